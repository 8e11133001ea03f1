//! The PROXY protocol at both borders, with HAProxy and nginx at the other end.

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use evenkeel::proxy_protocol::{Decoded, Ends, Header, Transport, V2_BYTES, decode};
use socket2::{Domain, Socket, Type};
use support::daemon::Daemon;
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::{eventually, within};

fn main() {
    support::run(tests![
        a_server_is_told_the_client_in_both_versions,
        ipv6_clients_and_unix_servers_are_told_as_well,
        the_next_server_gets_the_header_anew,
        a_header_cut_at_every_byte_is_taken_and_the_stream_follows_it,
        a_header_and_the_stream_in_one_piece_are_told_apart,
        who_is_not_trusted_is_turned_away,
        rubbish_and_what_is_too_long_are_turned_away,
        a_slow_header_is_given_up_and_others_are_served_meanwhile,
        a_look_without_a_byte_is_no_error,
        local_and_unknown_mean_the_one_who_connected,
        access_and_balancing_go_by_the_client_of_the_header,
        a_header_that_is_half_there_survives_a_reload,
        a_service_takes_headers_too,
        haproxy_in_front_is_understood needs ["haproxy"],
        haproxy_behind_understands needs ["haproxy"],
        nginx_in_front_and_behind needs ["nginx"],
    ])
}

/// A program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What servers got before anything else.
type Headers = Receiver<Vec<u8>>;

/// Reads a header, answers the rest by an echo.
fn serve(mut stream: impl Read + Write, tell: impl Fn(Vec<u8>)) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let length = loop {
        match decode(&bytes) {
            Ok(Decoded::Header { length, .. }) => break length,
            Ok(Decoded::Incomplete) => {
                let mut more = [0; 4096];
                let count = stream.read(&mut more)?;
                if count == 0 {
                    return Ok(());
                }
                bytes.extend(&more[..count]);
            }
            Err(error) => return Err(std::io::Error::other(error)),
        }
    };
    tell(bytes[..length].to_vec());
    stream.write_all(&bytes[length..])?;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => stream.write_all(&buffer[..count])?,
        }
    }
}

/// A server that wants a header and tells it here.
fn wanting(address: &str) -> (SocketAddr, Headers) {
    let (sender, receiver) = channel();
    let sender = Mutex::new(sender);
    let (address, _) = tcp_server(address, move |stream| {
        serve(stream, |header| sender.lock().unwrap().send(header).unwrap())
    });
    (address, receiver)
}

#[track_caller]
fn next(headers: &Headers) -> Vec<u8> {
    headers.recv_timeout(Duration::from_secs(10)).expect("a header")
}

#[track_caller]
fn ends_of(header: &[u8]) -> Ends {
    match decode(header) {
        Ok(Decoded::Header { length, ends: Some(ends) }) if length == header.len() => ends,
        other => panic!("{other:?} of {header:?}"),
    }
}

fn config(bind: &str, tcp: &str, upstream: &str, servers: &[String]) -> String {
    let mut text = format!(
        "[daemon]\nworkers = 2\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"{bind}\"\nupstream = \"back\"\n\
         [listener.tcp]\n{tcp}\n[[upstream]]\nname = \"back\"\n{upstream}\n"
    );
    for server in servers {
        text += &format!("[[upstream.server]]\naddress = \"{server}\"\n");
    }
    // A check is a connection too, with a header of its own.
    text + "[upstream.health]\ncheck = \"none\"\n"
}

const ACCEPT: &str = "accept_proxy = \"on\"\ntrusted = \"127.0.0.1\"";

/// A daemon that wants headers on 127.0.0.1:8080, in front of an echo.
fn accepting() -> Daemon {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    Daemon::ready(&config("127.0.0.1:8080", ACCEPT, "", &[server.to_string()]))
}

/// A connection from an address of our choice.
fn connect_from(source: &str, to: SocketAddr) -> TcpStream {
    try_connect_from(source, to).expect("a connection")
}

