// What is shown of each thing: made once, then brought up to date.
"use strict";

const WINDOW_MS = 120_000;

/** The time that is plotted: two minutes, less while less is known. */
function windowOf(points) {
  return points.length ? Math.min(WINDOW_MS, Math.max(15_000, points[points.length - 1][0] - points[0][0])) : WINDOW_MS;
}

/* ---- the daemon ---- */

function tiles(parent) {
  const tile = (name, wide) => {
    const value = make("strong"), unit = make("small"), text = make("span"), more = make("span", { class: "more" });
    const node = make("div", { class: "tile" }, make("span", { class: "name", text: name }), value, more);
    value.append(text, unit);
    parent.append(node);
    return { node, set(shown, kind, below, bad) {
      setText(text, shown); setText(unit, kind); setText(more, below); setClass(node, `tile${wide ? " wide" : ""}${bad ? " bad" : ""}`);
    } };
  };
  const fresh = tile("New connections", true), traffic = tile("Traffic", true), active = tile("Active");
  const lost = tile("Dropped"), workers = tile("Workers"), servers = tile("Servers");
  const sparks = [fresh, traffic].map((view) => { const spark = sparkline(); view.node.append(spark.node); return spark; });
  return (status, rates) => {
    const sum = (pick) => status.listeners.reduce((total, listener) => total + pick(listener), 0);
    fresh.set(rate(rates.get("new").now), "/s", `${count(sum((l) => l.connections))} in all`);
    const flows = status.listeners.some((l) => l.mode === "udp"), tcp = status.listeners.some((l) => l.mode === "tcp");
    active.set(count(sum((l) => l.active)), "", tcp && flows ? "open now" : flows ? "flows" : "sessions");
    const now = bytes(rates.get("in").now + rates.get("out").now).split(" ");
    traffic.set(now[0], `${now[1]}/s`, `${bytes(rates.get("in").now)} in, ${bytes(rates.get("out").now)} out`);
    const dropping = rates.get("lost").now, total = sum(lostBy);
    lost.set(rate(dropping), "/s", `${count(total)} in all`, dropping > 0.05);
    const ready = status.workers.filter((w) => w.state === "ready").length;
    const restarts = status.workers.reduce((all, w) => all + w.restarts, 0);
    workers.set(`${ready}`, `of ${status.workers.length}`, restarts ? `${count(restarts)} replaced` : "none replaced", ready < status.workers.length);
    const all = status.upstreams.flatMap((u) => u.servers), up = all.filter((s) => s.state === "up").length;
    const down = all.filter((s) => s.state === "down").length;
    servers.set(all.length ? `${up}` : "–", all.length ? `of ${all.length}` : "", down ? `${down} down` : all.length ? "none down" : "no upstream", down > 0);
    sparks[0].set(rates.get("new").points);
    sparks[1].set(sumPoints(rates.get("in").points, rates.get("out").points));
  };
}

function sumPoints(one, other) {
  return one.map(([time, value], index) => [time, value === null || !other[index] ? null : value + other[index][1]]);
}

/** What a listener lost: overflows of TCP, drops of UDP. */
function lostBy(listener) {
  return listener.accept_overflows + Object.values(listener.dropped || {}).reduce((all, n) => all + n, 0);
}

/* ---- a listener ---- */

const SLOT_COLUMNS = [["Slot", "l"], ["Connections"], ["Share"], ["Due"], ["Active"], ["Waiting"], ["Room"], ["Dropped"]];

