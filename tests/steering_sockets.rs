//! The steering program and its tables over plain sockets: what the kernel
//! chooses is what user space computes. No daemon here.

mod support;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use evenkeel::spread::Spread;
use evenkeel::steering::{Pick, Table, bucket, classic, page, program, source_bucket};
use evenkeel::sys::bpf::{self, Page, Program, SocketArray};
use evenkeel::sys::listen::{self, Options};
use socket2::{Domain, SockAddr, Socket, Type};
use support::eventually;

fn main() {
    support::run(tests![
        user_space_computes_the_slot_of_two_thousand_ipv4_flows needs ["ebpf"],
        user_space_computes_the_slot_of_two_thousand_ipv6_flows needs ["ebpf"],
        a_source_has_one_slot_whatever_its_port needs ["ebpf"],
        a_join_and_a_leave_move_no_more_flows_than_the_tables_say needs ["ebpf"],
        random_spreads_the_datagrams_of_one_flow needs ["ebpf"],
        a_closed_socket_leaves_no_datagram_unserved needs ["ebpf"],
        two_choices_take_the_less_loaded_and_avoid_the_slow_and_the_stuck needs ["ebpf"],
        what_waits_at_a_closing_listener_moves_to_another needs ["ebpf"],
        a_program_that_is_wrong_is_refused_with_the_verifiers_words needs ["ebpf"],
        classic_programs_keep_a_source_and_leave_out_who_is_away,
        classic_programs_spread_connections_evenly_and_sources_not_by_port,
        a_classic_program_steers_by_cpu,
        detaching_gives_the_group_back_to_the_kernel,
    ])
}

const SEED: u32 = 0x5EED_CAFE;

/// A group of sockets on one address, with a program and its pages.
struct Group {
    address: SocketAddr,
    sockets: Vec<Option<OwnedFd>>,
    page: Page,
    loads: Page,
    _program: Program,
}

impl Group {
    fn new(address: &str, slot_count: usize, pick: Pick, table: &Table) -> Group {
        let mut address: SocketAddr = address.parse().unwrap();
        let is_tcp = matches!(pick, Pick::TwoChoices | Pick::Connection);
        let array = SocketArray::create(64).unwrap();
        let page = Page::create(page::PAGE_BYTES).unwrap();
        let loads = Page::create(page::LOADS_BYTES).unwrap();
        let code = program::program(array.as_fd(), page.as_fd(), loads.as_fd());
        let program = Program::load(&code).expect("the verifier takes it");
        let mut sockets = Vec::new();
        for slot in 0..slot_count {
            let options = Options::default();
            let open = if is_tcp { listen::tcp } else { listen::udp };
            let socket = open(address, &options).unwrap();
            address = socket2::SockRef::from(&socket).local_addr().unwrap().as_socket().unwrap();
            array.put(slot as u32, &socket).unwrap();
            sockets.push(Some(socket));
        }
        program.attach(sockets[0].as_ref().unwrap()).unwrap();
        page.word(page::SEED).store(SEED, Relaxed);
        page.word(page::PICK).store(pick as u32, Relaxed);
        let group = Group { address, sockets, page, loads, _program: program };
        group.write(table);
        group
    }

    fn write(&self, table: &Table) {
        for (at, slot) in table.bytes().iter().enumerate() {
            self.page.byte(page::TABLE + at).store(*slot, Relaxed);
        }
    }

    fn load(&self, slot: usize, field: usize) -> &std::sync::atomic::AtomicU32 {
        self.loads.word((slot << page::LINE_SHIFT) + field)
    }

    /// Sends one datagram from each client; the slot where each arrived.
    fn send_all(&self, clients: &[UdpSocket]) -> HashMap<SocketAddr, usize> {
        let mut arrived = HashMap::new();
        // Few at a time, so that no receive buffer overflows.
        for chunk in clients.chunks(64) {
            for client in chunk {
                client.send_to(b"x", self.address).unwrap();
            }
            eventually("every datagram arrives", || {
                self.receive(&mut arrived);
                chunk.iter().all(|client| arrived.contains_key(&client.local_addr().unwrap()))
            });
        }
        arrived
    }

    fn receive(&self, arrived: &mut HashMap<SocketAddr, usize>) {
        for (slot, socket) in self.sockets.iter().enumerate() {
            let Some(socket) = socket else { continue };
            let socket = UdpSocket::from(socket.try_clone().unwrap());
            let mut buffer = [0; 16];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                arrived.insert(from, slot);
            }
        }
    }

    /// Connects so often from one address; how many came to each slot.
    fn connect(&self, count: usize) -> Vec<u64> {
        let mut counts = vec![0; self.sockets.len()];
        for _ in 0..count {
            let client = TcpStream::connect(self.address).unwrap();
            let mut slot = None;
            eventually("it is accepted", || {
                slot = self.accept();
                slot.is_some()
            });
            counts[slot.unwrap()] += 1;
            let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
        }
        counts
    }

    fn accept(&self) -> Option<usize> {
        self.sockets.iter().position(|socket| {
            let Some(socket) = socket else { return false };
            TcpListener::from(socket.try_clone().unwrap()).accept().is_ok()
        })
    }
}

