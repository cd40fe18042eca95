//! NATS: the store, and the bare client's key-value bucket.

use async_nats::jetstream::{kv, stream};
use async_nats::{Client, jetstream};
use bytes::Bytes;
use guestlist::dedup::NatsKvStore;
use guestlist::dedup::protocol::Token;

use crate::Bench;
use crate::calls::{WINDOW, claim_and_complete, new_key};
use crate::pairs::{Contender, Group, Target};

/// Of the store's size.
const RECORD: &[u8] = &[b'r'; 53];

pub(crate) async fn run(bench: &Bench, url: &str) {
    let client = async_nats::connect(url).await.unwrap();
    let bucket = format!("guestlist-bench-{:x}", Token::random().bits());
    let bare_bucket = format!("{bucket}-bare");
    let store = NatsKvStore::options().bucket(&bucket).window(WINDOW).connect(url).await.unwrap();
    bench.measure(&new_ids(&client, store, &bare_bucket).await).await;
    let context = jetstream::new(client);
    for bucket in [bucket, bare_bucket] {
        context.delete_key_value(bucket).await.unwrap();
    }
}

async fn new_ids(client: &Client, store: NatsKvStore, bare_bucket: &str) -> Group {
    let version = client.server_info().version;
    let bare = bucket(client, bare_bucket).await;
    let bare = Contender::new("bare client: KV create, update", bare, |bare| async move {
        create_and_update(&bare).await;
    });
    let store =
        Contender::new("NatsKvStore", store, |store| async move { claim_and_complete(&*store).await });
    Group::of(format!("NATS {version}, claim + complete"), store).beside(bare, Target::BareCall)
}

/// As the store makes its own: the client's way to make a bucket is not understood by server 2.9.
async fn bucket(client: &Client, name: &str) -> kv::Store {
    let context = jetstream::new(client.clone());
    let config = stream::Config {
        name: format!("KV_{name}"),
        subjects: vec![format!("$KV.{name}.>")],
        max_messages_per_subject: 1,
        max_age: WINDOW,
        storage: stream::StorageType::File,
        num_replicas: 1,
        discard: stream::DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        ..stream::Config::default()
    };
    context.create_stream(config).await.unwrap();
    context.get_key_value(name).await.unwrap()
}

async fn create_and_update(bucket: &kv::Store) {
    let key = new_key().to_string();
    let revision = bucket.create(&key, Bytes::from_static(RECORD)).await.unwrap();
    bucket.update(&key, Bytes::from_static(RECORD), revision).await.unwrap();
}