fn try_connect_from(source: &str, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    socket.bind(&format!("{source}:0").parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.connect(&to.into())?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn a_server_is_told_the_client_in_both_versions() {
    let (one, ones) = wanting("127.0.0.1:0");
    let (two, twos) = wanting("127.0.0.1:0");
    let mut text = config("127.0.0.1:8080", "", "send_proxy = \"v1\"", &[one.to_string()]);
    text += &config("127.0.0.1:8081", "", "send_proxy = \"v2\"", &[two.to_string()])
        .replace("[daemon]\nworkers = 2\n", "")
        .replace("front", "second")
        .replace("back", "other");
    let daemon = Daemon::ready(&text);
    for (port, headers, name) in [(8080, ones, "front"), (8081, twos, "second")] {
        let mut client = connect(local(port));
        assert_eq!(exchange(&mut client, b"question").unwrap(), b"question");
        let header = next(&headers);
        let expected = Ends { source: client.local_addr().unwrap(), destination: local(port) };
        assert_eq!(ends_of(&header), expected);
        assert_eq!(header.starts_with(b"PROXY TCP4 127.0.0.1 127.0.0.1 "), port == 8080);
        // The header is ours, not the client's.
        eventually("the bytes are counted", || {
            let listener = daemon.listener(name);
            (listener.bytes_in, listener.bytes_out) == (8, 8)
        });
    }
}

fn ipv6_clients_and_unix_servers_are_told_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server");
    let listener = UnixListener::bind(&path).unwrap();
    let (sender, headers) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let sender = sender.clone();
            std::thread::spawn(move || serve(stream, |header| sender.send(header).unwrap()));
        }
    });
    let server = format!("unix:{}", path.display());
    let _daemon = Daemon::ready(&config("[::1]:8080", "", "send_proxy = \"v1\"", &[server]));
    let to: SocketAddr = "[::1]:8080".parse().unwrap();
    let mut client = connect(to);
    assert_eq!(exchange(&mut client, b"question").unwrap(), b"question");
    let expected = Ends { source: client.local_addr().unwrap(), destination: to };
    assert_eq!(ends_of(&next(&headers)), expected);
}

fn the_next_server_gets_the_header_anew() {
    let refusing = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (server, headers) = wanting("127.0.0.1:0");
    let servers = [refusing.to_string(), server.to_string()];
    let daemon = Daemon::ready(&config("127.0.0.1:8080", "", "send_proxy = \"v2\"", &servers));
    for _ in 0..10 {
        let mut client = connect(local(8080));
        assert_eq!(exchange(&mut client, b"question").unwrap(), b"question");
        assert_eq!(ends_of(&next(&headers)).source, client.local_addr().unwrap());
    }
    let status = daemon.status();
    assert!(status.upstreams[0].servers[0].failures > 0, "{:?}", status.upstreams);
}

fn header_bytes(version: u8) -> Vec<u8> {
    let ends =
        Ends { source: "192.0.2.7:4711".parse().unwrap(), destination: "192.0.2.1:80".parse().unwrap() };
    match version {
        1 => Header::version_1(&ends).as_bytes().to_vec(),
        _ => {
            let mut bytes = Header::version_2(&ends, Transport::Stream).as_bytes().to_vec();
            // A TLV of five bytes.
            bytes.extend([0xe2, 0, 2, b'o', b'k']);
            bytes[15] += 5;
            bytes
        }
    }
}

/// What comes, up to so many bytes.
#[track_caller]
fn read_some(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("an answer");
    bytes
}

fn a_header_cut_at_every_byte_is_taken_and_the_stream_follows_it() {
    let daemon = accepting();
    let mut sessions = 0;
    for header in [header_bytes(1), header_bytes(2)] {
        for cut in 1..header.len() {
            let mut client = connect(local(8080));
            client.set_nodelay(true).unwrap();
            client.write_all(&header[..cut]).unwrap();
            client.write_all(&[&header[cut..], b"stream"].concat()).unwrap();
            assert_eq!(read_some(&mut client, 6), b"stream", "cut at {cut}");
            sessions += 1;
        }
        let mut client = connect(local(8080));
        client.set_nodelay(true).unwrap();
        for byte in header.iter().chain(b"stream") {
            client.write_all(&[*byte]).unwrap();
        }
        assert_eq!(read_some(&mut client, 6), b"stream");
        sessions += 1;
    }
    eventually("every session has finished", || {
        let listener = daemon.listener("front");
        listener.ended.get("finished") == Some(&sessions) && listener.bytes_in == 6 * sessions
    });
}

