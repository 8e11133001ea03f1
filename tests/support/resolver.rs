//! A host's own /etc/resolv.conf and /etc/hosts, and a DNS server to name in
//! it: for this test and all that it starts, nobody else.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::daemon::signal;
use super::eventually;

/// Files in place of the host's; they stay until this process ends.
pub struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    /// With DNS at 127.0.0.1, and nothing but localhost in /etc/hosts.
    pub fn own() -> Files {
        let folder = tempfile::tempdir().expect("a folder");
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("its mode");
        let files = Files { folder };
        files.write("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:2\n");
        files.write("hosts", "127.0.0.1 localhost\n");
        unshare(CloneFlags::CLONE_NEWNS).expect("mounts of its own");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
        for name in ["resolv.conf", "hosts"] {
            let target = fs::canonicalize(format!("/etc/{name}")).expect("the host has one");
            let file = files.folder.path().join(name);
            mount(Some(&file), &target, none, MsFlags::MS_BIND, none).expect("a bind mount");
        }
        files
    }

    /// Changes one of them in place: the mount is of this very file.
    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.path().join(name), text).expect("a file");
    }
}

/// dnsmasq at 127.0.0.1:53, which knows `test.` alone.
pub struct Dns {
    child: Option<Child>,
    folder: tempfile::TempDir,
    services: Vec<String>,
}

impl Dns {
    /// With these addresses, each "ADDRESS NAME", good for one second.
    pub fn start(hosts: &[&str]) -> Dns {
        Dns::with_services(hosts, &[])
    }

    /// And with these services, each "NAME,TARGET,PORT,PRIORITY,WEIGHT".
    pub fn with_services(hosts: &[&str], services: &[&str]) -> Dns {
        let folder = tempfile::tempdir().expect("a folder");
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("its mode");
        let services = services.iter().map(ToString::to_string).collect();
        let mut dns = Dns { child: None, folder, services };
        dns.write(hosts);
        dns.run();
        dns
    }

    fn hosts(&self) -> PathBuf {
        self.folder.path().join("hosts")
    }

    fn write(&self, hosts: &[&str]) {
        fs::write(self.hosts(), hosts.join("\n") + "\n").expect("a file");
    }

    /// Starts it again, after `kill`.
    pub fn run(&mut self) {
        let mut command = Command::new("/usr/sbin/dnsmasq");
        command.args([
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
            "--pid-file=",
        ]);
        command.args(["--listen-address=127.0.0.1", "--bind-interfaces", "--local=/test/", "--local-ttl=1"]);
        command.args(["--user=root", "--group=root"]).arg(format!("--addn-hosts={}", self.hosts().display()));
        command.args(self.services.iter().map(|service| format!("--srv-host={service}")));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().expect("dnsmasq"));
        eventually("dnsmasq answers", || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
            socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a time-out");
            // A question for the root's name servers: any answer will do.
            let question = [7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];
            let _ = socket.connect("127.0.0.1:53");
            let _ = socket.send(&question);
            socket.recv(&mut [0; 512]).is_ok()
        });
    }

    /// Will answer like this once it runs.
    pub fn change_while_dead(&self, hosts: &[&str]) {
        self.write(hosts);
    }

    /// Answers like this from now on.
    pub fn change(&self, hosts: &[&str]) {
        self.write(hosts);
        signal(self.child.as_ref().expect("it runs").id(), nix::sys::signal::Signal::SIGHUP);
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.kill();
    }
}
