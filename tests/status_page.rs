//! The status page in a real browser: against a running daemon, and against
//! documents that a daemon would take long to come to.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use support::browser::Browser;
use support::daemon::Daemon;
use support::eventually;
use support::http::{self, get};
use support::servers::{connect, echo, exchange, local, tcp_server};

fn main() {
    support::run(tests![
        the_page_lives_while_traffic_runs needs ["chromium"],
        a_server_that_goes_down_and_a_silent_daemon_are_shown needs ["chromium"],
        ten_listeners_sixteen_slots_and_a_hundred_servers_are_readable needs ["chromium"],
        names_are_text_and_nothing_else needs ["chromium"],
        the_page_is_used_by_keyboard_and_read_aloud needs ["chromium"],
    ])
}

const ADMIN: u16 = 9180;

fn daemon() -> Daemon {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&format!(
        "[daemon]\nworkers = 2\nadmin = \"127.0.0.1:9180\"\n\
        [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nupstream = \"back\"\n\
        [[listener]]\nname = \"dns\"\nmode = \"udp\"\nbind = \"127.0.0.1:8053\"\nservice = \"echo\"\n\
        [[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n"
    ));
    eventually("the admin address answers", || TcpStream::connect(local(ADMIN)).is_ok());
    daemon
}

/// A page's visible text, in one line.
const SEEN: &str = "document.body.innerText.replace(/\\s+/g, ' ')";

fn the_page_lives_while_traffic_runs() {
    let daemon = daemon();
    let mut browser = Browser::start();
    browser.open("http://127.0.0.1:9180/", "document.querySelectorAll('.listener').length === 2");
    assert_eq!(browser.text("document.getElementById('health').textContent"), "healthy");
    let over = Arc::new(AtomicBool::new(false));
    let (stop, traffic) = (Arc::clone(&over), std::thread::spawn);
    let traffic = traffic(move || {
        while !stop.load(Ordering::SeqCst) {
            exchange(&mut connect(local(8080)), b"x").unwrap();
        }
    });
    let rate = "parseFloat(document.querySelector('.f-rate .v').textContent.replace(',', ''))";
    browser.until(&format!("{rate} > 5"));
    browser.until("document.querySelector('.listener .line').getAttribute('d').split('L').length > 3");
    over.store(true, Ordering::SeqCst);
    traffic.join().unwrap();
    browser.until(&format!("{rate} === 0"));
    // Each slot has its bar, whose heights are the daemon's own shares.
    let counts = daemon.listener("front").spread.per_slot;
    let bars = browser.value(
        "[...document.querySelectorAll('.listener .slots .slot')].slice(0, 2).map((bar) => bar.title)",
    );
    for (slot, count) in counts.iter().enumerate() {
        let title = bars[slot].as_str().unwrap().replace(',', "");
        assert!(title.starts_with(&format!("slot {slot}: {count} ")), "{bars} {counts:?}");
    }
    daemon.kill_worker(1);
    browser.until(&format!("{SEEN}.includes('1: killed 1')"));
    let server = format!("back/{}", daemon.status().upstreams[0].servers[0].address);
    daemon.succeed(&["server", "disable", &server]);
    browser.until(&format!("{SEEN}.includes('disabled by hand')"));
    browser.until("document.getElementById('news').textContent.includes('is disabled')");
    assert_eq!(browser.complaints, Vec::<String>::new());
}

/// The page of a real daemon, and documents of the test's own.
struct Stage {
    address: SocketAddr,
    document: Arc<Mutex<Option<Value>>>,
}

impl Stage {
    fn new(document: Value) -> Stage {
        let daemon = daemon();
        let page = get(local(ADMIN), "/");
        drop(daemon);
        let document = Arc::new(Mutex::new(Some(document)));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shown = Arc::clone(&document);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (page, shown) = (page.clone(), Arc::clone(&shown));
                std::thread::spawn(move || answer(stream, &page, &shown));
            }
        });
        Stage { address, document }
    }

    fn show(&self, document: Option<Value>) {
        *self.document.lock().unwrap() = document;
    }

    fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

