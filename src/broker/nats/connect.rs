//! The connection: URLs, credentials, and when a link counts as lost.

use std::collections::HashSet;
use std::error::Error as _;
use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::{self, ContextBuilder};
use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr, rustls};
use futures_util::Sink;
use tokio::sync::{Mutex, broadcast, watch};
use tokio::time::timeout;
use url::Url;

use crate::broker::{BrokerError, BrokerErrorKind, copy};
use crate::defaults;

/// How often the client asks the server whether it is there: 10 s. It gives up after two
/// unanswered pings; its own 60 s would take minutes to notice a half-open connection.
pub const PING_INTERVAL: Duration = Duration::from_secs(10);

/// How long the first connect may take, name lookup and TLS included: 5 s.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How many of the server's errors wait for who listens to them.
const ERRORS_KEPT: usize = 64;

/// A NATS server, or a cluster: the broker for [`Consumer`](crate::Consumer). Cheap to clone.
///
/// `Debug` prints the addresses, never credentials.
#[derive(Clone)]
pub struct Nats {
    inner: Arc<Inner>,
}

struct Inner {
    servers: Vec<ServerAddr>,
    options: NatsOptionsBuilder,
    link: Mutex<Option<Link>>,
    /// The streams of our own that this user may not have, and the subjects that say so: asked for once, and warned about.
    forbidden: std::sync::Mutex<HashSet<String>>,
}

/// How to connect, where a URL is not enough: made by [`Nats::options`].
///
/// Credentials given here come before those in the URL.
#[derive(Clone, Default)]
#[must_use = "finish with `connect`"]
pub struct NatsOptionsBuilder {
    name: Option<String>,
    inbox_prefix: Option<String>,
    credentials: Credentials,
    ca: Option<PathBuf>,
    client_certificate: Option<(PathBuf, PathBuf)>,
    connect_timeout: Option<Duration>,
    confirm: Option<Duration>,
}

/// Has no `Debug` on purpose: what cannot be printed cannot be logged.
#[derive(Clone, Default)]
enum Credentials {
    #[default]
    None,
    UserPassword(String, String),
    Token(String),
    Nkey(String),
    File(PathBuf),
}

impl Nats {
    /// Connects to `nats://host`, or by TLS to `tls://host`; several servers of a cluster are
    /// separated by commas. `user:password@` and `token@` before the host are understood.
    ///
    /// # Errors
    ///
    /// [`BrokerErrorKind::Refused`] for a URL that is none, wrong credentials or an untrusted
    /// certificate, [`BrokerErrorKind::Unreachable`] if no server answers within
    /// [`CONNECT_TIMEOUT`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped before it ends, there is no connection.
    pub async fn connect(url: &str) -> Result<Self, BrokerError> {
        Self::options().connect(url).await
    }

    /// Starts a connection with more than a URL: credentials file, nkey, certificates.
    pub fn options() -> NatsOptionsBuilder {
        NatsOptionsBuilder::default()
    }

    /// The client, connected: the one there is, or a new one if that is dead.
    ///
    /// # Errors
    ///
    /// As for [`connect`](Self::connect); also `Unreachable` at once while the client is busy
    /// reconnecting, since a request that waits for that would have an unknown answer.
    pub(crate) async fn link(&self) -> Result<Link, BrokerError> {
        let mut slot = self.inner.link.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.is_alive()) {
            return if link.is_connected() { Ok(link.clone()) } else { Err(self.reconnecting()) };
        }
        let link = self.inner.options.open(&self.inner.servers).await?;
        *slot = Some(link.clone());
        Ok(link)
    }

    fn reconnecting(&self) -> BrokerError {
        let servers = Addresses(&self.inner.servers);
        let what = format!("the connection to NATS at {servers} is lost; the client is reconnecting");
        BrokerError::new(BrokerErrorKind::Unreachable, what)
    }

    /// The streams of our own, and the subjects, that are known not to be permitted.
    pub(super) fn forbidden(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.inner.forbidden.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a confirmation may take.
    pub(super) fn confirm(&self) -> Duration {
        self.inner.options.confirm()
    }

    /// Sends what is on its way (acks!) and ends the connection.
    pub(super) async fn disconnect(&self) {
        let Some(link) = self.inner.link.lock().await.take() else { return };
        // Both fail only if the connection is gone already.
        let _ = timeout(CONNECT_TIMEOUT, link.client.flush()).await;
        let _ = link.client.drain().await;
    }
}

