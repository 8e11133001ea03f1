//! Real servers and clients on both sides of the daemon.

mod support;

use std::fs;
use std::process::{Child, Command, Stdio};

use support::daemon::Daemon;
use support::{nginx, pattern};

fn main() {
    support::run(tests![
        nginx_serves_a_folder_of_files_to_64_clients_byte_for_byte needs ["nginx", "curl"],
    ])
}

fn nginx_serves_a_folder_of_files_to_64_clients_byte_for_byte() {
    let folder = nginx::a_folder();
    let sizes = [0, 1, 100, 1460, 16_384, 65_536, 300_000, 2_000_000];
    for index in 0..128 {
        let bytes = pattern(index, sizes[index % sizes.len()] + index);
        fs::write(folder.path().join(format!("files/{index}")), bytes).unwrap();
    }
    let _nginx = nginx::start(folder.path());
    let listener = |name: &str, port: u16, server: u16| {
        format!(
            "[[listener]]\nname = \"{name}\"\nmode = \"tcp\"\nbind = \"127.0.0.1:{port}\"\nupstream = \"{name}\"\n\
             [[upstream]]\nname = \"{name}\"\n[[upstream.server]]\naddress = \"127.0.0.1:{server}\"\n"
        )
    };
    let text =
        format!("[daemon]\nworkers = 4\n{}{}", listener("one", 8001, 9001), listener("two", 8002, 9002));
    let daemon = Daemon::ready(&text);
    for (version, port) in [("--http1.1", 8001), ("--http2-prior-knowledge", 8002)] {
        let target = folder.path().join(format!("got{port}"));
        fs::create_dir(&target).unwrap();
        // One transfer a process: the second one over HTTP/2 with prior
        // knowledge fails in curl 7.88 against nginx alone too.
        for round in [0..64, 64..128] {
            let clients: Vec<Child> = round
                .map(|index| {
                    Command::new("curl")
                        .args([version, "--silent", "--show-error", "--fail", "--max-time", "60", "-o"])
                        .arg(target.join(index.to_string()))
                        .arg(format!("http://127.0.0.1:{port}/{index}"))
                        .stderr(Stdio::piped())
                        .spawn()
                        .expect("curl starts")
                })
                .collect();
            for client in clients {
                let done = client.wait_with_output().unwrap();
                assert!(done.status.success(), "{version}: {}", String::from_utf8_lossy(&done.stderr));
            }
        }
        for index in 0..128 {
            let got = fs::read(target.join(index.to_string())).unwrap();
            assert!(got == pattern(index, sizes[index % sizes.len()] + index), "{version}: file {index}");
        }
    }
    assert!(daemon.status().workers.iter().all(|worker| worker.restarts == 0));
}
