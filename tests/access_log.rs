//! The access log: what a line says, that no disk stalls a worker, and that
//! nothing but a named cause loses a line.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use support::daemon::{Daemon, signal};
use support::eventually;
use support::servers::{connect, echo, exchange, local, tcp_server};

fn main() {
    support::run(tests![
        a_session_leaves_one_line_with_its_figures,
        lines_are_json_where_the_log_is,
        stderr_takes_lines_as_well,
        a_file_that_was_renamed_is_written_until_usr1,
        a_full_disk_costs_lines_and_nothing_else,
        a_steward_that_stands_still_costs_lines_and_nothing_else,
        lines_wait_for_a_new_steward,
        a_session_that_was_handed_over_leaves_one_line,
        the_last_sessions_are_written_before_the_end,
        a_flow_leaves_one_line_over_a_hand_over,
        a_file_that_cannot_be_opened_refuses_start_and_reload,
    ])
}

fn config(access: &str, more: &str, server: std::net::SocketAddr) -> String {
    format!(
        "[daemon]\nworkers = 2\n[log]\naccess = \"{access}\"\n{more}\
         [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nupstream = \"back\"\n\
         [[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n\
         [upstream.health]\ncheck = \"none\"\n"
    )
}

struct Scene {
    daemon: Daemon,
    server: String,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

fn scene(more: &str) -> Scene {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(path.to_str().unwrap(), more, server));
    Scene { daemon, server: server.to_string(), path, _folder: folder }
}

impl Scene {
    fn lines(&self) -> Vec<String> {
        fs::read_to_string(&self.path).unwrap().lines().map(str::to_string).collect()
    }
}

/// One exchange and an orderly end; the client's address.
fn session(bytes: &[u8]) -> String {
    let mut client = connect(local(8080));
    exchange(&mut client, bytes).unwrap();
    client.local_addr().unwrap().to_string()
}

fn fields(line: &str) -> BTreeMap<&str, &str> {
    line.split(' ').filter_map(|field| field.split_once('=')).collect()
}

fn a_session_leaves_one_line_with_its_figures() {
    let scene = scene("");
    let client = session(&[7; 1234]);
    eventually("the line is there", || !scene.lines().is_empty());
    let lines = scene.lines();
    let line = fields(&lines[0]);
    for (key, value) in [
        ("listener", "front"),
        ("client", client.as_str()),
        ("upstream", "back"),
        ("server", scene.server.as_str()),
        ("in", "1234"),
        ("out", "1234"),
        ("retries", "0"),
        ("end", "finished"),
    ] {
        assert_eq!(line.get(key), Some(&value), "{key} in {line:?}");
    }
    for key in ["wait_ms", "connect_ms", "total_ms"] {
        assert!(line[key].parse::<u64>().unwrap() < 10_000, "{line:?}");
    }
    // What ends otherwise is told otherwise.
    let mut killed = connect(local(8080));
    exchange(&mut killed, b"x").unwrap();
    scene.daemon.succeed(&["sessions", "--kill", "--all"]);
    eventually("it is told", || scene.lines().len() == 2);
    assert_eq!(fields(&scene.lines()[1])["end"], "killed");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&scene.path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o640);
}

fn lines_are_json_where_the_log_is() {
    let scene = scene("format = \"json\"\n");
    let client = session(b"12345");
    eventually("the line is there", || !scene.lines().is_empty());
    let line: serde_json::Value = serde_json::from_str(&scene.lines()[0]).unwrap();
    assert_eq!((line["client"].as_str(), line["in"].as_u64()), (Some(client.as_str()), Some(5)));
    assert!(line["time"].as_str().unwrap().ends_with('Z'));
}

fn stderr_takes_lines_as_well() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config("stderr", "", server));
    let client = session(b"12345");
    eventually("the line is there", || daemon.log().contains(&format!("client={client}")));
}

fn a_file_that_was_renamed_is_written_until_usr1() {
    let scene = scene("");
    session(b"x");
    eventually("the line is there", || scene.lines().len() == 1);
    let old = scene.path.with_extension("old");
    fs::rename(&scene.path, &old).unwrap();
    session(b"x");
    let count = |path| fs::read_to_string(path).unwrap_or_default().lines().count();
    eventually("the old file goes on", || count(&old) == 2);
    scene.daemon.signal(Signal::SIGUSR1);
    eventually("a new file is there", || scene.path.exists());
    eventually("and is written", || {
        session(b"x");
        count(&scene.path) > 0
    });
}

fn a_full_disk_costs_lines_and_nothing_else() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config("/dev/full", "", server));
    for _ in 0..20 {
        session(b"x");
    }
    eventually("all twenty are counted", || daemon.status().access_log_lost == 20);
    assert_eq!(daemon.log().matches("the access log cannot be written").count(), 1);
    session(b"x");
}