/// A client at an address that may be no address of this host.
fn client(address: SocketAddr) -> UdpSocket {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None).unwrap();
    if address.is_ipv6() {
        socket.set_freebind_v6(true).unwrap();
    }
    socket.bind(&SockAddr::from(address)).unwrap();
    socket.into()
}

/// Clients all over 127/8, two of each address.
fn ipv4_clients(count: u32) -> Vec<UdpSocket> {
    let address = |i: u32| (0x7F00_0000 + (i / 2 + 1).wrapping_mul(0x9E37) % 0x00FF_0000).to_be_bytes();
    (0..count).map(|i| client(SocketAddr::from((address(i), 0)))).collect()
}

fn as_computed(arrived: &HashMap<SocketAddr, usize>, table: &Table) {
    let wrong: Vec<_> =
        arrived.iter().filter(|(from, slot)| table.slot(bucket(SEED, **from)) != **slot).collect();
    assert!(wrong.is_empty(), "{} of {}: {wrong:?}", wrong.len(), arrived.len());
}

fn user_space_computes_the_slot_of_two_thousand_ipv4_flows() {
    let table = Table::new(&[1, 1, 1, 1, 1, 1, 1]);
    let group = Group::new("127.0.0.1:0", 7, Pick::Flow, &table);
    let arrived = group.send_all(&ipv4_clients(2000));
    assert_eq!(arrived.len(), 2000);
    as_computed(&arrived, &table);
}

fn user_space_computes_the_slot_of_two_thousand_ipv6_flows() {
    let table = Table::new(&[1, 1, 1, 1, 1]);
    let group = Group::new("[::1]:0", 5, Pick::Flow, &table);
    // Where `ip` can make all of 2001:db8::/64 ours, many addresses.
    let route = std::process::Command::new("ip")
        .args(["-6", "route", "add", "local", "2001:db8::/64", "dev", "lo"])
        .status();
    let many = route.is_ok_and(|status| status.success());
    let clients: Vec<UdpSocket> = (0..2000u128)
        .map(|i| {
            let ip = 0x2001_0DB8_u128 << 96 | i.wrapping_mul(0x9E37_79B9_7F4A_7C15) & 0xFFFF_FFFF_FFFF_FFFF;
            let ip = if many && i % 2 == 0 { Ipv6Addr::from(ip) } else { Ipv6Addr::LOCALHOST };
            client(SocketAddr::from((ip, 0)))
        })
        .collect();
    println!("IPv6 addresses: {}", if many { 1001 } else { 1 });
    let arrived = group.send_all(&clients);
    assert_eq!(arrived.len(), 2000);
    as_computed(&arrived, &table);
}

fn a_source_has_one_slot_whatever_its_port() {
    let table = Table::new(&[1; 4]);
    let group = Group::new("127.0.0.1:0", 4, Pick::Source, &table);
    for (from, slot) in group.send_all(&ipv4_clients(1000)) {
        assert_eq!(slot, table.slot(source_bucket(SEED, from.ip())), "{from}");
    }
}

fn a_join_and_a_leave_move_no_more_flows_than_the_tables_say() {
    let four = Table::new(&[1, 1, 1, 1, 0]);
    let five = four.refilled(&[1; 5]);
    let without_one = five.refilled(&[1, 0, 1, 1, 1]);
    let group = Group::new("127.0.0.1:0", 5, Pick::Flow, &four);
    let clients = ipv4_clients(2000);
    let mut before = group.send_all(&clients);
    for (table, ideal) in [(&five, 0.2), (&without_one, 0.2)] {
        group.write(table);
        let after = group.send_all(&clients);
        as_computed(&after, table);
        let moved = after.iter().filter(|(from, slot)| before[*from] != **slot).count();
        // 400 are due, with a standard deviation of 18: outside of 89 by
        // chance less than once in a million runs.
        assert!((moved as f64 - 2000.0 * ideal).abs() < 89.0, "{moved} moved");
        println!("moved {moved} of 2000, ideal {}", 2000.0 * ideal);
        before = after;
    }
}

