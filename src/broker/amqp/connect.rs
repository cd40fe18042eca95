//! The client: where the broker is, and two connections to it that are made anew when dead.

use std::fmt;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lapin::tcp::{AsyncTcpStream, OwnedIdentity, OwnedTLSConfig};
use lapin::types::{FrameSize, ShortString};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind};
use tokio::time::timeout;

use super::publish::Publisher;
use crate::broker::{BrokerError, BrokerErrorKind};

/// A RabbitMQ broker, or another that speaks AMQP 0-9-1.
///
/// It holds two connections: a publisher that the broker blocks (memory or disk alarm) must not
/// hold up acks. A third is made when dead letters are first looked at: one of them that the client cannot read ends
/// the connection it came by. Each is made again by the next call that needs it when it is dead.
///
/// See the [module docs](super) for what it promises and an example.
///
/// # Clone
///
/// Clones share the connections.
#[derive(Clone)]
pub struct Amqp {
    pub(super) target: Arc<Target>,
    pub(super) consuming: Arc<Link>,
    pub(super) publisher: Arc<Publisher>,
    pub(super) letters: Arc<Link>,
}

impl Amqp {
    /// The heartbeat unless the URL has one, in seconds. A dead peer is noticed after twice this
    /// time; the broker's own default would take two minutes.
    pub const HEARTBEAT: u16 = 10;

    /// How long a connection may take to be made unless the URL says otherwise
    /// (`?connection_timeout=` milliseconds).
    pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

    /// Connects to `amqp://user:password@host:port/vhost`, or by TLS with `amqps://`.
    ///
    /// The query may hold `heartbeat` (seconds), `connection_timeout` (milliseconds),
    /// `frame_max`, `channel_max` and `auth_mechanism` (`plain`, `external`). No vhost, or an
    /// empty one, is `/`; write a vhost's own slashes as `%2f`.
    ///
    /// # Errors
    ///
    /// [`BrokerErrorKind::Refused`] if the URL cannot be read, or the broker refuses the user,
    /// the vhost or the certificate; [`BrokerErrorKind::Unreachable`] if it does not answer.
    /// Neither holds the URL or the password.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a connection half made is given up.
    pub async fn connect(url: &str) -> Result<Self, BrokerError> {
        Self::options().connect(url).await
    }

    /// Options for connections: certificates, a name.
    pub fn options() -> ConnectOptions {
        ConnectOptions::default()
    }

    pub(super) fn vhost(&self) -> &str {
        &self.target.uri.vhost
    }
}

impl fmt::Debug for Amqp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Amqp").field("target", &self.target).finish_non_exhaustive()
    }
}

/// What [`Amqp`] needs to connect beside the URL.
///
/// ```no_run
/// # async fn f() -> Result<(), Box<dyn std::error::Error>> {
/// use guestlist::broker::amqp::Amqp;
/// let broker = Amqp::options()
///     .root_certificates(std::fs::read_to_string("ca.pem")?)
///     .client_identity(std::fs::read("client.p12")?, "password of the file")
///     .connect("amqps://broker.example/?auth_mechanism=external")
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Default)]
#[must_use]
pub struct ConnectOptions {
    tls: OwnedTLSConfig,
    name: Option<String>,
}

impl ConnectOptions {
    /// Trusts these certificate authorities (PEM) beside the system's own, which have to be
    /// there even so.
    pub fn root_certificates(mut self, pem: impl Into<String>) -> Self {
        self.tls.cert_chain = Some(pem.into());
        self
    }

    /// Shows the broker this certificate, with its key, from a PKCS#12 file. With
    /// `?auth_mechanism=external` in the URL it stands for user and password.
    pub fn client_identity(mut self, pkcs12: impl Into<Vec<u8>>, password: impl Into<String>) -> Self {
        self.tls.identity = Some(OwnedIdentity::PKCS12 { der: pkcs12.into(), password: password.into() });
        self
    }

    /// The name under which the broker lists the connections; `guestlist` if none is given.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Connects; see [`Amqp::connect`].
    ///
    /// # Errors
    ///
    /// As for [`Amqp::connect`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a connection half made is given up.
    pub async fn connect(self, url: &str) -> Result<Amqp, BrokerError> {
        let target = Arc::new(Target::new(parse(url)?, self));
        let consuming = Arc::new(Link::new("consuming", Arc::clone(&target)));
        let publishing = Link::new("publishing", Arc::clone(&target));
        let letters = Arc::new(Link::new("letters", Arc::clone(&target)));
        consuming.connected().await?;
        Ok(Amqp { target, consuming, publisher: Arc::new(Publisher::new(publishing)), letters })
    }
}

impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("root_certificates", &self.tls.cert_chain.is_some())
            .field("client_identity", &self.tls.identity.is_some())
            .field("name", &self.name)
            .finish()
    }
}

/// Reads the URL. lapin's own errors are not passed on: some of them quote it.
fn parse(url: &str) -> Result<AMQPUri, BrokerError> {
    let refuse = |why: String| BrokerError::new(BrokerErrorKind::Refused, why);
    let parsed =
        url::Url::parse(url).map_err(|error| refuse(format!("the broker's URL is not one: {error}")))?;
    let mut uri: AMQPUri = url.parse().map_err(|_| {
        refuse("the broker's URL is not like amqp://user:password@host:port/vhost?heartbeat=10".to_owned())
    })?;
    // lapin takes an IPv6 address for a missing host and goes to localhost.
    if let Some(url::Host::Ipv6(address)) = parsed.host() {
        uri.authority.host = address.to_string();
    }
    if uri.vhost.is_empty() {
        "/".clone_into(&mut uri.vhost);
    }
    short("the vhost", &uri.vhost)?;
    uri.query.heartbeat.get_or_insert(Amqp::HEARTBEAT);
    Ok(uri)
}

/// A name as AMQP's short string, whose own conversion panics above 255 bytes.
pub(super) fn short(what: &str, name: &str) -> Result<ShortString, BrokerError> {
    ShortString::try_new(name).map_err(|_| {
        let length = name.len();
        BrokerError::new(
            BrokerErrorKind::Refused,
            format!("{what} has {length} bytes, and AMQP allows 255: choose a shorter name"),
        )
    })
}

/// Where the broker is, and how to get in.
pub(super) struct Target {
    uri: AMQPUri,
    tls: OwnedTLSConfig,
    name: String,
    timeout: Duration,
}

impl Target {
    fn new(uri: AMQPUri, options: ConnectOptions) -> Self {
        // lapin reads this parameter but does not obey it in its async connect.
        let timeout = uri.query.connection_timeout.map_or(Amqp::CONNECT_TIMEOUT, Duration::from_millis);
        let name = options.name.unwrap_or_else(|| "guestlist".to_owned());
        Self { uri, tls: options.tls, name, timeout }
    }

    async fn connect(&self, role: &str) -> Result<Connection, BrokerError> {
        let attempt = HangUp::new();
        match timeout(self.timeout, self.handshake(role, attempt.watcher())).await {
            Ok(Ok(connection)) => {
                attempt.keep();
                Ok(connection)
            }
            Ok(Err(error)) => Err(self.refused(error)),
            Err(_) => Err(BrokerError::new(
                BrokerErrorKind::Unreachable,
                format!("RabbitMQ at {} did not answer within {:?}", self.place(), self.timeout),
            )),
        }
    }

    async fn handshake(&self, role: &str, socket: Watched) -> lapin::Result<Connection> {
        let name = format!("{} {role}", self.name);
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let tls = self.tls.clone();
        let runtime = lapin::runtime::default_runtime()?;
        Connection::connector(
            self.uri.clone(),
            runtime,
            async move |uri, runtime| {
                let address = (uri.authority.host.clone(), uri.authority.port);
                let stream = AsyncTcpStream::connect(&runtime, runtime.to_socket_addrs(address)).await?;
                if let AsyncTcpStream::Plain(plain) = &stream {
                    plain.get_ref().set_nodelay(true)?;
                    *lock(&socket) = Some(second_handle(plain.get_ref())?);
                }
                match uri.scheme {
                    AMQPScheme::AMQP => Ok(stream),
                    AMQPScheme::AMQPS => Ok(stream.into_tls(&uri.authority.host, tls.as_ref()).await?),
                }
            },
            properties,
        )
        .await
    }

    fn refused(&self, error: lapin::Error) -> BrokerError {
        let place = self.place();
        // A bad certificate, key or password of a key file comes as one of these two.
        let tls = matches!(error.kind(), ErrorKind::IOError(error)
            if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::Other));
        if tls && self.uri.scheme == AMQPScheme::AMQPS {
            let what = format!("no TLS with RabbitMQ at {place}");
            return BrokerError::new(BrokerErrorKind::Refused, what).with_source(error);
        }
        said_no(format!("cannot connect to RabbitMQ at {place}"), error)
    }

    /// For people: no user, no password.
    fn place(&self) -> String {
        let authority = &self.uri.authority;
        format!("{}:{}, vhost {:?}", authority.host, authority.port, self.uri.vhost)
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Target").field(&self.place()).finish()
    }
}

