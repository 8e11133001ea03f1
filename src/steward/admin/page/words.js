// Numbers and times as people read them. Pure.
"use strict";

const GROUPED = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** 1,234 up to six digits, then 1.23 M. */
function count(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 1e6) return GROUPED.format(value);
  return scaled(value, [[1e12, "T"], [1e9, "G"], [1e6, "M"]]);
}

/** A rate: small ones with a digit after the point. */
function rate(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 9.95) return value < 0.05 ? "0" : value.toFixed(1);
  if (value < 1e4) return GROUPED.format(value);
  return scaled(value, [[1e9, "G"], [1e6, "M"], [1e3, "k"]]);
}

/** Bytes, by thousands. */
function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 1e3) return `${Math.round(value)} B`;
  return `${scaled(value, [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])}`;
}

function scaled(value, steps) {
  const [size, unit] = steps.find(([size]) => value >= size) || steps[steps.length - 1];
  const short = value / size;
  return `${short.toFixed(short < 9.995 ? 2 : short < 99.95 ? 1 : 0)} ${unit}`;
}

/** Microseconds. */
function micros(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 1e3) return `${Math.round(value)} µs`;
  if (value < 1e6) return `${trim(value / 1e3)} ms`;
  return `${trim(value / 1e6)} s`;
}

function trim(value) {
  return value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0).replace(/\.?0+$/, "");
}

/** Milliseconds as the two largest units. */
function span(ms) {
  const s = Math.max(0, Math.floor(ms / 1000));
  const d = Math.floor(s / 86400), h = Math.floor(s / 3600) % 24, m = Math.floor(s / 60) % 60;
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  if (m) return s % 60 ? `${m} min ${s % 60} s` : `${m} min`;
  return `${s} s`;
}

/** Seconds since 1970 as local date and time. */
function clock(seconds) {
  return new Date(seconds * 1000).toLocaleString("sv-SE");
}

/** receive_buffer -> receive buffer */
function words(name) {
  return String(name).replaceAll("_", " ");
}

/** Reasons with their counts, the most frequent first. */
function reasons(counts) {
  return Object.entries(counts || {}).filter(([, n]) => n > 0).sort((x, y) => y[1] - x[1]);
}
