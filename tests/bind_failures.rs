//! Every bind of `evenkeel run` that fails: its words, its exit code, and the
//! holder by name.

mod support;

use std::ffi::OsString;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::daemon::Daemon;

fn main() {
    support::run(tests![
        a_holder_of_the_same_user_is_named,
        a_holder_of_another_user_is_named_with_its_uid needs ["root"],
        a_holder_that_shares_but_is_another_user_is_explained needs ["root"],
        a_holder_in_another_pid_namespace_is_told_by_uid needs ["root", "unshare"],
        a_holder_that_proc_hides_is_told_by_uid needs ["root"],
        a_wildcard_holder_of_a_specific_address_is_named,
        an_address_that_is_not_here_hints_at_freebind,
        a_link_local_address_without_a_scope_says_so,
        an_interface_that_does_not_exist_is_said needs ["root"],
        a_low_port_without_permission_says_what_would_permit_it needs ["root"],
        doctor_says_the_same_as_run,
    ])
}

fn config(bind: &str) -> String {
    format!(
        "[daemon]\nworkers = 1\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"{bind}\"\nservice = \"echo\"\n"
    )
}

/// Runs the daemon until it refuses: its exit code and its words.
#[track_caller]
fn refused(config: &str, change: impl FnOnce(&mut Command)) -> (Option<i32>, String) {
    let mut daemon = Daemon::start_with(config, change);
    let status = daemon.wait(Duration::from_secs(15));
    (status.code(), daemon.log())
}

#[track_caller]
fn assert_says(log: &str, expected: &[&str]) {
    for part in expected {
        assert!(log.contains(part), "{part:?} is not in\n{log}");
    }
}

/// The program under another command; what the harness set is kept.
fn under(command: &mut Command, wrapper: &[&str]) {
    let program = command.get_program().to_owned();
    let arguments: Vec<OsString> = command.get_args().map(OsString::from).collect();
    let environment: Vec<(OsString, OsString)> =
        command.get_envs().filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned()))).collect();
    let notify = environment.iter().find(|(key, _)| key == "NOTIFY_SOCKET").expect("set").1.clone();
    let log = fs::OpenOptions::new().append(true).open(Path::new(&notify).with_file_name("log")).unwrap();
    *command = Command::new(wrapper[0]);
    command.args(&wrapper[1..]).arg(program).args(arguments).envs(environment).stderr(log);
}

/// Lets another user write beside the configuration.
fn as_user(command: &mut Command, uid: u32) {
    let notify = command.get_envs().find(|(key, _)| *key == "NOTIFY_SOCKET").and_then(|(_, value)| value);
    let folder = Path::new(notify.expect("set")).parent().expect("a folder").to_owned();
    fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    std::os::unix::process::CommandExt::uid(command, uid);
}

fn a_holder_of_the_same_user_is_named() {
    let _holder = TcpListener::bind("127.0.0.1:8080").unwrap();
    let (code, log) = refused(&config("127.0.0.1:8080"), |_| {});
    assert_eq!(code, Some(69));
    let pid = format!("pid {}", std::process::id());
    assert_says(&log, &["listener \"front\": 127.0.0.1:8080/tcp", &pid, "bind_failures"]);
}

fn a_holder_of_another_user_is_named_with_its_uid() {
    let holder = Daemon::start_with(&config("127.0.0.1:8080"), |command| as_user(command, 65534));
    // It may not write to the test's notify socket.
    support::eventually("it serves", || holder.log().contains("ready: 1 workers"));
    let (code, log) = refused(&config("127.0.0.1:8080"), |_| {});
    assert_eq!(code, Some(69));
    assert_says(&log, &["127.0.0.1:8080/tcp", &format!("pid {}", holder.pid()), "uid 65534"]);
}

fn a_holder_that_shares_but_is_another_user_is_explained() {
    let holder = Daemon::ready(&config("127.0.0.1:8080"));
    let (code, log) = refused(&config("127.0.0.1:8080"), |command| as_user(command, 65534));
    assert_eq!(code, Some(69));
    assert_says(&log, &["127.0.0.1:8080/tcp", "uid 0"]);
    drop(holder);
}

fn a_holder_in_another_pid_namespace_is_told_by_uid() {
    let _holder = TcpListener::bind("127.0.0.1:8080").unwrap();
    let (code, log) = refused(&config("127.0.0.1:8080"), |command| {
        under(command, &["unshare", "--pid", "--fork", "--mount-proc"]);
    });
    assert_eq!(code, Some(69), "{log}");
    assert_says(&log, &["127.0.0.1:8080/tcp", "uid 0", "not visible from here"]);
}

fn a_holder_that_proc_hides_is_told_by_uid() {
    // An ordinary user may not look into root's descriptors.
    let _holder = TcpListener::bind("127.0.0.1:8080").unwrap();
    let (code, log) = refused(&config("127.0.0.1:8080"), |command| as_user(command, 65534));
    assert_eq!(code, Some(69), "{log}");
    assert_says(&log, &["127.0.0.1:8080/tcp", "uid 0", "not visible from here"]);
}

fn a_wildcard_holder_of_a_specific_address_is_named() {
    let _holder = TcpListener::bind("0.0.0.0:8080").unwrap();
    let (code, log) = refused(&config("127.0.0.1:8080"), |_| {});
    assert_eq!(code, Some(69));
    assert_says(&log, &["127.0.0.1:8080/tcp", "0.0.0.0:8080", &format!("pid {}", std::process::id())]);
}

fn an_address_that_is_not_here_hints_at_freebind() {
    let (code, log) = refused(&config("192.0.2.7:8080"), |_| {});
    assert_eq!(code, Some(69));
    assert_says(&log, &["192.0.2.7:8080/tcp", "freebind = true"]);
}

fn a_link_local_address_without_a_scope_says_so() {
    let (code, log) = refused(&config("[fe80::1]:8080"), |_| {});
    assert_eq!(code, Some(69), "{log}");
    assert_says(&log, &["[fe80::1]:8080/tcp", "not whole without its interface", "interface = \"eth0\""]);
}

fn an_interface_that_does_not_exist_is_said() {
    let text = config("127.0.0.1:8080") + "interface = \"nosuch0\"\n";
    let (code, log) = refused(&text, |_| {});
    assert_eq!(code, Some(69), "{log}");
    assert_says(&log, &["127.0.0.1:8080/tcp", "nosuch0"]);
}

fn a_low_port_without_permission_says_what_would_permit_it() {
    let (code, log) = refused(&config("127.0.0.1:81"), |command| as_user(command, 65534));
    assert_eq!(code, Some(77));
    assert_says(&log, &["127.0.0.1:81/tcp", "CAP_NET_BIND_SERVICE", "ip_unprivileged_port_start"]);
}

fn doctor_says_the_same_as_run() {
    let _holder = TcpListener::bind("127.0.0.1:8080").unwrap();
    let (_, log) = refused(&config("127.0.0.1:8080"), |_| {});
    let doctor = support::daemon::evenkeel(&["doctor", "127.0.0.1:8080"]);
    assert_eq!(doctor.status.code(), Some(69));
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert_says(&said, &["127.0.0.1:8080/tcp", &format!("pid {}", std::process::id())]);
    // The line of the holder, word for word.
    let line = log.lines().find(|line| line.contains("127.0.0.1:8080/tcp")).expect("a line");
    let words = line.split_once("127.0.0.1:8080/tcp").expect("contains it").1;
    assert_says(&said, &[words]);
    drop(_holder);
    assert_eq!(support::daemon::evenkeel(&["doctor", "127.0.0.1:8080"]).status.code(), Some(0));
}
