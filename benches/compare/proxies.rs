//! The ways from the client to the servers: straight, by the kernel's NAT, by
//! evenkeel, by its peers. Each is started anew for every sample.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::account;
use crate::server::{BULK, ECHO, HOSTS, WEB};

/// Something that stands, or does not, between client and server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing: what client and server can do.
    Direct,
    /// The kernel's own address translation.
    Nftables,
    /// evenkeel, or another build of it.
    Evenkeel { name: String, program: PathBuf, setting: Setting },
    /// HAProxy.
    Haproxy,
    /// HAProxy with splice(2) and large pipes.
    HaproxySplice,
    /// nginx, stream module.
    Nginx,
    /// nginx with large buffers.
    NginxBuffers,
}

/// How evenkeel is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// As it is by default.
    Default,
    /// With an access log, which its peers have not.
    AccessLog,
    /// Without keepers: what a killed worker had is lost, as with its peers.
    NoKeepers,
}

/// What the client is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    Echo,
    Bulk,
    Web,
    Datagrams,
}

impl Way {
    /// Its name in tables.
    pub fn name(&self) -> &str {
        match self {
            Way::Direct => "direct",
            Way::Nftables => "nftables",
            Way::Evenkeel { name, .. } => name,
            Way::Haproxy => "haproxy",
            Way::HaproxySplice => "haproxy-splice",
            Way::Nginx => "nginx",
            Way::NginxBuffers => "nginx-buffers",
        }
    }

    /// Why it cannot be had here.
    pub fn missing(&self) -> Option<String> {
        let runs = |program: &str, argument: &str| {
            let mut command = command(program);
            command.arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
        };
        match self {
            Way::Direct => None,
            Way::Evenkeel { program, .. } => {
                (!program.exists()).then(|| format!("{} is missing", program.display()))
            }
            Way::Haproxy | Way::HaproxySplice => {
                (!runs("haproxy", "-v")).then(|| "haproxy is not installed".to_string())
            }
            Way::Nginx | Way::NginxBuffers => nginx_missing(),
            Way::Nftables if !runs("nft", "-v") => Some("nft is not installed".to_string()),
            Way::Nftables => Nat::begin().err(),
        }
    }

    /// Its version, as it tells it.
    pub fn version(&self) -> Option<String> {
        let (program, argument) = match self {
            Way::Direct | Way::NginxBuffers | Way::HaproxySplice => return None,
            Way::Nftables => ("nft", "-v"),
            Way::Evenkeel { program, .. } => (program.to_str()?, "--version"),
            Way::Haproxy => ("haproxy", "-v"),
            Way::Nginx => ("nginx", "-v"),
        };
        let output = command(program).arg(argument).output().ok()?;
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&text).lines().next().map(str::to_string)
    }
}

fn nginx_missing() -> Option<String> {
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    if !Path::new(module).exists() {
        return Some(format!("nginx's stream module is not at {module} (Debian: libnginx-mod-stream)"));
    }
    let found = command("nginx").arg("-v").stderr(Stdio::null()).status().is_ok();
    (!found).then(|| "nginx is not installed".to_string())
}

/// Daemons live where an ordinary user's path does not lead.
fn command(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = path.split(':').map(|folder| Path::new(folder).join(program)).find(|path| path.exists());
    Command::new(found.unwrap_or_else(|| program.into()))
}

/// The kernel's NAT of all services, removed with this value.
struct Nat;