function listenerView(listener) {
  const udp = listener.mode === "udp";
  const at = make("span", { class: "at" }), spark = sparkline(), mini = make("span", { class: "mini", "aria-hidden": "true" });
  const fresh = figure("f-rate", udp ? "flows/s" : "new/s"), active = figure("f-active", "active");
  const traffic = figure("f-traffic", "traffic"), queue = figure("f-queue", udp ? "unread" : "waiting"), even = make("span", { class: "k" });
  const summary = make("summary", {}, make("span", { class: "chevron", "aria-hidden": "true" }),
    make("span", { class: "who" }, make("h3", { text: listener.name }), make("span", { class: `chip ${udp ? "udp" : ""}`, text: listener.mode.toUpperCase() }), at),
    spark.node, fresh.node, active.node, traffic.node, queue.node, make("span", { class: "spread-cell" }, mini, even));

  const plot = sparkline(true), most = make("span", { class: "label hi" }), from = make("span", { class: "label from" });
  const slots = make("div", { class: "slots", role: "img" }), verdict = make("p", { class: "verdict" }), spreadHead = make("span");
  const list = make("dl", { class: "facts-list" });
  const figures = table(`Figures of each slot of ${listener.name}`, SLOT_COLUMNS);
  const perSlot = make("details", { class: "per-slot" }, make("summary", { text: "Figures of each slot" }), figures.node);
  const body = make("div", { class: "body" },
    make("div", {}, make("h4", { text: udp ? "New flows a second" : "New connections a second" }),
      make("div", { class: "plot" }, plot.node, most, from, make("span", { class: "label to", text: "now" }))),
    make("div", {}, make("h4", { text: "Spread over the slots" }, spreadHead), slots, verdict), list, perSlot);
  const node = make("details", { class: "card listener" }, summary, body);
  const draw = { mini: bars(mini, miniBar), slots: bars(slots, slotBar) };

  const update = (item, shown) => {
    const { rates, status } = shown, key = item.name;
    setText(at, item.bind.join("  ") || "closed: finishes what it has");
    setAttribute(at, "title", item.bind.join("  "));
    const now = rates.get(`new ${key}`), moved = rates.get(`in ${key}`).now + rates.get(`out ${key}`).now;
    fresh.set(rate(now.now));
    active.set(count(item.active));
    traffic.set(`${bytes(moved)}/s`);
    const waiting = item.queues.reduce((all, q) => all + q.waiting, 0), crowded = item.queues.some((q) => q.waiting * 2 > q.limit);
    queue.set(udp ? bytes(waiting) : count(waiting), crowded ? "warn" : "");
    spark.set(now.points);
    const states = new Map(status.workers.map((worker) => [worker.slot, worker.state]));
    const all = slotsOf(item, states);
    draw.mini(all);
    setText(even, item.connections ? `spread ${item.spread.max_over_mean.toFixed(2)}${item.uneven ? ", uneven" : ""}` : "spread –");
    if (!node.open) return;
    setText(most, `${rate(plot.set(now.points))} /s at most`);
    setText(from, `${span(windowOf(now.points))} ago`);
    draw.slots(all);
    setText(spreadHead, item.connections ? `max/mean ${item.spread.max_over_mean.toFixed(3)}` : "");
    setAttribute(slots, "aria-label", `Share of each slot: ${all.map((s) => `slot ${s.slot} ${(100 * s.share).toFixed(1)} percent`).join(", ")}`);
    setText(verdict, item.verdict || "");
    setClass(verdict, item.uneven ? "verdict bad" : "verdict");
    listFacts(list, item);
    if (perSlot.open) slotTable(figures.body, all, item, udp);
  };
  node.addEventListener("toggle", () => live.again());
  perSlot.addEventListener("toggle", () => live.again());
  return { node, update };
}

/** What each slot got, beside what it was due. */
function slotsOf(listener, states) {
  const counts = listener.spread.per_slot, total = counts.reduce((all, n) => all + n, 0);
  const due = listener.expected_per_slot, dueSum = due.reduce((all, n) => all + n, 0);
  const shares = listener.shares || [];
  return counts.map((n, slot) => ({
    slot, count: n, share: total ? n / total : 0, due: dueSum ? due[slot] / dueSum : shares[slot] || 0,
    bad: listener.uneven && Math.abs(n - due[slot]) > Math.max(4 * Math.sqrt(due[slot] + 1), 0.25 * due[slot]),
    out: states.has(slot) && states.get(slot) !== "ready",
  }));
}

/** Keeps one bar a slot; heights against the largest share or due. */
function bars(parent, create) {
  return (all) => {
    const most = Math.max(1e-9, ...all.map((s) => Math.max(s.share, s.due)));
    const every = Math.max(1, Math.ceil(all.length / 20));
    keep(parent, all, (s) => s.slot, create, (view, s) => view.update(s, most, every));
  };
}

function miniBar() {
  const node = make("i");
  return { node, update(s, most) {
    node.style.height = `${100 * s.share / most}%`;
    setClass(node, s.bad || s.out ? "bad" : "");
  } };
}

