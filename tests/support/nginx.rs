//! An nginx of a test's own.

use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::eventually;
use super::servers::local;

/// A program that ends with the test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves the folder's `files`, with HTTP/1.1 at port 9001 and HTTP/2 at 9002.
#[track_caller]
pub fn start(folder: &Path) -> Running {
    let config = folder.join("nginx.conf");
    let text = format!(
        "daemon off; worker_processes 1; pid {0}/pid; error_log {0}/error.log;\n\
         events {{ worker_connections 2000; }}\n\
         http {{ access_log off; root {0}/files; keepalive_requests 1000000000; keepalive_time 1d;\n\
           client_body_temp_path {0}/t1; proxy_temp_path {0}/t2; fastcgi_temp_path {0}/t3;\n\
           uwsgi_temp_path {0}/t4; scgi_temp_path {0}/t5;\n\
           server {{ listen 127.0.0.1:9001; }}\n\
           server {{ listen 127.0.0.1:9002 http2; }} }}\n",
        folder.display()
    );
    std::fs::write(&config, text).expect("our folder");
    // One process: killed whole with the test.
    let child = Command::new("nginx")
        .args(["-g", "master_process off;", "-c"])
        .arg(&config)
        .stdin(Stdio::null())
        .spawn()
        .expect("nginx starts");
    let nginx = Running(child);
    eventually("nginx listens", || TcpStream::connect(local(9002)).is_ok());
    nginx
}

/// A folder for it: its workers may be another user.
pub fn a_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).expect("its mode");
    std::fs::create_dir(folder.path().join("files")).expect("our folder");
    folder
}
