//! Another program in place of the running one: nothing is lost, and what
//! cannot take over never does.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::daemon::{Daemon, evenkeel, program, runs, signal};
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::{datagrams, eventually, pattern, within};

fn main() {
    support::run(tests![
        upgrades_under_load_lose_nothing,
        twenty_upgrades_leave_nothing_behind,
        usr2_upgrades_and_systemd_is_told,
        counters_and_what_scale_set_go_on,
        what_is_no_program_is_refused,
        another_program_is_refused,
        a_program_that_refuses_the_configuration_is_refused_with_its_words,
        a_worker_that_dies_on_trial_refuses_the_upgrade,
        what_cannot_take_over_gives_way_to_the_old_program,
        a_file_that_no_worker_can_serve_leads_back,
        processes_that_are_killed_meanwhile_are_replaced,
        signals_that_come_during_an_upgrade_are_not_lost,
        the_table_of_steering_goes_on needs ["ebpf"],
    ])
}

/// A daemon that runs from a file of its own, which a test may replace.
struct Upgradable {
    daemon: Daemon,
    path: PathBuf,
    hook: PathBuf,
}

impl Upgradable {
    #[track_caller]
    fn ready(config: &str) -> Upgradable {
        let mut paths = None;
        let mut daemon = Daemon::start_with(config, |command| {
            let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
            let folder = Path::new(&arguments[2]).parent().expect("a folder").to_path_buf();
            let (path, hook) = (folder.join("evenkeel"), folder.join("hook"));
            fs::copy(program(), &path).expect("a copy");
            let log = fs::File::create(folder.join("log")).expect("a log file");
            let mut own = Command::new(&path);
            own.args(&arguments)
                .env("NOTIFY_SOCKET", folder.join("notify"))
                .env("EVENKEEL_TEST_UPGRADE", &hook);
            own.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(log);
            *command = own;
            paths = Some((path, hook));
        });
        daemon.wait_ready();
        let (path, hook) = paths.expect("set above");
        Upgradable { daemon, path, hook }
    }

    /// As a package upgrade does it: written aside, and renamed.
    fn install(&self, bytes: &[u8]) {
        let aside = self.path.with_extension("new");
        fs::write(&aside, bytes).expect("a file");
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o755)).expect("a mode");
        fs::rename(&aside, &self.path).expect("a rename");
    }

    /// Another file that does the same.
    fn install_version(&self, number: usize) {
        let mut bytes = fs::read(program()).expect("the program");
        bytes.extend(format!("version {number}").bytes());
        self.install(&bytes);
    }

    /// The next image fails at this step.
    fn misbehave_at(&self, step: &str) {
        fs::write(&self.hook, step).expect("a file");
    }

    fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let socket = self.daemon.socket();
        let mut all = arguments.to_vec();
        all.extend(["--socket", socket.to_str().expect("plain")]);
        let done = evenkeel(&all);
        let text =
            String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        (done.status.code(), text)
    }

    #[track_caller]
    fn upgrade(&self) -> String {
        let (code, text) = self.run(&["upgrade"]);
        assert_eq!(code, Some(0), "{text}\n{}", self.daemon.log());
        for failure in ["a hand-over stopped", "a hand-over was", "left to drain"] {
            assert!(!self.daemon.log().contains(failure), "{}", self.daemon.log());
        }
        text
    }

    #[track_caller]
    fn is_refused(&self, word: &str) -> String {
        let (code, text) = self.run(&["upgrade"]);
        assert_eq!(code, Some(1), "{text}\n{}", self.daemon.log());
        assert!(text.contains(word), "{text}\n{}", self.daemon.log());
        text
    }

    /// Which file the supervisor and its children run.
    fn images(&self) -> Vec<PathBuf> {
        let pids = [vec![self.daemon.pid()], self.daemon.children()].concat();
        pids.iter().filter_map(|pid| fs::read_link(format!("/proc/{pid}/exe")).ok()).collect()
    }

    /// Only processes of the file that lies at the path now are left.
    #[track_caller]
    fn runs_the_file_alone(&self, children: usize) {
        eventually("every process is of the new file", || {
            let images = self.images();
            images.len() == children + 1 && images.iter().all(|image| *image == self.path)
        });
    }
}