/// Ends the connection attempt that it belongs to by ending its socket, unless told to
/// [`keep`](Self::keep) it.
///
/// lapin does its IO on a thread of its own, and nothing else ends that thread while a peer that
/// accepted the connection keeps silent: each attempt at a broker that hangs would leak one.
struct HangUp {
    socket: Watched,
    armed: bool,
}

impl HangUp {
    fn new() -> Self {
        Self { socket: Arc::default(), armed: true }
    }

    /// The half for lapin's thread.
    fn watcher(&self) -> Watched {
        Arc::clone(&self.socket)
    }

    fn keep(mut self) {
        self.armed = false;
    }
}

impl Drop for HangUp {
    fn drop(&mut self) {
        let socket = lock(&self.socket).take();
        if let (Some(socket), true) = (socket, self.armed) {
            // It may be gone already: that is the end we want.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

type Watched = Arc<Mutex<Option<TcpStream>>>;

fn lock(socket: &Watched) -> MutexGuard<'_, Option<TcpStream>> {
    socket.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(unix)]
fn second_handle(socket: &impl std::os::fd::AsFd) -> io::Result<TcpStream> {
    Ok(socket.as_fd().try_clone_to_owned()?.into())
}

#[cfg(windows)]
fn second_handle(socket: &impl std::os::windows::io::AsSocket) -> io::Result<TcpStream> {
    Ok(socket.as_socket().try_clone_to_owned()?.into())
}

/// One connection, made when it is needed and made again when it is dead.
pub(super) struct Link {
    role: &'static str,
    target: Arc<Target>,
    // Held while connecting: of several callers one connects, the others wait for it.
    connection: tokio::sync::Mutex<Option<Arc<Connection>>>,
}

impl Link {
    fn new(role: &'static str, target: Arc<Target>) -> Self {
        Self { role, target, connection: tokio::sync::Mutex::default() }
    }

    pub(super) async fn connected(&self) -> Result<Arc<Connection>, BrokerError> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = slot.as_ref().filter(|connection| connection.status().connected()) {
            return Ok(Arc::clone(connection));
        }
        *slot = None;
        let connection = Arc::new(self.target.connect(self.role).await?);
        *slot = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// A new channel, and the largest frame that may be sent by it.
    pub(super) async fn channel(&self) -> Result<(Channel, FrameSize), BrokerError> {
        let connection = self.connected().await?;
        let frame_max = connection.configuration().frame_max();
        let channel = answered("opening a channel", self.target.timeout, connection.create_channel()).await?;
        Ok((channel, frame_max))
    }

    pub(super) async fn close(&self) {
        if let Some(connection) = self.connection.lock().await.take() {
            let bye = connection.close(REPLY_SUCCESS, "OK".into());
            let _ = timeout(FAREWELL, bye).await;
        }
    }
}

/// How long a goodbye may take. A dead peer answers none, and is noticed by its heartbeat later.
pub(super) const FAREWELL: Duration = Duration::from_secs(5);

pub(super) const REPLY_SUCCESS: u16 = 200;

/// The answer to `question`, unless it takes longer than `limit`.
pub(super) async fn answered<T>(
    what: &str,
    limit: Duration,
    question: impl Future<Output = lapin::Result<T>>,
) -> Result<T, BrokerError> {
    match timeout(limit, question).await {
        Ok(answer) => answer.map_err(|error| said_no(format!("{what} failed"), error)),
        Err(_) => Err(BrokerError::new(
            BrokerErrorKind::Unreachable,
            format!("RabbitMQ did not answer within {limit:?}: {what}"),
        )),
    }
}

/// The code of the broker's own refusal, if it is one.
pub(super) fn reply_code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => Some(error.get_id()),
        _ => None,
    }
}

/// Sorts out whether trying again can help.
pub(super) fn said_no(what: String, error: lapin::Error) -> BrokerError {
    let kind = match reply_code(&error) {
        // Access refused, not found, locked, precondition failed, not allowed.
        Some(403 | 404 | 405 | 406 | 530) => BrokerErrorKind::Refused,
        _ => BrokerErrorKind::Unreachable,
    };
    BrokerError::new(kind, what).with_source(error)
}
