//! A headless Chromium, driven over its debugging socket.
//!
//! As much of WebSocket (RFC 6455) and of the DevTools protocol as it takes to
//! load a page, ask it things, press keys, and hear its console.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::within;

/// The browser with one page; it ends with this value.
pub struct Browser {
    child: Child,
    stream: BufReader<TcpStream>,
    last_id: u64,
    /// Exceptions, failed requests, and what the page wrote to its console.
    pub complaints: Vec<String>,
    _profile: tempfile::TempDir,
}

impl Browser {
    #[track_caller]
    pub fn start() -> Browser {
        let profile = tempfile::tempdir().expect("a folder");
        let child = Command::new("chromium")
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"])
            .args([
                "--disable-background-networking",
                "--disable-component-update",
                "--remote-debugging-port=0",
            ])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it was there a moment ago");
        let file = profile.path().join("DevToolsActivePort");
        let mut said = String::new();
        within(Duration::from_secs(60), "the browser's port", || {
            said = fs::read_to_string(&file).unwrap_or_default();
            said.lines().count() >= 2
        });
        let port: u16 = said.lines().next().and_then(|line| line.parse().ok()).expect("a port");
        let path = new_page(port);
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the browser listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
        let mut stream = BufReader::new(stream);
        let hello = format!(
            "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        );
        stream.get_mut().write_all(hello.as_bytes()).expect("a hello");
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).expect("an answer to the hello");
        }
        let mut browser = Browser { child, stream, last_id: 0, complaints: Vec::new(), _profile: profile };
        for domain in ["Runtime", "Log", "Page"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Goes to an address, and waits until something is true there.
    #[track_caller]
    pub fn open(&mut self, address: &str, condition: &str) {
        self.call("Page.navigate", json!({ "url": address }));
        self.until(condition);
    }

    /// What an expression is worth on the page.
    #[track_caller]
    pub fn value(&mut self, expression: &str) -> Value {
        let arguments = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.call("Runtime.evaluate", arguments);
        assert!(answer.get("exceptionDetails").is_none(), "{expression}: {answer}");
        answer["result"]["value"].take()
    }

    #[track_caller]
    pub fn text(&mut self, expression: &str) -> String {
        self.value(&format!("String({expression})")).as_str().expect("a text").to_string()
    }

    /// Waits until an expression is true.
    #[track_caller]
    pub fn until(&mut self, condition: &str) {
        let deadline = std::time::Instant::now() + Duration::from_secs(40);
        while self.value(&format!("Boolean({condition})")) != Value::Bool(true) {
            if std::time::Instant::now() > deadline {
                let seen = self.text("document.body.innerText.slice(0, 3000)");
                panic!("never: {condition}\n{:?}\n{seen}", self.complaints);
            }
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// Presses a key, with the text that it types.
    pub fn press(&mut self, key: &str, text: &str) {
        let event = |kind: &str| json!({ "type": kind, "key": key, "text": text, "code": key });
        self.call("Input.dispatchKeyEvent", event("keyDown"));
        self.call("Input.dispatchKeyEvent", json!({ "type": "keyUp", "key": key, "code": key }));
    }

    /// Another size, in CSS pixels.
    pub fn resize(&mut self, width: u32, height: u32) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    /// A command of the protocol and its result.
    #[track_caller]
    pub fn call(&mut self, method: &str, arguments: Value) -> Value {
        self.last_id += 1;
        let message = json!({ "id": self.last_id, "method": method, "params": arguments });
        self.send(message.to_string().as_bytes());
        loop {
            let mut message = self.receive();
            if message["id"] == self.last_id {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].take();
            }
            let kind = message["method"].as_str().unwrap_or_default();
            if ["Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"].contains(&kind) {
                self.complaints.push(message["params"].to_string());
            }
        }
    }

    /// One masked text frame; the mask may be zero.
    fn send(&mut self, bytes: &[u8]) {
        let mut frame = vec![0x81];
        match u16::try_from(bytes.len()) {
            Ok(length @ 0..=125) => frame.push(0x80 | length as u8),
            Ok(length) => {
                frame.push(0x80 | 126);
                frame.extend(length.to_be_bytes());
            }
            Err(_) => {
                frame.push(0x80 | 127);
                frame.extend((bytes.len() as u64).to_be_bytes());
            }
        }
        frame.extend([0; 4]);
        frame.extend(bytes);
        self.stream.get_mut().write_all(&frame).expect("the browser reads");
    }

    fn receive(&mut self) -> Value {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head).expect("the browser answers within a minute");
        let length = match head[1] & 127 {
            126 => {
                let mut long = [0; 2];
                self.stream.read_exact(&mut long).expect("a length");
                u64::from(u16::from_be_bytes(long))
            }
            127 => {
                let mut long = [0; 8];
                self.stream.read_exact(&mut long).expect("a length");
                u64::from_be_bytes(long)
            }
            short => u64::from(short),
        };
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes).expect("a frame");
        serde_json::from_slice(&bytes).expect("JSON")
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Opens a page and answers the path of its socket.
fn new_page(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the browser listens");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a time-out");
    let request = "PUT /json/new?about:blank HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("a request");
    let mut text = String::new();
    let mut reader = BufReader::new(stream);
    // It keeps the connection: the answer ends with its object.
    while !text.trim_end().ends_with('}') {
        assert_ne!(reader.read_line(&mut text).expect("an answer"), 0, "{text}");
    }
    let start = text.find('{').expect("an object");
    let page: Value = serde_json::from_str(&text[start..]).expect("JSON");
    let address = page["webSocketDebuggerUrl"].as_str().expect("an address");
    let path = address.splitn(4, '/').nth(3).expect("a path");
    format!("/{path}")
}
