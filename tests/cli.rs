//! The program as a user meets it: the demo, help, errors, the control socket.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::daemon::{Daemon, evenkeel, program, signal};
use support::servers::{connect, exchange, local};
use support::{eventually, within};

fn main() {
    support::run(tests![
        run_without_a_file_serves_the_demo_and_says_what_to_try,
        the_greetings_commands_work_as_they_are_printed,
        check_tells_every_error_with_its_place,
        check_binds_nothing needs ["strace"],
        check_warns_of_accounts_that_this_host_does_not_have,
        a_reload_whose_file_is_gone_says_what_to_do,
        an_error_of_two_lines_is_one_line_of_the_log,
        a_full_disk_is_no_success,
        a_file_that_is_not_there_is_said,
        what_cannot_be_read_is_json_for_programs,
        a_reader_that_has_enough_is_no_failure,
        config_show_prints_what_run_would_run,
        status_without_a_daemon_says_what_to_do,
        status_shows_every_slot_and_the_spread,
        rubbish_at_the_control_socket_is_answered_and_harms_nobody,
        slow_callers_do_not_keep_others_waiting,
        usage_errors_exit_with_two,
        completions_and_the_manual_page_are_printed,
        the_log_can_be_json,
    ])
}

const FRONT: &str =
    "[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nservice = \"echo\"\n";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `evenkeel run` with nothing but a folder for its socket.
fn demo() -> (std::process::Child, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let child = Command::new(program())
        .arg("run")
        .env_remove("EVENKEEL_CONFIG")
        .env("EVENKEEL_SOCKET", folder.path().join("control.sock"))
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let path = folder.path().join("log");
    within(Duration::from_secs(20), "the greeting", || {
        fs::read_to_string(&path).unwrap().contains("try next")
    });
    (child, folder)
}

fn leave(mut child: std::process::Child) {
    signal(child.id(), Signal::SIGTERM);
    assert!(child.wait().unwrap().success());
}

fn run_without_a_file_serves_the_demo_and_says_what_to_try() {
    let (child, folder) = demo();
    let mut answer = [0; 200];
    let count = connect(local(8080)).read(&mut answer).unwrap();
    assert!(text(&answer[..count]).starts_with("evenkeel listener=server-"), "{}", text(&answer[..count]));
    leave(child);
    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(log.contains("configuration: embedded demo (config/demo.toml)"), "{log}");
    assert!(log.contains("127.0.0.1:8080"), "{log}");
}

fn the_greetings_commands_work_as_they_are_printed() {
    let (child, folder) = demo();
    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    let commands: Vec<&str> = log
        .lines()
        .skip_while(|line| !line.starts_with("try next"))
        .filter_map(|line| line.strip_prefix("  "))
        .collect();
    assert_eq!(commands.len(), 2, "{log}");
    for command in commands {
        let path = std::path::Path::new(program()).parent().unwrap().display().to_string();
        let path = format!("{path}:{}", std::env::var("PATH").unwrap());
        let done = Command::new("bash")
            .args(["-c", command])
            .env("PATH", path)
            .env("EVENKEEL_SOCKET", folder.path().join("control.sock"))
            .output()
            .unwrap();
        assert!(text(&done.stdout).contains("slot"), "{command}: {done:?}");
    }
    leave(child);
}

fn written(name: &str, content: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    let path = path.display().to_string();
    (folder, path)
}

const WRONG: &str = "[daemon]\nworkers = 0\n[[listener]]\nname = \"front\"\nmod = \"tcp\"\nmode = \"tcp\"\n\
    bind = \"127.0.0.1:8080\"\nupstream = \"bakc\"\n[[upstream]]\nname = \"back\"\n\
    [[upstream.server]]\naddress = \"127.0.0.1:1\"\n";

