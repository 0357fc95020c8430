//! nginx as a load's server: one process, in a network namespace, and nothing of it outside of a directory.
//!
//! What comes in: where, and what it is to serve. What goes out: the process, once it listens; it ends with what it is
//! returned as. It never reads a configuration of the host.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::network::{Namespace, Running};
use crate::workspace;

/// Longest wait for it to listen.
const PATIENCE: Duration = Duration::from_secs(60);

/// What differs from one load to another, in the words of nginx.
pub(crate) struct Settings<'a> {
    /// It listens on all IPv4 addresses.
    pub(crate) port: u16,
    /// How many connections may wait to be accepted; `None`: as many as nginx takes by itself.
    pub(crate) backlog: Option<u32>,
    /// Open at once, at most.
    pub(crate) connections: u32,
    /// Directives of the `http` block.
    pub(crate) http: &'a str,
}

/// Where it tells what it has done so far.
pub(crate) const STATUS: &str = "/status";

/// Starts it, and waits until it listens. `/` is answered with six bytes, everything else but [`STATUS`] with files of the
/// directory.
///
/// # Errors
/// It is not installed, or does not listen; then with what it logged.
pub(crate) fn start(namespace: &Namespace, directory: &Path, settings: &Settings<'_>) -> Result<Running> {
    let Settings { port, backlog, connections, http } = settings;
    let backlog = backlog.map(|backlog| format!(" backlog={backlog}")).unwrap_or_default();
    let config = directory.join("nginx.conf");
    fs::write(
        &config,
        format!(
            "worker_processes 1; daemon off; master_process off; user root; pid {d}/nginx.pid;\n\
             error_log {d}/nginx-error.log; events {{ worker_connections {connections}; }}\n\
             http {{\n\
               access_log off; {http}\n\
               client_body_temp_path {d}/t1; proxy_temp_path {d}/t2; fastcgi_temp_path {d}/t3;\n\
               uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;\n\
               server {{\n\
                 listen {port}{backlog}; root {d};\n\
                 location = / {{ return 200 \"hello\\n\"; }}\n\
                 location = {STATUS} {{ stub_status; }}\n\
               }}\n\
             }}\n",
            d = directory.display(),
        ),
    )?;
    let nginx = workspace::find("nginx").context("no nginx")?;
    let mut command = namespace.command(&nginx);
    let nginx = Running::start(command.arg("-p").arg(directory).arg("-c").arg(&config), directory, "nginx")?;
    let deadline = Instant::now() + PATIENCE;
    while namespace.ss(&["-l", "sport", "=", &format!(":{port}")])?.is_empty() {
        // Not collected, so that its id stays its own until it is killed.
        let how = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let ended = waitid(WaitId::Pid(Pid::from_child(&nginx.child)), how)?.is_some();
        if ended || Instant::now() > deadline {
            // What is wrong with its configuration it says on stderr.
            let logs = ["nginx-error.log", "nginx.log"];
            let said = logs.map(|log| fs::read_to_string(directory.join(log)).unwrap_or_default());
            bail!("nginx does not listen: {}", said.concat().trim());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(nginx)
}
