//! What the load generator hands out: JSON by its schema, a page that needs
//! nothing from anywhere, exit codes.

mod bench_support;
mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bench_support::{Tcp, Udp, bench, bench_words, daemon, group, tcp, udp};
use serde_json::Value;
use support::schema::check;

fn main() {
    support::run(tests![
        the_json_of_every_kind_of_run_fits_its_schema,
        the_schema_checker_sees_what_is_wrong,
        the_page_is_well_formed_and_fetches_nothing,
        a_browser_shows_the_page needs ["chromium"],
        usage_errors_are_exit_2_and_a_bad_report_path_costs_no_run,
        the_table_has_a_bar_for_each_slot,
    ])
}

fn schema() -> Value {
    let text =
        std::fs::read_to_string("docs/bench.schema.json").expect("the schema is part of the repository");
    serde_json::from_str(&text).expect("the schema is JSON")
}

fn problems(value: &Value) -> Vec<String> {
    let (schema, mut wrong) = (schema(), Vec::new());
    check(&schema, &schema, value, "", &mut wrong);
    wrong
}

fn the_json_of_every_kind_of_run_fits_its_schema() {
    let folder = tempfile::tempdir().expect("a folder");
    let group = group(4, &[0, 1, 2, 3]);
    let socket = daemon(folder.path(), &group.address.to_string(), "hash", &group.accepted);
    let runs = [
        format!("tcp {} --connections 200 --socket {} --json", group.address, socket.display()),
        format!(
            "tcp {} --pattern request --duration 700ms --socket {} --json",
            group.address,
            socket.display()
        ),
        format!("tcp {} --connections 200 --json", tcp(Tcp::Identify(3))),
        format!("tcp {} --connections 20 --json", tcp(Tcp::Reset)),
        format!("tcp {} --rate 300 --duration 300ms --json", tcp(Tcp::Echo)),
        format!("tcp {} --pattern stream --duration 200ms --json", tcp(Tcp::Echo)),
        format!("tcp {} --pattern stream --direction up --duration 200ms --json", tcp(Tcp::Discard)),
        format!("udp {} --requests 100 --json", udp(Udp::Identify(2))),
        format!("udp {} --requests 20 --timeout 100ms --json", udp(Udp::Drop(10))),
    ];
    for words in runs {
        let json = bench(&words).json();
        assert_eq!(problems(&json), Vec::<String>::new(), "{words}\n{json:#}");
    }
}

fn the_schema_checker_sees_what_is_wrong() {
    let with = |change: fn(&mut Value)| {
        let mut value =
            serde_json::json!({ "mode": "tcp", "errors": { "reset": 1 }, "seconds": 1.5, "spread": null });
        change(&mut value);
        problems(&value).join("\n")
    };
    assert!(with(|_| {}).contains(": threads is missing"));
    assert!(!with(|_| {}).contains("/errors"));
    assert!(with(|value| value["errors"]["reset"] = 0.into()).contains("/errors/reset: 0 is below 1"));
    assert!(with(|value| value["errors"]["oops"] = 1.into()).contains("/errors/oops"));
    assert!(with(|value| value["seconds"] = "1".into()).contains("/seconds: \"1\" is not \"number\""));
    assert!(with(|value| value["more"] = 1.into()).contains("/more is not in the schema"));
}

/// Walks over the tags: each one closed, in order. What is left out of XML
/// here, the page does not use.
fn check_tags(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("the page says what it is");
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        assert_eq!(tag.matches('"').count() % 2, 0, "quotes in <{tag}>");
        let name = tag.trim_start_matches('/').split([' ', '/']).next().expect("a name");
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "</{name}>");
        } else if !tag.ends_with('/') {
            open.push(name);
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "{open:?} stay open");
}

fn page_of(words: &str, folder: &Path) -> String {
    let file = folder.join("report.html");
    let mut words: Vec<&str> = words.split_whitespace().collect();
    let file_text = file.to_str().expect("text");
    words.extend(["--report", file_text]);
    bench_words(&words);
    std::fs::read_to_string(&file).expect("the report was written")
}