fn a_header_and_the_stream_in_one_piece_are_told_apart() {
    let daemon = accepting();
    for header in [header_bytes(1), header_bytes(2)] {
        let mut client = connect(local(8080));
        // What looks like another header belongs to the stream.
        let stream = [&header[..], &support::pattern(0, 200_000)].concat();
        let whole = [&header[..], &stream].concat();
        let mut reader = client.try_clone().unwrap();
        let expected = stream.clone();
        let reading = std::thread::spawn(move || read_some(&mut reader, expected.len()) == expected);
        client.write_all(&whole).unwrap();
        assert!(reading.join().unwrap());
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
    drop(daemon);
}

/// Whether a connection ends by a reset.
#[track_caller]
fn is_reset(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0; 16]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => true,
        Ok(0) => false,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn wait_for_drops(daemon: &Daemon, reason: &str, count: u64) {
    eventually(&format!("{count} {reason}"), || {
        let listener = daemon.listener("front");
        listener.dropped.get(reason) == Some(&count) && listener.ended.get(reason) == Some(&count)
    });
}

fn who_is_not_trusted_is_turned_away() {
    let daemon = accepting();
    for _ in 0..20 {
        // The reset may be there before the header is written, or even before
        // the connect returns.
        let Ok(mut client) = try_connect_from("127.0.0.2", local(8080)) else { continue };
        assert!(client.write_all(&header_bytes(1)).is_err() || is_reset(&mut client));
    }
    wait_for_drops(&daemon, "proxy_untrusted", 20);
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.contains("proxy_untrusted")).count();
    // One a worker in ten seconds.
    assert!((1..=2).contains(&lines) && log.contains("127.0.0.2 sends no PROXY header"), "{log}");
    let mut client = connect_from("127.0.0.1", local(8080));
    client.write_all(&[&header_bytes(1)[..], b"x"].concat()).unwrap();
    assert_eq!(read_some(&mut client, 1), b"x");
}

fn rubbish_and_what_is_too_long_are_turned_away() {
    let daemon = accepting();
    let mut too_long = header_bytes(2);
    too_long[14..16].copy_from_slice(&(V2_BYTES as u16).to_be_bytes());
    let mut no_tlv = header_bytes(2);
    let end = no_tlv.len() - 3;
    no_tlv[end] = 9;
    let refused: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\n",
        b"x",
        &[b"PROXY UNKNOWN ".as_slice(), &[b'x'; 100]].concat(),
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4711\r\n",
        &too_long[..16],
        &no_tlv,
    ];
    for bytes in refused {
        let mut client = connect(local(8080));
        client.write_all(bytes).unwrap();
        assert!(is_reset(&mut client), "{bytes:?}");
    }
    // The end comes in the middle of it.
    let mut client = connect(local(8080));
    client.write_all(&header_bytes(2)[..20]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert!(is_reset(&mut client));
    wait_for_drops(&daemon, "proxy_malformed", 7);
}

fn a_slow_header_is_given_up_and_others_are_served_meanwhile() {
    let daemon = accepting();
    let begun = Instant::now();
    let mut slow: Vec<TcpStream> = (0..500).map(|_| connect(local(8080))).collect();
    for client in &mut slow {
        client.write_all(&header_bytes(2)[..27]).unwrap();
    }
    let mut client = connect(local(8080));
    client.write_all(&[&header_bytes(1)[..], b"x"].concat()).unwrap();
    assert_eq!(read_some(&mut client, 1), b"x");
    // It is served on while the others are given up.
    assert!(slow.iter_mut().all(is_reset));
    assert!(begun.elapsed() >= Duration::from_secs(3));
    wait_for_drops(&daemon, "proxy_timeout", 500);
    assert_eq!(exchange(&mut client, b"y").unwrap(), b"y");
}

fn a_look_without_a_byte_is_no_error() {
    let daemon = accepting();
    drop(connect(local(8080)));
    eventually("it has finished", || daemon.listener("front").ended.get("finished") == Some(&1));
    assert!(daemon.listener("front").dropped.is_empty());
}

fn local_and_unknown_mean_the_one_who_connected() {
    let (server, headers) = wanting("127.0.0.1:0");
    let _daemon =
        Daemon::ready(&config("127.0.0.1:8080", ACCEPT, "send_proxy = \"v2\"", &[server.to_string()]));
    let local_command = [&b"\r\n\r\n\0\r\nQUIT\n\x20\x11\0\x03"[..], b"abc"].concat();
    for header in [b"PROXY UNKNOWN 1.2.3.4 5.6.7.8 1 2\r\n".to_vec(), local_command] {
        let mut client = connect(local(8080));
        client.write_all(&[&header[..], b"x"].concat()).unwrap();
        assert_eq!(read_some(&mut client, 1), b"x");
        let expected = Ends { source: client.local_addr().unwrap(), destination: local(8080) };
        assert_eq!(ends_of(&next(&headers)), expected);
    }
}

