"use strict";
// A head as lines: queries in the left column, keys in the right. The canvas covers only what is scrolled into sight.

const TOKEN = 20; // pixels of a line of text

class Lines {
  constructor(trace) {
    this.trace = trace;
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.columns = { queries: make("ol", { class: "column queries" }), keys: make("ol", { class: "column keys" }) };
    this.box = make("div", { class: "lines", role: "group", "aria-label": "tokens", tabindex: "0", scroll: () => this.paint() },
      this.canvas, this.columns.queries, this.columns.keys);
    this.names = make("div", { class: "colnames" }, make("span", {}, "query ↓"), make("span", {}, "↓ key"));
    this.element = make("div", {}, this.names, this.box);
    this.hover = { query: null, key: null };
    for (const side of ["queries", "keys"]) this.listen(side);
    this.box.addEventListener("mouseleave", () => this.point(null, null));
  }

  listen(side) {
    const place = (event) => {
      const found = event.target.closest(".tok");
      return found ? Number(found.dataset.place) : null;
    };
    this.columns[side].addEventListener("mouseover", (event) => {
      const n = place(event);
      if (n !== null) this.point(side === "queries" ? n : null, side === "keys" ? n : null);
    });
    this.columns[side].addEventListener("click", (event) => {
      const n = place(event);
      if (n !== null && side === "queries") go({ held: state.held === n ? null : n });
    });
  }

  point(query, key) {
    if (query === this.hover.query && key === this.hover.key) return;
    this.hover = { query, key };
    pointed({ query, key });
  }

  // heads: [{map, colour}], the chosen head first.
  show(heads) {
    this.heads = heads;
    this.strong = heads.map(({ map }) => strongest(map, Number(state.lines)));
    const { T, S } = heads[0].map;
    const wanted = `${state.row} ${state.layer} ${T} ${S}`;
    if (this.made !== wanted) {
      this.made = wanted;
      for (const [side, count, text] of [["queries", T, queryToken], ["keys", S, keyToken]]) {
        this.columns[side].replaceChildren(...Array.from({ length: count }, (_, n) =>
          make("li", { class: "tok", "data-place": n }, text(this.trace, state.layer, n))));
      }
      this.box.scrollTop = 0;
      const brush = this.canvas.getContext("2d");
      brush.font = getComputedStyle(this.columns.keys).font;
      this.wide = 16;
      for (const word of this.box.querySelectorAll(".tok")) this.wide = Math.max(this.wide, brush.measureText(word.textContent).width + 16);
    }
    this.paint({});
  }

  // Light up what belongs to a query or a key, or to what is held.
  paint(at = this.at) {
    this.at = at || {};
    if (!this.heads || !this.box.clientWidth) return;
    const { T, S } = this.heads[0].map;
    const query = this.at.query ?? (this.at.key == null ? state.held : null);
    const key = this.at.key ?? null;
    this.tint(query, key);
    const width = this.box.clientWidth;
    const column = Math.min(this.wide, width * 0.36);
    for (const list of Object.values(this.columns)) list.style.width = column + "px";
    const content = Math.max(T, S) * TOKEN + 12;
    this.box.style.maxHeight = content + 2 + "px";
    const height = Math.min(this.box.clientHeight, content);
    const brush = fit(this.canvas, width, height);
    this.canvas.style.marginBottom = -height + "px"; // the columns begin where the canvas does
    const top = this.box.scrollTop;
    const y = (n) => 6 + n * TOKEN + TOKEN / 2 - top;
    const [left, right] = [column, width - column];
    const line = (i, j, w, colour) => {
      const [from, to] = [y(i), y(j)];
      if (Math.max(from, to) < 0 || Math.min(from, to) > height) return;
      brush.globalAlpha = Math.min(1, 0.05 + Math.abs(w) ** 0.75);
      brush.strokeStyle = colour;
      brush.lineWidth = 0.8 + 2.2 * Math.min(1, Math.abs(w));
      brush.beginPath();
      brush.moveTo(left, from);
      brush.bezierCurveTo(left + (right - left) * 0.35, from, right - (right - left) * 0.35, to, right, to);
      brush.stroke();
    };
    this.drawn = 0;
    this.heads.forEach(({ map, colour }, n) => {
      const put = (i, j) => {
        const w = map.at(i, j);
        if (Math.abs(w) < 0.004) return;
        line(i, j, w, colour);
        this.drawn += 1;
      };
      if (query !== null && query < T) for (let j = 0; j < S; j++) put(query, j);
      else if (key !== null) for (let i = 0; i < T; i++) put(i, key);
      else for (const [i, j] of this.strong[n]) put(i, j);
    });
    this.box.dataset.lines = this.drawn;
  }

  tint(query, key) {
    const { map, colour } = this.heads[0];
    const set = (side, count, weight, own) => {
      const list = this.columns[side].children;
      for (let n = 0; n < count; n++) {
        const w = weight ? Math.min(1, Math.abs(weight(n))) : 0;
        const shade = w >= 0.002 ? `color-mix(in srgb, ${colour} ${Math.round(10 + 65 * Math.sqrt(w))}%, transparent)` : "";
        if (list[n].style.background !== shade) list[n].style.background = shade;
        list[n].classList.toggle("held", n === own);
      }
    };
    set("keys", map.S, query !== null && query < map.T ? (j) => map.at(query, j) : null, key);
    set("queries", map.T, key !== null ? (i) => map.at(i, key) : null, query);
  }

  reveal(query) {
    const y = query * TOKEN;
    if (y < this.box.scrollTop || y > this.box.scrollTop + this.box.clientHeight - 2 * TOKEN) {
      this.box.scrollTop = Math.max(0, y - this.box.clientHeight / 2);
    }
  }
}

// Of each query the `count` largest weights of at least 1 %, weakest first, so that strong lines lie on top.
function strongest(map, count) {
  const found = [];
  for (let i = 0; i < map.T; i++) {
    const row = [];
    for (let j = 0; j < map.S; j++) {
      const w = Math.abs(map.at(i, j));
      if (w < 0.01 || (row.length === count && w <= row[row.length - 1][2])) continue;
      let n = row.length;
      while (n > 0 && row[n - 1][2] < w) n -= 1;
      row.splice(n, 0, [i, j, w]);
      if (row.length > count) row.pop();
    }
    found.push(...row);
  }
  return found.sort((a, b) => a[2] - b[2]);
}
