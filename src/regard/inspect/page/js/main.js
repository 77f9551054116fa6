"use strict";
// The frame around the views: tabs, choosers, keys, theme, and what the page says about itself.

const order = ["model", "head", "neuron", "plane", "text", "picture", "table"].filter((name) => views.has(name));
const root = document.documentElement;

// The one way to change what is shown.
function go(change) {
  const before = { ...state };
  Object.assign(state, change);
  state.layer = Math.max(0, Math.min(state.layer, traces[0].layers.length - 1));
  const [H, T] = layerOf().shape;
  state.head = Math.max(0, Math.min(state.head, H - 1));
  if (state.layer !== before.layer) state.more.clear();
  if (state.held !== null && state.held >= T) state.held = null;
  if (!views.get(state.view).usesDifference && state.shown === DIFFERENCE) state.shown = 0;
  hideTip();
  frame();
  const onlyHead = Object.keys(change).every((name) => name === "layer" || name === "head");
  const view = views.get(state.view);
  if (state.view === "model" && before.view === "model" && onlyHead && view.panel.dataset.drawn) view.mark(false);
  else view.draw();
  say(whereWords());
}

// What the pointer is over. Views that show tokens light up what belongs to it.
function pointed(at) {
  const { hovered } = views.get(state.view);
  if (hovered) hovered(at);
}

function whereWords() {
  const { usesHead } = views.get(state.view);
  if (!usesHead && state.view !== "model") return "";
  const { name, kind } = layerOf();
  return `layer ${layerName(state.layer)}, head ${headName(state.layer, state.head)} · ${name} · ${kind}-attention`;
}

function frame() {
  const view = views.get(state.view);
  for (const name of order) {
    byId("tab-" + name).setAttribute("aria-selected", String(name === state.view));
    byId("tab-" + name).tabIndex = name === state.view ? 0 : -1;
    views.get(name).panel.hidden = name !== state.view;
  }
  byId("layer").value = String(state.layer);
  const heads = byId("head");
  const H = layerOf().shape[0];
  if (heads.options.length !== H || heads.dataset.layer !== String(state.layer)) {
    heads.dataset.layer = String(state.layer);
    heads.replaceChildren(...Array.from({ length: H }, (_, h) => make("option", { value: h }, headName(state.layer, h))));
  }
  heads.value = String(state.head);
  byId("where").hidden = !view.usesHead && state.view !== "model";
  byId("shown-field").hidden = !paired || !view.usesShown;
  byId("shown").options[DIFFERENCE].hidden = !view.usesDifference;
  byId("shown").value = String(state.shown);
  byId("row").value = String(state.row);
}

function setUp() {
  byId("title").textContent = facts.title;
  for (const name of order) {
    const { title, panel } = views.get(name);
    byId("tabs").append(make("button", {
      type: "button", role: "tab", id: "tab-" + name, "aria-controls": "view-" + name, click: () => go({ view: name }),
    }, title));
    Object.assign(panel, { id: "view-" + name });
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", "tab-" + name);
    byId("main").append(panel);
  }
  traces[0].layers.forEach((_, n) => byId("layer").append(make("option", { value: n }, layerName(n))));
  const rows = Math.min(...traces.map((t) => t.rows));
  const list = Object.values(traces[0].tokens)[0];
  for (let row = 0; row < rows; row++) {
    const words = list && !traces[0].tokens.picture ? (list[row] || []).slice(0, 8).join(" ").slice(0, 48) : "";
    byId("row").append(make("option", { value: row }, `${row + 1}  ${words}`));
  }
  byId("row-field").hidden = rows < 2;
  [...traces.map((t) => t.name), "difference"].slice(0, 3).forEach((name, n) => byId("shown").append(make("option", { value: n }, name)));
  while (byId("shown").options.length < 3) byId("shown").append(make("option", { value: byId("shown").options.length }, ""));
  byId("row").addEventListener("change", (event) => go({ row: Number(event.target.value), held: null }));
  byId("shown").addEventListener("change", (event) => go({ shown: Number(event.target.value) }));
  byId("layer").addEventListener("change", (event) => go({ layer: Number(event.target.value) }));
  byId("head").addEventListener("change", (event) => go({ head: Number(event.target.value) }));
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  byId("theme").addEventListener("click", () => theme(root.dataset.theme === "dark" ? "light" : "dark"));
  byId("notes").append(...notes().map((words) => make("li", {}, words)));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  theme(dark.matches ? "dark" : "light", false);
}

