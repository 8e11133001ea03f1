//! The load generator against servers of others: nginx, HAProxy, dnsmasq.
//! A test whose server is not installed is reported as skipped.

mod bench_support;
mod support;

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bench_support::{Tcp, bench, tcp};
use support::eventually;

fn main() {
    support::run(tests![
        nginx_is_asked_by_http needs ["nginx"],
        haproxy_passes_every_byte_on needs ["haproxy"],
        a_name_server_is_asked_by_dns needs ["dnsmasq"],
    ])
}

/// A server that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn path_of(name: &str) -> PathBuf {
    let folders = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"];
    let path = folders.into_iter().map(|folder| Path::new(folder).join(name)).find(|path| path.exists());
    path.unwrap_or_else(|| name.into())
}

fn start(command: &mut Command) -> Server {
    Server(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it is installed"),
    )
}

fn accepts(address: &str) {
    eventually(&format!("{address} accepts"), || TcpStream::connect(address).is_ok());
}

fn nginx_is_asked_by_http() {
    let program = path_of("nginx");
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(
        folder.path().join("nginx.conf"),
        format!(
            "daemon off; master_process off; user root; pid {0}/pid; error_log stderr;\n\
             events {{ worker_connections 512; }}\n\
             http {{ access_log off; keepalive_requests 20;\n\
             client_body_temp_path {0}/a; proxy_temp_path {0}/b; fastcgi_temp_path {0}/c; uwsgi_temp_path {0}/d; scgi_temp_path {0}/e;\n\
             server {{ listen 127.0.0.1:80; location / {{ return 200 'hello'; }} location /no {{ return 404; }} }} }}\n",
            folder.path().display()
        ),
    )
    .expect("our folder");
    let _server = start(Command::new(program).arg("-c").arg(folder.path().join("nginx.conf")));
    accepts("127.0.0.1:80");
    let run = bench("tcp 127.0.0.1:80 --payload http --connections 300 --json");
    run.ended(0, 300, 0);
    // nginx closes after twenty: that is its right, and no error.
    let run =
        bench("tcp 127.0.0.1:80 --payload http --pattern request --concurrency 8 --requests 1000 --json");
    run.ended(0, 1000, 0);
    assert!(run.number("/connections") >= 50.0, "{}", run.stdout);
    let run = bench("tcp 127.0.0.1:80 --payload http --path /no --connections 10 --json");
    assert_eq!((run.code, run.errors("error_reply"), run.error_count()), (1, 10, 10), "{}", run.stdout);
    let run = bench(
        "tcp 127.0.0.1:80 --connections 10 --expect hello --send GET\\x20/\\x20HTTP/1.0\\r\\n\\r\\n --json",
    );
    run.ended(0, 10, 0);
}

fn haproxy_passes_every_byte_on() {
    let program = path_of("haproxy");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("haproxy.cfg");
    let behind = tcp(Tcp::Echo);
    std::fs::write(
        &file,
        format!(
            "global\n maxconn 2000\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 5s\n timeout server 5s\n\
             frontend in\n bind 127.0.0.1:8080\n default_backend out\nbackend out\n server one {behind}\n"
        ),
    )
    .expect("our folder");
    let _server = start(Command::new(program).arg("-db").arg("-f").arg(&file));
    accepts("127.0.0.1:8080");
    let run = bench("tcp 127.0.0.1:8080 --connections 300 --size 5000 --json");
    run.ended(0, 300, 0);
    let run = bench("tcp 127.0.0.1:8080 --pattern request --connections 20 --requests 2000 --json");
    run.ended(0, 2000, 0);
    let run = bench("tcp 127.0.0.1:8080 --pattern stream --connections 2 --requests 500 --json");
    run.ended(0, 500, 0);
}

fn a_name_server_is_asked_by_dns() {
    let program = path_of("dnsmasq");
    let _server = start(Command::new(program).args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--user=root",
        "--pid-file",
        "--port=53",
        "--listen-address=127.0.0.1",
        "--bind-interfaces",
        "--address=/bench.test/192.0.2.1",
        "--auth-ttl=1",
    ]));
    let address: SocketAddr = "127.0.0.1:53".parse().expect("an address");
    eventually("the name server answers", || {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        let query = b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\x05bench\x04test\0\0\x01\0\x01";
        socket.send_to(query, address).is_ok() && socket.recv(&mut [0; 512]).is_ok()
    });
    let run =
        bench("udp 127.0.0.1:53 --payload dns --query bench.test --requests 2000 --concurrency 8 --json");
    run.ended(0, 2000, 0);
    // It knows nobody to ask for other names: REFUSED, which is an error reply.
    let run = bench("udp 127.0.0.1:53 --payload dns --query other.test --requests 20 --json");
    assert_eq!((run.code, run.errors("error_reply"), run.error_count()), (1, 20, 20), "{}", run.stdout);
    let run = bench("udp 127.0.0.1:53 --payload dns --query bench.test --rate 1000 --duration 300ms --json");
    assert_eq!((run.code, run.error_count()), (0, 0), "{}", run.stdout);
}
