//! A wire to a broker that can be cut.

use std::sync::{Arc, Mutex};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// Carries connections to a broker, and cuts them all when told to.
pub(super) struct Proxy {
    port: u16,
    wires: Arc<Mutex<Vec<AbortHandle>>>,
}

impl Proxy {
    /// A proxy to the broker at this URL.
    pub(super) async fn to(url: &str) -> Self {
        let url = url::Url::parse(url).unwrap();
        let target = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let wires: Arc<Mutex<Vec<AbortHandle>>> = Arc::default();
        let kept = Arc::clone(&wires);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let target = target.clone();
                let wire = tokio::spawn(async move {
                    let mut server = TcpStream::connect(target).await.unwrap();
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                });
                kept.lock().unwrap().push(wire.abort_handle());
            }
        });
        Self { port, wires }
    }

    /// The broker's URL by way of this proxy.
    pub(super) fn url(&self, url: &str) -> String {
        let mut through = url::Url::parse(url).unwrap();
        through.set_port(Some(self.port)).unwrap();
        through.to_string()
    }

    /// Cuts every connection there is.
    pub(super) fn cut(&self) {
        for wire in self.wires.lock().unwrap().drain(..) {
            wire.abort();
        }
    }
}
