// Draws the plots of the page. Mechanism names are plain text everywhere: plotly's own mark-up is escaped in `plain`.
(() => {
  "use strict";
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const root = document.documentElement;
  const hidden = new Set();
  const PRINT_WIDTH = 660;
  const MARGIN = { l: 62, r: 14, t: 12, b: 52 };
  const plain = (s) => s.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const brush = document.createElement("canvas").getContext("2d");
  brush.font = "12px system-ui, sans-serif";

  const axis = (a) => ({
    title: { text: a.title, standoff: 8 }, type: a.type, range: a.range, tickvals: a.tickvals, ticktext: a.ticktext,
    gridcolor: colour("--line"), linecolor: colour("--soft"), zeroline: false, showline: true, ticks: "outside",
    tickcolor: colour("--line"), nticks: 7, tickformat: a.tickformat, exponentformat: "SI", minexponent: 5,
  });

  // Gives every point the first of eight label places that hits no point, label, line or edge; the
  // best points choose first, and a point without a free place keeps its hover text only.
  function placeLabels(plot, points, width, height) {
    const inner = { x: width - MARGIN.l - MARGIN.r, y: height - MARGIN.t - MARGIN.b };
    const scale = (v, a) => ((a.type === "log" ? Math.log10(v) : v) - a.range[0]) / (a.range[1] - a.range[0]);
    const pixel = (x, y) => [scale(x, plot.x) * inner.x, (1 - scale(y, plot.y)) * inner.y];
    const at = points.map((p) => pixel(p.x, p.y));
    const taken = at.map(([x, y]) => [x - 5, y - 5, x + 5, y + 5]);
    const corners = (plot.front ? plot.front.x : []).map((x, k) => pixel(x, plot.front.y[k]));
    for (let k = 1; k < corners.length; k++) {
      const [[x, y], [u, v]] = [corners[k - 1], corners[k]]; // right, then down or up, as the line is drawn
      taken.push([x, y - 0.5, u, y + 0.5], [u - 0.5, Math.min(y, v), u + 0.5, Math.max(y, v)]);
    }
    for (const p of points) {
      const [x, top] = pixel(p.x, p.y + p.spread), low = p.y - p.spread;
      taken.push([x - 3, top, x + 3, plot.y.type === "log" && low <= 0 ? inner.y : pixel(p.x, low)[1]]);
    }
    const hit = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
    const order = points.map((_, i) => i).sort((a, b) => points[b].front - points[a].front);
    const places = [
      "middle right", "middle left", "top center", "bottom center", "top right", "top left", "bottom right", "bottom left",
    ];
    const chosen = points.map(() => null);
    for (const i of order) {
      const w = brush.measureText(points[i].label).width + 6, h = 14, [x, y] = at[i];
      for (const place of places) {
        const [v, u] = place.split(" ");
        const left = u === "right" ? x + 6 : u === "left" ? x - w - 6 : x - w / 2;
        const top = v === "top" ? y - h - 6 : v === "bottom" ? y + 6 : y - h / 2;
        const box = [left, top, left + w, top + h];
        if (left < 0 || box[2] > inner.x || top < 0 || box[3] > inner.y || taken.some((t, j) => j !== i && hit(box, t))) continue;
        taken.push(box);
        chosen[i] = place;
        break;
      }
    }
    return chosen;
  }

  function draw(plot) {
    const div = document.getElementById(plot.id);
    const printing = root.classList.contains("printing");
    const width = printing ? PRINT_WIDTH : Math.max(240, div.clientWidth);
    const height = printing || width < 520 ? 340 : plot.height;
    const shown = plot.series.filter((s) => !hidden.has(s.mechanism));
    const point = (s) => ({ x: s.x[0], y: s.y[0], label: s.label, front: s.front, spread: s.spread ? s.spread[0] : 0 });
    const points = plot.labels ? shown.map(point) : [];
    const places = placeLabels(plot, points, width, height);
    const missing = document.getElementById(plot.id + "-unlabelled");
    if (missing) missing.hidden = places.every((p) => p !== null);
    const traces = shown.map((s, k) => {
      const ink = colour("--c" + s.colour);
      const text = plot.labels && places[k] ? [plain(s.label)] : undefined;
      return {
        type: "scatter", x: s.x, y: s.y, name: plain(s.name), connectgaps: false,
        opacity: s.faint ? (plot.series.length > 40 ? 0.15 : 0.28) : 1,
        mode: s.faint ? "lines" : plot.labels ? (text ? "markers+text" : "markers") : "lines+markers",
        line: { color: ink, width: s.faint ? 1 : 2, dash: s.faint ? "solid" : s.dash },
        marker: { color: ink, symbol: s.marker, size: plot.labels ? 10 : 7, maxdisplayed: plot.labels ? 0 : 9 },
        error_y: s.spread ? { type: "data", array: s.spread, color: ink, thickness: 1, width: 3 } : undefined,
        text, textposition: places[k] || undefined, textfont: { size: 12, color: colour("--ink") }, cliponaxis: !plot.labels,
        hoverinfo: s.faint ? "skip" : undefined,
        hovertemplate: s.faint ? undefined : plot.hover + "<extra>%{fullData.name}</extra>",
      };
    });
    if (plot.front && plot.front.x.length > 1) {
      traces.unshift({
        type: "scatter", mode: "lines", x: plot.front.x, y: plot.front.y, hoverinfo: "skip",
        line: { shape: "hv", dash: "dot", width: 1.5, color: colour("--soft") },
      });
    }
    const layout = {
      width, height, margin: MARGIN, showlegend: false, hovermode: "closest", xaxis: axis(plot.x), yaxis: axis(plot.y),
      dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: colour("--ink") },
      hoverlabel: { namelength: -1, bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    };
    div.style.minHeight = height + "px";
    Plotly.react(div, traces, layout, { displayModeBar: false });
  }

  const drawAll = () => plots.forEach(draw);
  let waiting = 0, drawnWidth = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === drawnWidth) return; // a phone's address bar changes the height only
    drawnWidth = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 120);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { root.classList.add("printing"); drawAll(); });
  addEventListener("afterprint", () => { root.classList.remove("printing"); drawAll(); });
  for (const button of document.querySelectorAll(".key button")) {
    button.addEventListener("click", () => {
      const id = Number(button.dataset.mechanism);
      if (!hidden.delete(id)) hidden.add(id);
      for (const twin of document.querySelectorAll(`.key button[data-mechanism="${id}"]`)) {
        twin.setAttribute("aria-pressed", String(!hidden.has(id)));
      }
      drawAll();
    });
  }
  drawAll();
})();