impl fmt::Debug for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nats").field("servers", &Addresses(&self.inner.servers)).finish_non_exhaustive()
    }
}

impl NatsOptionsBuilder {
    /// The client's name, as the server's monitoring shows it; else `guestlist`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// A prefix for reply subjects, where `_INBOX` is not permitted.
    pub fn inbox_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.inbox_prefix = Some(prefix.into());
        self
    }

    /// A user and a password.
    pub fn user_and_password(mut self, user: impl Into<String>, password: impl Into<String>) -> Self {
        self.credentials = Credentials::UserPassword(user.into(), password.into());
        self
    }

    /// A token.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.credentials = Credentials::Token(token.into());
        self
    }

    /// The seed of an nkey (`SU…`).
    pub fn nkey_seed(mut self, seed: impl Into<String>) -> Self {
        self.credentials = Credentials::Nkey(seed.into());
        self
    }

    /// A credentials file (`.creds`: a JWT and a seed).
    pub fn credentials_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.credentials = Credentials::File(path.into());
        self
    }

    /// A file of certificates (PEM) to trust in place of the system's. Requires TLS.
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca = Some(path.into());
        self
    }

    /// A certificate and its key (PEM files) to show to the server. Requires TLS.
    pub fn client_certificate(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    /// How long a connect may take; else [`CONNECT_TIMEOUT`].
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = Some(limit);
        self
    }

    /// How long the server may take to confirm a copy, a double ack or a look-up; else
    /// [`defaults::CONFIRM`].
    pub fn confirm_timeout(mut self, limit: Duration) -> Self {
        self.confirm = Some(limit);
        self
    }

    fn confirm(&self) -> Duration {
        self.confirm.unwrap_or(defaults::CONFIRM)
    }

    /// Connects with these options.
    ///
    /// # Errors
    ///
    /// As for [`Nats::connect`]; also `Refused` for a file that cannot be read.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped before it ends, there is no connection.
    pub async fn connect(mut self, url: &str) -> Result<Nats, BrokerError> {
        let (servers, credentials) = parse(url)?;
        if matches!(self.credentials, Credentials::None) {
            self.credentials = credentials;
        }
        let link = self.open(&servers).await?;
        let (link, forbidden) = (Mutex::new(Some(link)), std::sync::Mutex::default());
        let inner = Inner { servers, options: self, link, forbidden };
        Ok(Nats { inner: Arc::new(inner) })
    }

    async fn open(&self, servers: &[ServerAddr]) -> Result<Link, BrokerError> {
        let (lost, watch) = watch::channel(());
        let (errors, _) = broadcast::channel(ERRORS_KEPT);
        let told = errors.clone();
        let options = self.client_options().await?.event_callback(move |event| {
            report(&event, &lost, &told);
            std::future::ready(())
        });
        let limit = self.connect_timeout.unwrap_or(CONNECT_TIMEOUT);
        // The client's own limit is per address and does not cover the name lookup.
        match timeout(limit, options.connection_timeout(limit).connect(servers)).await {
            Ok(Ok(client)) => Ok(Link::new(client, watch, errors, self.confirm())),
            Ok(Err(error)) => Err(refused_or_unreachable(servers, error)),
            Err(elapsed) => {
                let what = format!("NATS at {} did not answer within {limit:?}", Addresses(servers));
                Err(BrokerError::new(BrokerErrorKind::Unreachable, what).with_source(elapsed))
            }
        }
    }

    async fn client_options(&self) -> Result<ConnectOptions, BrokerError> {
        let mut options = self
            .authenticated(ConnectOptions::new())
            .await?
            .name(self.name.as_deref().unwrap_or("guestlist"))
            .ping_interval(PING_INTERVAL)
            .request_timeout(Some(self.confirm()));
        if let Some(prefix) = &self.inbox_prefix {
            options = options.custom_inbox_prefix(prefix);
        }
        if let Some(ca) = &self.ca {
            options = options.add_root_certificates(readable(ca).await?).require_tls(true);
        }
        if let Some((certificate, key)) = &self.client_certificate {
            let (certificate, key) = (readable(certificate).await?, readable(key).await?);
            options = options.add_client_certificate(certificate, key).require_tls(true);
        }
        Ok(options)
    }

    async fn authenticated(&self, options: ConnectOptions) -> Result<ConnectOptions, BrokerError> {
        Ok(match &self.credentials {
            Credentials::None => options,
            Credentials::UserPassword(user, password) => {
                options.user_and_password(user.clone(), password.clone())
            }
            Credentials::Token(token) => options.token(token.clone()),
            Credentials::Nkey(seed) => options.nkey(seed.clone()),
            Credentials::File(path) => {
                options.credentials_file(path).await.map_err(|error| unreadable(path, error))?
            }
        })
    }
}