fn answer(stream: TcpStream, page: &http::Answer, shown: &Mutex<Option<Value>>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut first = String::new();
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if first.is_empty() {
                first = line.clone();
            }
        }
        let (kind, body) = if first.starts_with("GET / ") {
            ("text/html; charset=utf-8", page.body.clone())
        } else {
            match shown.lock().unwrap().clone() {
                Some(document) => ("application/json", document.to_string()),
                // As a daemon that is gone.
                None => return,
            }
        };
        let policy = page.field("content-security-policy");
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Security-Policy: {policy}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        if reader.get_mut().write_all((head + &body).as_bytes()).is_err() {
            return;
        }
    }
}

/// A document as large as asked; `time` in seconds drives all counters.
fn document(listeners: usize, slots: usize, upstreams: usize, servers: usize, time: u64) -> Value {
    let workers: Vec<Value> = (0..slots)
        .map(|slot| json!({ "slot": slot, "pid": 100 + slot, "generation": 3, "state": "ready", "restarts": 0, "restart_reasons": {},
            "accepted": 100 * time, "active": 10 * slot, "loop_lag_us": 250, "accept_pauses": 0 }))
        .collect();
    let listener = |index: usize| {
        let count = 50 * time * (index as u64 + 1);
        let even = vec![1.0 / slots as f64; slots];
        json!({ "name": format!("listener-{index}"), "mode": "tcp", "bind": [format!("127.0.0.1:{}", 8000 + index)], "steering": "hash",
            "steering_active": "ebpf-table", "connections": count * slots as u64, "active": 5, "bytes_in": 1000 * count, "bytes_out": 9000 * count,
            "accept_queue": 0, "accept_overflows": 0, "queues": vec![json!({ "waiting": 0, "limit": 4096, "dropped": 0 }); slots],
            "dropped": {}, "ended": { "finished": count }, "active_per_slot": vec![1; slots], "shares": even,
            "expected_per_slot": vec![count; slots], "spread": { "per_slot": vec![count; slots], "max_over_mean": 1.0, "cv": 0.0, "jain": 1.0,
            "chi_square": 0.0, "p_value": 1.0 }, "verdict": "within chance", "uneven": false })
    };
    let server = |upstream: usize, index: usize| {
        json!({ "address": format!("10.0.{upstream}.{index}:80"), "state": "up", "weight": 1, "backup": false, "active": 1,
            "connections": 10 * time, "failures": 0, "connect": { "count": 10, "sum_us": 1000, "p50_us": 100, "p99_us": 250, "buckets": [] } })
    };
    let upstream = |number: usize| {
        let servers: Vec<Value> = (0..servers).map(|index| server(number, index)).collect();
        json!({ "name": format!("upstream-{number}"), "balance": "round-robin", "servers": servers })
    };
    json!({ "version": "1.2.3", "pid": 99, "generation": 3, "started_at": 1_700_000_000, "uptime_ms": 1000 * time, "config_path": "/etc/evenkeel/evenkeel.toml",
        "healthy": true, "reload": null, "workers": workers, "listeners": (0..listeners).map(listener).collect::<Vec<_>>(),
        "upstreams": (0..upstreams).map(upstream).collect::<Vec<_>>() })
}

fn a_server_that_goes_down_and_a_silent_daemon_are_shown() {
    let stage = Stage::new(document(1, 2, 1, 3, 100));
    let mut browser = Browser::start();
    browser.open(&stage.url(), "document.querySelectorAll('#upstream-rows tbody tr').length === 3");
    assert_eq!(browser.value("document.querySelectorAll('.state.bad').length"), 0);
    let mut next = document(1, 2, 1, 3, 102);
    next["upstreams"][0]["servers"][1]["state"] = "down".into();
    next["upstreams"][0]["servers"][1]["check"] =
        json!({ "kind": "http", "last": "bad", "reason": "status 503" });
    next["healthy"] = false.into();
    next["unhealthy"] = "slot 1 does not serve: backoff".into();
    stage.show(Some(next));
    browser.until("document.querySelector('#upstream-rows tr.bad')");
    let row = browser.text("document.querySelector('#upstream-rows tr.bad').innerText.replace(/\\s+/g, ' ')");
    assert!(row.starts_with("10.0.0.1:80 down http, status 503"), "{row}");
    assert!(
        browser
            .text("document.getElementById('news').textContent")
            .contains("Server 10.0.0.1:80 of upstream-0 is down.")
    );
    assert_eq!(browser.text("document.getElementById('health').textContent"), "not healthy");
    assert!(browser.text(SEEN).contains("slot 1 does not serve: backoff"));
    assert_eq!(browser.complaints, Vec::<String>::new());
    // It stops to answer: the figures stay, and are said to be old.
    stage.show(None);
    browser.until("!document.getElementById('stale').hidden");
    assert!(browser.text(SEEN).contains("The daemon does not answer. These figures are of "));
    assert!(browser.text("document.title").starts_with("! no answer"));
    assert_eq!(browser.value("document.querySelectorAll('#upstream-rows tbody tr').length"), 3);
    stage.show(Some(document(1, 2, 1, 3, 110)));
    browser.until("document.getElementById('stale').hidden");
    browser.until("!document.querySelector('#upstream-rows tr.bad')");
}

