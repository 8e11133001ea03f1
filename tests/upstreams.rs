//! Which servers are used: what the operator says, verdicts, limits, queues.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evenkeel::control::client;
use evenkeel::control::status;
use nix::sys::signal::Signal;
use serde_json::json;
use support::daemon::{Daemon, signal};
use support::datagrams::{self, named_server};
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::{eventually, within};

fn main() {
    support::run(tests![
        draining_under_load_meets_no_error,
        a_changed_weight_changes_the_split_at_once,
        no_server_has_more_than_its_limit_over_four_workers,
        who_waits_too_long_is_told_by_a_reset_and_counted,
        waiting_sessions_survive_a_reload_and_come_in_their_order,
        no_workers_clients_starve_in_the_queue needs ["ebpf"],
        least_connections_are_even_again_after_a_killed_worker,
        when_all_are_down_clients_are_closed_or_any_is_tried,
        sessions_of_a_server_that_goes_down_are_reset_where_that_is_asked,
        verdicts_and_orders_outlive_the_steward,
        verdicts_and_orders_outlive_a_reload,
        flows_of_a_server_that_goes_down_move_with_their_next_datagram,
        a_backup_serves_while_all_others_are_down,
        a_client_keeps_its_server_by_source_hash_while_another_drains,
        an_unknown_server_is_answered_by_what_there_is,
    ])
}

const CHECKS: &str = "[upstream.health]\ncheck = \"none\"\npassive = false\n";

/// A daemon on 127.0.0.1:8080 in front of these servers.
fn config(workers: usize, upstream: &str, servers: &[(SocketAddr, &str)]) -> String {
    let mut text = format!(
        "[daemon]\nworkers = {workers}\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\n\
         upstream = \"back\"\n[[upstream]]\nname = \"back\"\n{upstream}\n"
    );
    for (address, keys) in servers {
        text += &format!("[[upstream.server]]\naddress = \"{address}\"\n{keys}\n");
    }
    text + CHECKS
}

/// `evenkeel server CHANGE back/ADDRESS`
#[track_caller]
fn order(daemon: &Daemon, words: &[&str], server: SocketAddr) -> String {
    let name = format!("back/{server}");
    let mut all = vec!["server"];
    all.extend(words);
    all.push(&name);
    daemon.succeed(&all)
}

/// A verdict, as if a check had found it.
#[track_caller]
fn verdict(daemon: &Daemon, server: SocketAddr, health: &str) {
    let request = json!({
        "command": "test-verdict", "upstream": "back", "server": server.to_string(), "health": health
    });
    eventually("a steward that takes a verdict", || {
        client::ask(&daemon.socket(), &request, Duration::from_secs(5)).is_ok()
    });
}

fn server_status(daemon: &Daemon, server: SocketAddr) -> status::Server {
    let servers = daemon.status().upstreams[0].servers.clone();
    servers.into_iter().find(|other| other.address == server.to_string()).expect("a server of the file")
}

/// A server that names itself on connect and echoes then.
fn naming_server(address: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
    let name = *address.as_bytes().get(8).expect("127.0.0.N");
    tcp_server(address, move |mut stream| {
        stream.write_all(&[name])?;
        echo(stream)
    })
}

/// One connection, and which server answered.
fn visit() -> std::io::Result<u8> {
    let mut stream = TcpStream::connect(local(8080))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    named(&mut stream)
}

fn named(stream: &mut TcpStream) -> std::io::Result<u8> {
    let mut name = [0];
    stream.read_exact(&mut name)?;
    Ok(name[0])
}

fn visits(count: usize) -> Vec<u8> {
    (0..count).map(|_| visit().expect("an answer")).collect()
}

/// Opens sessions that stay, each with its first answer.
fn stay(count: usize) -> Vec<(TcpStream, u8)> {
    let open = |_| {
        let mut stream = connect(local(8080));
        let name = named(&mut stream).expect("an answer");
        (stream, name)
    };
    (0..count).map(open).collect()
}

fn is_reset(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0; 16]), Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset)
}

