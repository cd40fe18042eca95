//! A name that leads to a server, or to another, or nowhere.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Carries connections to the server that it leads to when they are made.
pub(super) struct Proxy {
    port: u16,
    leads_to: Arc<AtomicU16>,
    swallowed: Arc<Mutex<watch::Sender<()>>>,
}

impl Proxy {
    pub(super) async fn to(server: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let leads_to = Arc::new(AtomicU16::new(server));
        let swallowed = Arc::new(Mutex::new(watch::Sender::new(())));
        let (to, swallow) = (Arc::clone(&leads_to), Arc::clone(&swallowed));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let swallow = swallow.lock().unwrap().subscribe();
                tokio::spawn(carry(client, to.load(Ordering::Relaxed), swallow));
            }
        });
        Self { port, leads_to, swallowed }
    }

    pub(super) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// From now on new connections go there; those that are there stay.
    pub(super) fn lead_to(&self, server: u16) {
        self.leads_to.store(server, Ordering::Relaxed);
    }

    /// What is sent on the connections of now goes nowhere, and nothing says so.
    pub(super) fn swallow_what_is_connected(&self) {
        drop(std::mem::replace(&mut *self.swallowed.lock().unwrap(), watch::Sender::new(())));
    }
}

async fn carry(mut client: TcpStream, server: u16, mut swallow: watch::Receiver<()>) {
    let mut server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
    tokio::select! {
        _ = copy_bidirectional(&mut client, &mut server) => {}
        _ = swallow.changed() => {
            let mut nowhere = [0; 1024];
            while client.read(&mut nowhere).await.is_ok_and(|read| read > 0) {}
        }
    }
}
