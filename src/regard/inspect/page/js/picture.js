"use strict";
// Maps over the picture: what one patch, or an extra token such as [CLS], sees, in the chosen head and in all of its layer.

if (traces[0].picture) {
  views.set("picture", (() => {
    const panel = make("section");
    const controls = make("div", { class: "controls" });
    const { size: [Y, X], grid: [rows, columns], extra, lost } = traces[0].picture;
    const large = tracesShown().map((t) => ({ trace: t, canvas: make("canvas", { class: "drawing", role: "img", "aria-label": "the picture" }) }));
    const left = make("div", { class: "panels" }, ...large.map(({ trace, canvas }) => make("div", {}, make("h3", {}, paired ? traces[trace].name : ""), canvas)));
    left.style.gridTemplateColumns = paired ? "1fr 1fr" : "1fr";
    const heads = make("div", { class: "heads" });
    const right = make("div", {}, make("h3", {}, "All heads of the layer"), heads);
    const both = make("div", { class: "panels" }, left, right);
    both.style.gridTemplateColumns = paired ? "1fr" : "minmax(0, 5fr) minmax(0, 6fr)";
    panel.append(controls, both);
    let source = "head";
    let background = null;
    let shown = [];

    function offer(query) {
      const sources = [["head", "weights of the chosen head"], ...traces[0].paint.map((p, n) => [n, p.name])];
      const extras = Array.from({ length: extra }, (_, n) => make("button", {
        type: "button", "aria-pressed": String(query === n), click: () => go({ held: n }),
      }, queryToken(0, state.layer, n)));
      controls.replaceChildren(choose("Paint", sources, source, (value) => { source = value; go({}); }),
        make("span", { class: "note" }, "What is seen by"), ...extras,
        make("span", { class: "note" }, "or by a patch: click on it. The patch that is read most is the brightest."),
        make("span", { class: "note warn" }, lost ? `${lost} pixels of the pictures are no numbers, and drawn in magenta.` : ""));
    }

    // The picture under a dark veil, which is lifted from a patch as far as the query reads it.
    function cover(canvas, width, map, query) {
      const height = (width * Y) / X;
      const brush = fit(canvas, width, height);
      const values = Array.from({ length: rows * columns }, (_, n) => Math.abs(map.at(query, extra + n)));
      const largest = Math.max(...values.filter((value) => !Number.isNaN(value)), 0) || 1;
      brush.drawImage(background, 0, 0, width, height);
      const veil = make("canvas", { width: columns, height: rows });
      const pixels = veil.getContext("2d").createImageData(columns, rows);
      values.forEach((value, n) => {
        pixels.data.set(Number.isNaN(value) ? [...hex(colours.warn), 190] : [8, 10, 16, 190 * (1 - value / largest)], 4 * n);
      });
      veil.getContext("2d").putImageData(pixels, 0, 0);
      brush.imageSmoothingEnabled = false;
      brush.drawImage(veil, 0, 0, width, height);
      const [w, h] = [width / columns, height / rows];
      if (query >= extra) {
        const n = query - extra;
        brush.strokeStyle = "#ffffff";
        brush.lineWidth = width > 200 ? 3 : 1.5;
        brush.strokeRect((n % columns) * w, Math.floor(n / columns) * h, w, h);
        brush.strokeStyle = "#0b5cad";
        brush.lineWidth = 1;
        brush.strokeRect((n % columns) * w, Math.floor(n / columns) * h, w, h);
      }
    }

    const draw = latest(async (stale) => {
      const { shape: [H, T, S] } = layerOf();
      if (S !== extra + rows * columns || T !== S) {
        controls.replaceChildren(make("p", { class: "note" }, "This layer does not attend over the picture's patches."));
        return;
      }
      const query = Math.min(state.held ?? 0, T - 1);
      offer(query);
      const get = (t, h) => (source === "head" ? headMap(t, state.layer, h) : paintMap(t, Number(source)));
      const [pixels, ...maps] = await Promise.all([picturePixels(0), ...tracesShown().map((t) => get(t, state.head))]);
      const all = await Promise.all(Array.from({ length: H }, (_, h) => headMap(one(), state.layer, h)));
      if (stale()) return;
      background = ground(pixels);
      shown = maps;
      large.forEach(({ canvas }, n) => cover(canvas, Math.min(560, canvas.parentElement.clientWidth), maps[n], query));
      heads.replaceChildren(...all.map((map, h) => {
        const small = make("canvas");
        cover(small, 110, map, query);
        [small.style.width, small.style.height] = ["100%", "auto"];
        return make("button", { type: "button", "aria-pressed": String(h === state.head), click: () => go({ head: h }) }, small, headName(state.layer, h));
      }));
      panel.dataset.drawn = `${state.layer} ${state.head} ${query}`;
    });

    function ground(pixels) {
      const canvas = make("canvas", { width: X, height: Y });
      const brush = canvas.getContext("2d");
      const image = brush.createImageData(X, Y);
      for (let n = 0; n < X * Y; n++) {
        for (let c = 0; c < 3; c++) image.data[4 * n + c] = pixels[3 * n + c];
        image.data[4 * n + 3] = 255;
      }
      brush.putImageData(image, 0, 0);
      return canvas;
    }

    function patch(canvas, event) {
      const box = canvas.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width) * columns);
      const y = Math.floor(((event.clientY - box.top) / box.height) * rows);
      return x >= 0 && y >= 0 && x < columns && y < rows ? extra + y * columns + x : null;
    }

    large.forEach(({ canvas }, n) => {
      canvas.addEventListener("click", (event) => { const at = patch(canvas, event); if (at !== null) go({ held: at }); });
      canvas.addEventListener("mouseleave", hideTip);
      canvas.addEventListener("mousemove", (event) => {
        const at = patch(canvas, event);
        const query = state.held ?? 0;
        if (at === null || !shown[n]) hideTip();
        else showTip(event, `${keyToken(0, state.layer, at)}\n${percent(shown[n].at(query, at))} of what ${queryToken(0, state.layer, query)} reads`);
      });
    });

    return { title: "On the picture", panel, draw, usesHead: true };
  })());
}