fn draining_under_load_meets_no_error() {
    let (one, _) = naming_server("127.0.0.1:9001");
    let (two, _) = naming_server("127.0.0.2:9001");
    let daemon = Daemon::ready(&config(4, "", &[(one, ""), (two, "")]));
    let mut kept = stay(8);
    let (stop, errors, done) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let wrong = visit().is_err();
                    errors.fetch_add(usize::from(wrong), Ordering::Relaxed);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let go_on = |more: usize| {
            let goal = done.load(Ordering::Relaxed) + more;
            within(Duration::from_secs(60), "load", || done.load(Ordering::Relaxed) >= goal);
        };
        go_on(100);
        let text = order(&daemon, &["drain"], one);
        assert!(text.contains("gets nothing new"), "{text}");
        // What was on its way when the order was given may still arrive.
        go_on(20);
        let before = server_status(&daemon, one);
        assert_eq!(before.state, "draining");
        assert_eq!(before.differs_from_file.as_ref().unwrap().state.as_deref(), Some("draining"));
        go_on(200);
        assert_eq!(server_status(&daemon, one).connections, before.connections);
        order(&daemon, &["disable"], one);
        assert_eq!(server_status(&daemon, one).state, "disabled");
        order(&daemon, &["ready"], one);
        go_on(200);
        let after = server_status(&daemon, one);
        assert_eq!((after.state.as_str(), after.differs_from_file), ("up", None));
        assert!(after.connections > before.connections);
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(errors.into_inner(), 0);
    for (stream, _) in &mut kept {
        assert_eq!(exchange(stream, b"still here").unwrap(), b"still here");
    }
}

fn a_changed_weight_changes_the_split_at_once() {
    let (one, _) = naming_server("127.0.0.1:9001");
    let (two, _) = naming_server("127.0.0.2:9001");
    let daemon = Daemon::ready(&config(1, "", &[(one, ""), (two, "")]));
    let share = |names: Vec<u8>| names.into_iter().filter(|name| *name == b'1').count();
    assert_eq!(share(visits(40)), 20);
    order(&daemon, &["weight", "3"], one);
    // Round robin is exact; what the last rotation owed is paid at first.
    assert!(share(visits(40)).abs_diff(30) <= 1);
    let human = daemon.succeed(&["status"]);
    assert!(human.contains("weight by hand, 1 in the file"), "{human}");
    order(&daemon, &["weight", "0"], one);
    assert_eq!(share(visits(10)), 0);
    order(&daemon, &["ready"], one);
    assert!(share(visits(40)).abs_diff(20) <= 1);
}

/// A server that counts who is there at once.
fn counting_server(address: &str) -> (SocketAddr, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counted, peak) = (Arc::clone(&now), Arc::clone(&most));
    let (address, _) = tcp_server(address, move |mut stream| {
        let count = counted.fetch_add(1, Ordering::SeqCst) + 1;
        peak.fetch_max(count, Ordering::SeqCst);
        let ended = stream.write_all(b"!").and_then(|()| stream.read(&mut [0; 16]));
        // Counted out before the daemon can know that it is over.
        counted.fetch_sub(1, Ordering::SeqCst);
        ended.map(drop)
    });
    (address, now, most)
}

fn no_server_has_more_than_its_limit_over_four_workers() {
    let (one, _, most_one) = counting_server("127.0.0.1:9001");
    let (two, _, most_two) = counting_server("127.0.0.2:9001");
    let limit = "max_connections = 3";
    let daemon = Daemon::ready(&config(4, "queue_timeout = \"60s\"\n", &[(one, limit), (two, limit)]));
    let served = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let mut stream = connect(local(8080));
                    stream.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
                    assert_eq!(named(&mut stream).expect("an answer"), b'!');
                    served.fetch_add(1, Ordering::SeqCst);
                    stream.write_all(b"bye").unwrap();
                    let _ = stream.read(&mut [0; 16]);
                }
            });
        }
    });
    assert_eq!(served.into_inner(), 400);
    let most = [most_one, most_two].map(|most| most.load(Ordering::SeqCst));
    assert!(most.iter().all(|&most| (1..=3).contains(&most)), "{most:?} at once");
    eventually("an empty queue", || daemon.status().upstreams[0].waiting == 0);
}

fn who_waits_too_long_is_told_by_a_reset_and_counted() {
    let (one, _) = naming_server("127.0.0.1:9001");
    let upstream = "queue_timeout = \"400ms\"\n";
    let daemon = Daemon::ready(&config(1, upstream, &[(one, "max_connections = 1")]));
    let mut first = stay(1);
    let began = Instant::now();
    let mut second = connect(local(8080));
    eventually("one who waits", || daemon.status().upstreams[0].waiting == 1);
    assert!(is_reset(&mut second));
    assert!(began.elapsed() >= Duration::from_millis(390), "{:?}", began.elapsed());
    eventually("the reason", || daemon.listener("front").ended.get("queue_timeout") == Some(&1));
    assert_eq!(exchange(&mut first[0].0, b"hello").unwrap(), b"hello");
    // A client that gives up while it waits holds no turn.
    let third = connect(local(8080));
    eventually("one who waits", || daemon.status().upstreams[0].waiting == 1);
    socket2::SockRef::from(&third).set_linger(Some(Duration::ZERO)).unwrap();
    drop(third);
    drop(first);
    assert_eq!(visit().unwrap(), b'1');
}