impl fmt::Debug for NatsOptionsBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsOptionsBuilder").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The client's message for a missing file names no file, so it is looked at first.
async fn readable(path: &Path) -> Result<PathBuf, BrokerError> {
    let path = path.to_owned();
    let looked = path.clone();
    match tokio::task::spawn_blocking(move || std::fs::File::open(looked)).await {
        Ok(Ok(_)) => Ok(path),
        Ok(Err(error)) => Err(unreadable(&path, error)),
        Err(error) => Err(unreadable(&path, io::Error::other(error))),
    }
}

fn unreadable(path: &Path, error: io::Error) -> BrokerError {
    let what = format!("cannot use the file {}", path.display());
    BrokerError::new(BrokerErrorKind::Refused, what).with_source(error)
}

/// The client prints its addresses in debug logs, so credentials are taken out of them here.
fn parse(urls: &str) -> Result<(Vec<ServerAddr>, Credentials), BrokerError> {
    let mut servers = Vec::new();
    let mut credentials = Credentials::None;
    for text in urls.split(',') {
        let mut url = Url::parse(text.trim()).map_err(|error| bad_url().with_source(error))?;
        if !matches!(url.scheme(), "nats" | "tls") || url.host().is_none() {
            return Err(bad_url());
        }
        if matches!(credentials, Credentials::None) {
            credentials = credentials_in(&url)?;
        }
        url.set_username("").and_then(|()| url.set_password(None)).map_err(|()| bad_url())?;
        servers.push(ServerAddr::from_url(url).map_err(|error| bad_url().with_source(error))?);
    }
    Ok((servers, credentials))
}

fn credentials_in(url: &Url) -> Result<Credentials, BrokerError> {
    let plain = |text: &str| {
        String::from_utf8(copy::decode(text.as_bytes()).into()).map_err(|_| {
            // The error's own text would show the bytes.
            BrokerError::new(BrokerErrorKind::Refused, "the credentials in the NATS URL are not UTF-8")
        })
    };
    Ok(match (url.username(), url.password()) {
        ("", _) => Credentials::None,
        (token, None) => Credentials::Token(plain(token)?),
        (user, Some(password)) => Credentials::UserPassword(plain(user)?, plain(password)?),
    })
}

fn bad_url() -> BrokerError {
    // The URL itself may hold a password, so it is not repeated.
    BrokerError::new(BrokerErrorKind::Refused, "not a NATS URL: write nats://host:4222 or tls://host:4222")
}

/// Host and port of each server, without credentials.
struct Addresses<'a>(&'a [ServerAddr]);

impl fmt::Display for Addresses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, server) in self.0.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma}{}:{}", server.host(), server.port())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Addresses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn refused_or_unreachable(servers: &[ServerAddr], error: ConnectError) -> BrokerError {
    let servers = Addresses(servers);
    let (kind, what) = match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            (BrokerErrorKind::Refused, format!("NATS at {servers} refuses the credentials"))
        }
        _ if is_tls(&error) => {
            (BrokerErrorKind::Refused, format!("no TLS connection to NATS at {servers} could be agreed on"))
        }
        _ => (BrokerErrorKind::Unreachable, format!("cannot connect to NATS at {servers}")),
    };
    BrokerError::new(kind, what).with_source(error)
}

