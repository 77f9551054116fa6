"use strict";
// Each head in numbers; sorted by a click on a column's name, opened by a click on a row.

function measure(name, value) {
  if (value === null) return "–";
  if (!Number.isFinite(value)) return percent(value);
  const text = name === "entropy" ? value.toFixed(2) : name === "distance" ? value.toFixed(1) : percent(value);
  return /^-[0.]+( %)?$/.test(text) ? text.slice(1) : text;
}

views.set("table", (() => {
  const panel = make("section");
  const note = make("p", { class: "note" });
  const head = make("tr");
  const body = make("tbody");
  const wrap = make("div", { class: "tablewrap", tabindex: "0", role: "group", "aria-label": "heads in numbers" },
    make("table", {}, make("thead", {}, head), body));
  panel.append(note, wrap);
  const { columns } = traces[0];
  let sorted = { by: "place", down: false };

  const values = (n) => (state.shown < DIFFERENCE ? traces[one()].table[n].slice(2)
    : traces[1].table[n].slice(2).map((v, c) => (v === null || traces[0].table[n][c + 2] === null ? null : v - traces[0].table[n][c + 2])));

  function heading(id, words, help, name) {
    const mark = sorted.by === id ? (sorted.down ? " ▼" : " ▲") : "";
    const sort = () => {
      sorted = { by: id, down: sorted.by === id ? !sorted.down : id !== "place" };
      draw();
      head.querySelector(`[data-column="${id}"]`).focus();
    };
    return make("th", { class: name, scope: "col", "aria-sort": sorted.by !== id ? "none" : sorted.down ? "descending" : "ascending" },
      make("button", { type: "button", title: help, "data-column": id, click: sort }, words + mark));
  }

  function draw() {
    head.replaceChildren(heading("place", "layer, head", "in the model's order", "name"),
      ...columns.map((c, n) => heading(String(n), c.name, c.help, "")));
    const found = traces[0].table.map(([layer, h], n) => ({ layer, head: h, n, values: values(n) }));
    if (sorted.by !== "place") {
      const c = Number(sorted.by);
      const none = (r) => r.values[c] === null || Number.isNaN(r.values[c]);
      found.sort((a, b) => none(a) - none(b) || (none(a) ? a.n - b.n : 0) || (sorted.down ? b.values[c] - a.values[c] : a.values[c] - b.values[c]) || a.n - b.n);
    } else if (sorted.down) found.reverse();
    const finite = (x) => (Number.isFinite(x) ? Math.abs(x) : 0);
    const most = columns.map((_, c) => Math.max(...found.map((r) => finite(r.values[c]))) || 1);
    body.replaceChildren(...found.map((row) => line(row, most)));
    note.textContent = state.shown === DIFFERENCE ? `${traces[1].name} less ${traces[0].name}.` : "Averages over all queries of all inputs. Entropy is in nats, distance in tokens.";
    panel.dataset.drawn = `${sorted.by} ${sorted.down}`;
  }

  function line(row, most) {
    const open = () => go({ view: "head", layer: row.layer, head: row.head });
    const name = `${layerName(row.layer)}, ${headName(row.layer, row.head)}`;
    const current = row.layer === state.layer && row.head === state.head;
    return make("tr", {
      tabindex: "0", "aria-current": String(current), "aria-label": `open layer ${name}`, "data-head": `${row.layer},${row.head}`,
      click: open, keydown: (event) => { if (event.key === "Enter") open(); },
    }, make("td", { class: "name" }, name), ...row.values.map((value, c) => {
      const cell = make("td", { class: "bar" }, measure(columns[c].name, value));
      if (state.shown === DIFFERENCE) cell.style.setProperty("--tint", `color-mix(in srgb, var(${value < 0 ? "--less" : "--more"}) 24%, transparent)`);
      cell.style.setProperty("--part", `${Math.min(100, (100 * Math.abs(value || 0)) / most[c])}%`);
      return cell;
    }));
  }

  return { title: "In numbers", panel, draw, usesShown: true, usesDifference: true };
})());