/// A client as a header names it.
fn client_named(source: &str) -> TcpStream {
    let mut client = connect(local(8080));
    let ends = Ends { source: source.parse().unwrap(), destination: "192.0.2.1:80".parse().unwrap() };
    client.write_all(Header::version_1(&ends).as_bytes()).unwrap();
    client
}

fn access_and_balancing_go_by_the_client_of_the_header() {
    let (one, ones) = tcp_server("127.0.0.1:0", echo);
    let (two, twos) = tcp_server("127.0.0.1:0", echo);
    let access = format!("{ACCEPT}\n[listener.access]\ndeny = [\"198.51.100.0/24\"]");
    let servers = [one.to_string(), two.to_string()];
    let daemon = Daemon::ready(&config("127.0.0.1:8080", &access, "balance = \"source-hash\"", &servers));
    let denied: Vec<TcpStream> = (1..=5).map(|i| client_named(&format!("198.51.100.{i}:9"))).collect();
    for mut client in denied {
        assert!(is_reset(&mut client));
    }
    wait_for_drops(&daemon, "denied", 5);
    // Each of two servers gets none of forty clients once in 2^39 runs.
    for i in 1..=40 {
        let mut client = client_named(&format!("192.0.2.{i}:9"));
        assert_eq!(exchange(&mut client, b"x").unwrap(), b"x");
    }
    let counts = [&ones, &twos].map(|count| count.load(std::sync::atomic::Ordering::SeqCst));
    assert!(counts.iter().all(|&count| count > 0) && counts.iter().sum::<usize>() == 40, "{counts:?}");
}

fn a_header_that_is_half_there_survives_a_reload() {
    let (server, headers) = wanting("127.0.0.1:0");
    let upstream = "send_proxy = \"v1\"";
    let daemon = Daemon::ready(&config("127.0.0.1:8080", ACCEPT, upstream, &[server.to_string()]));
    let header = header_bytes(2);
    // Where the machine is so busy that a reload takes as long as a header
    // may, it is tried again.
    for attempt in 0.. {
        assert!(attempt < 10, "no reload took less than 2 s");
        let begun = Instant::now();
        let mut half = connect(local(8080));
        half.write_all(&header[..30]).unwrap();
        let mut whole = connect(local(8080));
        whole.write_all(&[&header[..], b"x"].concat()).unwrap();
        assert_eq!(read_some(&mut whole, 1), b"x");
        let _ = next(&headers);
        let before = daemon.status().generation;
        daemon.ask("reload").expect("a reload");
        assert_eq!(daemon.status().generation, before + 1);
        if begun.elapsed() > Duration::from_secs(2) {
            continue;
        }
        half.write_all(&[&header[30..], b"stream"].concat()).unwrap();
        assert_eq!(read_some(&mut half, 6), b"stream");
        assert_eq!(ends_of(&next(&headers)).source, "192.0.2.7:4711".parse().unwrap());
        assert_eq!(exchange(&mut whole, b"y").unwrap(), b"y");
        break;
    }
}

fn a_service_takes_headers_too() {
    let daemon = Daemon::ready(&format!(
        "[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nservice = \"identify\"\n\
         [listener.tcp]\n{ACCEPT}\n"
    ));
    let mut client = client_named("192.0.2.7:4711");
    client.write_all(b"hello").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("evenkeel listener=front ") && text.ends_with("\nhello"), "{text:?}");
    drop(daemon);
}

fn program(name: &str, arguments: &[&str], folder: &Path, ready: u16) -> Running {
    let log = fs::File::create(folder.join("log")).unwrap();
    let child = Command::new(name)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("it starts");
    let running = Running(child);
    within(Duration::from_secs(20), &format!("{name} listens"), || TcpStream::connect(local(ready)).is_ok());
    running
}

fn haproxy(folder: &Path, text: &str, ready: u16) -> Running {
    let path = folder.join("haproxy.cfg");
    fs::write(
        &path,
        format!("defaults\n mode tcp\n timeout connect 5s\n timeout client 1m\n timeout server 1m\n{text}"),
    )
    .unwrap();
    program("haproxy", &["-db", "-f", path.to_str().unwrap()], folder, ready)
}

