"use strict";
// A head as a matrix: queries down, keys across. Hover reads a weight; a click holds the query.

class Matrix {
  constructor(trace) {
    this.trace = trace; // whose tokens name rows and columns
    this.title = make("h3");
    this.canvas = make("canvas", {
      class: "drawing", role: "img",
      mousemove: (event) => this.move(event),
      mouseleave: () => { hideTip(); pointed({ query: null, key: null }); },
      click: (event) => { const at = this.place(event); if (at) go({ held: state.held === at.query ? null : at.query }); },
    });
    this.element = make("div", {}, this.title, this.canvas);
  }

  show(map, { title, tint, rowwise = false, values }) {
    this.title.textContent = title;
    this.title.hidden = !title;
    [this.map, this.tint, this.rowwise, this.values] = [map, tint, rowwise, values];
    this.picture = null;
    this.canvas.setAttribute("aria-label", `weights of layer ${layerName(state.layer)}, head ${headName(state.layer, state.head)}`);
    this.paint({});
  }

  paint(at = {}) {
    const width = this.element.clientWidth;
    if (!this.map || !width) return;
    const { T, S } = this.map;
    const high = Math.max(340, Math.min(640, innerHeight - 250)); // what is above the view stays in sight
    const roomy = (width - 138) / S >= 9 && (high - 90) / T >= 9;
    const margin = roomy ? this.room() : { left: 38, top: 22, right: 12 };
    const size = Math.min(36, (width - margin.left - margin.right) / S, (high - margin.top) / T);
    Object.assign(this, { margin, cell: size });
    const [w, h] = [S * size, T * size];
    const brush = fit(this.canvas, margin.left + w + margin.right, margin.top + h + 2);
    const ratio = devicePixelRatio || 1;
    this.picture ??= heat(this.map, w * ratio, h * ratio, this.tint, this.rowwise);
    brush.imageSmoothingEnabled = false;
    brush.drawImage(this.picture, margin.left, margin.top, w, h);
    brush.strokeStyle = colours.line;
    brush.strokeRect(margin.left - 0.5, margin.top - 0.5, w + 1, h + 1);
    this.names(brush, roomy, at);
    const query = at.query ?? state.held;
    brush.strokeStyle = colours.warn;
    brush.lineWidth = 1.5;
    if (query != null && query < T) brush.strokeRect(margin.left - 1, margin.top + query * size - 1, w + 2, Math.max(3, size + 2));
    if (at.key != null) brush.strokeRect(margin.left + at.key * size - 1, margin.top - 1, Math.max(3, size + 2), h + 2);
  }

  // What the tokens need at the left and, leaning, on top.
  room() {
    const brush = this.canvas.getContext("2d");
    brush.font = "11px system-ui, sans-serif";
    const widest = (count, text) => Math.min(92, Math.max(12, ...Array.from({ length: count }, (_, n) =>
      brush.measureText(text(this.trace, state.layer, n)).width)));
    const [left, top] = [widest(this.map.T, queryToken), widest(this.map.S, keyToken)];
    return { left: left + 12, top: top * 0.87 + 14, right: Math.max(12, top * 0.5 - 4) };
  }

  names(brush, roomy, at) {
    const { margin, cell, map } = this;
    const step = roomy ? 1 : Math.max(1, 2 ** Math.ceil(Math.log2(26 / cell)));
    brush.font = roomy && cell >= 11 ? "11px system-ui, sans-serif" : "10px system-ui, sans-serif";
    for (let i = 0; i < map.T; i += step) {
      brush.fillStyle = i === (at.query ?? state.held) ? colours.ink : colours.soft;
      brush.textAlign = "right";
      const text = roomy ? shortened(brush, queryToken(this.trace, state.layer, i), margin.left - 9) : String(i);
      brush.fillText(text, margin.left - 5, margin.top + (i + (roomy ? 0.5 : 0)) * cell + (roomy ? 0 : 4));
    }
    for (let j = 0; j < map.S; j += step) {
      brush.fillStyle = j === at.key ? colours.ink : colours.soft;
      brush.save();
      brush.translate(margin.left + (j + (roomy ? 0.5 : 0)) * cell, margin.top - 5);
      brush.textAlign = "left";
      if (roomy) brush.rotate(-Math.PI / 3);
      brush.fillText(roomy ? shortened(brush, keyToken(this.trace, state.layer, j), 92) : String(j), 0, roomy ? 0 : -6);
      brush.restore();
    }
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const key = Math.floor((event.clientX - box.left - this.margin.left) / this.cell);
    const query = Math.floor((event.clientY - box.top - this.margin.top) / this.cell);
    return query >= 0 && key >= 0 && query < this.map.T && key < this.map.S ? { query, key } : null;
  }

  move(event) {
    const at = this.map && this.place(event);
    if (!at) { hideTip(); pointed({ query: null, key: null }); return; }
    showTip(event, [`query ${at.query}: ${queryToken(this.trace, state.layer, at.query)}`,
      `key ${at.key}: ${keyToken(this.trace, state.layer, at.key)}`, this.values(at.query, at.key)].join("\n"));
    pointed(at);
  }
}
