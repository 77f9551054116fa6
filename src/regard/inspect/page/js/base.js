"use strict";
// What all views share: the facts of the page, the state that they show, and how elements are made. Text of models and
// users is only ever written as text nodes.

const facts = JSON.parse(document.getElementById("facts").textContent);
const traces = facts.traces;
for (const trace of traces) trace.table = trace.table.map((row) => row.map((x) => (typeof x === "string" ? Number(x) : x)));
const paired = traces.length > 1;
const DIFFERENCE = 2; // state.shown: 0 and 1 are the traces, this is the second less the first
const state = { view: "model", row: 0, layer: 0, head: 0, more: new Set(), shown: 0, held: null, lines: "3", shade: "weight" };
const views = new Map(); // name -> {title, panel, draw(), hovered?(), usesHead, usesShown, usesDifference}
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children); // strings become text nodes
  return element;
}

function choose(label, options, value, changed) {
  const select = make("select", { change: () => changed(select.value) });
  for (const [key, words] of options) select.append(make("option", { value: key }, words));
  select.value = String(value);
  return make("label", {}, label + " ", select);
}

const percent = (w) => Number.isNaN(w) ? "not a number" : !Number.isFinite(w) ? String(w) : Math.abs(w) >= 0.0995 ? (100 * w).toFixed(0) + " %"
  : Math.abs(w) >= 0.00995 ? (100 * w).toFixed(1) + " %" : (100 * w).toFixed(2) + " %";

const layerOf = (layer = state.layer, trace = 0) => traces[trace].layers[layer];
const tracesShown = () => (paired ? [0, 1] : [0]);
const one = () => (paired && state.shown < DIFFERENCE ? state.shown : 0); // for views that show a single trace

function layerName(layer) {
  const { index, side, kind } = layerOf(layer);
  return [String(index), side, kind === "cross" ? "cross" : ""].filter(Boolean).join(" ");
}

const headName = (layer, head) => String(layerOf(layer).heads[head]);

// A token as it is shown: the marks that tokenizers put for a space in front become a dot.
function token(trace, layer, side, place, row = rowOf(layer, trace)) {
  const { tokens, pool, layers } = traces[trace];
  const list = layers[layer][side];
  if (list === null) return "#" + place * pool;
  const text = (tokens[list][row] || [])[place * pool];
  if (text === undefined) return "#" + place * pool;
  return text.replace(/^[Ġ▁](?=.)/, "·").replace(/Ċ/g, "↵").replace(/^[Ġ▁]$/, "·") + (pool > 1 ? " …" : "");
}

// Stacks of one trace may hold batches of different sizes.
const rowOf = (layer, trace = 0) => Math.min(state.row, layerOf(layer, trace).batch - 1);

const queryToken = (trace, layer, i) => token(trace, layer, "queries", i);
const keyToken = (trace, layer, j) => token(trace, layer, "keys", j);

const tip = byId("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const x = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 12 : event.clientX + 16;
  const y = event.clientY + 14 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 14;
  tip.style.left = Math.max(4, x) + "px";
  tip.style.top = Math.max(4, y) + "px";
}
const hideTip = () => { tip.hidden = true; };
const say = (text) => { byId("said").textContent = text; };

// Draws of one panel may overlap, as maps are unpacked in the background: only the last one that began may finish.
function latest(work) {
  let last = 0;
  return async (...given) => {
    const mine = ++last;
    await work(() => mine !== last, ...given);
  };
}
