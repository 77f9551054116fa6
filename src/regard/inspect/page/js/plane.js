"use strict";
// Queries and keys of one head in one plane, over all inputs of the trace: near means that the query reads the key.

views.set("plane", (() => {
  const panel = make("section");
  const controls = make("div", { class: "controls" });
  const search = make("input", { type: "search", placeholder: "find a token", "aria-label": "find a token", input: () => paint() });
  const canvas = make("canvas", { class: "drawing", role: "img", "aria-label": "queries and keys in a plane" });
  const missing = make("p", { class: "note", hidden: "" }, "This layer scores no pairs by queries and keys.");
  const key = make("div", { class: "note" });
  panel.append(controls, missing, canvas, key);
  const planes = Object.keys(traces[0].planes);
  const titles = { pca: "PCA", tsne: "t-SNE", umap: "UMAP" };
  let plane = planes[0];
  let by = "kind";
  let seen = null; // {points: [{x, y, kind, row, place, text}], near}

  function offer() {
    const ways = [["kind", "query or key"], ["place", "position"], ["token", "token"], ["input", "input"]];
    controls.replaceChildren(
      ...(planes.length > 1 ? [choose("Plane", planes.map((p) => [p, titles[p]]), plane, (value) => { plane = value; go({}); })] : []),
      choose("Colour by", ways, by, (value) => { by = value; paint(); }), search,
      make("span", { class: "note" }, `${titles[plane]} of queries and keys, scaled and moved so that near means attended`));
  }

  const draw = latest(async (stale) => {
    offer();
    const facts = traces[one()].planes[plane][state.layer];
    missing.hidden = facts !== null;
    canvas.hidden = key.hidden = facts === null;
    if (facts === null) return;
    const raw = await points(one(), state.layer, plane, state.head);
    if (stale()) return;
    const made = [];
    let count = 0;
    for (const [kind, list] of [["queries", facts.queries], ["keys", facts.keys]]) {
      for (const [row, place] of list) {
        const n = count++;
        if (raw[2 * n] === 65535) continue; // no number
        made.push({ x: raw[2 * n] / 65534, y: 1 - raw[2 * n + 1] / 65534, kind, row, place, text: token(one(), state.layer, kind, place, row) });
      }
    }
    seen = { points: made, near: null, map: null, lost: count - made.length };
    paint();
    panel.dataset.drawn = `${state.layer} ${state.head}`;
  });

  function inkOf() {
    const [, T, S] = layerOf(state.layer, one()).shape;
    const most = Math.max(T, S) - 1 || 1;
    const shared = new Map(); // the seven most frequent tokens get a hue each
    if (by === "token") {
      const counts = new Map();
      for (const p of seen.points) counts.set(p.text, (counts.get(p.text) || 0) + 1);
      [...counts].sort((a, b) => b[1] - a[1]).slice(0, 7).forEach(([text], n) => shared.set(text, n));
    }
    const found = traces[one()].planes[plane][state.layer].agreement[state.head];
    key.textContent = `In this plane a query's scores and distances correlate at ${found.toFixed(2)} (at −1, the nearest key would always be read most).   `
      + (seen.lost ? `No place for ${seen.lost} of the queries and keys: they hold what is no number.   ` : "");
    const entry = (colour, words) => {
      const dot = make("span", { "aria-hidden": "true" }, "■ ");
      dot.style.color = colour;
      key.append(dot, words + "   ");
    };
    if (by === "kind") { entry(colours.heads[0], "query ●"); entry(colours.heads[1], "key ▲"); }
    if (by === "token") { for (const [text, n] of shared) entry(colours.heads[n], text); entry(colours.soft, "other"); }
    if (by === "place") { entry(rgb(colours.less[230]), "first position"); entry(rgb(colours.more[230]), `position ${most}`); }
    return (p) => {
      if (by === "kind") return colours.heads[p.kind === "queries" ? 0 : 1];
      if (by === "place") return rgb(mix(colours.less[230], colours.more[230], p.place / most));
      if (by === "token") return shared.has(p.text) ? colours.heads[shared.get(p.text)] : colours.soft;
      return colours.heads[p.row % 8];
    };
  }

  const MARGIN = 14;

  function paint() {
    if (!seen || !panel.clientWidth) return;
    canvas.hidden = !seen.points.length;
    if (canvas.hidden) {
      inkOf();
      return;
    }
    const width = panel.clientWidth;
    const height = Math.min(600, 0.7 * innerHeight);
    // Both axes have the same scale: the plane is fitted into the canvas as a whole.
    const [right, low] = [Math.max(...seen.points.map((p) => p.x)), Math.min(...seen.points.map((p) => p.y))];
    const scale = Math.min((width - 2 * MARGIN) / (right || 1), (height - 2 * MARGIN) / (1 - low || 1));
    Object.assign(seen, { place: (p) => [(width - right * scale) / 2 + p.x * scale, MARGIN + (p.y - low) * scale] });
    const brush = fit(canvas, width, Math.max(160, (1 - low) * scale + 2 * MARGIN));
    brush.fillStyle = colours.panel;
    brush.fillRect(0, 0, width, height);
    const ink = inkOf();
    const wanted = search.value.trim().toLowerCase();
    for (const p of seen.points) {
      const hit = wanted && p.text.toLowerCase().includes(wanted);
      brush.globalAlpha = wanted && !hit ? 0.12 : 0.75;
      mark(brush, p, hit ? 5 : 3.2, ink(p));
    }
    brush.globalAlpha = 1;
    if (seen.near) {
      reads(brush);
      brush.lineWidth = 2;
      mark(brush, seen.near, 6, ink(seen.near), colours.ink);
    }
  }

  // From a query to the keys of its input, or from a key to the queries that read it, as strong as the weights.
  function reads(brush) {
    const { near, map } = seen;
    if (!map) return;
    const [x, y] = seen.place(near);
    brush.strokeStyle = colours.ink;
    brush.lineWidth = 1.2;
    for (const p of seen.points) {
      if (p.row !== near.row || p.kind === near.kind) continue;
      const w = near.kind === "queries" ? map.at(near.place, p.place) : map.at(p.place, near.place);
      if (!(Math.abs(w) > 0.01)) continue;
      brush.globalAlpha = Math.min(1, Math.sqrt(Math.abs(w)));
      brush.beginPath();
      brush.moveTo(x, y);
      brush.lineTo(...seen.place(p));
      brush.stroke();
    }
    brush.globalAlpha = 1;
  }

  async function approach(point) {
    const mine = seen;
    [mine.near, mine.map] = [point, null];
    paint();
    if (!point || point.row >= traces[one()].rows || traces[one()].pool > 1) return;
    const map = await headMap(one(), state.layer, state.head, point.row);
    if (mine !== seen || mine.near !== point) return; // the pointer has moved on
    mine.map = map;
    paint();
  }

  function mark(brush, p, size, colour, edge) {
    const [x, y] = seen.place(p);
    brush.fillStyle = colour;
    brush.beginPath();
    if (p.kind === "queries") brush.arc(x, y, size, 0, 7);
    else {
      brush.moveTo(x, y - size * 1.25);
      brush.lineTo(x + size * 1.15, y + size * 0.85);
      brush.lineTo(x - size * 1.15, y + size * 0.85);
      brush.closePath();
    }
    brush.fill();
    if (edge) { brush.strokeStyle = edge; brush.stroke(); }
  }

  // The sentence around a token, the token between brackets.
  function sentence(p) {
    const list = layerOf(state.layer, one())[p.kind];
    if (list === null || list === "picture") return "";
    const words = traces[one()].tokens[list][p.row];
    const from = Math.max(0, p.place - 12);
    const shown = words.slice(from, p.place + 13).map((w, n) => (from + n === p.place ? `⟦${w}⟧` : w)).join(" ");
    return (from ? "… " : "") + shown.replace(/ ##/g, "").replace(/[Ġ▁]/g, "") + (p.place + 13 < words.length ? " …" : "");
  }

  canvas.addEventListener("mousemove", (event) => {
    if (!seen) return;
    const area = canvas.getBoundingClientRect();
    let [best, least] = [null, 14];
    for (const p of seen.points) {
      const [x, y] = seen.place(p);
      const far = Math.hypot(x + area.left - event.clientX, y + area.top - event.clientY);
      if (far < least) [best, least] = [p, far];
    }
    if (best !== seen.near) approach(best);
    if (!best) { hideTip(); return; }
    const kind = best.kind === "queries" ? "query" : "key";
    showTip(event, [`${kind} ${best.place} of input ${best.row + 1}: ${best.text}`, sentence(best)].filter(Boolean).join("\n"));
  });
  canvas.addEventListener("mouseleave", () => { hideTip(); if (seen && seen.near) approach(null); });

  const spot = (n) => seen.place(seen.points[n]);

  return { title: "Queries and keys", panel, draw, spot, usesHead: true, usesShown: true };
})());
