//! Other people's servers and clients, and how they are started.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::network::{Namespace, Running};
use crate::workspace::{self, Program};

/// What the oracle runs, and the Debian package that has it.
pub(crate) const NEEDED: [Program; 16] = [
    ("ab", "apache2-utils"),
    // Not `apache2`: that one would also start a server on port 80.
    ("apache2", "apache2-bin"),
    ("curl", "curl"),
    ("go", "golang-go"),
    ("haproxy", "haproxy"),
    ("ip", "iproute2"),
    ("java", "default-jdk-headless"),
    ("javac", "default-jdk-headless"),
    ("nginx", "nginx"),
    ("node", "nodejs"),
    ("nsenter", "util-linux"),
    ("python3", "python3"),
    ("ss", "iproute2"),
    ("tcpdump", "tcpdump"),
    ("tshark", "tshark"),
    ("wrk", "wrk"),
];

/// The sources of the servers and clients that are written for the oracle.
const SOURCES: [(&str, &str); 10] = [
    ("server.go", include_str!("programs/server.go")),
    ("client.go", include_str!("programs/client.go")),
    ("server.js", include_str!("programs/server.js")),
    ("client.js", include_str!("programs/client.js")),
    ("http_server.py", include_str!("programs/http_server.py")),
    ("asyncio_server.py", include_str!("programs/asyncio_server.py")),
    ("client.py", include_str!("programs/client.py")),
    ("Server.java", include_str!("programs/Server.java")),
    ("Client.java", include_str!("programs/Client.java")),
    ("mime.types", ""),
];

/// Writes and compiles them.
pub(crate) fn build(directory: &Path) -> Result<()> {
    for (name, text) in SOURCES {
        fs::write(directory.join(name), text)?;
    }
    for name in ["server", "client"] {
        let mut go = Command::new(found("go")?);
        go.current_dir(directory).env("GOFLAGS", "-mod=mod").env("GO111MODULE", "off").env("GOTOOLCHAIN", "local");
        go.args(["build", "-o", &format!("go-{name}"), &format!("{name}.go")]);
        workspace::succeed(&mut go)?;
    }
    workspace::succeed(Command::new("javac").current_dir(directory).args(["-nowarn", "Server.java", "Client.java"]))?;
    fs::write(directory.join("index.html"), "hello\n")?;
    fs::write(directory.join("large"), vec![b'x'; 100_000])?;
    Ok(())
}

fn found(program: &str) -> Result<PathBuf> {
    workspace::find(program).with_context(|| format!("no {program}"))
}

/// A kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    Nginx,
    Apache,
    Go,
    Node,
    Python,
    Asyncio,
    /// In front of nginx.
    Haproxy,
    Java,
}

