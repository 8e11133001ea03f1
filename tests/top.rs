//! `evenkeel top` in a terminal of its own: what it draws, its keys, a resize,
//! a daemon that goes away, and that the terminal is as before at the end.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, tcgetattr};
use support::daemon::{Daemon, program};
use support::eventually;
use support::servers::{connect, exchange, local};

fn main() {
    support::run(tests![
        the_screen_shows_what_runs_and_follows_traffic needs ["setsid"],
        keys_sort_scroll_pause_and_quit needs ["setsid"],
        a_resize_is_followed_down_to_nothing needs ["setsid"],
        a_daemon_that_ends_is_told_and_the_terminal_given_back needs ["setsid"],
        without_a_terminal_or_a_daemon_it_says_so needs ["setsid"],
    ])
}

const CONFIG: &str = r#"
[daemon]
workers = 3
[[listener]]
name = "front"
mode = "tcp"
bind = "127.0.0.1:8080"
service = "echo"
[[listener]]
name = "back"
mode = "tcp"
bind = "127.0.0.1:8081"
service = "echo"
[[listener]]
name = "names"
mode = "udp"
bind = "127.0.0.1:8053"
upstream = "dns"
[[upstream]]
name = "dns"
[[upstream.server]]
address = "127.0.0.1:9053"
[[upstream.server]]
address = "127.0.0.2:9053"
weight = 7
"#;

/// `top` in a terminal of our own, and what that shows.
struct Screen {
    child: Child,
    master: File,
    slave: OwnedFd,
    parser: Arc<Mutex<vt100::Parser>>,
}

impl Screen {
    fn of(daemon: &Daemon, rows: u16, columns: u16) -> Screen {
        let socket = daemon.socket();
        Screen::running(&["top", "--interval", "100ms", "--socket", socket.to_str().unwrap()], rows, columns)
    }

    fn running(arguments: &[&str], rows: u16, columns: u16) -> Screen {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        let slave = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = Command::new("setsid")
            .args(["--ctty", "--wait", program()])
            .args(arguments)
            .env("TERM", "xterm-256color")
            .stdin(slave())
            .stdout(slave())
            .stderr(slave())
            .spawn()
            .unwrap();
        let parser = Arc::new(Mutex::new(vt100::Parser::new(lines(rows), lines(columns), 0)));
        let (shown, mut reader) = (Arc::clone(&parser), File::from(pty.master.try_clone().unwrap()));
        thread::spawn(move || {
            let mut bytes = [0; 65_536];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                shown.lock().unwrap().process(&bytes[..count]);
            }
        });
        Screen { child, master: File::from(pty.master), slave: pty.slave, parser }
    }

    fn text(&self) -> String {
        self.parser.lock().unwrap().screen().contents()
    }

    /// The first line that has this text.
    fn line(&self, text: &str) -> Option<String> {
        self.text().lines().find(|line| line.contains(text)).map(str::to_string)
    }

    fn shows(&self, text: &str) {
        eventually(&format!("the screen shows {text:?}; it is\n{}", self.text()), || {
            self.text().contains(text)
        });
    }

    fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    fn resize(&self, rows: u16, columns: u16) {
        self.parser.lock().unwrap().screen_mut().set_size(lines(rows), lines(columns));
        let status = Command::new("stty")
            .args(["rows", &rows.to_string(), "cols", &columns.to_string()])
            .stdin(Stdio::from(self.slave.try_clone().unwrap()))
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Whether the terminal echoes lines, as a shell wants it.
    fn is_cooked(&self) -> bool {
        let flags = tcgetattr(&self.slave).unwrap().local_flags;
        flags.contains(LocalFlags::ICANON | LocalFlags::ECHO)
    }

    fn ends(&mut self) -> i32 {
        let mut code = None;
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while code.is_none() {
            assert!(std::time::Instant::now() < deadline, "top does not end; it shows\n{}", self.text());
            thread::park_timeout(Duration::from_millis(5));
            code = self.child.try_wait().unwrap();
        }
        code.unwrap().code().unwrap()
    }
}

