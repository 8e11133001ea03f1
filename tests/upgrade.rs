//! Another program in place of the running one: nothing is lost, and what
//! cannot take over never does.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use evenkeel::control::status::Server;
use nix::sys::signal::Signal;
use support::clients::{Stop, under_load};
use support::daemon::{Daemon, runs, signal};
use support::http;
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::upgradable::Upgradable;
use support::{datagrams, eventually, within};

fn main() {
    support::run(tests![
        upgrades_under_load_lose_nothing,
        twenty_upgrades_leave_nothing_behind,
        usr2_upgrades_and_systemd_is_told,
        counters_and_what_scale_set_go_on,
        what_was_ordered_at_run_time_stands_over_upgrades_and_reloads,
        the_admin_address_refuses_nobody_and_no_counter_goes_back,
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

fn config(workers: usize, server: &str) -> String {
    format!(
        "[daemon]\nworkers = {workers}\n\
         [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nupstream = \"back\"\n\
         [[listener]]\nname = \"datagrams\"\nmode = \"udp\"\nbind = \"127.0.0.1:8081\"\nservice = \"echo\"\n\
         [[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n"
    )
}

fn upgrades_under_load_lose_nothing() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let it = Upgradable::ready(&config(3, &server.to_string()));
    let pid = it.daemon.pid();
    let served = under_load(Some(8081), || {
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

fn what_was_ordered_at_run_time_stands_over_upgrades_and_reloads() {
    let ((one, _), (two, _)) = (tcp_server("127.0.0.1:0", echo), tcp_server("127.0.0.1:0", echo));
    let text = config(2, &one.to_string()) + &format!("[[upstream.server]]\naddress = \"{two}\"\n");
    let it = Upgradable::ready(&text);
    let mut session = connect(local(8080));
    exchange(&mut session, b"before").expect("served");
    for arguments in [
        &["scale", "3"][..],
        &["server", "drain", &format!("back/{one}")],
        &["server", "weight", "7", &format!("back/{two}")],
    ] {
        let (code, text) = it.run(arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {text}");
    }
    let stands = |event: &str| {
        let status = it.daemon.status();
        assert_eq!(status.workers.len(), 3, "{event}");
        let servers = &status.upstreams[0].servers;
        let [drained, heavy] = &servers[..] else { panic!("{event}: {servers:?}") };
        assert_eq!((drained.state.as_str(), heavy.state.as_str()), ("draining", "up"), "{event}");
        assert_eq!((drained.weight, heavy.weight), (1, 7), "{event}");
        let differs = |server: &Server| server.differs_from_file.clone().expect("it differs from the file");
        assert_eq!(differs(drained).state.as_deref(), Some("draining"), "{event}");
        assert_eq!(differs(heavy).file_weight, Some(1), "{event}");
        // By its own count: checks visit the servers as well.
        let counts = || {
            let servers = it.daemon.status().upstreams.swap_remove(0).servers;
            (servers[0].connections, servers[1].connections)
        };
        let before = counts();
        for _ in 0..20 {
            exchange(&mut connect(local(8080)), b"new").expect("served");
        }
        assert_eq!(counts(), (before.0, before.1 + 20), "{event}: what drains gets nothing new");
    };
    stands("the orders");
    for round in 0..3 {
        it.install_version(round);
        it.upgrade();
        stands("an upgrade");
        assert_eq!(it.run(&["reload"]).0, Some(0));
        stands("a reload");
    }
    // And it can be taken back.
    for server in [one, two] {
        assert_eq!(it.run(&["server", "ready", &format!("back/{server}")]).0, Some(0));
    }
    let of_one = || it.daemon.status().upstreams[0].servers[0].connections;
    let before = of_one();
    eventually("it gets sessions again", || {
        exchange(&mut connect(local(8080)), b"new").expect("served");
        of_one() > before
    });
    exchange(&mut session, b"after").expect("an open session stays");
}

/// Every series of /metrics that only grows.
fn growing(metrics: &str) -> BTreeMap<String, f64> {
    let kinds: BTreeMap<&str, &str> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .filter(|(_, kind)| ["counter", "histogram"].contains(kind))
        .collect();
    let grows = |name: &str| {
        let family = ["_bucket", "_count", "_sum"].iter().find_map(|end| name.strip_suffix(end));
        kinds.contains_key(name) || family.is_some_and(|family| kinds.contains_key(family))
    };
    let samples = metrics.lines().filter(|line| !line.starts_with('#'));
    let samples = samples.filter_map(|line| line.rsplit_once(' '));
    samples
        .filter(|(series, _)| grows(series.split('{').next().unwrap_or_default()))
        .map(|(series, value)| (series.to_string(), value.parse().expect("a number")))
        .collect()
}

fn the_admin_address_refuses_nobody_and_no_counter_goes_back() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let text = config(3, &server.to_string()).replace("[daemon]\n", "[daemon]\nadmin = \"127.0.0.1:9180\"\n");
    let it = Upgradable::ready(&text);
    let scrape =
        || http::send(local(9180), "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    eventually("the admin address answers", || scrape().is_ok_and(|answer| answer.status == 200));
    let (stop, scrapes, cut) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut before = BTreeMap::new();
            while !stop.load(Ordering::Relaxed) {
                // Nobody is refused; the steward that goes may cut a request
                // short, once an upgrade.
                let answer = match scrape() {
                    Ok(answer) if answer.status == 200 => answer,
                    Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                        panic!("the admin address refuses")
                    }
                    _ => {
                        assert!(cut.fetch_add(1, Ordering::Relaxed) < 5, "more than one an upgrade");
                        continue;
                    }
                };
                let now = growing(&answer.body);
                for (series, value) in &before {
                    let value_now = now.get(series);
                    assert!(value_now.is_some_and(|now| now >= value), "{series}: {value}, {value_now:?}");
                }
                before = now;
                scrapes.fetch_add(1, Ordering::Relaxed);
            }
            before
        });
        let ending = Stop(&stop);
        let served = under_load(Some(8081), || {
            for round in 0..5 {
                it.install_version(round);
                it.upgrade();
                // Also the new steward's own answers.
                let seen = scrapes.load(Ordering::Relaxed);
                within(Duration::from_secs(30), "scrapes go on", || {
                    watch.is_finished() || scrapes.load(Ordering::Relaxed) > seen + 3
                });
            }
        });
        drop(ending);
        let last = watch.join().expect("no counter went back");
        let of_front = |name: &str| {
            let own =
                last.iter().filter(|(series, _)| series.starts_with(name) && series.contains("\"front\""));
            own.map(|(_, value)| *value).sum::<f64>()
        };
        assert!(of_front("evenkeel_listener_connections_total") > 20.0, "{last:?}");
        assert!(of_front("evenkeel_listener_bytes_total") > 1000.0, "{last:?}");
        let counts = [&scrapes, &cut].map(|count| count.load(Ordering::Relaxed));
        println!("{counts:?} scrapes, and cut short; {} series that grow; {served:?}", last.len());
    });
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
