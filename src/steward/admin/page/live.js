// Asks for /status.json once a second while the page is seen, and shows it.
"use strict";

const EVERY_MS = 1000;
const PATIENCE_MS = 3000;
/** A displayed rate is over so long, a plotted one over one step. */
const RATE_OVER_MS = 3000;
const by = (id) => document.getElementById(id);

/** Rates and their history, of counters by name. */
class Rates {
  constructor() { this.series = new Map(); this.nothing = { now: 0, points: [] }; }

  get(name) { return this.series.get(name) || this.nothing; }

  /** Takes in a counter's value at a time in milliseconds. */
  note(name, time, value, plotted) {
    let series = this.series.get(name);
    if (!series) this.series.set(name, series = { raw: [], points: [], now: 0 });
    series.touched = time;
    const { raw, points } = series, last = raw[raw.length - 1];
    if (last && time <= last[0]) return;
    // After a pause, or where the counter is another one: from here on.
    const broken = last && (value < last[1] || time - last[0] > 5 * EVERY_MS);
    if (broken) raw.length = 0;
    if (plotted && last) points.push([time, broken ? null : 1000 * (value - last[1]) / (time - last[0])]);
    raw.push([time, value]);
    while (raw.length > 2 && time - raw[1][0] >= RATE_OVER_MS) raw.shift();
    while (points.length && time - points[0][0] > WINDOW_MS) points.shift();
    const first = raw[0];
    series.now = raw.length > 1 ? 1000 * (value - first[1]) / (time - first[0]) : 0;
  }

  /** Forgets what was not noted at this time. */
  sweep(time) {
    for (const [name, series] of this.series) if (series.touched !== time) this.series.delete(name);
  }
}

const live = {
  status: null, rates: new Rates(), came: 0, timer: 0, views: null, listeners: null,
  /** Shows what is known once more: something was opened or filtered. */
  again() { if (live.status) render(live.status); },
};

/* ---- asking ---- */

async function ask() {
  clearTimeout(live.timer);
  if (document.hidden) return;
  const begun = performance.now();
  try {
    const answer = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    take(await answer.json());
  } catch (error) {
    if (!(error instanceof DOMException) && !(error instanceof TypeError)) setText(by("stale"), String(error.message));
    age(true);
  }
  clearTimeout(live.timer);
  // A daemon that is slow to answer is asked less often.
  live.timer = setTimeout(ask, Math.max(EVERY_MS, 2 * (performance.now() - begun)) - (performance.now() - begun));
}

function take(status) {
  const before = live.status;
  if (before && (before.pid !== status.pid || before.started_at !== status.started_at)) live.rates = new Rates();
  live.came = Date.now();
  note(status);
  live.status = status;
  render(status);
  age(false);
  if (before) tell(before, status);
}

/** Takes in every counter of which a rate is shown. */
function note(status) {
  const rates = live.rates, time = status.uptime_ms, total = { new: 0, in: 0, out: 0, lost: 0 };
  for (const listener of status.listeners) {
    const { name, connections, bytes_in: into, bytes_out: out } = listener;
    rates.note(`new ${name}`, time, connections, true);
    rates.note(`in ${name}`, time, into);
    rates.note(`out ${name}`, time, out);
    total.new += connections; total.in += into; total.out += out; total.lost += lostBy(listener);
  }
  for (const [name, value] of Object.entries(total)) rates.note(name, time, value, true);
  for (const worker of status.workers) rates.note(`slot ${worker.slot}`, time, worker.accepted);
  for (const upstream of status.upstreams) for (const server of upstream.servers) rates.note(`to ${upstream.name} ${server.address}`, time, server.connections);
  rates.sweep(time);
}

/* ---- showing ---- */

function render(status) {
  if (!live.views) live.views = { tiles: tiles(by("tiles")), workers: workersView(by("worker-rows")) };
  const shown = { status, rates: live.rates };
  head(status);
  live.views.tiles(status, live.rates);
  const { wanted, troubled } = filter();
  const keepsListener = (l) => wanted(`${l.name} ${l.mode} ${l.bind.join(" ")} ${l.steering}`) && (!troubled || l.uneven || live.rates.get("lost").now > 0.05 && lostBy(l) > 0 || l.queues.some((q) => q.waiting * 2 > q.limit));
  const listeners = status.listeners.filter(keepsListener);
  const first = !live.listeners;
  live.listeners = listeners.length;
  keep(by("listener-rows"), listeners, (l) => `${l.name}/${l.mode}`, (l) => {
    const view = listenerView(l);
    // A few are shown whole; of many, what each does stands on its line.
    view.node.open = first && status.listeners.length <= 3;
    return view;
  }, (view, item) => view.update(item, shown));
  counted("listeners", listeners.length, status.listeners.length);
  foldText();

  const upstreams = status.upstreams.map((upstream) => {
    const whole = wanted(upstream.name) && !troubled;
    const some = whole ? upstream.servers : upstream.servers.filter((s) => wanted(`${upstream.name} ${s.address} ${s.state}`) && (!troubled || s.state !== "up"));
    return { ...upstream, shown: some };
  }).filter((upstream) => upstream.shown.length);
  const few = status.upstreams.reduce((all, u) => all + u.servers.length, 0) <= 40;
  keep(by("upstream-rows"), upstreams, (u) => u.name, (u) => {
    const view = upstreamView(u);
    view.node.open = few || status.upstreams.length === 1 || u.servers.some((s) => s.state === "down");
    return view;
  }, (view, item) => view.update(item, shown));
  const total = status.upstreams.reduce((all, u) => all + u.servers.length, 0);
  counted("upstreams", upstreams.reduce((all, u) => all + u.shown.length, 0), total, "servers");
  show(by("upstreams"), status.upstreams.length > 0);

  const workers = status.workers.filter((w) => wanted(`slot ${w.slot} ${w.pid} ${w.state}`) && (!troubled || w.state !== "ready" || w.restarts > 0));
  live.views.workers(workers, shown);
  counted("workers", workers.length, status.workers.length);
}