fn lines(count: u16) -> NonZero<u16> {
    NonZero::new(count).expect("a screen has a line")
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn the_screen_shows_what_runs_and_follows_traffic() {
    let daemon = Daemon::ready(CONFIG);
    let screen = Screen::of(&daemon, 40, 120);
    screen.shows("Listeners 3");
    screen.shows("Workers 3");
    screen.shows("Servers 2");
    screen.shows("127.0.0.2:9053");
    screen.shows(&format!("pid {}", daemon.pid()));
    let mut held: Vec<TcpStream> = (0..7).map(|_| connect(local(8080))).collect();
    for client in &mut held {
        exchange(client, b"x").unwrap();
    }
    // Name, mode, new a second, active, total.
    eventually("seven are active", || {
        let line = screen.line("front").unwrap_or_default();
        line.split_whitespace().nth(3) == Some("7") && line.split_whitespace().nth(4) == Some("7")
    });
    drop(held);
    eventually("none is", || screen.line("front").unwrap_or_default().split_whitespace().nth(3) == Some("0"));
}

fn keys_sort_scroll_pause_and_quit() {
    let daemon = Daemon::ready(CONFIG);
    let mut screen = Screen::of(&daemon, 40, 120);
    screen.shows("Listeners 3");
    let order = |screen: &Screen| {
        let text = screen.text();
        let place = |name: &str| text.find(&format!("║{name}")).unwrap_or(usize::MAX);
        let mut names = ["front", "back", "names"];
        names.sort_by_key(|name| place(name));
        names
    };
    assert_eq!(order(&screen), ["front", "back", "names"]);
    screen.press("s");
    eventually("sorted by name", || order(&screen) == ["back", "front", "names"]);
    screen.press("r");
    eventually("and the other way round", || order(&screen) == ["names", "front", "back"]);
    screen.press("?");
    screen.shows("sort by the next column");
    screen.press("?");
    eventually("the help is gone", || !screen.text().contains("sort by the next column"));
    screen.press("p");
    screen.shows("PAUSED");
    let mut client = connect(local(8080));
    exchange(&mut client, b"x").unwrap();
    screen.press("p");
    eventually("it goes on", || !screen.text().contains("PAUSED"));
    assert!(!screen.is_cooked());
    screen.press("q");
    assert_eq!(screen.ends(), 0);
    assert!(screen.is_cooked(), "the terminal was not given back");
}

fn a_resize_is_followed_down_to_nothing() {
    let daemon = Daemon::ready(CONFIG);
    let mut screen = Screen::of(&daemon, 40, 120);
    screen.shows("Servers 2");
    for (rows, columns) in [(12, 60), (5, 20), (1, 1), (3, 200)] {
        screen.resize(rows, columns);
    }
    screen.resize(30, 100);
    eventually("all of it is there again", || {
        ["Listeners 3", "Workers 3", "Servers 2", "q quit"].iter().all(|text| screen.text().contains(text))
    });
    // With too few lines the focus has what there is.
    screen.resize(14, 100);
    screen.press("3");
    eventually("the servers are in focus", || screen.text().contains("127.0.0.2:9053"));
    screen.press("\u{3}");
    assert_eq!(screen.ends(), 0);
}

fn a_daemon_that_ends_is_told_and_the_terminal_given_back() {
    let mut daemon = Daemon::ready(CONFIG);
    let mut screen = Screen::of(&daemon, 30, 100);
    screen.shows("Listeners 3");
    daemon.ask("stop").unwrap();
    daemon.wait(Duration::from_secs(10));
    screen.shows("NO ANSWER");
    // What was known last stays to be read.
    screen.shows("Listeners 3");
    screen.press("q");
    assert_eq!(screen.ends(), 0);
    assert!(screen.is_cooked());
}

fn without_a_terminal_or_a_daemon_it_says_so() {
    let output = support::daemon::evenkeel(&["top"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("top needs a terminal"));
    let mut screen = Screen::running(&["top", "--socket", "/nonexistent/x.sock"], 24, 80);
    screen.shows("no daemon answers");
    assert_eq!(screen.ends(), 1);
    let output = support::daemon::evenkeel(&["top", "--interval", "3"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("with its unit"));
}