fn a_steward_that_stands_still_costs_lines_and_nothing_else() {
    let scene = scene("");
    let steward = steward_of(&scene.daemon);
    signal(steward, Signal::SIGSTOP);
    // A line has some 200 bytes; the socket takes at most some megabytes.
    let mut ended = 0;
    let dropped = || -> u64 {
        // The workers' own counters, in status, need the steward.
        signal(steward, Signal::SIGCONT);
        let dropped = scene.daemon.status().workers.iter().map(|worker| worker.access_log_dropped).sum();
        signal(steward, Signal::SIGSTOP);
        dropped
    };
    for _ in 0..6 {
        for _ in 0..500 {
            session(b"x");
            ended += 1;
        }
    }
    let lost = dropped();
    signal(steward, Signal::SIGCONT);
    eventually("every session is written or counted", || {
        let dropped: u64 = scene.daemon.status().workers.iter().map(|worker| worker.access_log_dropped).sum();
        scene.lines().len() as u64 + dropped == ended
    });
    assert!(lost > 0, "the socket took all lines: more are needed to see it full");
}

fn lines_wait_for_a_new_steward() {
    let scene = scene("");
    let steward = steward_of(&scene.daemon);
    signal(steward, Signal::SIGSTOP);
    for _ in 0..10 {
        session(b"x");
    }
    signal(steward, Signal::SIGKILL);
    eventually("a new steward writes them", || scene.lines().len() == 10);
}

fn a_session_that_was_handed_over_leaves_one_line() {
    let scene = scene("");
    let mut client = connect(local(8080));
    exchange(&mut client, &[1; 100]).unwrap();
    scene.daemon.ask("reload").unwrap();
    exchange(&mut client, &[2; 100]).unwrap();
    let address = client.local_addr().unwrap().to_string();
    finish(client);
    eventually("the line is there", || !scene.lines().is_empty());
    let lines = scene.lines();
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line = fields(&lines[0]);
    assert_eq!((line["client"], line["in"], line["out"]), (address.as_str(), "200", "200"));
}

fn finish(mut client: TcpStream) {
    client.flush().unwrap();
    client.shutdown(Shutdown::Write).unwrap();
}

fn the_last_sessions_are_written_before_the_end() {
    let mut scene = scene("");
    let mut held: Vec<TcpStream> = (0..200).map(|_| connect(local(8080))).collect();
    for client in &mut held {
        exchange(client, b"x").unwrap();
    }
    scene.daemon.signal(Signal::SIGTERM);
    eventually("it leaves", || scene.daemon.status().workers.iter().all(|worker| worker.state == "draining"));
    drop(held);
    scene.daemon.wait(Duration::from_secs(20));
    assert_eq!(scene.lines().len(), 200);
}

fn a_file_that_cannot_be_opened_refuses_start_and_reload() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let mut daemon = Daemon::start(&config("/nonexistent/access.log", "", server));
    assert_eq!(daemon.wait(Duration::from_secs(10)).code(), Some(1));
    daemon.says("/nonexistent/access.log cannot be opened");
    let scene = scene("");
    let file = scene.daemon.folder().join("evenkeel.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace(scene.path.to_str().unwrap(), "/nonexistent/access.log")).unwrap();
    let error = scene.daemon.ask("reload").unwrap_err();
    assert!(error.contains("make its folder first"), "{error}");
    session(b"x");
    eventually("the old one is written on", || scene.lines().len() == 1);
}

fn a_flow_leaves_one_line_over_a_hand_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((count, from)) = server.recv_from(&mut bytes) {
            let _ = server.send_to(&[&bytes[..count], b"!"].concat(), from);
        }
    });
    let daemon = Daemon::ready(&format!(
        "[daemon]\nworkers = 2\n[log]\naccess = \"{}\"\n\
         [[listener]]\nname = \"names\"\nmode = \"udp\"\nbind = \"127.0.0.1:8053\"\nupstream = \"dns\"\n\
         [listener.udp]\nidle_timeout = \"1s\"\n\
         [[upstream]]\nname = \"dns\"\n[[upstream.server]]\naddress = \"{address}\"\n",
        path.display()
    ));
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect("127.0.0.1:8053").unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let ask = || {
        client.send(&[7; 100]).unwrap();
        assert_eq!(client.recv(&mut [0; 2048]).unwrap(), 101);
    };
    ask();
    daemon.ask("reload").unwrap();
    ask();
    eventually("the flow ends", || fs::read_to_string(&path).is_ok_and(|text| !text.is_empty()));
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    let line = fields(text.trim());
    let (client, server) = (client.local_addr().unwrap().to_string(), address.to_string());
    assert_eq!((line["client"], line["server"]), (client.as_str(), server.as_str()));
    assert_eq!((line["in"], line["out"], line["end"]), ("200", "202", "idle_timeout"));
    assert!(line["total_ms"].parse::<u64>().unwrap() >= 1000, "{text}");
}

fn steward_of(daemon: &Daemon) -> u32 {
    let is_steward = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "ek-steward")
    };
    daemon.children().into_iter().find(is_steward).expect("there is a steward")
}
