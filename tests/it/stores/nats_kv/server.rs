//! Servers of a test's own: killed, rolled back, several of them as a cluster.

use std::fs;
use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{env, unique, until};

/// Its data outlives a kill, and goes with the test.
pub(super) struct Server {
    pub(super) name: String,
    port: u16,
    dir: PathBuf,
    config: Option<PathBuf>,
    process: Option<Child>,
}

impl Server {
    pub(super) async fn start() -> Self {
        Self::start_with("").await
    }

    pub(super) async fn start_with(config: &str) -> Self {
        let mut server = Self::new(unique("guestlist-kv"), config);
        server.run();
        server.listens().await;
        server
    }

    fn new(name: String, config: &str) -> Self {
        let dir = std::env::temp_dir().join(&name);
        fs::create_dir_all(&dir).expect("a folder for the server");
        let config = (!config.is_empty()).then(|| {
            let path = dir.join("nats.conf");
            fs::write(&path, config).expect("the config is written");
            path
        });
        Self { name, port: free_port(), dir, config, process: None }
    }

    pub(super) fn run(&mut self) {
        let mut command = Command::new(PathBuf::from(env("GUESTLIST_SCRIPTS")).join("brokers"));
        command.args(["run", "nats", &env("GUESTLIST_BROKERS"), &self.port.to_string()]);
        command.arg(&self.dir).args(&self.config);
        let out = fs::File::create(self.dir.join("out")).expect("a log");
        command.stdin(Stdio::null()).stdout(out.try_clone().expect("a log")).stderr(out);
        self.process = Some(command.spawn().expect("scripts/brokers runs"));
    }

    pub(super) async fn listens(&self) {
        until("the private server listens", || async {
            TcpStream::connect(("127.0.0.1", self.port)).is_ok_and(|mut server| {
                let mut first = [0; 4];
                server.read_exact(&mut first).is_ok() && &first == b"INFO"
            })
        })
        .await;
    }

    pub(super) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// As `kill -9` does.
    pub(super) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub(super) async fn restart(&mut self) {
        self.kill();
        self.run();
        self.listens().await;
    }

    /// A copy of all that the server keeps.
    pub(super) async fn snapshot(&mut self) {
        self.kill();
        copy(&self.dir.join("nats"), &self.dir.join("snapshot"));
        self.restart().await;
    }

    /// Comes back with what it had at the snapshot, as after a power failure.
    pub(super) async fn roll_back(&mut self) {
        self.kill();
        fs::remove_dir_all(self.dir.join("nats")).expect("the data is removed");
        copy(&self.dir.join("snapshot"), &self.dir.join("nats"));
        self.restart().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("a file is copied");
        }
    }
}

/// Three servers.
pub(super) struct Cluster(pub(super) Vec<Server>);

impl Cluster {
    pub(super) async fn start() -> Self {
        let routes: Vec<u16> = (0..3).map(|_| free_port()).collect();
        let urls: Vec<String> = routes.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect();
        let mut servers = Vec::new();
        for port in &routes {
            let name = unique("guestlist-kv-node");
            let config = format!(
                "server_name: {name}\ncluster {{ name: test, listen: 127.0.0.1:{port}, routes: [{}] }}\n",
                urls.join(", ")
            );
            let mut server = Server::new(name, &config);
            server.run();
            servers.push(server);
        }
        for server in &servers {
            server.listens().await;
        }
        Self(servers)
    }

    pub(super) fn url(&self) -> String {
        self.0.iter().map(Server::url).collect::<Vec<_>>().join(",")
    }

    pub(super) fn node(&mut self, name: &str) -> &mut Server {
        self.0.iter_mut().find(|server| server.name == name).expect("a node of this cluster")
    }
}
