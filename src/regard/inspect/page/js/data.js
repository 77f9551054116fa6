"use strict";
// Unpacks the page's chunks when they are first asked for. A map holds levels: weight = size of its row x (level / top)^2.

const unpacked = new Map(); // chunk name -> promise; the oldest are dropped
const KEPT = 96;

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const out = new Uint8Array(binary.length);
  for (let n = 0; n < binary.length; n++) out[n] = binary.charCodeAt(n);
  return out;
}

async function bytes(name) {
  const stream = new Blob([fromBase64(byId(name).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function remembered(name, unpack) {
  let found = unpacked.get(name);
  if (found) unpacked.delete(name); // to be the youngest again
  else found = bytes(name).then(unpack);
  unpacked.set(name, found);
  if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
  return found;
}

class WeightMap {
  constructor(raw, T, S, top, signed) {
    [this.T, this.S] = [T, S];
    this.sizes = new Float32Array(raw.buffer, 0, T);
    this.scale = signed ? 127 : 255;
    const Levels = signed ? Int8Array : Uint8Array;
    if (top === null || top >= S) {
      this.levels = new Levels(raw.buffer, 4 * T, T * S);
      return;
    }
    const places = new Uint16Array(raw.buffer, 4 * T, T * top);
    const kept = new Levels(raw.buffer, 4 * T + 2 * T * top, T * top);
    this.levels = new Levels(T * S);
    for (let n = 0; n < places.length; n++) this.levels[Math.floor(n / top) * S + places[n]] = kept[n];
  }

  at(i, j) {
    const part = this.levels[i * this.S + j] / this.scale;
    return this.sizes[i] * part * Math.abs(part);
  }
}

class Difference {
  constructor(first, second) {
    [this.T, this.S, this.first, this.second] = [first.T, first.S, first, second];
    this.largest = 0;
    for (let i = 0; i < this.T; i++) {
      for (let j = 0; j < this.S; j++) this.largest = Math.max(this.largest, Math.abs(this.at(i, j)) || 0);
    }
  }

  at(i, j) { return this.second.at(i, j) - this.first.at(i, j); }
}

const key = (trace) => "ab"[trace];

function headMap(trace, layer, head, row = rowOf(layer, trace)) {
  const { shape, signed } = layerOf(layer, trace);
  const unpack = (raw) => new WeightMap(raw, shape[1], shape[2], traces[trace].top, signed[head]);
  return remembered(`${key(trace)}-${layer}-${head}-${row}`, unpack);
}

function paintMap(trace, number) {
  const { layer, signed } = traces[trace].paint[number];
  const [, T, S] = layerOf(layer, trace).shape;
  const unpack = (raw) => new WeightMap(raw, T, S, traces[trace].top, signed);
  return remembered(`${key(trace)}-paint-${number}-${rowOf(layer, trace)}`, unpack);
}

const thumbs = (trace, layer) => remembered(`${key(trace)}-${layer}-thumbs-${rowOf(layer, trace)}`, (raw) => raw);

// (query, key) -> may the query see the key?
async function sight(trace, layer, head) {
  const { mask, shape: [, T, S] } = layerOf(layer, trace);
  if (mask === null) return () => true;
  const raw = await remembered(mask.chunks[rowOf(layer, trace)], (x) => x);
  const start = (mask.heads > 1 ? head : 0) * T * S;
  return (i, j) => Boolean((raw[(start + i * S + j) >> 3] >> ((start + i * S + j) & 7)) & 1);
}

// Vectors in eight bits a number with a scale each: vector n is scale[n] * level[n].
function vectors(trace, layer, name, head) {
  const { shape, keyHeads } = layerOf(layer, trace);
  const [H, T, S] = shape;
  const which = name === "k" ? Math.floor(head / (H / keyHeads)) : head;
  const count = name === "k" ? S : T;
  return remembered(`${key(trace)}-${layer}-${name}-${which}-${rowOf(layer, trace)}`, (raw) => {
    const levels = new Int8Array(raw.buffer, 4 * count);
    return { scales: new Float32Array(raw.buffer, 0, count), levels, width: levels.length / count };
  });
}

const points = (trace, layer, plane, head) =>
  remembered(`${key(trace)}-${layer}-${plane}-${head}`, (raw) => new Uint16Array(raw.buffer));

const picturePixels = (trace) => remembered(`${key(trace)}-picture-${state.row}`, (raw) => raw);
