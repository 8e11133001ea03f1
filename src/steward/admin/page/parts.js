// Elements: made once, changed only where something changed. Text goes in as
// text; nothing of the daemon's is ever read as HTML.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties (attributes, `class`, `text`) and children. */
function make(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

function draw(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") node.textContent = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function setText(node, text) {
  const wanted = String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

function setClass(node, names) {
  if (node.getAttribute("class") !== names) node.setAttribute("class", names);
}

function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

/** One child for each item, kept by its key from one call to the next. */
function keep(parent, items, key, create, update) {
  const kept = parent.kept || (parent.kept = new Map());
  const wanted = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    wanted.add(name);
    let view = kept.get(name);
    if (!view) kept.set(name, view = create(item));
    if (view.node === place) place = place.nextElementSibling;
    else parent.insertBefore(view.node, place);
    update(view, item);
  }
  for (const [name, view] of kept) {
    if (!wanted.has(name)) {
      view.node.remove();
      kept.delete(name);
    }
  }
}

/** A number under its name. */
function figure(name, label) {
  const value = make("span", { class: "v" });
  const node = make("span", { class: `figure ${name}` }, make("span", { class: "k", text: label }), value);
  return { node, set(text, mark = "") { setText(value, text); setClass(node, `figure ${name} ${mark}`.trim()); } };
}

/** A state in words, with a sign of its own besides its colour. */
function stateClass(state) {
  switch (state) {
    case "up": case "ready": return "state good";
    case "down": case "hung": case "backoff": return "state bad";
    case "draining": case "starting": return "state warn";
    default: return "state off";
  }
}

/** A line over time with the area below; points are [time, value or null]. */
function sparkline(grid) {
  const area = draw("path", { class: "area" }), line = draw("path", { class: "line" });
  const lines = grid ? [0.25, 0.5, 0.75].map((y) => draw("path", { class: "grid", d: `M0 ${100 * y}H1000` })) : [];
  const node = draw("svg", { class: "spark", viewBox: "0 0 1000 100", preserveAspectRatio: "none", "aria-hidden": "true" }, ...lines, area, line);
  return {
    node,
    set(points) {
      const window = windowOf(points);
      const known = points.filter(([, value]) => value !== null);
      const most = Math.max(1e-9, ...known.map(([, value]) => value));
      const end = points.length ? points[points.length - 1][0] : 0;
      let stroke = "", below = "", begun = null, last = 0;
      const close = () => { if (begun !== null) below += `L${last.toFixed(1)} 100L${begun.toFixed(1)} 100Z`; begun = null; };
      for (const [time, value] of points) {
        if (value === null) { close(); continue; }
        const x = 1000 * (1 - (end - time) / window), y = 97 - 90 * (value / most);
        const at = `${begun === null ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
        stroke += at;
        below += at;
        if (begun === null) begun = x;
        last = x;
      }
      close();
      setAttribute(line, "d", stroke);
      setAttribute(area, "d", below);
      return known.length ? most : 0;
    },
  };
}

/** A table whose head stays in sight; columns are [name, class]. */
function table(caption, columns) {
  const head = make("tr", {}, ...columns.map(([name, kind]) => make("th", { scope: "col", class: kind || "", text: name })));
  const body = make("tbody");
  const node = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    make("table", {}, make("caption", { class: "unseen", text: caption }), make("thead", {}, head), body));
  return { node, body };
}

/** A row of cells, the first being its head. */
function row(columns) {
  const cells = columns.map(([, kind], index) =>
    index === 0 ? make("th", { scope: "row", class: kind || "" }) : make("td", { class: kind || "" }));
  return { node: make("tr", {}, ...cells), cells };
}
