//! Servers behind the daemon, as threads of the test.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Calls a function with each connection, in a thread of its own; answers the
/// address and how many connections there were.
pub fn tcp_server(
    address: &str,
    serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(address).expect("a free address");
    let address = listener.local_addr().expect("bound");
    let count = Arc::new(AtomicUsize::new(0));
    let (serve, counted) = (Arc::new(serve), Arc::clone(&count));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            counted.fetch_add(1, Ordering::SeqCst);
            let serve = Arc::clone(&serve);
            std::thread::spawn(move || drop(serve(stream)));
        }
    });
    (address, count)
}

/// Sends back what it gets, and the end after it.
pub fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return stream.shutdown(std::net::Shutdown::Write);
        }
        stream.write_all(&buffer[..count])?;
    }
}

/// Connects, with time-outs so that a test cannot hang.
#[track_caller]
pub fn connect(address: impl Into<SocketAddr>) -> TcpStream {
    let address = address.into();
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10)).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
    stream.set_write_timeout(Some(Duration::from_secs(20))).expect("a time-out");
    stream
}

/// An address on 127.0.0.1.
pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// One question and its answer of the same length.
pub fn exchange(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(bytes)?;
    let mut answer = vec![0; bytes.len()];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}
