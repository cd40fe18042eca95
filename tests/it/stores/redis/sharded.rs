//! Two servers behind a proxy that spreads keys over them, as Envoy and twemproxy do: it looks like one server, and sends a
//! script to the server of its first key without a word about the others.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use futures_util::future::join_all;
use guestlist::dedup::RedisStore;
use redis::aio::MultiplexedConnection;
use redis::{Value, cmd};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::faults::{finish, is_done};
use super::server::{Server, connect};

struct Sharded {
    shards: [Server; 2],
    port: u16,
}

impl Sharded {
    async fn start() -> Self {
        let shards = [Server::start("").await, Server::start("").await];
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let urls = [shards[0].url(), shards[1].url()];
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, urls.clone()));
            }
        });
        Self { shards, port }
    }

    async fn store(&self) -> RedisStore {
        RedisStore::connect(&format!("redis://127.0.0.1:{}", self.port)).await.unwrap()
    }
}

async fn carry(client: TcpStream, urls: [String; 2]) -> Option<()> {
    let mut shards = Vec::new();
    for url in urls {
        shards.push(connect(&url).await.ok()?);
    }
    let mut client = BufReader::new(client);
    loop {
        let words = command(&mut client).await?;
        let shard = shard_of(&words);
        let mut answer = Vec::new();
        encode(&ask(&mut shards[shard], &words).await, &mut answer);
        client.write_all(&answer).await.ok()?;
    }
}

async fn command(client: &mut BufReader<TcpStream>) -> Option<Vec<Vec<u8>>> {
    let mut words = Vec::new();
    for _ in 0..number(client).await? {
        let mut word = vec![0; number(client).await? + 2];
        client.read_exact(&mut word).await.ok()?;
        word.truncate(word.len() - 2);
        words.push(word);
    }
    Some(words)
}

/// What follows `*` or `$`.
async fn number(client: &mut BufReader<TcpStream>) -> Option<usize> {
    let mut line = String::new();
    client.read_line(&mut line).await.ok()?;
    line.get(1..)?.trim_end().parse().ok()
}

/// By the first key.
fn shard_of(words: &[Vec<u8>]) -> usize {
    let key = match words[0].to_ascii_uppercase().as_slice() {
        b"EVAL" | b"EVALSHA" => &words[3],
        b"GET" | b"SET" | b"DEL" => &words[1],
        _ => return 0,
    };
    usize::from(BuildHasherDefault::<DefaultHasher>::default().hash_one(key) % 2 == 1)
}

async fn ask(shard: &mut MultiplexedConnection, words: &[Vec<u8>]) -> Value {
    let mut command = cmd(std::str::from_utf8(&words[0]).unwrap());
    command.arg(&words[1..]);
    shard.send_packed_command(&command).await.unwrap()
}

fn encode(answer: &Value, to: &mut Vec<u8>) {
    match answer {
        Value::Nil => to.extend(b"$-1\r\n"),
        Value::Int(number) => to.extend(format!(":{number}\r\n").bytes()),
        Value::Okay => to.extend(b"+OK\r\n"),
        Value::SimpleString(text) => to.extend(format!("+{text}\r\n").bytes()),
        Value::BulkString(bytes) => {
            to.extend(format!("${}\r\n", bytes.len()).bytes());
            to.extend(bytes);
            to.extend(b"\r\n");
        }
        Value::Array(answers) => {
            to.extend(format!("*{}\r\n", answers.len()).bytes());
            for answer in answers {
                encode(answer, to);
            }
        }
        Value::ServerError(error) => {
            to.extend(format!("-{} {}\r\n", error.code(), error.details().unwrap_or("")).bytes());
        }
        other => panic!("not of RESP 2: {other:?}"),
    }
}

#[tokio::test]
async fn i1_i2_no_claim_goes_to_the_server_of_another_key() {
    let sharded = Sharded::start().await;
    let store = sharded.store().await;
    join_all((1..200).map(|number| finish(&store, number))).await;
    // Alone, each is looked for where its own key belongs.
    for number in 1..200 {
        assert!(is_done(&store, number).await, "{number}");
    }
    for shard in &sharded.shards {
        let keys: u32 = shard.plain().await.ask("DBSIZE").await;
        assert!(keys > 50, "each has its share, {keys}");
    }
}
