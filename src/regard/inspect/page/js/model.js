"use strict";
// All layers and heads as thumbnails. One click, or Enter, opens the head.

views.set("model", (() => {
  const panel = make("section");
  const note = make("div", { class: "controls" });
  const stacks = make("div");
  panel.append(note, stacks);
  const buttons = new Map(); // "layer,head" -> button

  // Layers of one stack and kind stand together.
  function groups() {
    const found = new Map();
    traces[0].layers.forEach((layer, number) => {
      const name = [layer.side, layer.kind === "cross" ? "cross-attention" : "self-attention"].filter(Boolean).join(" ");
      if (!found.has(name)) found.set(name, []);
      found.get(name).push(number);
    });
    return found;
  }

  function build() {
    for (const [name, numbers] of groups()) {
      const most = Math.max(...numbers.map((n) => layerOf(n).shape[0]));
      const grid = make("div", { class: "grid", role: "group", "aria-label": name });
      grid.style.gridTemplateColumns = `3.2rem repeat(${most}, minmax(0, ${most < 5 ? "9rem" : "6.5rem"}))`;
      grid.append(make("span", { class: "rowname" }, "layer"));
      for (let h = 0; h < most; h++) grid.append(make("span", { class: "colname" }, (h ? "" : "head ") + headName(numbers[0], h)));
      for (const layer of numbers) {
        grid.append(make("span", { class: "rowname", title: layerOf(layer).name }, String(layerOf(layer).index)));
        for (let head = 0; head < most; head++) grid.append(head < layerOf(layer).shape[0] ? thumb(layer, head) : make("span"));
      }
      const section = make("section", { class: "stack" }, grid);
      if (groups().size > 1) section.prepend(make("h2", {}, name));
      stacks.append(section);
    }
  }

  function thumb(layer, head) {
    const [T, S] = layerOf(layer).thumb;
    const button = make("button", {
      type: "button", class: "thumb", tabindex: "-1", "aria-label": `layer ${layerName(layer)}, head ${headName(layer, head)}`,
      click: () => go({ view: "head", layer, head }),
      focus: () => { if (state.layer !== layer || state.head !== head) go({ layer, head }); },
      mousemove: (event) => showTip(event, about(layer, head)), mouseleave: hideTip,
    }, make("canvas"));
    button.style.setProperty("--shape", `${Math.max(S, T / 3)} / ${Math.max(T, S / 3)}`);
    buttons.set(`${layer},${head}`, button);
    return button;
  }

  // Which heads have queries whose weights are no numbers.
  function lost() {
    const found = tracesShown().flatMap((t) => traces[t].layers.flatMap((layer, n) => layer.lost.map((count, head) => [t, n, head, count])))
      .filter(([, , , count]) => count);
    const words = found.slice(0, 8).map(([t, n, head, count]) =>
      `${paired ? traces[t].name + ", " : ""}layer ${layerName(n)} head ${headName(n, head)} (${count} ${count === 1 ? "query" : "queries"})`);
    if (found.length > 8) words.push(`${found.length - 8} heads more`);
    return found.length ? `Weights that are no numbers: ${words.join("; ")}.` : "";
  }

  function about(layer, head) {
    const found = traces[one()];
    const row = found.table.find((r) => r[0] === layer && r[1] === head);
    const lines = found.columns.map((c, n) => [c.name, row[n + 2]]).filter(([, v]) => v !== null);
    const title = `layer ${layerName(layer)}, head ${headName(layer, head)}`;
    return [title, ...lines.map(([name, v]) => `${name} ${measure(name, v)}`)].join("\n");
  }

  const draw = latest(async (stale) => {
    if (!buttons.size) build();
    const compared = paired && state.shown === DIFFERENCE;
    const tint = tinter(1, compared);
    note.replaceChildren(
      compared ? legend(traces[0].name + " more", traces[1].name + " more", tint, -1) : legend("0", "100 % of a query's attention", tint),
      make("span", { class: "note" }, "Queries go down, keys across. A point that covers several weights shows the largest."),
      make("span", { class: "note warn" }, lost()));
    for (let layer = 0; layer < traces[0].layers.length; layer++) {
      const parts = await Promise.all(compared ? [thumbs(0, layer), thumbs(1, layer)] : [thumbs(one(), layer)]);
      if (stale()) return;
      const { thumb: [T, S], shape: [H] } = layerOf(layer);
      for (let head = 0; head < H; head++) {
        const values = new Float32Array(T * S);
        for (let n = 0; n < values.length; n++) {
          const [x, y] = parts.map((part) => part[head * T * S + n]).map((level) => (level === 255 ? NaN : (level / 254) ** 2));
          values[n] = compared ? y - x : x;
        }
        const canvas = buttons.get(`${layer},${head}`).firstChild;
        [canvas.width, canvas.height] = [S, T];
        canvas.getContext("2d").drawImage(painted(values, S, T, tint), 0, 0);
      }
    }
    panel.dataset.drawn = "yes";
  });

  function mark(focus) {
    for (const button of buttons.values()) {
      button.setAttribute("aria-current", "false");
      button.tabIndex = -1;
    }
    const chosen = buttons.get(`${state.layer},${state.head}`);
    chosen.setAttribute("aria-current", "true");
    chosen.tabIndex = 0;
    if (focus) chosen.focus();
  }

  return { title: "All heads", panel, draw: async () => { await draw(); mark(false); }, mark, usesShown: true, usesDifference: true };
})());