impl Nat {
    fn begin() -> Result<Nat, String> {
        let mut rules =
            "table ip compare {\nchain output {\ntype nat hook output priority -100;\n".to_string();
        for (front, back, protocol) in [
            (ECHO - 1000, ECHO, "tcp"),
            (BULK - 1000, BULK, "tcp"),
            (WEB - 1000, WEB, "tcp"),
            (8000, ECHO, "udp"),
        ] {
            let host = HOSTS[0];
            rules += &format!("ip daddr 127.0.0.1 {protocol} dport {front} dnat to {host}:{back}\n");
        }
        rules += "}\n}\n";
        let mut child = command("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("nft does not start: {error}"))?;
        let mut input = child.stdin.take().expect("piped");
        input.write_all(rules.as_bytes()).map_err(|error| error.to_string())?;
        drop(input);
        let output = child.wait_with_output().map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_string();
        if output.status.success() { Ok(Nat) } else { Err(format!("nft refuses: {said}")) }
    }
}

impl Drop for Nat {
    fn drop(&mut self) {
        let _ = command("nft").args(["delete", "table", "ip", "compare"]).status();
    }
}

/// A way that is open; closed with this value.
pub struct Open {
    child: Option<Child>,
    nat: Option<Nat>,
    pids: Vec<u32>,
    _folder: Option<tempfile::TempDir>,
}

impl Open {
    /// Opens a way, and waits until it answers.
    pub fn begin(way: &Way) -> Open {
        let mut open = Open { child: None, nat: None, pids: Vec::new(), _folder: None };
        let (text, file) = match way {
            Way::Direct => return open,
            Way::Nftables => {
                open.nat = Some(Nat::begin().expect("it did before"));
                return open;
            }
            Way::Evenkeel { setting, .. } => {
                let (line, more) = match setting {
                    Setting::Default => ("", ""),
                    Setting::AccessLog => ("[log]\n", "access = \"@folder@/access\"\n"),
                    Setting::NoKeepers => ("[daemon]\n", "crash_proof = false\n"),
                };
                let text = include_str!("evenkeel.toml");
                (text.replacen(line, &format!("{line}{more}"), 1), "evenkeel.toml")
            }
            Way::Haproxy => (include_str!("haproxy.cfg").to_string(), "haproxy.cfg"),
            Way::HaproxySplice => (include_str!("haproxy-splice.cfg").to_string(), "haproxy.cfg"),
            Way::Nginx => (include_str!("nginx.conf").to_string(), "nginx.conf"),
            Way::NginxBuffers => (include_str!("nginx-buffers.conf").to_string(), "nginx.conf"),
        };
        let folder = folder_with(file, &text);
        let path = folder.path().join(file);
        let mut command = match way {
            Way::Evenkeel { program, .. } => {
                let mut command = Command::new(program);
                command.args(["run", "-c"]);
                command
            }
            Way::Haproxy | Way::HaproxySplice => {
                let mut command = command("haproxy");
                command.args(["-q", "-db", "-f"]);
                command
            }
            _ => {
                let mut command = command("nginx");
                command.arg("-c");
                command
            }
        };
        command.arg(path);
        open.start(&mut command);
        open._folder = Some(folder);
        wait_for_echo();
        if matches!(way, Way::Evenkeel { .. } | Way::Nginx | Way::NginxBuffers) {
            wait_for_datagrams();
        }
        open.pids = whole_family(open.child.as_ref().expect("just started").id());
        open
    }

    /// The HTTP server behind all of them.
    pub fn web_server() -> Open {
        let folder = folder_with("web.conf", include_str!("web.conf"));
        fs::write(folder.path().join("index.html"), [b'x'; 1024]).expect("a page");
        let mut open = Open { child: None, nat: None, pids: Vec::new(), _folder: None };
        open.start(command("nginx").arg("-c").arg(folder.path().join("web.conf")));
        open.pids = vec![open.child.as_ref().expect("just started").id()];
        open._folder = Some(folder);
        open
    }

    fn start(&mut self, command: &mut Command) {
        let quiet = std::env::var_os("COMPARE_VERBOSE").is_none();
        if quiet {
            command.stderr(Stdio::null());
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        self.child = Some(child.expect("the program starts"));
    }

    /// All of its processes.
    pub fn pids(&self) -> &[u32] {
        &self.pids
    }

    /// Where a client connects for a service.
    pub fn address(&self, service: Service) -> SocketAddr {
        let port = match service {
            Service::Echo | Service::Datagrams => ECHO,
            Service::Bulk => BULK,
            Service::Web => WEB,
        };
        let is_direct = self.child.is_none() && self.nat.is_none();
        let text =
            if is_direct { format!("{}:{port}", HOSTS[0]) } else { format!("127.0.0.1:{}", port - 1000) };
        text.parse().expect("an address")
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let Some(child) = &mut self.child else { return };
        // TERM, so that nginx ends its workers; evenkeel would wait for its
        // sessions: a second one ends it at once.
        let pid = Pid::from_raw(child.id() as i32);
        let deadline = Instant::now() + Duration::from_secs(10);
        while child.try_wait().expect("our child").is_none() && Instant::now() < deadline {
            let _ = kill(pid, Signal::SIGTERM);
            std::thread::park_timeout(Duration::from_millis(50));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn folder_with(file: &str, text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    // nginx's workers are another user where it is started by root.
    let open_to_all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(folder.path(), open_to_all).expect("our folder");
    let text = text.replace("@folder@", folder.path().to_str().expect("plain letters"));
    fs::write(folder.path().join(file), text).expect("a configuration");
    folder
}

/// All of its processes. The first worker answers while the next is still
/// being started, so this waits until no more come and all of them rest.
fn whole_family(parent: u32) -> Vec<u32> {
    let mut family = account::family(parent);
    for _ in 0..50 {
        let before = account::used(&family);
        std::thread::park_timeout(Duration::from_millis(100));
        let now = account::family(parent);
        let is_whole = now == family && account::used(&family).since(before).seconds < 1e-3;
        family = now;
        if is_whole {
            break;
        }
    }
    family
}

fn wait_for_echo() {
    let is_answered = || {
        let mut stream = TcpStream::connect("127.0.0.1:8000")?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])
    };
    wait_until(|| is_answered().is_ok());
}

fn wait_for_datagrams() {
    let probe = UdpSocket::bind("127.0.0.1:0").expect("a port");
    probe.set_read_timeout(Some(Duration::from_millis(50))).expect("a time-out");
    wait_until(|| probe.send_to(b"?", "127.0.0.1:8000").is_ok() && probe.recv(&mut [0; 8]).is_ok());
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "the proxy does not answer (COMPARE_VERBOSE=1 shows what it says)"
        );
        std::thread::park_timeout(Duration::from_millis(5));
    }
}