function head(status) {
  const badge = by("health");
  setText(badge, status.healthy ? "healthy" : "not healthy");
  setClass(badge, status.healthy ? "badge good" : "badge bad");
  setText(by("unhealthy"), status.unhealthy || "");
  show(by("unhealthy"), Boolean(status.unhealthy));
  const failed = status.reload && !status.reload.success;
  setText(by("reload"), failed ? `The last reload was refused (${clock(status.reload.at)}): ${status.reload.text}` : "");
  show(by("reload"), Boolean(failed));
  const facts = [["Version", status.version], ["Generation", status.generation], ["Up for", span(status.uptime_ms)], ["Configuration", status.config_path], ["Process", status.pid]];
  if (status.reload && status.reload.success) facts.push(["Last reload", clock(status.reload.at)]);
  keep(by("facts"), facts, ([name]) => name, ([name]) => {
    const value = make("b");
    return { node: make("span", {}, `${name} `, value), value };
  }, ({ value }, [, text]) => setText(value, text));
  const rateNow = rate(live.rates.get("new").now);
  document.title = `${status.healthy ? "" : "! "}${rateNow}/s · evenkeel`;
}

function counted(section, some, all, what = "") {
  setText(by(`${section}-count`), `${some === all ? all : `${some} of ${all}`}${what ? ` ${what}` : ""}`);
  show(by(`${section}-empty`), all > 0 && some === 0);
}

/** How old the figures are; what is old is said. */
function age(failed) {
  const seconds = live.came ? Math.round((Date.now() - live.came) / 1000) : 0, stale = by("stale");
  const old = failed || seconds > 5;
  document.body.classList.toggle("is-stale", old && Boolean(live.came));
  if (old) {
    setText(stale, live.came ? `The daemon does not answer. These figures are of ${clock(live.came / 1000).slice(11)}.` : "The daemon does not answer.");
    document.title = "! no answer · evenkeel";
  }
  show(stale, old);
  setText(by("age"), live.came && !old ? "live" : "");
}

/* ---- what a screen reader is told: changes of state, never figures ---- */

function tell(before, now) {
  const news = [];
  if (before.healthy !== now.healthy) news.push(now.healthy ? "The daemon is healthy again." : `The daemon is not healthy: ${now.unhealthy || ""}.`);
  if (before.generation !== now.generation) news.push(`Generation ${now.generation} serves.`);
  const states = new Map(before.upstreams.flatMap((u) => u.servers.map((s) => [`${u.name} ${s.address}`, s.state])));
  for (const upstream of now.upstreams) for (const server of upstream.servers) {
    const old = states.get(`${upstream.name} ${server.address}`);
    if (old && old !== server.state) news.push(`Server ${server.address} of ${upstream.name} is ${server.state}.`);
  }
  for (const worker of now.workers) {
    const old = before.workers.find((other) => other.slot === worker.slot);
    if (old && old.restarts < worker.restarts) news.push(`The worker of slot ${worker.slot} was replaced.`);
  }
  if (news.length) setText(by("news"), news.slice(0, 5).join(" "));
}

/* ---- the reader's wishes ---- */

function filter() {
  const asked = by("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  return { wanted: (text) => asked.every((word) => text.toLowerCase().includes(word)), troubled: by("troubled").checked };
}

function foldText() {
  const rows = [...by("listener-rows").children], open = rows.some((node) => node.open);
  setText(by("fold"), open ? "Fold all" : "Unfold all");
  show(by("fold"), rows.length > 1);
}

by("fold").addEventListener("click", () => {
  const rows = [...by("listener-rows").children], open = rows.some((node) => node.open);
  for (const node of rows) node.open = !open;
});
by("filter").addEventListener("input", () => live.again());
by("troubled").addEventListener("change", () => live.again());
by("filter-form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName || "");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    by("filter").focus();
  } else if (event.key === "Escape" && event.target === by("filter")) {
    by("filter").value = "";
    live.again();
  }
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
ask();
