"use strict";
// Colours and pixels. Shades follow the root of the size, so that weights of a few percent are seen.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const hex = (text) => [1, 3, 5].map((n) => parseInt(text.slice(n, n + 2), 16));
const mix = (a, b, part) => a.map((x, n) => Math.round(x + (b[n] - x) * part));
let colours = {};

function readColours() {
  const stops = ["--ramp-0", "--ramp-1", "--ramp-2"].map((name) => hex(css(name)));
  const [none, more, less] = ["--none", "--more", "--less"].map((name) => hex(css(name)));
  const shade = (n) => (n < 128 ? mix(stops[0], stops[1], n / 128) : mix(stops[1], stops[2], (n - 128) / 127));
  colours = {
    ramp: Array.from({ length: 256 }, (_, n) => shade(n)),
    more: Array.from({ length: 256 }, (_, n) => mix(none, more, n / 255)),
    less: Array.from({ length: 256 }, (_, n) => mix(none, less, n / 255)),
    heads: Array.from({ length: 8 }, (_, n) => css("--c" + n)),
    ink: css("--ink"), soft: css("--soft"), line: css("--line"), page: css("--page"), panel: css("--panel"),
    link: css("--link"), warn: css("--warn"),
  };
}

const clip = (x) => Math.max(0, Math.min(255, Math.round(x)));
const rgb = (colour) => `rgb(${colour[0]} ${colour[1]} ${colour[2]})`;

// Weight -> [r, g, b]. Below zero, and where traces are compared, two hues; where a weight is no number, the warning's.
function tinter(largest = 1, signed = false) {
  const warn = hex(colours.warn);
  return (w) => {
    if (Number.isNaN(w)) return warn;
    const n = clip(255 * Math.sqrt(Math.abs(w) / (largest || 1)));
    if (!signed) return w < 0 ? colours.more[n] : colours.ramp[n];
    return w < 0 ? colours.less[n] : colours.more[n];
  };
}

// Sizes a canvas to the screen's own pixels; drawing goes on in CSS pixels.
function fit(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  const brush = canvas.getContext("2d");
  brush.setTransform(ratio, 0, 0, ratio, 0, 0);
  brush.font = "12px system-ui, sans-serif";
  brush.textBaseline = "middle";
  return brush;
}

// A picture of a map with at most width x height points; one that covers several weights shows the largest.
function heat(map, width, height, tint, rowwise = false) {
  const [W, H] = [Math.min(map.S, Math.max(1, Math.round(width))), Math.min(map.T, Math.max(1, Math.round(height)))];
  const most = new Float32Array(W * H);
  for (let i = 0; i < map.T; i++) {
    const y = Math.floor((i * H) / map.T) * W;
    const scale = rowwise ? 1 / (map.sizes[i] || 1) : 1;
    for (let j = 0; j < map.S; j++) {
      const n = y + Math.floor((j * W) / map.S);
      const w = map.at(i, j) * scale;
      if (!Number.isNaN(most[n]) && !(Math.abs(w) <= Math.abs(most[n]))) most[n] = w;
    }
  }
  return painted(most, W, H, tint);
}

function painted(values, W, H, tint) {
  const canvas = make("canvas", { width: W, height: H });
  const brush = canvas.getContext("2d");
  const image = brush.createImageData(W, H);
  for (let n = 0; n < values.length; n++) {
    const colour = tint(values[n]);
    image.data.set(colour, 4 * n);
    image.data[4 * n + 3] = 255;
  }
  brush.putImageData(image, 0, 0);
  return canvas;
}

function shortened(brush, text, width) {
  if (brush.measureText(text).width <= width) return text;
  let count = text.length;
  while (count > 1 && brush.measureText(text.slice(0, count) + "…").width > width) count -= 1;
  return text.slice(0, count) + "…";
}

// The scale of shades, with words at its ends.
function legend(low, high, tint, from = 0) {
  const steps = Float32Array.from({ length: 96 }, (_, n) => {
    const part = from + ((1 - from) * n) / 95;
    return Math.sign(part) * part * part; // even steps of shade
  });
  const strip = painted(steps, 96, 1, tint);
  return make("span", { class: "legend" }, low, strip, high);
}
