//! The page of `tracer report --html` in a real browser: that it is readable in light, dark and narrow, that its search
//! works, that nothing is wrong with its script or its policy, and that it loads nothing.
//!
//! Needs Chromium (`CHROMIUM` names another one than that in `PATH`), so it is not among the tests that a plain `cargo test`
//! runs; `cargo xtask test` installs it and runs them. Chromium is told what to do over two pipes, in the words of its
//! DevTools protocol. It gets a directory of its own, and is ended with the test.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use jiff::SignedDuration;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;
use tracer::event::{Close, Event};
use tracer::record::{End, Reader, Recorded, Recorder};
use tracer::sink::summary::Missed;

/// How long anything may take that Chromium is asked for. It takes a hundredth of that.
const PATIENCE: Duration = Duration::from_secs(60);
/// Rows of the table of connections: as many as a page has at most.
const ROWS: usize = 10_000;

/// A page of as many connections as a table has, and more, in a directory that goes with it. One of them asked for `/needle`;
/// another has markup for a name.
fn page() -> (TempDir, PathBuf) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1.rec");
    let mut reader = Reader::new(File::open(golden).expect("it is in the repository")).expect("a recording");
    let mut closes: Vec<Box<Close>> = Vec::new();
    let mut others = Vec::new();
    while let Some(recorded) = reader.next().expect("it is whole") {
        match recorded {
            Recorded::Event(Event::Close(close)) => closes.push(close),
            Recorded::Event(event) => others.push(event),
            Recorded::End(_) => {}
        }
    }
    let directory = tempfile::tempdir().expect("a directory");
    let recording = directory.path().join("many.rec");
    let mut recorder = Recorder::new(File::create(&recording).expect("made")).expect("written");
    others.iter().for_each(|event| recorder.event(event).expect("written"));
    let begin = closes[0].time;
    for n in 0..ROWS + 2_000 {
        let mut close = closes[n % closes.len()].clone();
        close.time = begin + SignedDuration::from_millis(10 * n as i64);
        close.remote = SocketAddr::new(close.remote.ip(), 20_000 + (n % 40_000) as u16);
        if let Some(process) = close.process.as_mut().map(Arc::make_mut) {
            process.pid = 1_000 + (n % 24) as u32;
            if n % 100 == 7 {
                "<b id=foreign>x</b><script>throw 1</script>".clone_into(&mut process.comm);
            }
        }
        if let Some(http) = close.http.as_mut().filter(|http| http.target.is_some() && n > ROWS / 2) {
            http.target = Some(if n < ROWS / 2 + closes.len() + 1 { "/needle" } else { "/hay" }.to_owned());
        }
        recorder.event(&Event::Close(close)).expect("written");
    }
    let ran = Duration::from_secs(120);
    let missed = Missed { lost: 0, untracked: 0 };
    let end = End { time: begin + SignedDuration::from_secs(120), ran, missed, time_wait_sockets: None };
    recorder.end(&end).expect("written");
    drop(recorder);

    let page = directory.path().join("page.html");
    let mut report = Command::new(env!("CARGO_BIN_EXE_tracer"));
    let status = report.arg("report").arg(&recording).arg("--html").arg(&page).status().expect("it starts");
    assert!(status.success());
    (directory, page)
}

/// A browser without a window.
struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    /// What came while something else was waited for.
    events: VecDeque<Value>,
    last_id: u64,
    profile: TempDir,
}

impl Browser {
    fn start() -> Self {
        let profile = tempfile::tempdir().expect("a directory");
        let chromium = std::env::var_os("CHROMIUM").unwrap_or_else(|| "chromium".into());
        // Over descriptors 3 and 4, as `--remote-debugging-pipe` wants it.
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>"$0/stderr""#]).arg(profile.path());
        command.arg(chromium);
        // What it keeps of its own goes with the test.
        command.env("HOME", profile.path()).env_remove("XDG_CONFIG_HOME").env_remove("XDG_CACHE_HOME");
        command.args([
            "--headless",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ]);
        // It is to talk to nobody.
        command.args(["--no-first-run", "--disable-background-networking", "--disable-component-update"]);
        command.args(["--disable-sync", "--disable-quic", "--disable-extensions", "--disable-breakpad"]);
        command.arg(format!("--user-data-dir={}", profile.path().display())).arg("about:blank");
        let mut child =
            command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sh starts");
        let to = child.stdin.take().expect("piped");
        let stdout = child.stdout.take().expect("piped");
        let (sender, from) = channel();
        std::thread::spawn(move || {
            // Each message ends with a NUL.
            for message in BufReader::new(stdout).split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).expect("JSON");
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        Self { child, to, from, events: VecDeque::new(), last_id: 0, profile }
    }

    fn next(&mut self, what: &str) -> Value {
        self.from.recv_timeout(PATIENCE).unwrap_or_else(|why| {
            let stderr = fs::read_to_string(self.profile.path().join("stderr")).unwrap_or_default();
            panic!("no answer to {what} from Chromium (on Debian: apt-get install chromium): {why}\n{stderr}")
        })
    }

    /// Asks, and waits for the answer.
    fn ask(&mut self, session: Option<&str>, method: &str, params: &Value) -> Value {
        self.last_id += 1;
        let mut message = json!({ "id": self.last_id, "method": method, "params": params });
        if let Some(session) = session {
            message["sessionId"] = session.into();
        }
        let sent = self.to.write_all(format!("{message}\0").as_bytes());
        loop {
            let answer = self.next(method);
            if answer["id"] == self.last_id {
                sent.expect("it was read");
                assert_eq!(answer["error"], Value::Null, "{method}");
                return answer["result"].clone();
            }
            self.events.push_back(answer);
        }
    }

    /// Waits for an event; those before it are kept.
    fn wait_for(&mut self, method: &str) {
        let mut at = 0;
        while self.events.get(at).is_none_or(|event| event["method"] != method) {
            at += 1;
            if at >= self.events.len() {
                let event = self.next(method);
                self.events.push_back(event);
                at = self.events.len() - 1;
            }
        }
    }

    fn tab(&mut self) -> Tab<'_> {
        let target = self.ask(None, "Target.createTarget", &json!({ "url": "about:blank" }))["targetId"].clone();
        let attach = json!({ "targetId": target, "flatten": true });
        let session =
            self.ask(None, "Target.attachToTarget", &attach)["sessionId"].as_str().expect("a session").to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            self.ask(Some(&session), &format!("{domain}.enable"), &json!({}));
        }
        self.events.clear();
        Tab { browser: self, session }
    }
}

