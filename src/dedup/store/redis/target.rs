//! Where Redis is: one server, a master that Sentinel knows, or a cluster.

use std::fmt;
use std::time::Duration;

use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::io::tcp::TcpSettings;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, ErrorKind,
    IntoConnectionInfo, RedisError, TlsCertificates, TlsMode,
};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::link::Connection;
use super::probe;
use crate::dedup::StoreError;
use crate::defaults::{REDIS_ANSWER, REDIS_CONNECT};

/// How many calls may wait for the connection's task, beyond which callers wait in turn.
const WAITING: usize = 1024;

/// Where Redis is and how to log in, from the URL.
#[derive(Clone)]
pub(super) struct Address {
    kind: Kind,
    nodes: Vec<ConnectionInfo>,
    /// From `?prefix=`.
    pub(super) prefix: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Single,
    Sentinel { service: String },
    Cluster,
}

/// What the URL cannot say.
#[derive(Clone, Default)]
pub(super) struct Extras {
    pub(super) sentinel_login: Option<(Option<String>, String)>,
    pub(super) root_certificates: Option<Vec<u8>>,
    pub(super) client_certificate: Option<(Vec<u8>, Vec<u8>)>,
}

impl Extras {
    fn certificates(&self) -> Option<TlsCertificates> {
        if self.root_certificates.is_none() && self.client_certificate.is_none() {
            return None;
        }
        let client_tls = self
            .client_certificate
            .clone()
            .map(|(client_cert, client_key)| ClientTlsConfig { client_cert, client_key });
        Some(TlsCertificates { client_tls, root_cert: self.root_certificates.clone() })
    }
}

/// No URL in the text: it may hold a password.
fn bad_url(why: &str) -> StoreError {
    StoreError::new(format!("the Redis URL cannot be used: {why}"))
}