fn ten_listeners_sixteen_slots_and_a_hundred_servers_are_readable() {
    let stage = Stage::new(document(10, 16, 10, 100, 100));
    let mut browser = Browser::start();
    browser.resize(1280, 900);
    browser.open(&stage.url(), "document.querySelectorAll('.listener').length === 10");
    assert_eq!(browser.value("document.querySelectorAll('#worker-rows tbody tr').length"), 16);
    assert_eq!(browser.value("document.querySelectorAll('.listener .mini i').length"), 160);
    browser.value("document.querySelectorAll('.upstream').forEach((node) => { node.open = true; })");
    browser.until("document.querySelectorAll('#upstream-rows tbody tr').length === 1000");
    // Bringing all of it up to date is no work for a browser.
    stage.show(Some(document(10, 16, 10, 100, 103)));
    let took = browser.value(
        "(() => { const begun = performance.now(); for (let i = 0; i < 5; i++) live.again(); return (performance.now() - begun) / 5; })()",
    );
    println!("1,000 servers: {took} ms a turn");
    // Generous: a machine that runs other tests beside this one.
    assert!(took.as_f64().unwrap() < 2000.0, "{took}");
    // A filter leaves what it names, and says how much.
    browser.value("(() => { const box = document.getElementById('filter'); box.value = '10.0.7.42'; box.dispatchEvent(new Event('input')); })()");
    assert_eq!(browser.value("document.querySelectorAll('#upstream-rows tbody tr').length"), 1);
    assert_eq!(browser.text("document.getElementById('upstreams-count').textContent"), "1 of 1000 servers");
    assert!(browser.text(SEEN).contains("No listener matches."));
    // No size makes the page itself scroll sideways.
    for width in [320, 390, 768, 1280, 1920] {
        browser.resize(width, 800);
        let over =
            browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth");
        assert_eq!(over, 0, "at {width} pixels");
    }
    browser.value("(() => { document.getElementById('filter').value = ''; live.again(); document.querySelectorAll('.listener').forEach((node) => { node.open = true; }); })()");
    for width in [320, 768, 1280] {
        browser.resize(width, 800);
        let over =
            browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth");
        assert_eq!(over, 0, "at {width} pixels with all unfolded");
    }
    assert_eq!(browser.complaints, Vec::<String>::new());
}

fn names_are_text_and_nothing_else() {
    let evil = "<img src=x onerror=\"window.owned=1\"><script>window.owned=1</script>&amp;\u{202e}";
    let mut document = document(1, 2, 1, 1, 100);
    for pointer in [
        "/listeners/0/name",
        "/listeners/0/verdict",
        "/listeners/0/steering",
        "/upstreams/0/name",
        "/upstreams/0/servers/0/address",
        "/upstreams/0/servers/0/state",
        "/workers/0/state",
        "/config_path",
        "/version",
    ] {
        *document.pointer_mut(pointer).expect("a field") = evil.into();
    }
    document["listeners"][0]["bind"] = json!([evil]);
    document["listeners"][0]["ended"] = json!({ evil: 1 });
    document["listeners"][0]["dropped"] = json!({ evil: 1 });
    document["workers"][0]["restart_reasons"] = json!({ evil: 1 });
    document["workers"][0]["restarts"] = 1.into();
    document["upstreams"][0]["servers"][0]["check"] = json!({ "kind": evil, "reason": evil });
    document["reload"] = json!({ "success": false, "at": 1_700_000_000, "text": evil });
    document["unhealthy"] = evil.into();
    let stage = Stage::new(document);
    let mut browser = Browser::start();
    browser.open(&stage.url(), "document.querySelectorAll('.listener').length === 1");
    browser.until(&format!("{SEEN}.includes('onerror')"));
    assert_eq!(browser.value("window.owned === undefined"), true);
    assert_eq!(browser.value("document.querySelectorAll('img, script:not([nonce])').length"), 0);
    // Even an element that got in would do nothing.
    browser.value("document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.owned = 2' }))");
    assert_eq!(browser.value("window.owned === undefined"), true);
}