fn waiting_sessions_survive_a_reload_and_come_in_their_order() {
    let (one, _) = naming_server("127.0.0.1:9001");
    let upstream = "queue_timeout = \"60s\"\n";
    let text = config(1, upstream, &[(one, "max_connections = 1")]);
    let daemon = Daemon::ready(&text);
    let first = stay(1);
    let mut waiting = Vec::new();
    for count in 1..=3 {
        waiting.push(connect(local(8080)));
        eventually("one more who waits", || daemon.status().upstreams[0].waiting == count);
    }
    daemon.rewrite(&(text + "# another\n"));
    daemon.succeed(&["reload"]);
    eventually("those who wait at the new worker", || daemon.status().upstreams[0].waiting == 3);
    drop(first);
    for stream in &mut waiting {
        assert_eq!(named(stream).unwrap(), b'1');
        // The others still wait: the place goes to one after the other.
        stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    assert_eq!(daemon.listener("front").ended.get("queue_timeout"), None);
}

/// A connection from 127.0.1.N.
fn connect_from(last: u8) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 1, last], 0)).into()).unwrap();
    socket.connect(&local(8080).into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

/// The end of a visit to a `counting_server`, told by the client.
fn end_visit(mut stream: TcpStream) {
    let _ = stream.write_all(b"bye").and_then(|()| stream.read(&mut [0; 16]));
}

fn no_workers_clients_starve_in_the_queue() {
    let (one, ..) = counting_server("127.0.0.1:9001");
    let text = config(2, "queue_timeout = \"5s\"\n", &[(one, "max_connections = 1")]);
    let text = text.replace("upstream = \"back\"\n", "upstream = \"back\"\nsteering = \"source\"\n");
    let daemon = Daemon::ready(&text);
    // Two clients of different workers.
    let slot_of = |last: u8| {
        let accepted = || daemon.status().workers.iter().map(|worker| worker.accepted).collect::<Vec<_>>();
        let before = accepted();
        let mut stream = connect_from(last);
        named(&mut stream).unwrap();
        end_visit(stream);
        accepted().iter().zip(&before).position(|(now, before)| now > before).expect("one took it")
    };
    let first = slot_of(1);
    let Some(other) = (2..=40).find(|&last| slot_of(last) != first) else {
        panic!("forty addresses at one worker: once in 2^39");
    };
    let stop = AtomicBool::new(false);
    let served = std::thread::scope(|scope| {
        // The first one's worker always has somebody for a free place.
        for _ in 0..8 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let mut stream = connect_from(1);
                    let _ = named(&mut stream);
                    // Long enough that the moments in which the place is
                    // free are few: who waited for luck would wait for long.
                    datagrams::let_pass(Duration::from_millis(50));
                    end_visit(stream);
                }
            });
        }
        eventually("a queue", || daemon.status().upstreams[0].waiting >= 5);
        let visits = (0..10).map(|_| {
            let mut stream = connect_from(other);
            let answer = named(&mut stream);
            end_visit(stream);
            answer.is_ok()
        });
        let served: Vec<bool> = visits.collect();
        stop.store(true, Ordering::Relaxed);
        served
    });
    assert_eq!(served, [true; 10]);
}

fn least_connections_are_even_again_after_a_killed_worker() {
    let (one, _) = naming_server("127.0.0.1:9001");
    let (two, _) = naming_server("127.0.0.2:9001");
    let daemon = Daemon::ready(&config(2, "balance = \"least-connections\"", &[(one, ""), (two, "")]));
    let mut sessions = stay(20);
    daemon.kill_worker(0);
    eventually("a new worker", || daemon.worker(0).state == "ready" && daemon.worker(0).restarts == 1);
    sessions.retain_mut(|(stream, _)| exchange(stream, b"alive?").is_ok());
    let active = || [one, two].map(|server| server_status(&daemon, server).active);
    let survivors = sessions.len() as u64;
    eventually("only the living are counted", || active().iter().sum::<u64>() == survivors);
    // Whoever has fewer gets the next ones, whichever worker they come to.
    sessions.extend(stay(24));
    let [one, two] = active();
    assert!(one.abs_diff(two) <= 1, "{one} and {two}");
}

