//! Clients of 127.0.0.1:8080 at work while a test does something to the daemon:
//! such that must all be served, and such whose errors are counted.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::servers::{connect, exchange, local};
use super::{datagrams, pattern, within};

/// What was served, by kind.
#[derive(Debug, Default)]
pub struct Served {
    pub short: AtomicU64,
    pub long: AtomicU64,
    pub datagrams: AtomicU64,
}

/// Ends the clients of a test with its disturbance, however that ends.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Short sessions, long ones with checked payloads, and datagrams to the port
/// of a UDP listener where there is one: all must be served without one error
/// while something happens.
pub fn under_load(udp_port: Option<u16>, happens: impl FnOnce()) -> Served {
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
                    long_exchange(&mut client, at);
                    at += 1;
                    served.long.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for (index, port) in (0..4u8).zip(udp_port.into_iter().cycle()) {
            scope.spawn(move || {
                let client = datagrams::client("127.0.0.1:0");
                while !stop.load(Ordering::Relaxed) {
                    let answer = datagrams::ask(&client, local(port), &[index; 100]);
                    assert_eq!(answer, [index; 100]);
                    served.datagrams.fetch_add(1, Ordering::Relaxed);
                    // Some hundred a second are enough.
                    std::thread::park_timeout(Duration::from_millis(2));
                }
            });
        }
        let _stop = Stop(stop);
        let mut kinds = vec![&served.short, &served.long];
        kinds.extend(udp_port.map(|_| &served.datagrams));
        all_go_on(&kinds);
        happens();
        all_go_on(&kinds);
    });
    served
}

/// Both ways at once; sizes from one byte to more than the buffers hold.
fn long_exchange(client: &mut TcpStream, at: usize) {
    let bytes = pattern(at, [1, 64, 1500, 40_000, 900_000][at % 5]);
    let mut writer = client.try_clone().expect("a duplicate");
    let answer = std::thread::scope(|scope| {
        scope.spawn(|| writer.write_all(&bytes).expect("a long session is written"));
        let mut answer = vec![0; bytes.len()];
        client.read_exact(&mut answer).expect("a long session is read");
        answer
    });
    assert!(answer == bytes, "wrong bytes");
}

/// Short sessions of four clients while something happens: how many were
/// served, and the errors. A session that is open when the service is killed
/// may end; nobody may be refused or left waiting.
pub fn under_traffic(happens: impl FnOnce(&AtomicU64)) -> (u64, Vec<io::Error>) {
    let (stop, served, errors) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    match try_exchange(local(8080)) {
                        Ok(()) => drop(served.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => errors.lock().expect("no panic").push(error),
                    }
                }
            });
        }
        let _stop = Stop(&stop);
        happens(&served);
    });
    (served.into_inner(), errors.into_inner().expect("no panic"))
}

/// One short session, with time for a service that is just restarted.
pub fn try_exchange(address: SocketAddr) -> io::Result<()> {
    let mut client = TcpStream::connect_timeout(&address, Duration::from_secs(20))?;
    client.set_read_timeout(Some(Duration::from_secs(20)))?;
    exchange(&mut client, b"hello").map(drop)
}

pub fn traffic_goes_on(served: &AtomicU64) {
    let before = served.load(Ordering::Relaxed);
    within(Duration::from_secs(20), "traffic goes on", || served.load(Ordering::Relaxed) > before + 50);
}

fn all_go_on(kinds: &[&AtomicU64]) {
    let counts = || kinds.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
    let before = counts();
    within(Duration::from_secs(30), "the load goes on", || {
        counts().iter().zip(&before).all(|(now, before)| *now > before + 40)
    });
}
