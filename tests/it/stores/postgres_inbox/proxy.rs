//! A line between the application's pool and the server, that is cut at a chosen statement.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// The statement at which it is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    Begin,
    Write,
    Complete,
    Commit,
}

/// What becomes of that statement and of the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// It never arrives; both ends see the line closed.
    Lost,
    /// It is executed; its answer never arrives.
    Unanswered,
    /// It never arrives, and the server does not notice: its session stays in the transaction.
    Stranded,
    /// It is executed; its answer arrives when it is let go.
    Held,
}

#[derive(Clone)]
pub(super) struct Proxy {
    address: SocketAddr,
    next: Arc<Mutex<Option<(At, Cut)>>>,
    held: Arc<Notify>,
}

impl Proxy {
    pub(super) async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let proxy = Self { address, next: Arc::default(), held: Arc::default() };
        let (next, held) = (Arc::clone(&proxy.next), Arc::clone(&proxy.held));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (server, next) = (TcpStream::connect(&server).await.unwrap(), Arc::clone(&next));
                tokio::spawn(carry(client, server, next, Arc::clone(&held)));
            }
        });
        proxy
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Once, at the next such statement of any session.
    pub(super) fn cut(&self, at: At, how: Cut) {
        *self.next.lock().unwrap() = Some((at, how));
    }

    /// The answer that is held, now or later.
    pub(super) fn let_go(&self) {
        self.held.notify_one();
    }

    pub(super) fn has_cut(&self) -> bool {
        self.next.lock().unwrap().is_none()
    }
}

/// Each statement is one write of the client's, and on this machine one read.
fn statement(bytes: &[u8]) -> Option<At> {
    let has = |words: &str| bytes.windows(words.len()).any(|window| window == words.as_bytes());
    match bytes.first() {
        Some(b'Q') if has("guestlist.run = ") => Some(At::Begin),
        Some(b'Q') if has("charged + 1") => Some(At::Write),
        Some(b'Q') if has("COMMIT") => Some(At::Commit),
        Some(b'Q') if has("set state = 3") => Some(At::Complete),
        _ => None,
    }
}

async fn carry(
    mut client: TcpStream,
    mut server: TcpStream,
    next: Arc<Mutex<Option<(At, Cut)>>>,
    held: Arc<Notify>,
) {
    let (mut asked, mut answered) = (vec![0; 65_536], vec![0; 65_536]);
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(length @ 1..) = read else { return };
                let cut = {
                    let mut next = next.lock().unwrap();
                    next.take_if(|(at, _)| statement(&asked[..length]) == Some(*at))
                };
                match cut {
                    Some((_, Cut::Lost)) => return,
                    Some((_, Cut::Unanswered)) => {
                        server.write_all(&asked[..length]).await.unwrap();
                        let _ = server.read(&mut answered).await;
                        return;
                    }
                    Some((_, Cut::Stranded)) => {
                        drop(client);
                        // Until the server itself ends the session.
                        while matches!(server.read(&mut answered).await, Ok(1..)) {}
                        return;
                    }
                    Some((_, Cut::Held)) => {
                        server.write_all(&asked[..length]).await.unwrap();
                        held.notified().await;
                    }
                    None if server.write_all(&asked[..length]).await.is_err() => return,
                    None => {}
                }
            }
            read = server.read(&mut answered) => {
                let Ok(length @ 1..) = read else { return };
                if client.write_all(&answered[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}