fn the_page_is_well_formed_and_fetches_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let pages = [
        page_of(
            &format!("tcp {} --rate 500 --duration 800ms --max-spread 1.01", tcp(Tcp::Identify(3))),
            folder.path(),
        ),
        page_of(&format!("tcp {} --connections 10", tcp(Tcp::Reset)), folder.path()),
        page_of(
            &format!("tcp {} --pattern stream --direction up --duration 600ms", tcp(Tcp::Discard)),
            folder.path(),
        ),
        page_of(&format!("udp {} --requests 50 --timeout 100ms", udp(Udp::Drop(10))), folder.path()),
        page_of(
            "tcp 127.0.0.1:9 --connections 1 --payload http --path /<script>alert(1)</script>&\"",
            folder.path(),
        ),
    ];
    for page in &pages {
        check_tags(page);
        for fetch in
            ["http:", "https:", "//", "url(", "@import", "<script", "<link", "<img", "<iframe", "src="]
        {
            let plain = page.replace("--report", "");
            assert!(!plain.contains(fetch), "{fetch} in {plain}");
        }
        assert!(!page.contains("NaN") && !page.contains("inf ") && !page.contains("\"inf\""), "{page}");
    }
    assert!(pages[0].contains("Latency by percentile") && pages[0].contains("Rate over time"));
    assert!(pages[0].contains("Connections of each slot") && pages[0].contains("prefers-color-scheme: dark"));
    assert!(pages[1].contains("<h2>Errors</h2>") && pages[1].contains("nothing was answered"));
    assert!(pages[4].contains("&lt;script&gt;"));
}

fn a_browser_shows_the_page() {
    let folder = tempfile::tempdir().expect("a folder");
    page_of(&format!("tcp {} --rate 500 --duration 1s", tcp(Tcp::Identify(3))), folder.path());
    let picture = folder.path().join("page.png");
    let out = std::fs::File::create(folder.path().join("dom.html")).expect("a file");
    let mut child = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"])
        .args(["--disable-background-networking", "--disable-component-update", "--dump-dom"])
        .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
        .arg(format!("--screenshot={}", picture.display()))
        .arg(format!("file://{}", folder.path().join("report.html").display()))
        .stdout(out)
        .stderr(Stdio::null())
        .spawn()
        .expect("it was there a moment ago");
    let deadline = Instant::now() + Duration::from_secs(60);
    while child.try_wait().expect("our child").is_none() {
        if Instant::now() > deadline {
            child.kill().expect("our child");
            child.wait().expect("our child");
            panic!("the browser did not end");
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    // What the browser understood: all three plots, with their shapes inside.
    let dom = std::fs::read_to_string(folder.path().join("dom.html")).expect("the browser wrote");
    assert_eq!(dom.matches("<svg ").count(), 4, "{dom}");
    assert!(dom.contains("<path class=\"line a\"") && dom.contains("class=\"slot\""), "{dom}");
    if let Ok(png) = std::fs::read(&picture) {
        assert!(png.len() > 20_000, "a picture with something on it: {} bytes", png.len());
    }
}

fn usage_errors_are_exit_2_and_a_bad_report_path_costs_no_run() {
    for words in ["tcp", "tcp nowhere", "tcp 127.0.0.1:80 --rate -1", "tcp 127.0.0.1:80 --pattern nothing"] {
        let run = bench(words);
        assert_eq!((run.code, run.stdout.as_str()), (2, ""), "{words}: {}", run.stderr);
        assert!(!run.stderr.is_empty());
    }
    let run = bench(&format!("tcp {} --report /nonexistent/x.html", tcp(Tcp::Echo)));
    assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{}", run.stderr);
    assert!(run.stderr.contains("/nonexistent/x.html"), "{}", run.stderr);
    let run = bench("tcp nobody.invalid:80");
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("does not resolve"), "{}", run.stderr);
}

fn the_table_has_a_bar_for_each_slot() {
    let run = bench(&format!("tcp {} --connections 400", tcp(Tcp::Identify(4))));
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{}", run.stdout);
    assert_eq!(run.stdout.matches("100   25.0 %  ████████").count(), 4, "{}", run.stdout);
    assert!(run.stdout.contains("within chance for 400 connections over 4 slots"), "{}", run.stdout);
}