fn random_spreads_the_datagrams_of_one_flow() {
    let table = Table::new(&[1; 4]);
    let group = Group::new("127.0.0.1:0", 4, Pick::Random, &table);
    let client = client("127.0.0.1:0".parse().unwrap());
    let mut counts = vec![0; 4];
    for _ in 0..1000 {
        client.send_to(b"x", group.address).unwrap();
        let mut arrived = HashMap::new();
        eventually("it arrives", || {
            group.receive(&mut arrived);
            !arrived.is_empty()
        });
        arrived.values().for_each(|slot| counts[*slot] += 1);
    }
    // Fails by chance once in a million runs.
    assert!(Spread::equal(&counts).p_value > 1e-6, "{counts:?}");
}

fn a_closed_socket_leaves_no_datagram_unserved() {
    let table = Table::new(&[1; 3]);
    let mut group = Group::new("127.0.0.1:0", 3, Pick::Flow, &table);
    group.sockets[1] = None;
    let arrived = group.send_all(&ipv4_clients(300));
    for (from, slot) in arrived {
        let due = table.slot(bucket(SEED, from));
        assert!(slot == due || due == 1, "{from} was not at the closed one and moved");
    }
}

fn two_choices_take_the_less_loaded_and_avoid_the_slow_and_the_stuck() {
    let group = Group::new("127.0.0.1:0", 4, Pick::TwoChoices, &Table::new(&[1; 4]));
    let reset = || (0..4).for_each(|slot| group.load(slot, page::SESSIONS).store(0, Relaxed));
    // The program counts what it steers, so a burst stays even without any
    // worker: two choices differ by some connections, not by tens.
    let counts = group.connect(400);
    assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 12, "{counts:?}");
    let told: Vec<u64> =
        (0..4).map(|slot| u64::from(group.load(slot, page::SESSIONS).load(Relaxed))).collect();
    assert_eq!(told, counts);
    // A slot with much more gets only what has no other choice: a sixteenth.
    // 400 draws of 1/16 exceed 60 less than once in a million times.
    let avoided =
        |counts: &[u64]| assert!(counts[2] <= 60 && counts.iter().sum::<u64>() == 400, "{counts:?}");
    reset();
    group.load(2, page::SESSIONS).store(100_000, Relaxed);
    avoided(&group.connect(400));
    reset();
    let now = || page::ticks(evenkeel::sys::clock::coarse());
    group.load(2, page::SLOW_UNTIL).store(now().wrapping_add(60_000), Relaxed);
    group.load(2, page::SLOW_LEVEL).store(2 << page::SLOW_SHIFT, Relaxed);
    avoided(&group.connect(400));
    reset();
    // The others are not quite as slow.
    for slot in [0, 1, 3] {
        group.load(slot, page::SLOW_UNTIL).store(now().wrapping_add(60_000), Relaxed);
        group.load(slot, page::SLOW_LEVEL).store(1 << page::SLOW_SHIFT, Relaxed);
    }
    avoided(&group.connect(400));
    group.load(2, page::SLOW_UNTIL).store(now().wrapping_sub(10), Relaxed);
    group.load(2, page::TURN_SINCE).store(now().wrapping_sub(100), Relaxed);
    reset();
    avoided(&group.connect(400));
    // Stuck is worse than slow, slow worse than full.
    reset();
    for slot in [0, 1, 3] {
        group.load(slot, page::SLOW_LEVEL).store(15 << page::SLOW_SHIFT, Relaxed);
    }
    avoided(&group.connect(400));
    group.load(2, page::TURN_SINCE).store(0, Relaxed);
    (0..4).for_each(|slot| group.load(slot, page::SLOW_UNTIL).store(0, Relaxed));
    reset();
    let counts = group.connect(400);
    assert!(counts[2] >= 80, "neither slow nor stuck any more: {counts:?}");
}

fn what_waits_at_a_closing_listener_moves_to_another() {
    let mut group = Group::new("127.0.0.1:0", 2, Pick::Connection, &Table::new(&[1, 0]));
    let clients: Vec<TcpStream> = (0..50).map(|_| TcpStream::connect(group.address).unwrap()).collect();
    group.write(&Table::new(&[0, 1]));
    group.sockets[0] = None;
    let listener = TcpListener::from(group.sockets[1].as_ref().unwrap().try_clone().unwrap());
    let mut taken = Vec::new();
    eventually("all fifty are accepted by the other one", || {
        while let Ok((stream, _)) = listener.accept() {
            taken.push(stream);
        }
        taken.len() == clients.len()
    });
}

fn a_program_that_is_wrong_is_refused_with_the_verifiers_words() {
    use bpf::assembler::{Assembler, Register::R0, Register::R5};
    let error = Program::load(&Assembler::default().mov_r(R0, R5).exit().finish()).unwrap_err();
    assert!(error.to_string().contains("R5 !read_ok"), "{error}");
}