fn when_all_are_down_clients_are_closed_or_any_is_tried() {
    let (one, _) = naming_server("127.0.0.1:9001");
    let (two, _) = naming_server("127.0.0.2:9001");
    let text = |all_down| config(2, &format!("all_down = \"{all_down}\"\n"), &[(one, ""), (two, "")]);
    let daemon = Daemon::ready(&text("close"));
    verdict(&daemon, one, "down");
    assert_eq!(visits(6), [b'2'; 6]);
    verdict(&daemon, two, "down");
    assert_eq!([one, two].map(|server| server_status(&daemon, server).state), ["down", "down"]);
    assert!(visit().is_err());
    eventually("the reason", || daemon.listener("front").ended.get("no_server") == Some(&1));
    daemon.rewrite(&text("try-any"));
    daemon.succeed(&["reload"]);
    // Down they are over the reload, and tried all the same.
    assert_eq!([one, two].map(|server| server_status(&daemon, server).state), ["down", "down"]);
    let names = visits(8);
    assert!(names.contains(&b'1') && names.contains(&b'2'), "{names:?}");
}

fn sessions_of_a_server_that_goes_down_are_reset_where_that_is_asked() {
    let (one, _) = naming_server("127.0.0.1:9001");
    let (two, _) = naming_server("127.0.0.2:9001");
    let text = |on_down| config(2, &format!("on_down = \"{on_down}\"\n"), &[(one, ""), (two, "")]);
    let daemon = Daemon::ready(&text("keep"));
    let mut sessions = stay(8);
    verdict(&daemon, one, "down");
    for (stream, _) in &mut sessions {
        assert_eq!(exchange(stream, b"kept").unwrap(), b"kept");
    }
    verdict(&daemon, one, "up");
    daemon.rewrite(&text("reset"));
    daemon.succeed(&["reload"]);
    verdict(&daemon, one, "down");
    let of_one = sessions.iter().filter(|(_, name)| *name == b'1').count();
    assert!(of_one > 0);
    for (stream, name) in &mut sessions {
        match name {
            b'1' => assert!(is_reset(stream)),
            _ => assert_eq!(exchange(stream, b"kept").unwrap(), b"kept"),
        }
    }
    eventually("the reason", || daemon.listener("front").ended.get("server_down") == Some(&(of_one as u64)));
}

fn kill_steward(daemon: &Daemon) {
    let workers: Vec<u32> = daemon.status().workers.iter().map(|worker| worker.pid).collect();
    let is_steward = |pid: &u32| !workers.contains(pid);
    signal(daemon.children().into_iter().find(is_steward).expect("a steward"), Signal::SIGKILL);
}

fn verdicts_and_orders_outlive_the_steward() {
    let servers = ["127.0.0.1:9001", "127.0.0.2:9001", "127.0.0.3:9001"].map(|at| naming_server(at).0);
    let [one, two, three] = servers;
    let daemon = Daemon::ready(&config(2, "", &[(one, ""), (two, ""), (three, "")]));
    verdict(&daemon, one, "down");
    order(&daemon, &["drain"], two);
    order(&daemon, &["weight", "9"], three);
    for _ in 0..3 {
        kill_steward(&daemon);
        assert_eq!(visits(10), [b'3'; 10]);
        assert_eq!(servers.map(|server| server_status(&daemon, server).state), ["down", "draining", "up"]);
        assert_eq!(server_status(&daemon, three).weight, 9);
    }
    verdict(&daemon, one, "up");
    assert!(visits(20).contains(&b'1'));
}

fn verdicts_and_orders_outlive_a_reload() {
    let servers = ["127.0.0.1:9001", "127.0.0.2:9001", "127.0.0.3:9001"].map(|at| naming_server(at).0);
    let [one, two, three] = servers;
    let daemon = Daemon::ready(&config(2, "", &[(one, ""), (two, ""), (three, "")]));
    verdict(&daemon, one, "down");
    order(&daemon, &["drain"], two);
    // Another order in the file: they are known by address.
    daemon.rewrite(&config(3, "", &[(three, ""), (one, ""), (two, "")]));
    daemon.succeed(&["reload"]);
    assert_eq!(servers.map(|server| server_status(&daemon, server).state), ["down", "draining", "up"]);
    assert_eq!(visits(12), [b'3'; 12]);
    // One that is gone for a while is as the file has it when it returns.
    daemon.rewrite(&config(3, "", &[(three, ""), (one, "")]));
    daemon.succeed(&["reload"]);
    daemon.rewrite(&config(3, "", &[(three, ""), (one, ""), (two, "")]));
    daemon.succeed(&["reload"]);
    assert_eq!(servers.map(|server| server_status(&daemon, server).state), ["down", "up", "up"]);
}

