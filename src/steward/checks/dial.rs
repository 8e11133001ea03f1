//! Where a check goes to, and how it gets there.
//!
//! The way that traffic takes: from the upstream's `source`, and with a PROXY
//! header in front where servers demand one. The header says that the
//! connection is the proxy's own ("LOCAL" in version 2, "UNKNOWN" in version
//! 1), which receivers of both take without an address.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpSocket, TcpStream, UdpSocket, UnixStream};

use super::probe::Failure;
use crate::config::SendProxy;

/// "The PROXY protocol", 2.1: what a proxy sends for a connection of its own.
const UNKNOWN: &[u8] = b"PROXY UNKNOWN\r\n";
/// The same, 2.2: signature, version 2 and command LOCAL, no family, no length.
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00";

/// A server's place, as a check reaches it.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Its address.
    pub target: Target,
    /// Addresses of ours to connect from; the first of the family is taken.
    pub source: Vec<IpAddr>,
    /// The PROXY header that servers of this upstream expect.
    pub send_proxy: SendProxy,
}

/// An address that can be connected to.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Target {
    Ip(SocketAddr),
    Unix(PathBuf),
}

/// A connection to a server.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Place {
    /// Connects, and says what servers expect to hear first.
    pub async fn connect(&self) -> Result<Stream, Failure> {
        let connected = match &self.target {
            Target::Ip(address) => self.connect_tcp(*address).await.map(Stream::Tcp),
            Target::Unix(path) => UnixStream::connect(path).await.map(Stream::Unix),
        };
        let mut stream = connected.map_err(|error| Failure::System("connect", error))?;
        let header = self.header();
        if !header.is_empty() {
            stream.write_all(header).await.map_err(|error| Failure::System("send", error))?;
        }
        Ok(stream)
    }

    async fn connect_tcp(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(source) = self.source_for(address) {
            // The port is chosen at connect, so that only the pair of both
            // ends has to be free.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(source)?;
        }
        socket.connect(address).await
    }

    /// A socket that sends to the server and hears it alone.
    pub async fn datagrams(&self) -> Result<UdpSocket, Failure> {
        let Target::Ip(address) = self.target else {
            return Err(Failure::Wrong("datagrams do not go to a Unix socket".into()));
        };
        let unspecified: SocketAddr = match address {
            SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
            SocketAddr::V6(_) => ([0u16; 8], 0).into(),
        };
        let own = self.source_for(address).unwrap_or(unspecified);
        let socket = UdpSocket::bind(own).await.map_err(|error| Failure::System("bind", error))?;
        socket.connect(address).await.map_err(|error| Failure::System("connect", error))?;
        Ok(socket)
    }

    /// The PROXY header of a check.
    pub fn header(&self) -> &'static [u8] {
        match self.send_proxy {
            SendProxy::Off => &[],
            SendProxy::V1 => UNKNOWN,
            SendProxy::V2 => LOCAL,
        }
    }

    fn source_for(&self, address: SocketAddr) -> Option<SocketAddr> {
        let of_family = self.source.iter().find(|source| source.is_ipv4() == address.is_ipv4());
        of_family.map(|source| SocketAddr::new(*source, 0))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context, buf: &mut ReadBuf) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
