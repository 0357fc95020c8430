//! Real servers, each on its own port, in its own directory, gone with all its workers when it goes out of scope.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

use crate::rig::{self, PATIENCE, comm_of, free_port, wait_until};

/// Size of the file `/large` of nginx and Apache: no client has read it before the server is done with it.
pub(crate) const LARGE: usize = 64 << 10;

/// A server that listens.
pub(crate) struct Server {
    child: Child,
    pub(crate) port: u16,
    directory: TempDir,
}

impl Server {
    /// Starts what `command` makes of a directory and a port, in a process group of its own, and waits until it listens.
    fn start(command: impl FnOnce(&Path, u16) -> Command) -> Self {
        let directory = tempfile::tempdir().expect("a directory can be made");
        // Workers may run as another user.
        open_to_all(directory.path());
        let port = free_port();
        fs::write(directory.path().join("index.html"), "hello\n").expect("it can be written to");
        fs::write(directory.path().join("large"), vec![b'x'; LARGE]).expect("it can be written to");
        let log = fs::File::create(directory.path().join("log")).expect("it can be written to");
        let mut command = command(directory.path(), port);
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut server = Self { child, port, directory };
        wait_until(&format!("{command:?} to listen"), || {
            if let Some(status) = server.child.try_wait().expect("it is our child") {
                let log = fs::read_to_string(server.directory.path().join("log")).unwrap_or_default();
                panic!("{command:?}: {status}\n{log}");
            }
            is_listening(port)
        });
        server
    }

    /// The process that was started.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its name.
    pub(crate) fn comm(&self) -> String {
        comm_of(self.pid())
    }

    /// The processes that it started.
    pub(crate) fn workers(&self) -> Vec<u32> {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("the server runs");
        children.split_whitespace().map(|child| child.parse().expect("a process id")).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let group = Pid::from_child(&self.child);
        // It may have ended by itself.
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.child.wait();
    }
}

/// Asked without a connection: that would be one more record.
fn is_listening(port: u16) -> bool {
    let any = format!(":{port:04X} 00000000:0000 0A ");
    let any6 = format!(":{port:04X} {:032}:0000 0A ", 0);
    let table = |path| fs::read_to_string(path).unwrap_or_default();
    table("/proc/net/tcp").contains(&any) || table("/proc/net/tcp6").contains(&any6)
}

fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it is ours");
}

/// Dies with the thread that starts it, should the test itself be killed.
fn program(name: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", name]).env("PATH", path());
    command
}

/// Daemons are not in everybody's `PATH`.
fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// nginx with two workers; `settings` go into its `http` block.
pub(crate) fn nginx(settings: &str) -> Server {
    Server::start(|directory, port| {
        let d = directory.display();
        let config = format!(
            "worker_processes 2; daemon off; pid {d}/pid; error_log {d}/error.log;\n\
             events {{ worker_connections 256; }}\n\
             http {{\n\
               access_log off; root {d};\n\
               client_body_temp_path {d}/t1; proxy_temp_path {d}/t2; fastcgi_temp_path {d}/t3;\n\
               uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;\n\
               {settings}\n\
               server {{ listen 127.0.0.1:{port}; }}\n\
             }}\n"
        );
        let path = directory.join("nginx.conf");
        fs::write(&path, config).expect("it can be written to");
        let mut command = program("nginx");
        command.arg("-p").arg(directory).arg("-c").arg(path).arg("-e").arg(directory.join("error.log"));
        command
    })
}

/// Apache as Debian ships it: its accept filter makes listeners use `TCP_DEFER_ACCEPT`.
pub(crate) fn apache() -> Server {
    apache_with("event")
}

/// The same, with `mpm` to share the work among processes and threads.
pub(crate) fn apache_with(mpm: &str) -> Server {
    Server::start(|directory, port| {
        let d = directory.display();
        let workers = match mpm {
            "prefork" => "StartServers 5\nServerLimit 16",
            _ => "StartServers 1\nMinSpareThreads 1\nMaxSpareThreads 64\nThreadsPerChild 16\nServerLimit 1",
        };
        let config = format!(
            "ServerName localhost\nListen 127.0.0.1:{port}\nAcceptFilter http data\n\
             LoadModule mpm_{mpm}_module /usr/lib/apache2/modules/mod_mpm_{mpm}.so\n\
             LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so\n\
             {workers}\nMaxRequestWorkers 16\nUser nobody\nGroup nogroup\nPidFile {d}/pid\nErrorLog {d}/error.log\nDocumentRoot {d}\n\
             KeepAlive On\nKeepAliveTimeout 1\n"
        );
        let path = directory.join("apache.conf");
        fs::write(&path, config).expect("it can be written to");
        let mut command = program("apache2");
        command.args(["-D", "FOREGROUND", "-d"]).arg(directory).arg("-f").arg(path);
        command
    })
}

