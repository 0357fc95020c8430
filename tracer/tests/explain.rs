//! `tracer explain`, and colours, as a shell and a terminal see them. No root.

use std::fs::File;
use std::io::Read as _;
use std::process::{Command, Output, Stdio};

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

const TRACER: &str = env!("CARGO_BIN_EXE_tracer");
const RECORDING: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/v1.rec");

/// `tracer` without what the environment of the test says of colours.
fn tracer(args: &[&str]) -> Command {
    let mut command = Command::new(TRACER);
    for variable in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
        command.env_remove(variable);
    }
    command.args(args).env("TERM", "xterm").stdin(Stdio::null());
    command
}

fn piped(args: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = tracer(args).output().expect("it starts");
    (status.code(), String::from_utf8(stdout).expect("text"), String::from_utf8(stderr).expect("text"))
}

/// What a terminal is sent, on stdout and stderr.
fn on_a_terminal(command: &mut Command) -> String {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&terminal).and_then(|()| unlockpt(&terminal)).expect("its other end");
    let name = ptsname(&terminal, Vec::new()).expect("its name");
    let end = open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).expect("its other end");
    let mut child = command.stdout(end.try_clone().expect("a copy")).stderr(end).spawn().expect("it starts");
    // The last reference of ours to the end that the child writes to: reading ends when the child does.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut sent = Vec::new();
    // The end of a terminal is an error (EIO).
    let _ = File::from(terminal).read_to_end(&mut sent);
    child.wait().expect("it ended");
    String::from_utf8_lossy(&sent).into_owned()
}

#[test]
fn one_cause_in_full() {
    let (code, out, err) = piped(&["explain", "request_close"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    insta::assert_snapshot!(out, @r#"
    request_close

    MEANING
    The client asked for it: its last request had `Connection: close`. The server obeys, mostly closes first, and
    TIME_WAIT stays on the server, whatever its own settings are. Mend the client.

    RECOGNISED BY
    The last request's `Connection` header, in any case and at any place in its list, had `close`.

    CONFIRM BY HAND
        tcpdump -i any -nn -l -A 'tcp port 8080' | grep -iE 'HTTP/1\.|^connection:'      # close below the request's line
        ss -Htan state time-wait '( sport = :8080 )' | awk '{print $4}' | sed 's/:[0-9]*$//' | sort | uniq -c   # whose
        curl -sv -o /dev/null -o /dev/null http://HOST:8080/a http://HOST:8080/b 2>&1 | grep -i re-using   # the server can

    CHANGE
    The client is the peer's address in the server's line, and the process in the client's. Proxies are clients, too:
    those below send `close` to the servers behind them.

    - nginx: before 1.29.7 it sends HTTP/1.0 with `Connection: close` to its upstreams.
      `proxy_http_version 1.1; proxy_set_header Connection "";` and, in `upstream`, `keepalive 32;` end that: all three
      are needed.
    - Apache: as a proxy it sends `close` with `disablereuse=On`, with `SetEnv proxy-nokeepalive 1`, and for a
      `RewriteRule` with `[P]`: use `ProxyPass` instead.
    - HAProxy: remove `option http-server-close` and `option httpclose`: both send `close` to the servers.
      `option httpchk` with HTTP/1.1 sends it with each check; that is a few.
    - Go: `Transport.DisableKeepAlives: true` or `Request.Close = true`: remove them.
    - Java: `-Dhttp.keepAlive=false` with `HttpURLConnection`, or a `Connection` header that is set by hand: remove
      them.
    - Node: `new http.Agent()` and `agent: false` send `close`: use `new http.Agent({keepAlive: true})`, or the global
      agent, which keeps connections (since 19).
    - Python: `urllib.request` always sends `close`: use one `requests.Session` or `httpx.Client`, without a
      `Connection` header of your own. In aiohttp remove `TCPConnector(force_close=True)`.

    RFC
    RFC 9112, section 9.6 <https://www.rfc-editor.org/rfc/rfc9112#section-9.6> (tear-down),
    section 9.3 <https://www.rfc-editor.org/rfc/rfc9112#section-9.3> (persistence);
    RFC 9110, section 7.6.1 <https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1> (Connection).

    The commands take port 8080 for the server's: put yours, and for HOST, PID and SERVICE, too. They need root to see
    processes and packets. In `ss`, `sport` is the port of this host's end: `sport = :8080` on the server's host,
    `dport = :8080` on the client's. In tcpdump, `tcp[...]` matches IPv4 only; for IPv6 leave that part out. Values in
    brackets are the defaults of current versions, unless a version is named.
    "#);
}

#[test]
fn all_causes_without_one() {
    let (code, out, _) = piped(&["explain"]);
    assert_eq!(code, Some(0));
    assert!(out.starts_with("Causes\n\n"), "{out}");
    assert_eq!(out.matches("\nMEANING\n").count(), 17);
}

#[test]
fn a_cause_that_does_not_exist_is_refused_and_all_are_named() {
    let (code, out, err) = piped(&["explain", "request-close"]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    for word in ["timeout", "request_close", "http10", "h2", "unknown"] {
        assert!(err.contains(word), "{word}: {err}");
    }
}

#[test]
fn bash_completes_a_cause() {
    let script = "eval \"$($0 completions bash)\"
        COMP_WORDS=(tracer explain re) COMP_CWORD=2; _tracer tracer re explain; echo \"${COMPREPLY[@]}\"
        COMP_WORDS=(tracer explain requ) COMP_CWORD=2; _tracer tracer requ explain; echo \"${COMPREPLY[@]}\"";
    let Output { status, stdout, .. } = Command::new("bash").args(["-c", script, TRACER]).output().expect("bash");
    assert!(status.success());
    let completed = String::from_utf8(stdout).expect("text");
    assert_eq!(completed, "reset_by_peer reset_by_local request_close response_close\nrequest_close\n");
}

#[test]
fn colours_are_as_the_terminal_no_color_and_the_option_say() {
    let commands: [&[&str]; 5] =
        [&["explain", "tls"], &["report", RECORDING], &["--help"], &["run", "--help"], &["explain", "nonsense"]];
    for args in commands {
        let with = |color: &[&str]| tracer(&[args, color].concat());
        let coloured = |sent: &str| {
            assert!(sent.len() > 100, "{args:?}: {sent}");
            sent.contains('\x1b')
        };
        assert!(coloured(&on_a_terminal(&mut with(&[]))), "{args:?}");
        assert!(!coloured(&on_a_terminal(with(&[]).env("NO_COLOR", "1"))), "{args:?}");
        assert!(!coloured(&on_a_terminal(&mut with(&["--color", "never"]))), "{args:?}");
        assert!(coloured(&on_a_terminal(with(&["--color", "always"]).env("NO_COLOR", "1"))), "{args:?}");
        let (_, out, err) = piped(args);
        assert!(!coloured(&(out + &err)), "{args:?}");
        let (_, out, err) = piped(&[args, &["--color=always"]].concat());
        assert!(coloured(&(out + &err)), "{args:?}");
    }
}