impl Server {
    pub(crate) const ALL: [Self; 8] =
        [Self::Nginx, Self::Apache, Self::Go, Self::Node, Self::Python, Self::Asyncio, Self::Haproxy, Self::Java];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Apache => "Apache",
            Self::Go => "Go net/http",
            Self::Node => "Node",
            Self::Python => "Python http.server",
            Self::Asyncio => "Python asyncio",
            Self::Haproxy => "HAProxy + nginx",
            Self::Java => "Java HttpServer",
        }
    }

    /// Starts it in `namespace`; `backend` is nginx's port behind HAProxy.
    pub(crate) fn start(
        self,
        namespace: &Namespace,
        programs: &Path,
        directory: &Path,
        address: &str,
        port: u16,
        backend: u16,
    ) -> Result<Running> {
        let source = |name: &str| programs.join(name);
        let (program, args): (&str, Vec<String>) = match self {
            Self::Nginx => ("nginx", nginx(programs, directory, address, port)?),
            Self::Apache => ("apache2", apache(programs, directory, address, port)?),
            Self::Go => ("", vec![address.to_owned(), port.to_string()]),
            Self::Node => ("node", vec![text(&source("server.js")), address.to_owned(), port.to_string()]),
            Self::Python => ("python3", vec![text(&source("http_server.py")), address.to_owned(), port.to_string()]),
            Self::Asyncio => {
                ("python3", vec![text(&source("asyncio_server.py")), address.to_owned(), port.to_string()])
            }
            Self::Haproxy => ("haproxy", haproxy(directory, address, port, backend)?),
            Self::Java => (
                "java",
                vec!["-cp".to_owned(), text(programs), "Server".to_owned(), address.to_owned(), port.to_string()],
            ),
        };
        let program = if program.is_empty() { source("go-server") } else { found(program)? };
        let mut command = namespace.command(&program);
        Running::start(command.args(args), directory, &format!("server-{port}"))
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// `address:port`, as a URL and most configurations want it.
fn join(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

fn nginx(programs: &Path, directory: &Path, address: &str, port: u16) -> Result<Vec<String>> {
    let dual = if address == "::" { "ipv6only=off " } else { "" };
    let config = format!(
        "worker_processes 2; daemon off; user root; pid {d}/nginx.pid; error_log {d}/nginx-error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
           log_format who '$pid $remote_addr $remote_port $server_addr $server_port'; access_log {d}/who-{port} who;\n\
           root {p}; keepalive_timeout 2s 2s; keepalive_requests 50;\n\
           client_body_temp_path {d}/t1; proxy_temp_path {d}/t2; fastcgi_temp_path {d}/t3;\n\
           uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;\n\
           server {{\n\
             listen {listen} {dual}backlog=4096;\n\
             location = /close {{ keepalive_timeout 0; return 200 \"closing\\n\"; }}\n\
             location = /empty {{ return 204; }}\n\
             location = /chunked {{ ssi on; ssi_types *; try_files /index.html =404; }}\n\
             location = /not-modified {{ return 304; }}\n\
           }}\n\
         }}\n",
        d = directory.display(),
        p = programs.display(),
        listen = join(address, port),
    );
    let path = directory.join(format!("nginx-{port}.conf"));
    fs::write(&path, config)?;
    Ok(vec!["-p".to_owned(), text(directory), "-c".to_owned(), text(&path)])
}

fn apache(programs: &Path, directory: &Path, address: &str, port: u16) -> Result<Vec<String>> {
    let modules = Path::new("/usr/lib/apache2/modules");
    let mut config = String::new();
    for module in ["mpm_event", "authz_core", "dir", "mime", "env", "setenvif", "alias", "logio"] {
        let file = modules.join(format!("mod_{module}.so"));
        // Some are built in.
        if file.is_file() {
            config.push_str(&format!("LoadModule {module}_module {}\n", file.display()));
        }
    }
    config.push_str(&format!(
        "ServerName test\nPidFile {d}/apache.pid\nErrorLog {d}/apache-error.log\nListen {listen}\nListenBacklog 4096\n\
         DocumentRoot {p}\nTypesConfig {p}/mime.types\nKeepAlive On\nKeepAliveTimeout 2\nMaxKeepAliveRequests 50\n\
         DefaultRuntimeDir {d}\nMutex fcntl\nStartServers 2\nLogFormat \"%P %a %{{remote}}p %A %{{local}}p\" who\n\
         CustomLog {d}/who-{port} who\nSetEnvIf Request_URI ^/close$ nokeepalive\nRedirect 204 /empty\n\
         <Directory {p}>\nRequire all granted\n</Directory>\n",
        d = directory.display(),
        p = programs.display(),
        listen = join(address, port),
    ));
    let path = directory.join("apache.conf");
    fs::write(&path, config)?;
    Ok(vec!["-DFOREGROUND".to_owned(), "-f".to_owned(), text(&path)])
}

fn haproxy(directory: &Path, address: &str, port: u16, backend: u16) -> Result<Vec<String>> {
    let bind = if address == "::" { format!(":::{port} v4v6") } else { format!("{address}:{port}") };
    let config = format!(
        "global\n  maxconn 4000\n\
         defaults\n  mode http\n  timeout connect 5s\n  timeout client 2s\n  timeout server 5s\n  timeout http-keep-alive 1s\n\
         frontend front\n  bind {bind} backlog 4096\n  default_backend back\n\
         backend back\n  server nginx 127.0.2.1:{backend}\n"
    );
    let path = directory.join("haproxy.cfg");
    fs::write(&path, config)?;
    // One process, without a master.
    Ok(vec!["-db".to_owned(), "-f".to_owned(), text(&path)])
}

/// A kind of client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    /// One request for each process and connection; the targets in turn, some requests with `Connection: close`.
    Curl,
    /// Several requests on one connection.
    CurlMany,
    GoKeepAlive,
    GoClose,
    NodeKeepAlive,
    NodeClose,
    Urllib,
    /// `http.client`
    HttpPackage,
    Wrk,
    WrkClose,
    Ab,
    AbKeepAlive,
    Java,
    /// [`crate::oracle::raw`]
    Raw,
}

impl Client {
    pub(crate) const ALL: [Self; 14] = [
        Self::Curl,
        Self::CurlMany,
        Self::GoKeepAlive,
        Self::GoClose,
        Self::NodeKeepAlive,
        Self::NodeClose,
        Self::Urllib,
        Self::HttpPackage,
        Self::Wrk,
        Self::WrkClose,
        Self::Ab,
        Self::AbKeepAlive,
        Self::Java,
        Self::Raw,
    ];

    /// Its place in [`Client::ALL`], and so the last part of the address that it connects to.
    pub(crate) fn number(self) -> u8 {
        let place = Self::ALL.iter().position(|client| *client == self).unwrap_or_default();
        u8::try_from(place).unwrap_or(u8::MAX)
    }

    /// The command lines of it, all to be run at once; `scale` is about how many connections each makes.
    pub(crate) fn commands(
        self,
        programs: &Path,
        address: IpAddr,
        port: u16,
        scale: u32,
    ) -> Result<Vec<(PathBuf, Vec<String>)>> {
        let base = format!("http://{}", join(&address.to_string(), port));
        let url = |target: &str| format!("{base}{target}");
        let owned = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
        let n = scale.to_string();
        let source = |name: &str| text(&programs.join(name));
        let one = |program: &str, args: Vec<String>| -> Result<_> { Ok(vec![(found(program)?, args)]) };
        // The address of the connection, to tell whose it is.
        let ports = ["-g", "-s", "-m", "20", "-o", "/dev/null", "-w", "%{local_ip} %{local_port}\\n"];
        match self {
            Self::Curl => {
                let cases: [&[&str]; 12] = [
                    &[],
                    &["-H", "Connection: close"],
                    &["-0"],
                    &["-0", "-H", "Connection: keep-alive"],
                    &["-I"],
                    &["-d", "name=value&other=GET / HTTP/1.1"],
                    &["-H", "Connection: Keep-Alive, X-Other", "-H", "X-Other: 1"],
                    &["--http2-prior-knowledge"],
                    &["-X", "OPTIONS"],
                    &["-H", "Connection: Upgrade", "-H", "Upgrade: websocket"],
                    &["-T", "/etc/hostname"],
                    &["-H", "Transfer-Encoding: chunked", "-d", "chunk"],
                ];
                let targets = ["/", "/close", "/large", "/chunked", "/empty", "/missing?with=query", "/not-modified"];
                let curl = found("curl")?;
                Ok((0..scale as usize / 4)
                    .map(|i| {
                        let target = url(targets[i / cases.len() % targets.len()]);
                        let args = owned(&ports).into_iter().chain(owned(cases[i % cases.len()])).chain([target]);
                        (curl.clone(), args.collect())
                    })
                    .collect())
            }
            Self::CurlMany => {
                let targets = ["/", "/large", "/chunked", "/empty", "/missing", "/", "/close", "/", "/"];
                let many = targets.iter().flat_map(|target| ["-o".to_owned(), "/dev/null".to_owned(), url(target)]);
                let args: Vec<_> = owned(&ports).into_iter().chain(many).collect();
                let curl = found("curl")?;
                Ok((0..scale / 20).map(|_| (curl.clone(), args.clone())).collect())
            }
            Self::GoKeepAlive => Ok(vec![(
                programs.join("go-client"),
                owned(&["keep-alive", &url("/"), &(scale * 4).to_string(), "20"]),
            )]),
            Self::GoClose => Ok(vec![(programs.join("go-client"), owned(&["close", &url("/chunked"), &n, "40"]))]),
            Self::NodeKeepAlive => one(
                "node",
                owned(&[&source("client.js"), "keep-alive", &url("/large"), &(scale * 2).to_string(), "20"]),
            ),
            Self::NodeClose => one("node", owned(&[&source("client.js"), "close", &url("/"), &n, "20"])),
            Self::Urllib => one("python3", owned(&[&source("client.py"), "urllib", &url("/"), &n])),
            Self::HttpPackage => {
                one("python3", owned(&[&source("client.py"), "http.client", &url("/"), &(scale * 5).to_string()]))
            }
            Self::Wrk => one("wrk", owned(&["-t", "2", "-c", &n, "-d", "1s", &url("/")])),
            Self::WrkClose => {
                one("wrk", owned(&["-t", "1", "-c", "8", "-d", "1s", "-H", "Connection: close", &url("/close")]))
            }
            Self::Ab => one("ab", owned(&["-q", "-r", "-s", "10", "-n", &n, "-c", "40", &url("/")])),
            Self::AbKeepAlive => {
                one("ab", owned(&["-q", "-r", "-s", "10", "-k", "-n", &(scale * 4).to_string(), "-c", "40", &url("/")]))
            }
            Self::Java => one("java", owned(&["-cp", &text(programs), "Client", &url("/"), &n])),
            Self::Raw => Ok(Vec::new()),
        }
    }
}