impl Address {
    pub(super) fn parse(url: &str) -> Result<Self, StoreError> {
        let (scheme, rest) =
            url.split_once("://").ok_or_else(|| bad_url("it has no scheme like redis://"))?;
        let (scheme, kind) = scheme.split_once('+').unwrap_or((scheme, ""));
        let tls = match scheme {
            "redis" | "valkey" => false,
            "rediss" | "valkeys" => true,
            _ => return Err(bad_url("its scheme is none of redis, rediss, valkey and valkeys")),
        };
        if rest.contains('#') {
            return Err(bad_url("it has a fragment (#); encode a # in the password as %23"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (kind, database) = kind_and_database(kind, path)?;
        let port = if matches!(kind, Kind::Sentinel { .. }) { 26379 } else { 6379 };
        let nodes = hosts
            .split(',')
            .map(|host| node(tls, login, host, port, database))
            .collect::<Result<Vec<_>, _>>()?;
        if kind == Kind::Single && nodes.len() > 1 {
            return Err(bad_url("it has several hosts; that needs redis+sentinel:// or redis+cluster://"));
        }
        Ok(Self { kind, nodes, prefix: prefix(query)? })
    }

    pub(super) fn target(self, extras: &Extras) -> Result<Target, StoreError> {
        if self.is_tls() {
            install_a_tls_provider();
        } else if extras.certificates().is_some() {
            return Err(bad_url("certificates are given, but it is without TLS; that needs rediss"));
        }
        let name = self.to_string();
        let reach = match self.kind.clone() {
            Kind::Single => self.single(extras),
            Kind::Sentinel { service } => self.sentinel(&service, extras),
            Kind::Cluster => self.cluster(extras),
        };
        let reach =
            reach.map_err(|error| StoreError::new("the Redis settings cannot be used").with_source(error))?;
        Ok(Target { name: name.into(), reach })
    }

    fn is_tls(&self) -> bool {
        self.nodes.iter().any(|node| matches!(node.addr(), ConnectionAddr::TcpTls { .. }))
    }

    fn single(self, extras: &Extras) -> Result<Reach, RedisError> {
        let node = self.nodes.into_iter().next().ok_or_else(no_host)?;
        let client = match extras.certificates() {
            Some(certificates) => Client::build_with_tls(node, certificates)?,
            None => Client::open(node)?,
        };
        Ok(Reach::Single(client))
    }

    fn sentinel(self, service: &str, extras: &Extras) -> Result<Reach, RedisError> {
        let tls = self.is_tls();
        let login = self.nodes.first().ok_or_else(no_host)?.redis_settings().clone();
        let sentinels = self.nodes.into_iter().map(|node| node.addr().clone());
        let mut builder = SentinelClientBuilder::new(sentinels, service, SentinelServerType::Master)?
            .set_client_to_redis_db(login.db())
            .set_client_to_redis_tcp_settings(tcp())
            .set_client_to_sentinel_tcp_settings(tcp());
        if let Some(user) = login.username() {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = login.password() {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some((user, password)) = &extras.sentinel_login {
            builder = builder.set_client_to_sentinel_password(password);
            if let Some(user) = user {
                builder = builder.set_client_to_sentinel_username(user);
            }
        }
        if tls {
            builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
            if let Some(certificates) = extras.certificates() {
                builder = builder
                    .set_client_to_redis_certificates(certificates.clone())
                    .set_client_to_sentinel_certificates(certificates);
            }
        }
        Ok(Reach::Sentinel(Mutex::new(builder.build()?)))
    }

    fn cluster(self, extras: &Extras) -> Result<Reach, RedisError> {
        // The client follows redirections and waits for failovers by itself; more tries than fit into
        // a call's deadline would only come too late.
        let mut builder = ClusterClientBuilder::new(self.nodes)
            .tcp_settings(tcp())
            .connection_timeout(REDIS_CONNECT)
            .response_timeout(REDIS_ANSWER)
            .overall_response_timeout(Some(REDIS_ANSWER))
            .retries(4)
            .min_retry_wait(50)
            .max_retry_wait(500);
        if let Some(certificates) = extras.certificates() {
            builder = builder.certs(certificates);
        }
        Ok(Reach::Cluster(builder.build()?))
    }
}

fn no_host() -> RedisError {
    (ErrorKind::InvalidClientConfig, "there is no host").into()
}

fn kind_and_database<'a>(kind: &str, path: &'a str) -> Result<(Kind, &'a str), StoreError> {
    match kind {
        "" => Ok((Kind::Single, path)),
        "sentinel" => {
            let (service, database) = path.split_once('/').unwrap_or((path, ""));
            if service.is_empty() {
                return Err(bad_url(
                    "Sentinel needs the service's name: redis+sentinel://host1,host2/SERVICE",
                ));
            }
            Ok((Kind::Sentinel { service: service.to_owned() }, database))
        }
        "cluster" if matches!(path, "" | "0") => Ok((Kind::Cluster, path)),
        "cluster" => Err(bad_url("a cluster has no databases but 0")),
        _ => Err(bad_url("after the + only sentinel and cluster are known")),
    }
}

/// The client's own parser decodes user, password and address.
fn node(tls: bool, login: &str, host: &str, port: u16, database: &str) -> Result<ConnectionInfo, StoreError> {
    let scheme = if tls { "rediss" } else { "redis" };
    let at = if login.is_empty() { "" } else { "@" };
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
    let port = if has_port { String::new() } else { format!(":{port}") };
    let node = format!("{scheme}://{login}{at}{host}{port}/{database}");
    let info = node
        .into_connection_info()
        .map_err(|_| bad_url("it is not like redis://user:password@host:port/database"))?;
    Ok(info.set_tcp_settings(tcp()))
}

fn prefix(query: &str) -> Result<Option<String>, StoreError> {
    let mut prefix = None;
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "prefix" => prefix = Some(value.into_owned()),
            _ => return Err(bad_url("of parameters it can have only prefix")),
        }
    }
    Ok(prefix)
}

/// Small packets go at once (the client's default is to let them wait for each other), and a peer that is gone
/// is noticed within seconds where the system can.
fn tcp() -> TcpSettings {
    let keepalive = redis::io::tcp::socket2::TcpKeepalive::new().with_time(Duration::from_secs(10));
    TcpSettings::default().set_nodelay(true).set_keepalive(keepalive)
}

/// The client takes the process's default provider and panics if there is none or rustls cannot choose one. A
/// program that wants another installs it before it connects.
fn install_a_tls_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Fails only if somebody else was quicker, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

/// Hosts, service and database: for people, without user and password.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_tls() { "rediss" } else { "redis" };
        match self.kind {
            Kind::Single => write!(f, "{scheme}://")?,
            Kind::Sentinel { .. } => write!(f, "{scheme}+sentinel://")?,
            Kind::Cluster => write!(f, "{scheme}+cluster://")?,
        }
        for (index, node) in self.nodes.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            match node.addr() {
                ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. }
                    if host.contains(':') =>
                {
                    write!(f, "{comma}[{host}]:{port}")?;
                }
                address => write!(f, "{comma}{address}")?,
            }
        }
        if let Kind::Sentinel { service } = &self.kind {
            write!(f, "/{service}")?;
        }
        write!(f, "/{}", self.nodes.first().map_or(0, |node| node.redis_settings().db()))
    }
}

/// A place to connect to, again and again.
pub(super) struct Target {
    name: Box<str>,
    reach: Reach,
}

enum Reach {
    Single(Client),
    /// One at a time asks Sentinel.
    Sentinel(Mutex<SentinelClient>),
    Cluster(ClusterClient),
}

impl Target {
    pub(super) fn is_cluster(&self) -> bool {
        matches!(self.reach, Reach::Cluster(_))
    }

    /// A new connection, to the master of now, and whether all keys of this prefix are at the other end of it.
    pub(super) async fn open(&self, prefix: &str) -> Result<(Connection, bool), RedisError> {
        let late = |_| RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
        let opened = async {
            let mut connection = self.reach.open().await?;
            let whole = probe::is_whole(&mut connection, prefix).await;
            Ok((connection, whole))
        };
        timeout(REDIS_CONNECT, opened).await.map_err(late)?
    }
}

impl Reach {
    async fn open(&self) -> Result<Connection, RedisError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(REDIS_CONNECT))
            .set_response_timeout(Some(REDIS_ANSWER))
            .set_pipeline_buffer_size(WAITING);
        Ok(match self {
            Self::Single(client) => {
                Connection::Node(client.get_multiplexed_async_connection_with_config(&config).await?)
            }
            Self::Sentinel(client) => {
                Connection::Node(client.lock().await.get_async_connection_with_config(&config).await?)
            }
            Self::Cluster(client) => Connection::Cluster(client.get_async_connection().await?),
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