/// Python's `http.server`.
pub(crate) fn python() -> Server {
    Server::start(|directory, port| {
        let mut command = program("python3");
        command.args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"]).arg(directory).arg(port.to_string());
        command
    })
}

/// Node's server; `settings` is a statement on `server`.
pub(crate) fn node(settings: &str) -> Server {
    Server::start(|_, port| {
        let script = format!(
            "const server = require('http').createServer((request, response) => response.end('hello\\n'));\n\
             {settings}\nserver.listen({port}, '127.0.0.1');"
        );
        let mut command = program("node");
        command.args(["-e", &script]);
        command
    })
}

/// OpenSSL's server, with a certificate of its own; it answers with a page over HTTP.
pub(crate) fn tls() -> Server {
    Server::start(|directory, port| {
        let (key, certificate) = (directory.join("key.pem"), directory.join("certificate.pem"));
        let new =
            ["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=test"];
        rig::run(Command::new("openssl").args(new).arg("-keyout").arg(&key).arg("-out").arg(&certificate));
        let mut command = program("openssl");
        command.args(["s_server", "-quiet", "-www", "-accept", &format!("127.0.0.1:{port}")]);
        command.arg("-key").arg(key).arg("-cert").arg(certificate);
        command
    })
}

/// Go's `net/http` server.
pub(crate) fn go() -> Server {
    Server::start(|_, port| {
        let mut command = program(&go_programs().join("go-server").to_string_lossy());
        command.arg(format!("127.0.0.1:{port}"));
        command
    })
}

/// The directory with `go-server` and `go-client`: the one that `TRACER_TEST_GO` names, or they are built once.
pub(crate) fn go_programs() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(directory) = std::env::var_os("TRACER_TEST_GO") {
            return directory.into();
        }
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernel/go");
        for name in ["go-server", "go-client"] {
            rig::run(
                Command::new("go")
                    .args(["build", "-o"])
                    .arg(directory.join(name))
                    .arg(sources.join(format!("{name}.go")))
                    .envs([("GOFLAGS", "-mod=mod"), ("GOPROXY", "off"), ("GO111MODULE", "off"), ("CGO_ENABLED", "0")])
                    .env("GOCACHE", directory.join("cache"))
                    .env("GOPATH", directory.join("path")),
            );
        }
        directory
    })
}

/// A connection that stays in the hands of the test.
pub(crate) struct Client {
    pub(crate) stream: TcpStream,
    pub(crate) port: u16,
}

impl Client {
    pub(crate) fn connect(server: &Server) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).expect("it listens");
        stream.set_read_timeout(Some(*PATIENCE)).expect("a time-out can be set");
        let port = stream.local_addr().expect("it is connected").port();
        Self { stream, port }
    }

    /// Sends a request and reads its response: the head, and a body of `Content-Length` or in chunks.
    pub(crate) fn exchange(&mut self, request: &str) -> String {
        self.stream.write_all(request.as_bytes()).expect("the connection is open");
        let mut response = String::new();
        let mut buffer = [0; 4096];
        loop {
            let n = self.stream.read(&mut buffer).expect("the server answers");
            assert!(n > 0, "closed in the middle of a response: {response}");
            response.push_str(&String::from_utf8_lossy(&buffer[..n]));
            if is_whole(&response) {
                return response;
            }
        }
    }
}

fn is_whole(response: &str) -> bool {
    let Some((head, body)) = response.split_once("\r\n\r\n") else {
        return false;
    };
    let head = head.to_ascii_lowercase();
    match head.lines().find_map(|line| line.strip_prefix("content-length: ")) {
        Some(length) => body.len() >= length.trim().parse().expect("a number"),
        None => body.ends_with("0\r\n\r\n"),
    }
}
