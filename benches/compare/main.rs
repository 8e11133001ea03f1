//! evenkeel beside HAProxy, nginx, the kernel's NAT and no proxy at all, in
//! turns, on one machine.
//!
//! ```text
//! cargo bench --bench compare                        all of it, 7 rounds
//! cargo bench --bench compare -- --quick             a minute, one round
//! cargo bench --bench compare -- --only connect,bulk-16 --rounds 9
//! cargo bench --bench compare -- --build main=PATH   another build beside this one
//! ```
//! docs/BENCHMARKS.md says what is held fixed and how to read it. Everything
//! runs in a network namespace of its own; what is started is ended.

mod account;
mod flows;
mod plot;
mod proxies;
mod report;
mod server;
mod streams;
mod workloads;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use evenkeel::sys::{isolated, process};
use serde_json::json;

use proxies::{Open, Setting, Way};
use report::Results;
use server::Server;
use workloads::{ALL, Lab, Workload};

/// Compares evenkeel with other proxies.
#[derive(Parser)]
struct Arguments {
    /// One round of short samples: about a minute.
    #[arg(long)]
    quick: bool,
    /// Rounds; each runs every workload over every way.
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of a sample.
    #[arg(long)]
    seconds: Option<f64>,
    /// These workloads alone; a name's beginning will do.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// These ways alone: direct, nftables, haproxy, haproxy-splice, nginx, nginx-buffers, evenkeel.
    #[arg(long, value_delimiter = ',')]
    ways: Vec<String>,
    /// Another build of evenkeel beside this one, as NAME=PATH.
    #[arg(long)]
    build: Vec<String>,
    /// Writes benchmarks.json and benchmarks.svg into this folder, and the tables
    /// into its BENCHMARKS.md.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Prints JSON in place of tables.
    #[arg(long)]
    json: bool,
    /// cargo bench says so.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    server::serve_if_told();
    let arguments = Arguments::parse();
    if !arguments.bench {
        return println!("SKIPPED: cargo bench --bench compare");
    }
    let allowed = allow_cubic();
    let network = isolated::leave_network().expect("a network of its own");
    if network == isolated::Network::Shared {
        return println!("SKIPPED: this host allows no network namespace");
    }
    process::raise_file_limit().expect("a limit of open files");
    // What the host has by default (BBR, say) would measure its pacing.
    set("/proc/sys/net/ipv4/tcp_congestion_control", "cubic");
    set("/proc/sys/net/ipv4/ip_local_port_range", "10000 65535");
    let (results, about) = measure(&arguments);
    let document = results.json(about.clone());
    let markdown = format!("{}\n\n{}", sentence(&about), results.markdown());
    if arguments.json {
        println!("{document:#}");
    } else {
        println!("{markdown}");
    }
    if let Some(folder) = &arguments.out {
        write(folder, "benchmarks.json", &format!("{document:#}\n"));
        put_into_page(folder, &markdown);
        write(folder, "benchmarks.svg", &plot::svg(&results));
    }
    if let Some((mut file, before)) = allowed {
        let _ = file.write_all(before.as_bytes());
    }
}

/// A network of one's own may choose only what the host allows: allows CUBIC
/// where the host does not, and answers what to write back, and where.
fn allow_cubic() -> Option<(fs::File, String)> {
    let path = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    let before = fs::read_to_string(path).ok()?;
    if before.split_whitespace().any(|name| name == "cubic") {
        return None;
    }
    let mut file = fs::OpenOptions::new().write(true).open(path).ok()?;
    file.write_all(format!("{} cubic", before.trim()).as_bytes()).ok()?;
    // An open one stays the host's, wherever this process goes.
    Some((fs::OpenOptions::new().write(true).open(path).ok()?, before))
}

/// Puts the tables where the page has its figures.
fn put_into_page(folder: &Path, markdown: &str) {
    const BEGIN: &str = "<!-- figures -->\n";
    const END: &str = "<!-- end of figures -->";
    let page = fs::read_to_string(folder.join("BENCHMARKS.md")).unwrap_or_default();
    match (page.find(BEGIN), page.find(END)) {
        (Some(begin), Some(end)) if begin < end => {
            let (before, after) = (&page[..begin + BEGIN.len()], &page[end..]);
            write(folder, "BENCHMARKS.md", &format!("{before}\n{markdown}\n{after}"));
        }
        _ => write(folder, "benchmarks.md", markdown),
    }
}

/// Says so where that is not possible.
fn set(path: &str, value: &str) {
    if let Err(error) = fs::write(path, value) {
        eprintln!("{path} stays as it is: {error}");
    }
}

fn write(folder: &Path, name: &str, text: &str) {
    fs::create_dir_all(folder).expect("a folder");
    fs::write(folder.join(name), text).expect("a file");
}

