//! A wire to the broker that can be cut, or spoken into.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use super::rabbit::url;

struct Wire {
    carrier: JoinHandle<()>,
    upstream: UnboundedSender<Vec<u8>>,
}

/// Carries connections to the broker.
pub(crate) struct Proxy {
    port: u16,
    wires: Arc<Mutex<Vec<Wire>>>,
}

impl Proxy {
    pub(crate) async fn new() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let wires = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&wires);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (upstream, spoken) = unbounded_channel();
                let carrier = tokio::spawn(carry(client, spoken));
                kept.lock().unwrap().push(Wire { carrier, upstream });
            }
        });
        Self { port, wires }
    }

    /// The broker's URL by way of this proxy.
    pub(crate) fn url(&self) -> String {
        let mut through = url::Url::parse(&url()).unwrap();
        through.set_port(Some(self.port)).unwrap();
        through.to_string()
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        for wire in self.wires.lock().unwrap().drain(..) {
            wire.carrier.abort();
        }
    }

    /// Says something to the broker in the client's name, on its first connection. Nothing else
    /// may be on its way.
    pub(crate) fn say(&self, bytes: Vec<u8>) {
        self.wires.lock().unwrap()[0].upstream.send(bytes).unwrap();
    }
}

async fn carry(client: TcpStream, mut spoken: UnboundedReceiver<Vec<u8>>) {
    let broker = url::Url::parse(&url()).unwrap();
    let address = (broker.host_str().unwrap(), broker.port().unwrap_or(5672));
    let broker = TcpStream::connect(address).await.unwrap();
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_broker, mut to_broker) = broker.into_split();
    let down = async { tokio::io::copy(&mut from_broker, &mut to_client).await.map(drop) };
    let up = async {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            tokio::select! {
                read = from_client.read(&mut buffer) => match read? {
                    0 => return std::io::Result::Ok(()),
                    n => to_broker.write_all(&buffer[..n]).await?,
                },
                Some(bytes) = spoken.recv() => to_broker.write_all(&bytes).await?,
            }
        }
    };
    tokio::select! { _ = down => {}, _ = up => {} }
}

/// An ack of a delivery that never was: the broker closes that channel, and only that one.
pub(crate) fn ack_of_nothing(channel: u16) -> Vec<u8> {
    let mut frame = vec![1];
    frame.extend(channel.to_be_bytes());
    frame.extend(13_u32.to_be_bytes());
    frame.extend([0, 60, 0, 80]);
    frame.extend(999_999_u64.to_be_bytes());
    frame.extend([0, 0xCE]);
    frame
}