fn flows_of_a_server_that_goes_down_move_with_their_next_datagram() {
    let (one, _) = named_server("127.0.0.1:9001", "one");
    let (two, _) = named_server("127.0.0.2:9001", "two");
    let text = config(2, "", &[(one, ""), (two, "")]).replace("\"tcp\"", "\"udp\"");
    let daemon = Daemon::ready(&text);
    let clients: Vec<_> = (0..8).map(|_| datagrams::client("127.0.0.1:0")).collect();
    let ask = |client| String::from_utf8(datagrams::ask(client, local(8080), b"?")).unwrap();
    let before: Vec<String> = clients.iter().map(ask).collect();
    assert!(before.iter().any(|answer| answer.contains("one")), "{before:?}");
    verdict(&daemon, one, "down");
    let after: Vec<String> = clients.iter().map(ask).collect();
    assert!(after.iter().all(|answer| answer.contains("two")), "{after:?}");
    assert_eq!(server_status(&daemon, one).active, 0);
    // A server that drains keeps its flows.
    order(&daemon, &["drain"], two);
    verdict(&daemon, one, "up");
    let still: Vec<String> = clients.iter().map(ask).collect();
    assert!(still.iter().all(|answer| answer.contains("two")), "{still:?}");
}

fn a_backup_serves_while_all_others_are_down() {
    let (one, _) = naming_server("127.0.0.1:9001");
    let (two, _) = naming_server("127.0.0.2:9001");
    for balance in ["round-robin", "source-hash", "least-connections", "two-choices"] {
        let upstream = format!("balance = \"{balance}\"\n");
        let daemon = Daemon::ready(&config(2, &upstream, &[(one, ""), (two, "backup = true")]));
        assert_eq!(visits(5), [b'1'; 5], "{balance}");
        verdict(&daemon, one, "down");
        assert_eq!(visits(5), [b'2'; 5], "{balance}");
        verdict(&daemon, one, "up");
        assert_eq!(visits(5), [b'1'; 5], "{balance}");
    }
}

fn a_client_keeps_its_server_by_source_hash_while_another_drains() {
    let servers = ["127.0.0.1:9001", "127.0.0.2:9001", "127.0.0.3:9001"].map(|at| naming_server(at).0);
    let own: Vec<(SocketAddr, &str)> = servers.iter().map(|server| (*server, "")).collect();
    let daemon = Daemon::ready(&config(2, "balance = \"source-hash\"", &own));
    let visit_from = |last: u8| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 1, last], 0)).into()).unwrap();
        socket.connect(&local(8080).into()).unwrap();
        named(&mut socket.into()).unwrap()
    };
    let all = || (1..=40).map(visit_from).collect::<Vec<u8>>();
    let before = all();
    assert_eq!(all(), before);
    order(&daemon, &["drain"], servers[0]);
    let meanwhile = all();
    for (before, now) in before.iter().zip(&meanwhile) {
        assert!(*now != b'1' && (*before == b'1' || now == before), "{before} {now}");
    }
    order(&daemon, &["ready"], servers[0]);
    assert_eq!(all(), before);
}

fn an_unknown_server_is_answered_by_what_there_is() {
    let (one, _) = naming_server("127.0.0.1:9001");
    let daemon = Daemon::ready(&config(1, "", &[(one, "")]));
    let ask = |server: &str| daemon.run(&["server", "drain", server]);
    let (code, text) = ask("bakc/127.0.0.1:9001");
    assert_eq!(code, Some(1));
    assert!(text.contains("no upstream \"bakc\"") && text.contains("did you mean \"back\"?"), "{text}");
    let (code, text) = ask("back/127.0.0.1:9010");
    assert_eq!(code, Some(1));
    assert!(text.contains("has no server \"127.0.0.1:9010\"") && text.contains("127.0.0.1:9001"), "{text}");
    let (code, text) = ask("back");
    assert_eq!(code, Some(2), "it is no name of a server at all");
    assert!(text.contains("UPSTREAM/ADDRESS"), "{text}");
    assert_eq!(server_status(&daemon, one).differs_from_file, None);
}