fn the_page_is_used_by_keyboard_and_read_aloud() {
    let stage = Stage::new(document(4, 2, 1, 2, 100));
    let mut browser = Browser::start();
    browser.open(&stage.url(), "document.querySelectorAll('.listener').length === 4");
    browser.press("/", "/");
    assert_eq!(browser.text("document.activeElement.id"), "filter");
    for key in ["-", "2"] {
        browser.press(key, key);
    }
    browser.until("document.querySelectorAll('.listener').length === 1");
    browser.press("Escape", "");
    browser.until("document.querySelectorAll('.listener').length === 4");
    // Every control is reached by Tab, and shows it.
    let mut reached = Vec::new();
    for _ in 0..20 {
        browser.press("Tab", "");
        reached.push(browser.text("document.activeElement.tagName + ' ' + (document.activeElement.id || document.activeElement.className)"));
    }
    for wanted in ["INPUT troubled", "BUTTON fold", "SUMMARY ", "DIV scroll", "A "] {
        assert!(reached.iter().any(|name| name.starts_with(wanted)), "{wanted} in {reached:?}");
    }
    browser.value("document.querySelector('.listener summary').focus()");
    browser.press("Enter", "\r");
    browser.until("document.querySelector('.listener').open");
    // Landmarks, names of regions, heads of tables, what changes politely.
    let found = |selector: &str| format!("document.querySelectorAll('{selector}').length");
    for (selector, least) in [
        ("main", 1),
        ("header", 1),
        ("footer", 1),
        ("form[role=search] label", 2),
        ("section[aria-labelledby], section[aria-label]", 4),
        ("table caption", 2),
        ("thead th[scope=col]", 10),
        ("tbody th[scope=row]", 4),
        ("[aria-live=polite]", 1),
        ("[role=alert]", 1),
        ("h1", 1),
        ("h2", 3),
    ] {
        let count = browser.value(&found(selector)).as_u64().unwrap();
        assert!(count >= least, "{selector}: {count}");
    }
    assert_eq!(browser.value("[...document.querySelectorAll('input, button')].every((node) => (node.labels && node.labels.length) || node.textContent)"), true);
    assert!(
        browser
            .text("document.querySelector('.listener .slots').getAttribute('aria-label')")
            .contains("slot 0 50.0 percent")
    );
    // Text stands out from its ground by 4.5 to 1 at least, in light and dark.
    for scheme in ["light", "dark"] {
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }, { "name": "prefers-reduced-motion", "value": "reduce" }] });
        browser.call("Emulation.setEmulatedMedia", media);
        let worst = browser.value(CONTRAST);
        assert!(worst["ratio"].as_f64().unwrap() >= 4.5, "{scheme}: {worst}");
        let moving = "[...document.querySelectorAll('*')].filter((node) => parseFloat(getComputedStyle(node).transitionDuration) > 0).length";
        assert_eq!(browser.value(moving), 0, "nothing moves where that is not wanted");
    }
    assert_eq!(browser.complaints, Vec::<String>::new());
}

/// The least contrast (WCAG 2) of any visible text with what is behind it.
const CONTRAST: &str = r"(() => {
  const parse = (text) => { const n = text.match(/[\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (node) => { const all = []; for (let at = node; at; at = at.parentElement) all.push(parse(getComputedStyle(at).backgroundColor)); return all.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]); };
  let worst = { ratio: 99 };
  for (const node of document.body.querySelectorAll('*')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest('.unseen, script, noscript, svg')) continue;
    const below = ground(node), text = over(parse(getComputedStyle(node).color), below);
    const [a, b] = [light(text), light(below)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst.ratio) worst = { ratio, text: node.textContent.slice(0, 40), class: node.className };
  }
  return worst;
})()";