impl Drop for Browser {
    /// With all its processes.
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

struct Tab<'a> {
    browser: &'a mut Browser,
    session: String,
}

impl Tab<'_> {
    fn ask(&mut self, method: &str, params: &Value) -> Value {
        self.browser.ask(Some(&self.session), method, params)
    }

    /// What an expression is.
    fn value(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true });
        let answer = self.ask("Runtime.evaluate", &params);
        assert_eq!(answer["exceptionDetails"], Value::Null, "{expression}");
        answer["result"]["value"].clone()
    }

    /// A picture of what is to be seen: the bytes of a PNG, in base64.
    fn picture(&mut self) -> String {
        self.ask("Page.captureScreenshot", &json!({ "format": "png" }))["data"].as_str().expect("a picture").to_owned()
    }

    /// Looks at a page; answers how long it took to load.
    fn open(&mut self, page: &Path) -> Duration {
        let begun = Instant::now();
        self.ask("Page.navigate", &json!({ "url": format!("file://{}", page.display()) }));
        self.browser.wait_for("Page.loadEventFired");
        begun.elapsed()
    }

    /// Types into the search.
    fn search(&mut self, words: &str) {
        self.value("document.getElementById('q').focus(), document.getElementById('q').select()");
        self.ask("Input.insertText", &json!({ "text": words }));
    }

    fn wait_until(&mut self, expression: &str, wanted: &str) {
        let begun = Instant::now();
        loop {
            let is = self.value(expression);
            if is == wanted {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{expression} is {is}, not {wanted}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What the page said to the console, what it threw, what its policy forbade, and what it asked the network for.
fn troubles(events: &VecDeque<Value>, page: &Path) -> Vec<Value> {
    let itself = format!("file://{}", page.display());
    let is_trouble = |event: &&Value| match event["method"].as_str() {
        Some("Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded") => true,
        Some("Network.requestWillBeSent") => event["params"]["request"]["url"] != itself,
        _ => false,
    };
    events.iter().filter(is_trouble).cloned().collect()
}

const VISIBLE: &str = "[...document.querySelectorAll('.part tr')].filter(row => row.checkVisibility())";

#[test]
fn a_page_can_be_read_and_searched() {
    let (_directory, page) = page();
    let mut browser = Browser::start();
    let mut fastest = Duration::MAX;
    for (scheme, background, width) in [("light", "rgb(255, 255, 255)", 1300), ("dark", "rgb(15, 19, 24)", 400)] {
        let looked = format!("{scheme}, {width} pixels wide");
        let mut tab = browser.tab();
        let size = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false });
        tab.ask("Emulation.setDeviceMetricsOverride", &size);
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        tab.ask("Emulation.setEmulatedMedia", &media);
        let blank = tab.picture();
        fastest = fastest.min(tab.open(&page));

        assert_eq!(tab.value("getComputedStyle(document.body).backgroundColor"), background, "{looked}");
        // Wide tables scroll by themselves, the page does not.
        let beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth";
        assert_eq!(tab.value(beyond), 0, "{looked}");
        assert_eq!(tab.value("document.getElementById('foreign')"), Value::Null, "{looked}: what is foreign is text");
        assert!(tab.value("document.querySelectorAll('svg .f0').length").as_u64() > Some(10), "{looked}");
        let picture = tab.picture();
        assert!(picture.starts_with("iVBORw0KGgo") && picture.len() > 3 * blank.len(), "{looked}: it is empty");

        let visible = format!("{VISIBLE}.length");
        assert_eq!(tab.value(&visible), ROWS, "{looked}");
        tab.search("NEEDLE 250");
        let wanted = tab.value(
            "[...document.querySelectorAll('.part tr')].filter(row => row.textContent.includes('/needle')).length",
        );
        assert!(wanted.as_u64().is_some_and(|rows| (1..100).contains(&rows)), "{wanted}");
        tab.wait_until("document.getElementById('n').textContent", &format!("{wanted} of {ROWS}"));
        assert_eq!(tab.value(&visible), wanted, "{looked}");
        assert_eq!(tab.value(&format!("{VISIBLE}.every(row => row.textContent.includes('/needle'))")), true);
        tab.search("nothing has this");
        tab.wait_until("document.getElementById('n').textContent", &format!("0 of {ROWS}"));
        tab.value(
            "document.getElementById('q').value = '', document.getElementById('q').dispatchEvent(new Event('input'))",
        );
        tab.wait_until("document.getElementById('n').textContent", "");
        assert_eq!(tab.value(&visible), ROWS, "{looked}");

        let troubles = troubles(&tab.browser.events, &page);
        assert!(troubles.is_empty(), "{looked}: {troubles:#?}");
    }
    println!("opened in {} ms", fastest.as_millis());
    assert!(fastest < Duration::from_secs(3), "{fastest:?}");
}