function theme(name, redraw = true) {
  root.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `use the ${name === "dark" ? "light" : "dark"} theme`);
  readColours();
  if (redraw) views.get(state.view).draw();
}

function notes() {
  const [{ layers, rows, batch, top, pool, vectors: held, model, tokens }] = traces;
  const said = [];
  if (model) said.push(`Model: ${model}, ${layers.length} layers of attention.`);
  said.push("Weights are kept in 8 bits: each is within 0.4 % of its query's largest weight.");
  if (top !== null) said.push(`To keep the page small, only the ${top} largest weights of each query are kept; the others show as 0.`);
  if (pool > 1) said.push(`To keep the page small, ${pool} × ${pool} neighbouring weights are pooled into their largest, and each token stands for ${pool}.`);
  if (rows < batch) said.push(`To keep the page small, maps of the first ${rows} of ${batch} inputs are kept.`);
  if (held === 0) said.push("Queries and keys are not kept: the neuron view has nothing to show.");
  else said.push(`Queries and keys${held < rows ? ` of the first ${held} inputs` : ""} are kept in 8 bits a number, with a scale for each vector.`);
  if (!Object.keys(tokens).length) said.push("The trace holds no tokens: positions are shown.");
  if (tokens.picture) said.push("Pictures are shown with their own darkest and brightest values as black and white.");
  return said;
}

function move(by) {
  if (state.view === "model") {
    go(by);
    views.get("model").mark(true);
  } else go(by);
}

const KEYS = {
  ArrowLeft: () => move({ head: state.head - 1 }),
  ArrowRight: () => move({ head: state.head + 1 }),
  ArrowUp: () => move({ layer: state.layer - 1 }),
  ArrowDown: () => move({ layer: state.layer + 1 }),
  Enter: () => go({ view: "head" }),
  Escape: () => (state.held !== null && state.view !== "model" ? go({ held: null }) : back()),
  j: () => go({ held: Math.min((state.held ?? -1) + 1, layerOf().shape[1] - 1) }),
  k: () => go({ held: Math.max((state.held ?? 1) - 1, 0) }),
  b: () => go({ row: (state.row + 1) % byId("row").options.length, held: null }),
  t: () => byId("theme").click(),
  "?": () => byId("help").showModal(),
};

function back() {
  go({ view: "model" });
  views.get("model").mark(true);
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const { target, key } = event;
  if (target.matches("select, input") && key !== "Escape") return;
  if (target.matches("[role=tab]") && (key === "ArrowLeft" || key === "ArrowRight")) {
    const next = order[(order.indexOf(state.view) + (key === "ArrowLeft" ? order.length - 1 : 1)) % order.length];
    go({ view: next });
    byId("tab-" + next).focus();
    event.preventDefault();
    return;
  }
  if (target.matches(".lines, .tablewrap, .scroll") && (key === "ArrowUp" || key === "ArrowDown")) return; // scrolls
  if (key === "Enter" && target.matches("button, summary, tr") && !target.matches(".thumb")) return; // its own click
  if (/^[1-6]$/.test(key) && Number(key) <= order.length) go({ view: order[Number(key) - 1] });
  else if (KEYS[key] && views.get(state.view)) KEYS[key]();
  else return;
  event.preventDefault();
}

setUp();
if (!window.DecompressionStream) byId("main").prepend(make("p", {}, "This browser cannot unpack the maps: it has no DecompressionStream."));
addEventListener("keydown", pressed);
let waiting = 0;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => views.get(state.view).draw(), 120);
});
go({});