fn measure(arguments: &Arguments) -> (Results, serde_json::Value) {
    let rounds = arguments.rounds.unwrap_or(if arguments.quick { 1 } else { 7 });
    let seconds = arguments.seconds.unwrap_or(if arguments.quick { 0.4 } else { 1.5 });
    let mut results = Results::default();
    let ways = ways(arguments, &mut results);
    let is_named = |name: &String| ALL.iter().any(|workload| workload.name == name);
    let is_wanted = |workload: &&Workload| {
        let fits =
            |name: &String| workload.name == name || (!is_named(name) && workload.name.starts_with(name));
        arguments.only.is_empty() || arguments.only.iter().any(fits)
    };
    let workloads: Vec<&Workload> = ALL.iter().filter(is_wanted).collect();
    let lab =
        Lab { server: Server::start(), web: Open::web_server(), time: Duration::from_secs_f64(seconds) };
    let begin = Instant::now();
    for round in 0..rounds {
        for workload in &workloads {
            for way in in_turn(&ways, workload, round) {
                take_sample(&lab, workload, way, round, &mut results);
            }
        }
    }
    let versions: Vec<String> = ways.iter().filter_map(Way::version).collect();
    let about = json!({
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "cpu": cpu_model(),
        "load_average": fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        "congestion_control": fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default().trim(),
        "rounds": rounds,
        "seconds_a_sample": seconds,
        "minutes": begin.elapsed().as_secs_f64() / 60.0,
        "versions": versions,
    });
    (results, about)
}

fn take_sample(lab: &Lab, workload: &Workload, way: &Way, round: usize, results: &mut Results) {
    match (workload.run)(lab, way) {
        Ok(sample) => {
            let shown = sample.get(workload.metric).map_or(String::new(), |value| {
                let (heading, digits) = report::heading(workload.metric);
                format!("{value:.digits$} {heading}")
            });
            eprintln!("round {:>2}  {:<10} {:<15} {shown}", round + 1, workload.name, way.name());
            results.add(workload.name, way.name(), round, sample);
        }
        Err(error) => {
            let line = format!("{} over {} in round {}: {error}", workload.name, way.name(), round + 1);
            eprintln!("{line}");
            results.skipped.push(line);
        }
    }
}

/// The ways of a workload; every round begins with another and every second
/// one goes backwards, so that none always follows the same one.
fn in_turn<'a>(ways: &'a [Way], workload: &Workload, round: usize) -> Vec<&'a Way> {
    let belongs = |way: &&Way| match way {
        Way::Evenkeel { setting, .. } => workload.has(*setting),
        other => workload.ways.contains(&other.name()),
    };
    let mut turn: Vec<&Way> = ways.iter().filter(belongs).collect();
    let count = turn.len().max(1);
    turn.rotate_left((round / 2) % count);
    if round % 2 == 1 {
        turn.reverse();
    }
    turn
}

fn ways(arguments: &Arguments, results: &mut Results) -> Vec<Way> {
    let own = |name: &str, setting| Way::Evenkeel {
        name: name.into(),
        program: env!("CARGO_BIN_EXE_evenkeel").into(),
        setting,
    };
    let mut ways = vec![
        Way::Direct,
        Way::Nftables,
        Way::Haproxy,
        Way::HaproxySplice,
        Way::Nginx,
        Way::NginxBuffers,
        own("evenkeel", Setting::Default),
        own("evenkeel-log", Setting::AccessLog),
        own("evenkeel-unkept", Setting::NoKeepers),
    ];
    for text in &arguments.build {
        let (name, path) = text.split_once('=').expect("--build NAME=PATH");
        ways.push(Way::Evenkeel { name: name.into(), program: path.into(), setting: Setting::Default });
    }
    ways.retain(|way| {
        if !arguments.ways.is_empty() && !arguments.ways.iter().any(|name| name == way.name()) {
            return false;
        }
        let missing = way.missing();
        if let Some(reason) = &missing {
            results.skipped.push(format!("{} ({reason})", way.name()));
        }
        missing.is_none()
    });
    ways
}

/// What the figures were measured on.
fn sentence(about: &serde_json::Value) -> String {
    let text = |name: &str| about[name].to_string().trim_matches('"').to_string();
    format!(
        "Linux {}, {} CPUs ({}), loopback, congestion control {}. {} rounds, {} s a sample. Load average at the end: {}. {}.",
        text("kernel"),
        text("cpus"),
        text("cpu"),
        text("congestion_control"),
        text("rounds"),
        text("seconds_a_sample"),
        text("load_average").split(' ').take(3).collect::<Vec<_>>().join(" "),
        about["versions"].as_array().map_or(String::new(), |all| {
            let mut names: Vec<&str> = all.iter().filter_map(serde_json::Value::as_str).collect();
            names.dedup();
            names.join("; ")
        }),
    )
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    line.map_or("unknown".into(), |line| line.trim_start_matches([' ', '\t', ':']).to_string())
}
