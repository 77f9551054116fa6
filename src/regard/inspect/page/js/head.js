"use strict";
// One head: as lines, beside other heads of its layer if wanted, and as a matrix. Two traces stand side by side.

views.set("head", (() => {
  const panel = make("section");
  const controls = make("div", { class: "controls" });
  const lines = tracesShown().map((t) => new Lines(t));
  const matrices = tracesShown().map((t) => new Matrix(t));
  if (paired) matrices.push(new Matrix(0));
  const upper = make("div", { class: "panels" }, ...lines.map((x) => x.element));
  const lower = make("div", { class: "panels" }, ...matrices.map((x) => x.element));
  const both = make("div", { class: "panels" }, upper, lower);
  panel.append(controls, both);
  panel.classList.toggle("paired", paired);
  upper.style.gridTemplateColumns = paired ? "1fr 1fr" : "1fr";
  lower.style.gridTemplateColumns = paired ? "1fr 1fr 1fr" : "1fr";
  both.style.gridTemplateColumns = paired ? "1fr" : "minmax(0, 5fr) minmax(0, 7fr)";
  if (paired) lines.forEach((x, t) => x.element.prepend(make("h3", {}, traces[t].name)));

  const hue = (n) => colours.heads[n % 8];

  function offer(H, heads) {
    const chips = make("span", { class: "chips", role: "group", "aria-label": "heads drawn as lines" });
    for (let head = 0; head < H; head++) {
      const shown = heads.includes(head);
      const chip = make("button", {
        type: "button", "aria-pressed": String(shown), title: head === state.head ? "the chosen head" : "draw this head's lines too",
        click: () => {
          if (head === state.head) return;
          if (!state.more.delete(head)) state.more.add(head);
          go({});
        },
      }, headName(state.layer, head));
      if (shown) chip.style.setProperty("--chip", hue(heads.indexOf(head)));
      chips.append(chip);
    }
    const counts = [["1", "the strongest"], ["3", "the 3 strongest"], ["8", "the 8 strongest"], ["999999", "all over 1 %"]];
    const shades = [["weight", "by weight"], ["row", "within a row"]];
    controls.replaceChildren(
      make("span", { class: "note" }, "Lines of heads"), chips,
      choose("Each query", counts, state.lines, (value) => go({ lines: value })),
      choose("Shade", shades, state.shade, (value) => go({ shade: value })),
      state.shade === "row" ? "" : legend("0", "100 %", tinter(1)));
  }

  const draw = latest(async (stale) => {
    const [H] = layerOf().shape;
    const heads = [state.head, ...[...state.more].filter((h) => h < H && h !== state.head).sort((a, b) => a - b)];
    offer(H, heads);
    const maps = await Promise.all(tracesShown().map((t) => Promise.all(heads.map((h) => headMap(t, state.layer, h)))));
    if (stale()) return;
    const rowwise = state.shade === "row";
    maps.forEach((found, t) => {
      lines[t].show(found.map((map, n) => ({ map, colour: hue(n) })));
      const value = (i, j) => percent(found[0].at(i, j));
      matrices[t].show(found[0], { title: paired ? traces[t].name : "", tint: tinter(1), rowwise, values: value });
    });
    if (paired) {
      const change = new Difference(maps[0][0], maps[1][0]);
      const value = (i, j) => `${percent(change.first.at(i, j))} → ${percent(change.second.at(i, j))}`;
      const title = `${traces[1].name} less ${traces[0].name} (largest change ${percent(change.largest)})`;
      matrices[2].show(change, { title, tint: tinter(change.largest, true), values: value });
    }
    if (state.held !== null) lines.forEach((x) => x.reveal(state.held));
    panel.dataset.drawn = `${state.layer} ${state.head}`;
  });

  function hovered(at) {
    for (const part of [...lines, ...matrices]) part.paint(at);
    const map = lines[0].heads && lines[0].heads[0].map;
    if (!map) return;
    const query = at.query ?? (at.key == null ? state.held : null);
    if (query != null && query < map.T) say(reads(map, query));
    else if (at.key != null) say(`key ${at.key} “${keyToken(0, state.layer, at.key)}”`);
    else say(whereWords());
  }

  // A query and the keys that it reads most, in words.
  function reads(map, query) {
    const most = Array.from({ length: map.S }, (_, j) => [Math.abs(map.at(query, j)), j]).sort((a, b) => b[0] - a[0]).slice(0, 4);
    const words = most.filter(([w]) => w > 0).map(([, j]) => `“${keyToken(0, state.layer, j)}” ${percent(map.at(query, j))}`);
    return `query ${query} “${queryToken(0, state.layer, query)}” reads ${words.join(", ") || "nothing"}`;
  }

  return { title: "One head", panel, draw: async () => { await draw(); hovered({}); }, hovered, matrices, usesHead: true };
})());
