//! Redis by TLS.

use guestlist::dedup::{DedupStore, RedisStore};

use super::server::{Server, certificate, key};

#[tokio::test]
async fn it_speaks_tls_with_a_root_of_ones_own() {
    let (_server, port) = Server::start_with_tls("tls-auth-clients no").await;
    let url = format!("rediss://localhost:{port}");
    let store = RedisStore::builder(&url).root_certificates(certificate("ca.pem")).connect().await.unwrap();
    assert_eq!(store.inspect(&key(1)).await.unwrap(), None);
    assert!(format!("{store:?}").contains(&url), "{store:?}");

    let error = RedisStore::connect(&url).await.expect_err("the system does not know this root");
    assert!(error.to_string().starts_with("no connection to rediss://localhost:"), "{error}");
    let elsewhere = RedisStore::builder(format!("rediss://127.0.0.2:{port}"));
    elsewhere.root_certificates(certificate("ca.pem")).connect().await.expect_err("that is not its name");
}

#[tokio::test]
async fn it_shows_a_certificate_where_one_is_asked_for() {
    let (_server, port) = Server::start_with_tls("tls-auth-clients yes").await;
    let builder =
        || RedisStore::builder(format!("rediss://localhost:{port}")).root_certificates(certificate("ca.pem"));
    builder().connect().await.expect_err("it shows none");
    let shown = builder().client_certificate(certificate("client.pem"), certificate("client.key"));
    assert_eq!(shown.connect().await.unwrap().inspect(&key(1)).await.unwrap(), None);
}