fn check_tells_every_error_with_its_place() {
    let (_folder, path) = written("wrong.toml", WRONG);
    for command in ["check", "run"] {
        let done = evenkeel(&[command, "-c", &path]);
        assert_eq!(done.status.code(), Some(78));
        let errors = text(&done.stderr);
        for expected in
            ["wrong.toml:2:11: ", "wrong.toml:5:1: ", "wrong.toml:8:12: ", "did you mean \"back\""]
        {
            assert!(errors.contains(expected), "{expected} in {errors}");
        }
    }
    let done = evenkeel(&["check", "-c", &path, "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((json["ok"].as_bool(), json["errors"].as_array().unwrap().len()), (Some(false), 3));
    assert_eq!(json["errors"][0]["line"], 2);
}

fn check_binds_nothing() {
    let daemon = Daemon::ready(&format!("[daemon]\nworkers = 1\n{FRONT}"));
    let path = daemon.folder().join("evenkeel.toml");
    let done = Command::new("strace")
        .args(["-f", "-e", "trace=bind,listen", "-o"])
        .arg(daemon.folder().join("calls"))
        .args([program(), "check", "-c"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    let calls = fs::read_to_string(daemon.folder().join("calls")).unwrap();
    assert!(!calls.contains("bind(") && !calls.contains("listen("), "{calls}");
}

fn check_warns_of_accounts_that_this_host_does_not_have() {
    let (_folder, path) = written("my.toml", &format!("[daemon]\n\ngroup = \"of-nobody\"\n{FRONT}"));
    let done = evenkeel(&["check", "-c", &path]);
    assert!(done.status.success(), "the daemon may run on another host: {done:?}");
    let said = text(&done.stderr);
    assert!(
        said.starts_with("warning: ") && said.contains("my.toml:3:1: group \"of-nobody\" does not exist"),
        "{said}"
    );
}

fn a_reload_whose_file_is_gone_says_what_to_do() {
    let daemon = Daemon::ready(&format!("[daemon]\nworkers = 1\n{FRONT}"));
    fs::remove_file(daemon.folder().join("evenkeel.toml")).unwrap();
    let (code, said) = daemon.run(&["reload"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("No such file or directory") && said.contains("\n  is the path right?"), "{said}");
}

fn an_error_of_two_lines_is_one_line_of_the_log() {
    let daemon = Daemon::ready(&format!("[daemon]\nworkers = 1\n{FRONT}"));
    daemon.rewrite(&FRONT.replace("echo", "eco"));
    daemon.signal(Signal::SIGHUP);
    eventually("it is refused", || daemon.log().contains("not reloaded"));
    assert!(
        daemon.log().contains("service = \"eco\" is not known: did you mean \"echo\"?"),
        "{}",
        daemon.log()
    );
}

fn a_full_disk_is_no_success() {
    let (_folder, path) = written("my.toml", FRONT);
    let mut command = Command::new(program());
    command.args(["check", "-c", &path]).stdout(fs::File::create("/dev/full").unwrap());
    let done = command.output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("standard output: No space left on device"), "{done:?}");
}

fn a_file_that_is_not_there_is_said() {
    for command in ["run", "check"] {
        let done = evenkeel(&[command, "-c", "/nonexistent/x.toml"]);
        assert_eq!(done.status.code(), Some(78));
        assert!(text(&done.stderr).contains("/nonexistent/x.toml: No such file or directory"), "{done:?}");
    }
}

fn what_cannot_be_read_is_json_for_programs() {
    let (folder, path) = written("rubbish.toml", "");
    fs::write(&path, [0xff, 0xfe]).unwrap();
    for file in ["/nonexistent/x.toml", folder.path().to_str().unwrap(), &path] {
        let done = evenkeel(&["check", "--json", "-c", file]);
        assert_eq!(done.status.code(), Some(78), "{done:?}");
        let json: serde_json::Value = serde_json::from_slice(&done.stdout).expect("JSON all the same");
        assert_eq!((json["ok"].as_bool(), json["errors"][0]["file"].as_str()), (Some(false), Some(file)));
        assert!(!json["errors"][0]["help"].as_str().unwrap().is_empty(), "{json}");
    }
}

/// `evenkeel ... | true`.
fn a_reader_that_has_enough_is_no_failure() {
    let (_folder, path) = written("front.toml", FRONT);
    let commands: [&[&str]; 6] = [
        &["completions", "bash"],
        &["man"],
        &["config", "show", "-c", &path],
        &["check", "-c", &path],
        &["check", "--json", "-c", &path],
        &["doctor", "127.0.0.1:1"],
    ];
    for arguments in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let done = Command::new(program()).args(arguments).stdout(writer).output().unwrap();
        assert_eq!(done.status.code(), Some(0), "{arguments:?}: {done:?}");
        assert_eq!(text(&done.stderr), "", "{arguments:?}");
    }
}

fn config_show_prints_what_run_would_run() {
    let (_folder, path) = written("mine.toml", &format!("[daemon]\nworkers = 3\n{FRONT}"));
    let done = evenkeel(&["config", "show", "-c", &path]);
    let shown = text(&done.stdout);
    let line =
        |start: &str| shown.lines().find(|line| line.starts_with(start)).unwrap_or_default().to_string();
    assert!(line("workers = 3").ends_with("  # mine.toml:2"), "{shown}");
    assert!(line("idle_timeout = \"1h\"").ends_with("  # default"), "{shown}");
    let (_folder, again) = written("again.toml", &shown);
    assert!(evenkeel(&["check", "-c", &again]).status.success());
}

fn status_without_a_daemon_says_what_to_do() {
    let done = evenkeel(&["status", "--socket", "/nonexistent/c.sock"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("no daemon answers") && text(&done.stderr).contains("evenkeel run"));
}

fn status_shows_every_slot_and_the_spread() {
    let daemon = Daemon::ready(&format!("[daemon]\nworkers = 3\n{FRONT}"));
    let mut held = Vec::new();
    for _ in 0..60 {
        let mut client = connect(local(8080));
        exchange(&mut client, b"x").unwrap();
        held.push(client);
    }
    let done = daemon.command(&["status", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(json["workers"].as_array().unwrap().len(), 3);
    let listener = &json["listeners"][0];
    assert_eq!((listener["connections"].as_u64(), listener["active"].as_u64()), (Some(60), Some(60)));
    let per_slot: Vec<u64> =
        listener["spread"]["per_slot"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
    assert_eq!(per_slot.iter().sum::<u64>(), 60);
    for key in ["max_over_mean", "cv", "jain", "chi_square", "p_value"] {
        assert!(listener["spread"][key].is_f64(), "{key}");
    }
    let accepted: Vec<u64> =
        json["workers"].as_array().unwrap().iter().map(|w| w["accepted"].as_u64().unwrap()).collect();
    assert_eq!(accepted, per_slot);
    let table = text(&daemon.command(&["status"]).stdout);
    assert!(table.contains("SLOT") && table.contains("listener front  tcp 127.0.0.1:8080"), "{table}");
    assert!(table.contains("connections 60  active 60"), "{table}");
}

fn rubbish_at_the_control_socket_is_answered_and_harms_nobody() {
    let daemon = Daemon::ready(&format!("[daemon]\nworkers = 1\n{FRONT}"));
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    for (rubbish, expected) in [
        (&b"hello\n"[..], "not a JSON object"),
        (b"\xff\xfe\x00\n", "not a JSON object"),
        (b"[]\n", "a request is an object with a"),
        (b"{\"command\":7}\n", "a request is an object with a"),
        (b"{\"command\":\"\\u001b[2Jexplode\"}\n", "unknown command"),
        (b"{\"command\":\"status\"}\n", "\"generation\":1"),
    ] {
        stream.write_all(rubbish).unwrap();
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        assert!(line.contains(expected), "{line}");
        assert!(!line.contains('\u{1b}'));
    }
    let mut huge = UnixStream::connect(daemon.socket()).unwrap();
    let _ = huge.write_all(&vec![b'x'; 1 << 20]);
    let mut line = String::new();
    let _ = BufReader::new(&huge).read_line(&mut line);
    assert!(line.is_empty() || line.contains("longer than 65536 bytes"), "{line}");
    assert_eq!(daemon.status().workers[0].restarts, 0);
}

fn slow_callers_do_not_keep_others_waiting() {
    let daemon = Daemon::ready(&format!("[daemon]\nworkers = 1\n{FRONT}"));
    let mut slow = Vec::new();
    for _ in 0..40 {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.write_all(b"{\"comm").unwrap();
        slow.push(stream);
    }
    assert!(daemon.command(&["status"]).status.success());
    // Past the most callers at once the answer is a clear no, and only that.
    for _ in 0..100 {
        slow.push(UnixStream::connect(daemon.socket()).unwrap());
    }
    let mut refused = String::new();
    eventually("a refusal", || {
        let stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let _ = BufReader::new(&stream).read_line(&mut refused);
        !refused.is_empty()
    });
    assert!(refused.contains("too many callers"), "{refused}");
    drop(slow);
    eventually("room again", || daemon.command(&["status"]).status.success());
}

fn usage_errors_exit_with_two() {
    for arguments in [&["frobnicate"][..], &["run", "--no-such-flag"], &["check", "extra"], &[]] {
        assert_eq!(evenkeel(arguments).status.code(), Some(2), "{arguments:?}");
    }
    for (arguments, way_out) in [
        (&["scale", "many"][..], "write a number from 1 to 64"),
        (&["scale", "0"], "write a number from 1 to 64"),
        (&["server", "drain", "web"], "like web/10.0.0.1:80"),
        (&["server", "weight", "web/10.0.0.1:80", "7"], "write a number from 0 to 256"),
    ] {
        let done = evenkeel(arguments);
        assert_eq!(done.status.code(), Some(2), "{arguments:?}");
        assert!(text(&done.stderr).contains(way_out), "{done:?}");
    }
    assert!(evenkeel(&["--help"]).status.success());
    // The processes of the daemon are nobody's commands.
    assert_eq!(evenkeel(&["worker", "0"]).status.code(), Some(2));
}

fn completions_and_the_manual_page_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(text(&evenkeel(&["completions", shell]).stdout).contains("evenkeel"));
    }
    assert!(text(&evenkeel(&["man"]).stdout).contains(".TH evenkeel"));
}

fn the_log_can_be_json() {
    let daemon = Daemon::ready(&format!(
        "[daemon]\nworkers = 1\n{FRONT}[log]\nformat = \"json\"\nlevel = \"debug\"\n"
    ));
    eventually("the log is written", || daemon.log().contains("ready: 1 workers"));
    let log = daemon.log();
    for line in log.lines().filter(|line| line.starts_with('{')) {
        let json: serde_json::Value = serde_json::from_str(line).expect("each line is an object");
        assert!(json["level"].is_string() && json["message"].is_string());
    }
}
