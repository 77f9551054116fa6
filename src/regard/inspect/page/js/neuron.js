"use strict";
// The neuron view: one query against all keys, number by number. q x k is their elementwise product, its sum times the
// scale is the score, and the softmax over all scores is the weight.

views.set("neuron", (() => {
  const ROW = 18;
  const HEAD = 62; // pixels above the first key: the query and the columns' names
  const panel = make("section");
  const controls = make("div", { class: "controls" });
  const missing = make("p", { class: "note", hidden: "" });
  const canvas = make("canvas", { class: "drawing", role: "img", "aria-label": "query, keys, products, scores and weights" });
  const space = make("div");
  const box = make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "keys" }, canvas, space);
  panel.append(controls, missing, box);
  let byWeight = "place";
  let seen = null; // what is drawn: {query, order, products, scores, weights, ...}

  function offer(T, query) {
    const names = Array.from({ length: T }, (_, i) => [i, `${i}  ${queryToken(one(), state.layer, i)}`]);
    const { extras, scale } = layerOf(state.layer, one());
    controls.replaceChildren(
      choose("Query", names, query, (value) => go({ held: Number(value) })),
      choose("Keys", [["place", "in order"], ["weight", "largest weight first"]], byWeight, (value) => { byWeight = value; go({}); }),
      legend("negative", "positive", tinter(1, true), -1),
      make("span", { class: "note" }, `score = q · k × ${scale.toPrecision(4)}` + (extras.length ? `; the weights also have ${extras.join(", ")}` : "")));
  }

  const draw = latest(async (stale) => {
    const { shape: [, T, S], scored } = layerOf(state.layer, one());
    const query = Math.min(state.held ?? 0, T - 1);
    const held = traces[one()].vectors > rowOf(state.layer) && scored;
    missing.hidden = held;
    box.hidden = !held;
    offer(T, query);
    if (!held) {
      missing.textContent = scored ? "Queries and keys of this input are not on the page: they would have made it too large."
        : "This layer scores no pairs by queries and keys: its weights were measured.";
      return;
    }
    const here = [one(), state.layer];
    const [q, k, map, sees] = await Promise.all([
      vectors(...here, "q", state.head), vectors(...here, "k", state.head), headMap(...here, state.head), sight(...here, state.head)]);
    if (stale()) return;
    seen = { ...compared(q, k, map, query, S), sees: (j) => sees(query, j) };
    canvas.style.position = "sticky";
    canvas.style.top = "0";
    paint();
    panel.dataset.drawn = `${state.layer} ${state.head} ${query}`;
  });

  function compared(q, k, map, query, S) {
    const D = q.width;
    const mine = Float32Array.from({ length: D }, (_, d) => q.levels[query * D + d] * q.scales[query]);
    const keys = new Float32Array(S * D);
    const products = new Float32Array(S * D);
    const scores = new Float32Array(S);
    const weights = new Float32Array(S);
    const { scale } = layerOf(state.layer, one());
    for (let j = 0; j < S; j++) {
      for (let d = 0; d < D; d++) {
        keys[j * D + d] = k.levels[j * D + d] * k.scales[j];
        products[j * D + d] = mine[d] * keys[j * D + d];
        scores[j] += products[j * D + d] * scale;
      }
      weights[j] = map.at(query, j);
    }
    const order = Array.from({ length: S }, (_, j) => j);
    if (byWeight === "weight") order.sort((a, b) => weights[b] - weights[a]);
    const largest = (values) => values.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;
    return { query, D, S, mine, keys, products, scores, weights, order,
      most: { q: largest(mine), k: largest(keys), product: largest(products), score: largest(scores) } };
  }

  function layout() {
    const width = Math.max(640, box.clientWidth - 2);
    const name = 130;
    const strip = (width - name - 330) / 2;
    const first = name + 10;
    const second = first + strip + 20;
    const third = second + strip + 20;
    return { width, name, strip, first, second, score: third, weight: third + 140 };
  }

  function paint() {
    if (!seen || !box.clientWidth) return;
    const at = layout();
    const content = HEAD + seen.S * ROW + 6;
    const height = Math.min(content, Math.min(620, 0.72 * innerHeight));
    box.style.height = height + 2 + "px";
    space.style.height = content - height + "px";
    const brush = fit(canvas, at.width, height);
    const from = Math.floor(box.scrollTop / ROW);
    const shift = box.scrollTop - from * ROW;
    for (let n = from; n < seen.S && HEAD + (n - from) * ROW - shift < height; n++) keyRow(brush, at, seen.order[n], HEAD + (n - from) * ROW - shift);
    brush.fillStyle = colours.page;
    brush.fillRect(0, 0, at.width, HEAD - 2);
    heading(brush, at);
  }

  function heading(brush, at) {
    brush.fillStyle = colours.soft;
    brush.textAlign = "left";
    brush.fillText("q", at.first, 10);
    brush.textAlign = "right";
    brush.fillStyle = colours.ink;
    brush.font = "600 12px system-ui, sans-serif";
    brush.fillText(shortened(brush, queryToken(one(), state.layer, seen.query), at.name - 8), at.name, 26);
    brush.font = "12px system-ui, sans-serif";
    stripe(brush, seen.mine, 0, at.first, 19, at.strip, 14, seen.most.q);
    brush.fillStyle = colours.soft;
    brush.textAlign = "left";
    const names = [["k", at.first], ["q × k", at.second], ["score", at.score], ["weight", at.weight]];
    for (const [text, x] of names) brush.fillText(text, x, 48);
    brush.strokeStyle = colours.line;
    brush.strokeRect(0, HEAD - 3, at.width, 0);
  }

  function keyRow(brush, at, j, y) {
    brush.fillStyle = colours.ink;
    brush.textAlign = "right";
    brush.fillText(shortened(brush, keyToken(one(), state.layer, j), at.name - 8), at.name, y + ROW / 2);
    stripe(brush, seen.keys, j * seen.D, at.first, y + 2, at.strip, ROW - 4, seen.most.k);
    stripe(brush, seen.products, j * seen.D, at.second, y + 2, at.strip, ROW - 4, seen.most.product);
    if (!seen.sees(j)) {
      brush.fillStyle = colours.soft;
      brush.textAlign = "left";
      brush.fillText("masked", at.score, y + ROW / 2);
      return;
    }
    const middle = at.score + 40;
    const part = (40 * seen.scores[j]) / seen.most.score;
    brush.fillStyle = part < 0 ? rgb(colours.less[200]) : rgb(colours.more[200]);
    brush.fillRect(Math.min(middle, middle + part), y + 3, Math.abs(part), ROW - 6);
    brush.fillStyle = colours.link;
    brush.fillRect(at.weight, y + 3, 90 * Math.min(1, Math.abs(seen.weights[j])), ROW - 6);
    brush.fillStyle = colours.soft;
    brush.textAlign = "left";
    brush.fillText(seen.scores[j].toFixed(2), at.score + 88, y + ROW / 2);
    brush.fillText(percent(seen.weights[j]), at.weight + 94, y + ROW / 2);
  }

  function stripe(brush, values, start, x, y, width, height, most) {
    const tint = tinter(most, true);
    const cell = width / seen.D;
    for (let d = 0; d < seen.D; d++) {
      brush.fillStyle = rgb(tint(values[start + d]));
      brush.fillRect(x + d * cell, y, Math.max(1, cell - (cell > 4 ? 0.5 : 0)), height);
    }
    brush.strokeStyle = colours.line;
    brush.strokeRect(x - 0.5, y - 0.5, width + 1, height + 1);
  }

  canvas.addEventListener("mousemove", (event) => {
    if (!seen) return;
    const area = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - area.left, event.clientY - area.top];
    const j = seen.order[Math.floor((y - HEAD + box.scrollTop) / ROW)];
    const at = layout();
    if (y < HEAD || j === undefined) { hideTip(); return; }
    const near = [at.first, at.second].map((start) => Math.floor(((x - start) / at.strip) * seen.D)).find((d) => d >= 0 && d < seen.D);
    const words = [`key ${j}: ${keyToken(one(), state.layer, j)}`];
    if (near !== undefined) {
      const place = j * seen.D + near;
      words.push(`number ${near}: q ${seen.mine[near].toFixed(3)} × k ${seen.keys[place].toFixed(3)} = ${seen.products[place].toFixed(3)}`);
    }
    showTip(event, [...words, seen.sees(j) ? `score ${seen.scores[j].toFixed(3)}, weight ${percent(seen.weights[j])}` : "masked"].join("\n"));
  });
  canvas.addEventListener("mouseleave", hideTip);
  box.addEventListener("scroll", paint);

  return { title: "Neurons", panel, draw, usesHead: true, usesShown: true };
})());