fn config(workers: usize, server: &str) -> String {
    format!(
        "[daemon]\nworkers = {workers}\n\
         [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nupstream = \"back\"\n\
         [[listener]]\nname = \"datagrams\"\nmode = \"udp\"\nbind = \"127.0.0.1:8081\"\nservice = \"echo\"\n\
         [[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n"
    )
}

/// What was served while something was done to a daemon.
#[derive(Default)]
struct Served {
    short: AtomicU64,
    long: AtomicU64,
    datagrams: AtomicU64,
}

/// Short connections, long sessions with checked payloads and datagrams, all
/// of which must be served without one error.
fn under_load(disturb: impl FnOnce()) -> Served {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (stop, served) = (AtomicBool::new(false), Served::default());
    std::thread::scope(|scope| {
        let (stop, served) = (&stop, &served);
        for _ in 0..3 {
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let mut client = connect(local(8080));
                    let answer = exchange(&mut client, &[5; 700]).expect("a short session is served");
                    assert!(answer == [5; 700]);
                    served.short.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for index in 0..20 {
            scope.spawn(move || {
                let mut client = connect(local(8080));
                let mut at = index * 1000;
                while !stop.load(Ordering::Relaxed) {
                    let bytes = pattern(at, [1, 64, 1500, 40_000, 900_000][at % 5]);
                    let mut writer = client.try_clone().expect("a duplicate");
                    let answer = std::thread::scope(|inner| {
                        inner.spawn(|| writer.write_all(&bytes).expect("a long session is written"));
                        let mut answer = vec![0; bytes.len()];
                        client.read_exact(&mut answer).expect("a long session is read");
                        answer
                    });
                    assert!(answer == bytes, "wrong bytes");
                    at += 1;
                    served.long.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for index in 0..4u8 {
            scope.spawn(move || {
                let client = datagrams::client("127.0.0.1:0");
                while !stop.load(Ordering::Relaxed) {
                    let answer = datagrams::ask(&client, local(8081), &[index; 100]);
                    assert_eq!(answer, [index; 100]);
                    served.datagrams.fetch_add(1, Ordering::Relaxed);
                    // Some hundred a second are enough.
                    std::thread::park_timeout(Duration::from_millis(2));
                }
            });
        }
        let _stop = Stop(stop);
        let goes_on = || {
            let counts = [&served.short, &served.long, &served.datagrams].map(|c| c.load(Ordering::Relaxed));
            within(Duration::from_secs(30), "the load goes on", || {
                let now = [&served.short, &served.long, &served.datagrams].map(|c| c.load(Ordering::Relaxed));
                now.iter().zip(counts).all(|(now, before)| *now > before + 20)
            });
        };
        goes_on();
        disturb();
        goes_on();
    });
    served
}

fn upgrades_under_load_lose_nothing() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let it = Upgradable::ready(&config(3, &server.to_string()));
    let pid = it.daemon.pid();
    let served = under_load(|| {
        for round in 1..=10 {
            it.install_version(round);
            assert_eq!(it.upgrade().trim(), format!("generation {} serves", round + 1));
            assert!(runs(pid), "the same process");
            it.runs_the_file_alone(4);
        }
    });
    let status = it.daemon.status();
    assert_eq!((status.pid, status.generation), (pid, 11));
    assert!(status.workers.iter().all(|worker| worker.restarts == 0 && worker.generation == 11));
    println!(
        "10 upgrades: {} short, {} long, {} datagrams, no error",
        served.short.into_inner(),
        served.long.into_inner(),
        served.datagrams.into_inner()
    );
}

fn descriptors(daemon: &Daemon) -> Vec<String> {
    let folder = format!("/proc/{}/fd", daemon.pid());
    let entries = fs::read_dir(folder).expect("a living process").flatten();
    let mut all: Vec<String> = entries
        .map(|entry| format!("{:?} {:?}", entry.file_name(), fs::read_link(entry.path()).unwrap_or_default()))
        .collect();
    all.sort();
    all
}

/// Descriptors of the supervisor, and the number of processes.
fn weight(daemon: &Daemon) -> (usize, usize) {
    let fds = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("a living process").count();
    (fds, daemon.children().len())
}

fn twenty_upgrades_leave_nothing_behind() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let it = Upgradable::ready(&config(2, &server.to_string()));
    let mut session = connect(local(8080));
    exchange(&mut session, b"x").expect("served");
    it.install_version(0);
    it.upgrade();
    eventually("the new steward is there", || it.daemon.log().matches("steward ready").count() == 2);
    it.runs_the_file_alone(3);
    let before = weight(&it.daemon);
    for round in 1..=20 {
        if round % 5 == 0 {
            it.install_version(round);
        }
        it.upgrade();
        // The socket of commands is never without somebody behind it.
        let (code, text) = it.run(&["status"]);
        assert_eq!(code, Some(0), "{text}");
    }
    eventually("as many descriptors as before", || {
        let now = weight(&it.daemon);
        if now != before {
            eprintln!("{now:?} and not {before:?}: {:?}", descriptors(&it.daemon));
        }
        // One may have been open for a moment when they were counted first.
        now.0 <= before.0 && now.1 == before.1
    });
    it.runs_the_file_alone(3);
    exchange(&mut session, b"x").expect("it was handed over 21 times");
}

fn usr2_upgrades_and_systemd_is_told() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let it = Upgradable::ready(&config(2, &server.to_string()));
    it.install_version(1);
    it.daemon.notified();
    it.daemon.signal(Signal::SIGUSR2);
    eventually("it is over", || it.daemon.log().contains("upgraded: generation 2 serves"));
    it.runs_the_file_alone(3);
    let told = it.daemon.notified().join("\n");
    assert!(told.contains("RELOADING=1") && told.contains("MONOTONIC_USEC="), "{told}");
    assert!(told.rfind("READY=1") > told.find("RELOADING=1"), "{told}");
    assert!(!told.contains("STOPPING=1"), "{told}");
    it.install(b"rubbish");
    it.daemon.signal(Signal::SIGUSR2);
    eventually("it is refused", || it.daemon.log().contains("not upgraded: "));
    let told = it.daemon.notified().join("\n");
    assert!(told.rfind("READY=1") > told.find("RELOADING=1"), "{told}");
    assert_eq!(it.daemon.status().generation, 2);
}

fn counters_and_what_scale_set_go_on() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let it = Upgradable::ready(&config(2, &server.to_string()));
    let mut sessions: Vec<TcpStream> = (0..40).map(|_| connect(local(8080))).collect();
    for session in &mut sessions {
        exchange(session, &[1; 100]).expect("served");
    }
    assert_eq!(it.run(&["scale", "3"]).0, Some(0));
    let started_at = it.daemon.status().started_at;
    for round in 0..5 {
        it.install_version(round);
        it.upgrade();
        exchange(&mut connect(local(8080)), &[1; 100]).expect("served");
        eventually("the short one has ended", || it.daemon.listener("front").active == 40);
        let listener = it.daemon.listener("front");
        let count = 41 + round as u64;
        assert_eq!((listener.connections, listener.bytes_in), (count, count * 100));
        assert_eq!(it.daemon.status().workers.len(), 3, "scale stands");
    }
    assert_eq!(it.daemon.status().started_at, started_at);
    drop(sessions);
    eventually("all have ended", || it.daemon.listener("front").ended.get("finished") == Some(&45));
    // Another reload finds everything as after any reload.
    assert_eq!(it.run(&["reload"]), (Some(0), "generation 8 serves\n".into()));
}

/// Whatever is refused leaves the same workers, and a daemon that can still be
/// upgraded.
fn refusals(happen: impl FnOnce(&Upgradable)) {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let it = Upgradable::ready(&config(2, &server.to_string()));
    let mut session = connect(local(8080));
    exchange(&mut session, b"before").expect("served");
    let workers = || -> Vec<u32> { it.daemon.status().workers.iter().map(|worker| worker.pid).collect() };
    let before = (workers(), it.daemon.status().generation);
    let fds = weight(&it.daemon);
    happen(&it);
    assert_eq!((workers(), it.daemon.status().generation), before);
    eventually("nothing is left behind", || {
        let now = weight(&it.daemon);
        if now != fds {
            eprintln!("{now:?} and not {fds:?}: {:?}", descriptors(&it.daemon));
        }
        now.0 <= fds.0 && now.1 == fds.1
    });
    exchange(&mut session, b"after").expect("it was not touched");
    exchange(&mut connect(local(8080)), b"new").expect("served");
    let _ = fs::remove_file(&it.hook);
    it.install_version(1);
    it.upgrade();
    it.runs_the_file_alone(3);
    exchange(&mut session, b"after all").expect("it was handed over");
}

fn what_is_no_program_is_refused() {
    refusals(|it| {
        it.install(b"#!/bin/sh\ntouch \"$0.ran\"\n");
        it.is_refused("this is no program of this system");
        assert!(!it.path.with_extension("ran").exists(), "a script is not even run");
        it.install(b"");
        it.is_refused("this is no program of this system");
        // An ELF header, and rubbish behind it.
        it.install(&[b"\x7fELF".as_slice(), &[7; 5000]].concat());
        it.is_refused("it cannot be run");
        fs::remove_file(&it.path).expect("a file");
        let text = it.is_refused("No such file or directory");
        assert!(text.contains(it.path.to_str().expect("plain")), "{text}");
        fs::create_dir(&it.path).expect("a folder");
        it.is_refused("evenkeel: ");
        fs::remove_dir(&it.path).expect("a folder");
    });
}

fn another_program_is_refused() {
    refusals(|it| {
        it.install(&fs::read("/bin/true").expect("coreutils"));
        it.is_refused("no evenkeel that can be upgraded to");
        it.install(&fs::read("/bin/false").expect("coreutils"));
        it.is_refused("does not accept the configuration (exit status: 1)");
    });
}

fn a_program_that_refuses_the_configuration_is_refused_with_its_words() {
    refusals(|it| {
        it.install_version(5);
        it.misbehave_at("check");
        it.is_refused("told to by a test");
        fs::remove_file(&it.hook).expect("a file");
        let file = it.daemon.folder().join("evenkeel.toml");
        let good = fs::read_to_string(&file).expect("the file");
        fs::write(&file, good.replace("mode = ", "mdoe = ")).expect("written");
        let text = it.is_refused("evenkeel.toml:");
        assert!(text.contains("did you mean"), "{text}");
        fs::write(&file, good).expect("written");
    });
}

fn a_worker_that_dies_on_trial_refuses_the_upgrade() {
    refusals(|it| {
        it.install_version(5);
        it.misbehave_at("trial");
        it.is_refused("a worker of the new program ended: signal: 6");
    });
}

fn what_cannot_take_over_gives_way_to_the_old_program() {
    refusals(|it| {
        let old = it.images()[0].clone();
        for (step, word) in [
            ("format", "its state is of format"),
            ("take-up", "it panicked while it took over: told to by a test"),
            ("proving", "told to by a test"),
        ] {
            it.install_version(5);
            it.misbehave_at(step);
            let text = it.is_refused(word);
            assert!(text.contains("nothing has changed"), "{text}");
            // The file is another one by now: "(deleted)".
            let now = it.images()[0].clone();
            assert!(now.to_string_lossy().starts_with(&*old.to_string_lossy()), "{now:?}");
            assert!(now.to_string_lossy().ends_with("(deleted)"), "{now:?}");
            println!("{step}: {}", text.trim());
        }
    });
}

fn a_file_that_no_worker_can_serve_leads_back() {
    refusals(|it| {
        it.install_version(5);
        let file = it.daemon.folder().join("evenkeel.toml");
        let good = fs::read_to_string(&file).expect("the file");
        let more =
            "[[listener]]\nname = \"new\"\nmode = \"tcp\"\nbind = \"192.0.2.7:80\"\nservice = \"echo\"\n";
        fs::write(&file, good.clone() + more).expect("written");
        it.is_refused("192.0.2.7");
        // And with more slots than there were.
        let wider = good.replace("workers = 2", "workers = 4") + more;
        fs::write(&file, wider).expect("written");
        it.is_refused("192.0.2.7");
        fs::write(&file, good).expect("written");
    });
}

fn processes_that_are_killed_meanwhile_are_replaced() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let it = Upgradable::ready(&config(3, &server.to_string()));
    for round in 0..9 {
        it.install_version(round);
        let victims = it.daemon.children();
        it.daemon.signal(Signal::SIGUSR2);
        // At a different moment each time: a worker, or the steward.
        std::thread::park_timeout(Duration::from_millis(40 * round as u64));
        let victim = victims[round % victims.len()];
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim as i32), Signal::SIGKILL);
        within(Duration::from_secs(30), "all serve", || {
            let log = it.daemon.log();
            let ends = log.matches("upgraded: generation").count();
            let status = it.daemon.status();
            ends + log.matches("not upgraded").count() > round
                && status.workers.len() == 3
                && status.workers.iter().all(|worker| worker.state == "ready")
        });
        for _ in 0..20 {
            exchange(&mut connect(local(8080)), b"x").expect("nobody is refused");
        }
    }
    println!("{}", it.daemon.log().matches("upgraded: generation").count());
    it.install_version(100);
    eventually("no change is under way", || it.run(&["upgrade"]).0 == Some(0));
    it.runs_the_file_alone(4);
}

