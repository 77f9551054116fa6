"use strict";
// A map painted on the text: what a token is made of (a row), or where it goes to (a column).

if (!traces[0].picture) {
  views.set("text", (() => {
    const panel = make("section");
    const controls = make("div", { class: "controls" });
    const blocks = tracesShown().map((t) => ({ trace: t, words: make("div", { class: "words" }) }));
    const note = make("p", { class: "note" });
    panel.append(controls, note);
    for (const { trace, words } of blocks) panel.append(...(paired ? [make("h3", {}, traces[trace].name)] : []), words);
    let source = traces[0].paint.length ? "0" : "head";
    let direction = "row";
    let maps = [];

    const layerShown = () => (source === "head" ? state.layer : traces[0].paint[Number(source)].layer);

    function offer() {
      const sources = [...traces[0].paint.map((p, n) => [n, p.name]), ["head", "weights of the chosen head"]];
      const ways = [["row", "where the chosen token has it from"], ["column", "who takes from the chosen token"]];
      controls.replaceChildren(
        choose("Paint", sources, source, (value) => { source = value; go({}); }),
        choose("Show", ways, direction, (value) => { direction = value; go({}); }),
        make("button", { type: "button", click: () => go({ held: null }) }, "Average over all tokens"));
    }

    const draw = latest(async (stale) => {
      offer();
      maps = await Promise.all(blocks.map(({ trace }) =>
        source === "head" ? headMap(trace, state.layer, state.head) : paintMap(trace, Number(source))));
      if (stale()) return;
      const layer = layerShown();
      const { T, S } = maps[0];
      const along = direction === "row";
      const held = state.held === null ? null : Math.min(state.held, (along ? T : S) - 1);
      blocks.forEach(({ trace, words }, n) => fill(words, trace, layer, maps[n], held, along));
      const lost = Math.max(...maps.map((map) => map.sizes.reduce((sum, size) => sum + Number.isNaN(size), 0)));
      const same = layerOf(layer).queries === layerOf(layer).keys;
      note.textContent = held === null ? "Click a token to see its own map. Until then, the average over all tokens is shown."
          + (lost ? ` It leaves out ${lost} of the queries, whose weights are no numbers.` : "")
        : `${along ? "Query" : "Key"} ${held} “${(along ? queryToken : keyToken)(0, layer, held)}”. Shades reach up to the largest value.`
          + (same ? "" : " The text shown is the other stack's; j and k choose the next token.");
      panel.dataset.drawn = `${source} ${direction} ${held}`;
    });

    function fill(words, trace, layer, map, held, along) {
      const count = along ? map.S : map.T;
      const value = (n) => {
        if (held !== null) return along ? map.at(held, n) : map.at(n, held);
        let [sum, seen] = [0, 0];
        for (let m = 0; m < (along ? map.T : map.S); m++) {
          const w = along ? map.at(m, n) : map.at(n, m);
          if (!Number.isNaN(w)) { sum += w; seen += 1; }
        }
        return seen ? sum / seen : NaN;
      };
      const values = Array.from({ length: count }, (_, n) => value(n));
      const largest = Math.max(...values.map((w) => Math.abs(w) || 0)) || 1;
      const own = layerOf(layer).queries === layerOf(layer).keys;
      words.replaceChildren(...values.flatMap((w, n) => {
        const text = (along ? keyToken : queryToken)(trace, layer, n);
        const part = Number.isNaN(w) ? 1 : Math.abs(w) / largest || 0;
        const word = make("span", {
          class: "word" + (own && n === held ? " held" : ""), "data-place": n, "data-value": w,
          mousemove: (event) => showTip(event, `${n}: ${text}\n${percent(w)}`), mouseleave: hideTip,
          click: () => go({ held: state.held === n ? null : n }),
        }, text);
        word.style.background = `color-mix(in srgb, ${w < 0 || Number.isNaN(w) ? colours.warn : colours.link} ${Math.round(70 * Math.sqrt(part))}%, transparent)`;
        return [word, " "];
      }));
    }

    return { title: "On the text", panel, draw, get usesHead() { return source === "head"; } };
  })());
}