function slotBar() {
  const filled = make("span", { class: "fill" }), due = make("span", { class: "due" }), number = make("span", { class: "no" });
  const node = make("span", { class: "slot", "aria-hidden": "true" }, filled, due, number);
  return { node, update(s, most, every) {
    filled.style.height = `${94 * s.share / most}%`;
    due.style.bottom = `${94 * s.due / most}%`;
    setClass(node, `slot ${s.out ? "out" : s.bad ? "bad" : ""}`.trim());
    setText(number, s.out ? "✕" : s.slot % every ? "" : s.slot);
    const text = `slot ${s.slot}: ${count(s.count)}, ${(100 * s.share).toFixed(1)} %, due ${(100 * s.due).toFixed(1)} %${s.out ? "; its worker does not serve" : ""}`;
    setAttribute(node, "title", text);
  } };
}

function slotTable(body, all, item, udp) {
  const create = () => { const view = row(SLOT_COLUMNS); return { node: view.node, cells: view.cells }; };
  keep(body, all, (s) => s.slot, create, ({ cells }, s) => {
    const queue = item.queues[s.slot] || { waiting: 0, limit: 0, dropped: 0 }, size = udp ? bytes : count;
    const texts = [s.slot, count(s.count), `${(100 * s.share).toFixed(1)} %`, `${(100 * s.due).toFixed(1)} %`, count(item.active_per_slot[s.slot] || 0), size(queue.waiting), size(queue.limit), count(queue.dropped)];
    texts.forEach((text, index) => setText(cells[index], text));
  });
}

/** Facts as pairs; a pair is [key, name, text, mark]. */
function listFacts(list, item) {
  const pairs = [["steering", "Steering", `${item.steering}, by ${item.steering_active}`], ["total", item.mode === "udp" ? "Flows" : "Connections", count(item.connections)], ["in", "Bytes in", bytes(item.bytes_in)], ["out", "Bytes out", bytes(item.bytes_out)]];
  if (item.flows) pairs.push(["datagrams", "Datagrams", `${count(item.flows.datagrams_in)} in, ${count(item.flows.datagrams_out)} out`]);
  const dropped = reasons(item.dropped);
  if (item.mode === "tcp") pairs.push(["overflows", "Queue overflows", count(item.accept_overflows), item.accept_overflows ? "warn" : ""]);
  if (item.mode === "udp" || dropped.length) pairs.push(["d", "Dropped", dropped.length ? "" : "none", "part"]);
  for (const [reason, n] of dropped) pairs.push([`d ${reason}`, words(reason), count(n), "warn"]);
  const ended = reasons(item.ended);
  if (ended.length) pairs.push(["e", "Ended", "", "part"]);
  for (const [reason, n] of ended) pairs.push([`e ${reason}`, words(reason), count(n)]);
  const flat = pairs.flatMap(([key, name, text, mark]) => mark === "part"
    ? [[`${key}:k`, "dt", text ? `${name}: ${text}` : name, "part"]] : [[`${key}:k`, "dt", name, ""], [`${key}:v`, "dd", text, mark || ""]]);
  keep(list, flat, ([key]) => key, ([, tag]) => ({ node: make(tag) }), ({ node }, [, , text, kind]) => { setText(node, text); setClass(node, kind); });
}

/* ---- an upstream ---- */

const SERVER_COLUMNS = [["Server", "l mono"], ["State", "l"], ["Check", "l wide"], ["Weight"], ["Active"], ["New/s"], ["Connections"], ["Failed"], ["Connect, median"], ["99 %"]];

function upstreamView(upstream) {
  const sum = make("span", { class: "sum" }), down = make("b"), rest = make("span");
  sum.append(down, rest);
  const servers = table(`Servers of ${upstream.name}`, SERVER_COLUMNS);
  const summary = make("summary", {}, make("span", { class: "chevron", "aria-hidden": "true" }), make("h3", { text: upstream.name }), make("span", { class: "chip", text: upstream.balance }), sum);
  const node = make("details", { class: "card upstream" }, summary, servers.node);
  node.addEventListener("toggle", () => live.again());
  const update = (item, shown) => {
    const lost = item.servers.filter((s) => s.state === "down").length;
    setText(down, lost ? `✕ ${lost} down, ` : "");
    const up = item.servers.filter((s) => s.state === "up").length;
    setText(rest, `${up} of ${item.servers.length} up, ${count(item.servers.reduce((all, s) => all + s.active, 0))} active`);
    if (!node.open) return;
    const some = item.shown || item.servers;
    keep(servers.body, some, (s) => s.address, () => serverRow(), (view, server) => view.update(server, item.name, shown.rates));
  };
  return { node, update };
}

