//! What stands behind every proxy: an echo for TCP and UDP, and a source of
//! bytes without end. A process of its own, so that its descriptors and its
//! CPU time are nobody else's.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command, Stdio};

use evenkeel::sys::datagram::{Arena, Outgoing, Sender};
use evenkeel::sys::process;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

/// The addresses that every upstream has.
pub const HOSTS: [&str; 4] = ["127.0.0.11", "127.0.0.12", "127.0.0.13", "127.0.0.14"];
/// Sends back what it gets.
pub const ECHO: u16 = 9000;
/// Sends without end.
pub const BULK: u16 = 9001;
/// HTTP; another program serves it.
pub const WEB: u16 = 9002;

const ROLE: &str = "EVENKEEL_COMPARE_SERVER";
const LISTENERS: usize = 2 * HOSTS.len();

/// The process of the servers; ended with this value.
pub struct Server {
    child: Child,
}

impl Server {
    /// Starts it in this network.
    pub fn start() -> Server {
        let child = Command::new(std::env::current_exe().expect("this program"))
            .env(ROLE, "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("this program starts");
        while TcpStream::connect((HOSTS[HOSTS.len() - 1], BULK)).is_err() {
            std::thread::park_timeout(std::time::Duration::from_millis(2));
        }
        Server { child }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves and does not return where this process was started for it.
pub fn serve_if_told() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    // Nobody is left to serve once the parent is gone.
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    process::raise_file_limit().expect("a limit of open files");
    std::thread::spawn(serve_datagrams);
    serve_streams().expect("a server");
}

struct Connection {
    stream: TcpStream,
    is_source: bool,
}

fn serve_streams() -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(512);
    let mut listeners = Vec::new();
    for port in [ECHO, BULK] {
        for host in HOSTS {
            let address: SocketAddr = format!("{host}:{port}").parse().expect("an address");
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(4096)?;
            let listener = TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            let fd = listener.as_raw_fd();
            poll.registry().register(&mut SourceFd(&fd), Token(listeners.len()), Interest::READABLE)?;
            listeners.push(listener);
        }
    }
    // By descriptor, of which a process has few numbers.
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let (mut busy, mut buffer) = (Vec::new(), vec![7; 256 * 1024]);
    loop {
        let timeout = (!busy.is_empty()).then_some(std::time::Duration::ZERO);
        match poll.poll(&mut events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        }
        let again = std::mem::take(&mut busy);
        for token in events.iter().map(|event| event.token().0).chain(again) {
            if let Some(listener) = listeners.get(token) {
                accept(&poll, listener, token >= HOSTS.len(), &mut connections)?;
                continue;
            }
            let Some(place) = connections.get_mut(token - LISTENERS) else { continue };
            match place.as_mut().map(|connection| connection.turn(&mut buffer)) {
                Some(Turn::Again) if !busy.contains(&token) => busy.push(token),
                Some(Turn::Over) => *place = None,
                _ => {}
            }
        }
    }
}

fn accept(
    poll: &Poll,
    listener: &TcpListener,
    is_source: bool,
    connections: &mut Vec<Option<Connection>>,
) -> io::Result<()> {
    while let Ok((stream, _)) = listener.accept() {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let fd = stream.as_raw_fd();
        let interest = if is_source { Interest::WRITABLE } else { Interest::READABLE };
        poll.registry().register(&mut SourceFd(&fd), Token(LISTENERS + fd as usize), interest)?;
        if connections.len() <= fd as usize {
            connections.resize_with(fd as usize + 1, || None);
        }
        connections[fd as usize] = Some(Connection { stream, is_source });
    }
    Ok(())
}

enum Turn {
    Idle,
    Again,
    Over,
}

impl Connection {
    fn turn(&mut self, buffer: &mut [u8]) -> Turn {
        for _ in 0..8 {
            let done = if self.is_source { self.stream.write(buffer) } else { self.echo(buffer) };
            match done {
                Ok(0) => return Turn::Over,
                // A short one: nothing more is there, or fits.
                Ok(count) if count < buffer.len() => return Turn::Idle,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Turn::Idle,
                Err(_) => return Turn::Over,
            }
        }
        Turn::Again
    }

    fn echo(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        // Questions are short, and a client waits for its answer: it fits.
        self.stream.write_all(&buffer[..count])?;
        Ok(count)
    }
}

fn serve_datagrams() {
    let sockets = HOSTS.map(|host| {
        let socket = UdpSocket::bind((host, ECHO)).expect("a free port");
        let _ = socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20);
        let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::UdpGroSegment, &true);
        socket.set_nonblocking(true).expect("non-blocking");
        socket
    });
    let (mut arena, mut sender) = (Arena::new(64, 1 << 16), Sender::default());
    loop {
        let flags = nix::poll::PollFlags::POLLIN;
        let mut ready = sockets.each_ref().map(|socket| nix::poll::PollFd::new(socket.as_fd(), flags));
        let _ = nix::poll::poll(&mut ready, nix::poll::PollTimeout::NONE);
        for (socket, ready) in sockets.iter().zip(&ready) {
            if ready.any() == Some(true) {
                answer(socket, &mut arena, &mut sender);
            }
        }
    }
}

/// Datagram by datagram, as a server does that knows nothing of offloads.
fn answer(socket: &UdpSocket, arena: &mut Arena, sender: &mut Sender) {
    let Ok(count) = arena.receive(socket, 0, 64) else { return };
    let items = (0..count).flat_map(|at| {
        let received = arena.get(at);
        let step = received.segment.unwrap_or(usize::MAX);
        let answer = move |bytes| Outgoing { head: &[], bytes, to: received.from, from: None, segment: None };
        received.bytes.chunks(step).map(answer)
    });
    sender.send(socket, items, |_, _| {});
}