fn signals_that_come_during_an_upgrade_are_not_lost() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    for round in 0..8 {
        let mut it = Upgradable::ready(&config(2, &server.to_string()));
        it.install_version(round);
        let mut client = connect(local(8080));
        exchange(&mut client, b"x").expect("served");
        it.daemon.signal(Signal::SIGUSR2);
        std::thread::park_timeout(Duration::from_millis(50 * round as u64));
        signal(it.daemon.pid(), Signal::SIGTERM);
        eventually("it leaves", || it.daemon.log().contains("leaving: nothing new"));
        exchange(&mut client, b"y").expect("an open session goes on");
        drop(client);
        assert!(it.daemon.wait(Duration::from_secs(20)).success(), "{}", it.daemon.log());
        assert!(!it.daemon.socket().exists(), "nothing is left behind");
    }
}

fn the_table_of_steering_goes_on() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let it = Upgradable::ready(&config(4, &server.to_string()));
    // Which worker answers a flow, by its own count: no datagram may change
    // its slot.
    let clients: Vec<_> = (0..40).map(|_| datagrams::client("127.0.0.1:0")).collect();
    let ask_all = || {
        for client in &clients {
            datagrams::ask(client, local(8081), b"who?");
        }
    };
    ask_all();
    let slots = |it: &Upgradable| it.daemon.listener("datagrams").spread.per_slot;
    // In one slot alone by chance: 4 in 4^40.
    assert!(slots(&it).iter().filter(|count| **count > 0).count() > 1);
    for round in 0..3 {
        it.install_version(round);
        it.upgrade();
        assert_eq!(it.daemon.listener("datagrams").steering_active, "ebpf-table");
        let at = slots(&it);
        ask_all();
        let gained: Vec<u64> = slots(&it).iter().zip(&at).map(|(now, before)| now - before).collect();
        assert_eq!(gained, [0; 4], "a flow began anew: its datagrams came to another slot");
    }
    assert_eq!(it.run(&["scale", "2"]).0, Some(0));
    ask_all();
}