function serverRow() {
  const { node, cells } = row(SERVER_COLUMNS), state = make("span"), extra = make("span", { class: "dim" });
  cells[1].append(state, extra);
  return { node, update(server, upstream, rates) {
    setText(cells[0], server.address);
    setText(state, server.state);
    setClass(state, stateClass(server.state));
    const changed = server.differs_from_file, marks = [];
    if (server.backup) marks.push("backup");
    if (changed) marks.push(changed.file_weight === undefined ? "by hand" : `by hand, weight ${changed.file_weight} in the file`);
    setText(extra, marks.length ? ` ${marks.join(", ")}` : "");
    setText(cells[2], placeText(server));
    const connect = server.connect || {}, none = !connect.count;
    const texts = [server.weight, count(server.active), rate(rates.get(`to ${upstream} ${server.address}`).now), count(server.connections), count(server.failures), none ? "–" : `≤ ${micros(connect.p50_us)}`, none ? "–" : `≤ ${micros(connect.p99_us)}`];
    texts.forEach((text, index) => setText(cells[index + 3], text));
    setClass(node, server.state === "down" ? "bad" : "");
  } };
}

/** The check of a server, or of each address of a name. */
function placeText(server) {
  const places = server.places || [], told = server.resolve_error ? [`name: ${server.resolve_error}`] : [];
  if (!places.length) return (server.check || !told.length ? [...told, checkText(server.check)] : told).join("; ");
  const up = places.filter((place) => place.state === "up").length;
  const bad = places.filter((place) => place.state !== "up").map((place) => `${place.address} ${place.state}${place.check ? ` (${checkText(place.check)})` : ""}`);
  return [...told, `${up} of ${places.length} addresses up`, ...bad.slice(0, 4)].join("; ");
}

/** A check's result in words. */
function checkText(check) {
  if (!check || typeof check !== "object") return check ? String(check) : "–";
  const parts = [[check.kind !== "none" && check.kind, check.latency_us > 0 && micros(check.latency_us)].filter(Boolean).join(" ")];
  if (check.last === "traffic") parts.push("by its traffic");
  parts.push(check.reason, check.flapping && "flapping", check.on_trial && "on trial");
  return parts.filter(Boolean).join(", ") || "–";
}

/* ---- the workers ---- */

const WORKER_COLUMNS = [["Slot", "l"], ["State", "l"], ["Process"], ["Generation"], ["Accepted/s"], ["Accepted"], ["Active"], ["Loop lag"], ["Pauses"], ["Replaced", "l wide"]];

function workersView(parent) {
  const workers = table("Workers", WORKER_COLUMNS), node = make("div", { class: "card" }, workers.node);
  parent.append(node);
  return (all, shown) => {
    const most = Math.max(1, ...all.map((w) => w.active));
    keep(workers.body, all, (w) => w.slot, () => workerRow(), (view, worker) => view.update(worker, most, shown.rates));
    show(node, all.length > 0);
  };
}

function workerRow() {
  const { node, cells } = row(WORKER_COLUMNS), state = make("span"), help = make("span", { class: "dim" });
  const active = make("span"), level = make("i"), gauge = make("span", { class: "gauge", "aria-hidden": "true" }, level);
  cells[1].append(state, help);
  cells[6].append(active, gauge);
  return { node, update(worker, most, rates) {
    setText(cells[0], worker.slot);
    setText(state, worker.state);
    setClass(state, stateClass(worker.state));
    setText(help, Number.isInteger(worker.helped_by) ? ` slot ${worker.helped_by} accepts for it` : "");
    setText(active, count(worker.active));
    level.style.width = `${100 * worker.active / most}%`;
    const why = reasons(worker.restart_reasons).map(([reason, n]) => `${words(reason)} ${count(n)}`).join(", ");
    const replaced = worker.restarts ? `${count(worker.restarts)}${why ? `: ${why}` : ""}` : "–";
    const texts = [[2, worker.pid || "–"], [3, worker.generation], [4, rate(rates.get(`slot ${worker.slot}`).now)], [5, count(worker.accepted)], [7, micros(worker.loop_lag_us)], [8, count(worker.accept_pauses)], [9, replaced]];
    texts.forEach(([index, text]) => setText(cells[index], text));
    setClass(node, stateClass(worker.state) === "state bad" ? "bad" : "");
  } };
}