fn classic_group(address: &str, slot_count: usize) -> (Vec<OwnedFd>, SocketAddr) {
    let mut address: SocketAddr = address.parse().unwrap();
    let sockets = (0..slot_count).map(|_| {
        let socket = listen::tcp(address, &Options::default()).unwrap();
        address = socket2::SockRef::from(&socket).local_addr().unwrap().as_socket().unwrap();
        socket
    });
    (sockets.collect(), address)
}

fn slot_of(sockets: &[OwnedFd], from: IpAddr, to: SocketAddr) -> usize {
    let client = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    client.bind(&SockAddr::from(SocketAddr::new(from, 0))).unwrap();
    client.connect(&SockAddr::from(to)).unwrap();
    client.set_linger(Some(Duration::ZERO)).unwrap();
    let mut slot = None;
    eventually("it is accepted", || {
        slot =
            sockets.iter().position(|socket| TcpListener::from(socket.try_clone().unwrap()).accept().is_ok());
        slot.is_some()
    });
    slot.unwrap()
}

fn classic_programs_keep_a_source_and_leave_out_who_is_away() {
    let (sockets, address) = classic_group("127.0.0.1:0", 4);
    let attach = |live: &[bool]| {
        let request = classic::Request { pick: Pick::Source, is_ipv6: false, seed: SEED, live, cpus: &[0] };
        bpf::classic::attach(&sockets[2], &classic::program(&request).unwrap()).unwrap();
    };
    let sources: Vec<IpAddr> = (1..=40).map(|i| IpAddr::from([127, 0, i, 9])).collect();
    let slots = || sources.iter().map(|from| slot_of(&sockets, *from, address)).collect::<Vec<_>>();
    attach(&[true; 4]);
    let before = slots();
    assert_eq!(slots(), before, "each source has one slot");
    assert!((0..4).all(|slot| before.contains(&slot)), "by chance once in 25,000 seeds: {before:?}");
    attach(&[true, true, false, true]);
    for (before, after) in before.iter().zip(slots()) {
        assert!(after != 2 && (*before == 2 || after == *before), "{before} became {after}");
    }
}

/// Chi-square at p = 0.000001.
fn classic_programs_spread_connections_evenly_and_sources_not_by_port() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let (sockets, address) = classic_group(address, 4);
        let counts = |pick| {
            let request = classic::Request {
                pick,
                is_ipv6: address.is_ipv6(),
                seed: SEED,
                live: &[true; 4],
                cpus: &[0],
            };
            bpf::classic::attach(&sockets[0], &classic::program(&request).unwrap()).unwrap();
            let mut counts = vec![0; 4];
            (0..600).for_each(|_| counts[slot_of(&sockets, address.ip(), address)] += 1);
            counts
        };
        for pick in [Pick::Connection, Pick::Flow] {
            let counts = counts(pick);
            assert!(Spread::equal(&counts).p_value > 1e-6, "{address} {pick:?}: {counts:?}");
        }
        assert_eq!(counts(Pick::Source).iter().max(), Some(&600));
    }
}

fn a_classic_program_steers_by_cpu() {
    let cpus = evenkeel::sys::process::usable_cpu_numbers();
    let (sockets, address) = classic_group("127.0.0.1:0", 2 * cpus.len());
    let live = vec![true; 2 * cpus.len()];
    let request = classic::Request { pick: Pick::Cpu, is_ipv6: false, seed: SEED, live: &live, cpus: &cpus };
    bpf::classic::attach(&sockets[0], &classic::program(&request).unwrap()).unwrap();
    for (at, cpu) in cpus.iter().enumerate() {
        evenkeel::sys::process::pin_to_cpu(*cpu).unwrap();
        for _ in 0..50 {
            assert_eq!(slot_of(&sockets, [127, 0, 0, 1].into(), address) % cpus.len(), at);
        }
    }
}

fn detaching_gives_the_group_back_to_the_kernel() {
    let (sockets, address) = classic_group("127.0.0.1:0", 2);
    let request =
        classic::Request { pick: Pick::Source, is_ipv6: false, seed: SEED, live: &[true, false], cpus: &[0] };
    bpf::classic::attach(&sockets[0], &classic::program(&request).unwrap()).unwrap();
    assert!((0..40).all(|_| slot_of(&sockets, [127, 0, 0, 1].into(), address) == 0));
    bpf::classic::detach(&sockets[0]).unwrap();
    bpf::classic::detach(&sockets[0]).unwrap();
    // By chance once in 2^40 runs.
    assert!((0..40).any(|_| slot_of(&sockets, [127, 0, 0, 1].into(), address) == 1));
}