fn haproxy_in_front_is_understood() {
    let (server, headers) = wanting("127.0.0.1:0");
    let upstream = "send_proxy = \"v2\"";
    let _daemon = Daemon::ready(&config("127.0.0.1:8080", ACCEPT, upstream, &[server.to_string()]));
    let folder = tempfile::tempdir().unwrap();
    let _haproxy = haproxy(
        folder.path(),
        "listen one\n bind 127.0.0.1:9001\n server s 127.0.0.1:8080 send-proxy\n\
         listen two\n bind 127.0.0.1:9002\n server s 127.0.0.1:8080 send-proxy-v2\n\
         listen three\n bind 127.0.0.1:9003\n server s 127.0.0.1:8080 send-proxy-v2 proxy-v2-options crc32c,unique-id\n",
        9003,
    );
    // The look whether it listens went through to the server.
    let _ = next(&headers);
    for port in [9001, 9002, 9003] {
        for source in ["127.0.0.7", "127.0.0.8"] {
            let mut client = connect_from(source, local(port));
            assert_eq!(exchange(&mut client, b"question").unwrap(), b"question");
            let expected = Ends { source: client.local_addr().unwrap(), destination: local(port) };
            assert_eq!(ends_of(&next(&headers)), expected);
        }
    }
}

/// What a server answers that tells what it knows of us.
fn ask(port: u16, request: &[u8]) -> (SocketAddr, String) {
    let mut client = connect_from("127.0.0.7", local(port));
    client.write_all(request).unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    (client.local_addr().unwrap(), text.rsplit("\r\n").next().unwrap_or_default().to_string())
}

/// A daemon with version 1 on 8081 and version 2 on 8082.
fn sending(server: u16) -> Daemon {
    let mut text = String::from("[daemon]\nworkers = 2\n");
    for version in [1, 2] {
        text += &format!(
            "[[listener]]\nname = \"l{version}\"\nmode = \"tcp\"\nbind = \"127.0.0.1:808{version}\"\n\
             upstream = \"u{version}\"\n[[upstream]]\nname = \"u{version}\"\nsend_proxy = \"v{version}\"\n\
             [[upstream.server]]\naddress = \"127.0.0.1:{server}\"\n[upstream.health]\ncheck = \"none\"\n"
        );
    }
    Daemon::ready(&text)
}

fn haproxy_behind_understands() {
    let folder = tempfile::tempdir().unwrap();
    let _haproxy = haproxy(
        folder.path(),
        "frontend f\n mode http\n bind 127.0.0.1:9001 accept-proxy\n http-request return status 200 \
         content-type text/plain lf-string \"%[src]:%[src_port] %[dst]:%[dst_port]\"\n",
        9001,
    );
    let _daemon = sending(9001);
    for port in [8081, 8082] {
        let (client, answer) = ask(port, b"GET / HTTP/1.0\r\n\r\n");
        assert_eq!(answer, format!("{client} 127.0.0.1:{port}"));
    }
}

fn nginx_in_front_and_behind() {
    let module =
        ["/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/share/nginx/modules/ngx_stream_module.so"];
    let module = module.iter().find(|path| Path::new(path).exists());
    let load = module.map_or(String::new(), |path| format!("load_module {path};"));
    let folder = tempfile::tempdir().unwrap();
    let (server, headers) = wanting("127.0.0.1:0");
    let path = folder.path().join("nginx.conf");
    let text = format!(
        "{load} daemon off; master_process off; pid {0}/pid; error_log {0}/error.log;\n\
         events {{ worker_connections 200; }}\n\
         stream {{\n\
           server {{ listen 127.0.0.1:9001 proxy_protocol; return \"$proxy_protocol_addr:$proxy_protocol_port\"; }}\n\
           server {{ listen 127.0.0.1:9002; proxy_pass 127.0.0.1:8080; proxy_protocol on; }}\n}}\n",
        folder.path().display()
    );
    fs::write(&path, text).unwrap();
    let _nginx = program("nginx", &["-c", path.to_str().unwrap()], folder.path(), 9001);
    {
        let _daemon = sending(9001);
        for port in [8081, 8082] {
            // It asks for nothing, and what it has not read makes it reset.
            let (client, answer) = ask(port, b"");
            assert_eq!(answer, client.to_string());
        }
    }
    let upstream = "send_proxy = \"v1\"";
    let _daemon = Daemon::ready(&config("127.0.0.1:8080", ACCEPT, upstream, &[server.to_string()]));
    let mut client = connect_from("127.0.0.7", local(9002));
    assert_eq!(exchange(&mut client, b"question").unwrap(), b"question");
    let expected = Ends { source: client.local_addr().unwrap(), destination: local(9002) };
    assert_eq!(ends_of(&next(&headers)), expected);
}