/// A certificate that is not trusted arrives as an I/O error with the TLS error inside.
fn is_tls(error: &ConnectError) -> bool {
    let inner = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    let inner = inner.and_then(io::Error::get_ref);
    error.kind() == ConnectErrorKind::Tls
        || inner.is_some_and(<dyn std::error::Error + Send + Sync>::is::<rustls::Error>)
}

fn report(event: &Event, lost: &watch::Sender<()>, errors: &broadcast::Sender<String>) {
    match event {
        Event::Disconnected | Event::Closed => {
            let _ = lost.send(());
        }
        Event::ServerError(error) => {
            // Nobody may be listening.
            let _ = errors.send(error.to_string());
            tracing::warn!(%error, "the NATS server reports an error");
        }
        Event::SlowConsumer(_) => tracing::warn!("the NATS client's buffer is full: a message was dropped"),
        _ => {}
    }
}

/// `Permissions Violation for Publish to "subject"`: the subject.
fn denied(error: &str) -> Option<&str> {
    let (_, subject) = error.split_once("for Publish to \"")?;
    subject.split_once('"').map(|(subject, _)| subject)
}

/// One client, and the news of its disconnections.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) client: Client,
    pub(crate) jetstream: jetstream::Context,
    lost: watch::Receiver<()>,
    errors: broadcast::Sender<String>,
}

impl Link {
    fn new(
        client: Client,
        lost: watch::Receiver<()>,
        errors: broadcast::Sender<String>,
        limit: Duration,
    ) -> Self {
        let jetstream = ContextBuilder::new().timeout(limit).build(client.clone());
        Self { client, jetstream, lost, errors }
    }

    /// Ends when the server forbids to publish to a subject that is this, or has it between its dots, counted from now, and says to which.
    /// A request that is not permitted is never answered: this is how to know before it times out.
    pub(super) fn denial(&self, about: &str) -> impl Future<Output = String> + Send + use<> {
        let (mut errors, about) = (self.errors.subscribe(), about.to_owned());
        async move {
            loop {
                match errors.recv().await {
                    Ok(error) => {
                        if let Some(subject) = denied(&error).filter(|subject| {
                            *subject == about || subject.split('.').any(|part| part == about)
                        }) {
                            return subject.to_owned();
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                }
            }
        }
    }

    /// Whether the client's task still runs. It ends on `drain`, and by a panic on what it cannot
    /// read; then this client never comes back.
    fn is_alive(&self) -> bool {
        let mut client = self.client.clone();
        let ready = Pin::new(&mut client).poll_ready(&mut Context::from_waker(Waker::noop()));
        !matches!(ready, Poll::Ready(Err(_)))
    }

    fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Ends with the next disconnection, counted from now.
    pub(crate) fn loss(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut lost = self.lost.clone();
        lost.mark_unchanged();
        async move {
            // An error means that the client's task is gone: a loss, too.
            let _ = lost.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(url: &str) -> Credentials {
        parse(url).map(|(_, credentials)| credentials).unwrap_or_default()
    }

    #[test]
    fn credentials_leave_the_url_before_the_client_sees_it() {
        let (servers, _) = parse("nats://ann:s%23cret@a:1,tls://b").unwrap();
        assert_eq!(format!("{servers:?}").find("cret"), None);
        assert_eq!(Addresses(&servers).to_string(), "a:1,b:4222");
        assert!(servers[1].tls_required());
    }

    #[test]
    fn credentials_in_a_url_are_decoded() {
        let is = |url, user, pass| matches!(credentials(url), Credentials::UserPassword(u, p) if u == user && p == pass);
        assert!(is("nats://ann:s%23cret@a", "ann", "s#cret"));
        assert!(is("nats://a,nats://ann:x@b", "ann", "x"));
        assert!(matches!(credentials("nats://t%40ken@a"), Credentials::Token(t) if t == "t@ken"));
        assert!(matches!(credentials("nats://a:4222"), Credentials::None));
    }

    #[test]
    fn a_url_that_is_none_is_refused_without_repeating_it() {
        for url in ["", "localhost", "amqp://ann:secret@a", "nats://", "nats://ann:secret@a:port"] {
            let error = parse(url).err().unwrap();
            assert!(error.is_final(), "{url}");
            assert!(!format!("{error:?}").contains("secret"), "{error:?}");
        }
    }
}
