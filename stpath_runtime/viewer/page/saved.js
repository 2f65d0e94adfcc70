// The numbers of a prediction, from this page itself: what stpath_runtime/viewer/saved.py wrote into it.

import { csv } from "./files.js";

const text = (name) => document.getElementById(`data-${name}`)?.textContent ?? "";

function bytes(name) {
  const raw = atob(text(name));
  const found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found;
}

// float16 to float32, by a table of all 65,536.
const halves = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits++) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const size = exponent === 0 ? fraction * 2 ** -24 : exponent === 31 ? NaN : (1 + fraction / 1024) * 2 ** (exponent - 15);
  halves[bits] = bits & 32768 ? -size : size;
}
const fromHalf = (raw) => Float32Array.from(new Uint16Array(raw.buffer), (bits) => halves[bits]);
const floats = (name) => new Float32Array(bytes(name).buffer);

const info = JSON.parse(text("info"));
const names = JSON.parse(text("names")); // of each gene: to show, Ensembl id, aliases
const spotNames = JSON.parse(text("spots"));
const offset = info.spot.offset;
const coords = floats("coords").map((n) => n + offset);
const embedding = fromHalf(bytes("embedding")); // [N, d]
const offsets = floats("offsets"), squares = floats("squares"), products = floats("products"), jpeg = bytes("tissue");
const scale = info.weights === "int8" ? floats("scale") : null;
const weights = info.weights === "int8" ? new Int8Array(bytes("weights").buffer) : fromHalf(bytes("weights")); // [G, d]
const spots = coords.length / 2, genes = names.length, d = weights.length / genes;
const positions = new Map();
names.forEach((all, i) => all.forEach((name, j) => { if (j < 2 || !positions.has(name)) positions.set(name, i); }));
const found = names.flatMap((all, i) => all.map((name) => [name, name.toLowerCase(), i]));
let regions = {};

function position(name) {
  if (!positions.has(name)) throw new Error(`This page holds no gene '${name}'.`);
  return positions.get(name);
}

function weightsOf(gene) {
  const row = Float64Array.from(weights.subarray(gene * d, (gene + 1) * d));
  if (scale) for (let i = 0; i < d; i++) row[i] *= scale[gene];
  return row;
}

function dot(row, vector, at = 0) {
  let sum = 0;
  for (let i = 0; i < d; i++) sum += row[i] * vector[at + i];
  return sum;
}

function within(polygon) {
  const inside = [];
  for (let s = 0; s < spots; s++) {
    const x = coords[2 * s], y = coords[2 * s + 1];
    let odd = false;
    polygon.forEach(([x1, y1], i) => {
      const [x0, y0] = polygon[(i || polygon.length) - 1];
      if ((y0 > y) !== (y1 > y) && x < x0 + ((y - y0) * (x1 - x0)) / (y1 - y0)) odd = !odd;
    });
    if (odd) inside.push(s);
  }
  return inside;
}

function mean(members) {
  const sum = new Float64Array(d);
  for (const s of members) for (let i = 0; i < d; i++) sum[i] += embedding[s * d + i];
  return sum.map((n) => n / members.length);
}

// Sum of products about the mean, [d, d].
function scatter(members, middle) {
  const sum = new Float64Array(d * d), row = new Float64Array(d);
  for (const s of members) {
    for (let i = 0; i < d; i++) row[i] = embedding[s * d + i] - middle[i];
    for (let i = 0; i < d; i++) for (let j = 0; j <= i; j++) sum[i * d + j] += row[i] * row[j];
  }
  for (let i = 0; i < d; i++) for (let j = 0; j < i; j++) sum[j * d + i] = sum[i * d + j];
  return sum;
}

function quadratic(row, matrix) {
  let sum = 0;
  for (let i = 0; i < d; i++) sum += row[i] * dot(row, matrix, i * d);
  return sum;
}

// Genes inside against others. Against the rest, squares within are those about the slide's mean less those between;
// against another region they are computed, of the genes that differ most for how much they vary over the slide.
function contrast(inside, others, rest) {
  const means = [mean(inside), mean(others)];
  const rows = names.map(([name], gene) => {
    const row = weightsOf(gene);
    const [a, b] = means.map((each) => dot(row, each) + offsets[gene]);
    return { gene, name, inside: a, against: b, difference: dot(row, means[0].map((n, i) => n - means[1][i])), effect: null };
  });
  const [m, n] = [inside.length, others.length];
  const degrees = m + n - 2;
  let listed = rows;
  let within = (row) => squares[row.gene] - ((m * n) / (m + n)) * row.difference ** 2;
  if (!rest) {
    const size = (row) => (squares[row.gene] > 0 ? row.difference ** 2 / squares[row.gene] : -1);
    listed = [...rows].sort((one, other) => size(other) - size(one)).slice(0, 1000);
    const pooled = scatter(inside, means[0]);
    scatter(others, means[1]).forEach((value, i) => { pooled[i] += value; });
    within = (row) => quadratic(weightsOf(row.gene), pooled);
  }
  for (const row of listed) {
    const deviation = Math.sqrt(within(row) / degrees);
    if (degrees > 0 && deviation > 0) row.effect = row.difference / deviation;
  }
  return listed.sort((one, other) => Math.abs(other.effect ?? -1) - Math.abs(one.effect ?? -1)).slice(0, 50);
}

function gene(name) {
  const at = position(name), row = weightsOf(at);
  return Float32Array.from({ length: spots }, (_, s) => dot(row, embedding, s * d) + offsets[at]);
}

globalThis.stpathSource = {
  info: async () => info,
  spots: async () => coords,
  spot: async (i) => spotNames[i],
  gene: async (name) => gene(name),
  search: async (wanted, limit) => {
    const lower = wanted.toLowerCase();
    const begin = found.filter(([, folded]) => folded.startsWith(lower));
    const hold = begin.length < limit ? found.filter(([, folded]) => folded.includes(lower) && !folded.startsWith(lower)) : [];
    return [...begin, ...hold].slice(0, limit).map(([name]) => name);
  },
  region: async ({ polygon, against }) => {
    const inside = within(polygon), is = new Set(inside);
    const others = against ? within(against.polygon) : Array.from({ length: spots }, (_, s) => s).filter((s) => !is.has(s));
    if (!inside.length || !others.length) throw new Error("No spot is inside, or none is left to hold the region against.");
    return { spots: inside.length, against: others.length, genes: contrast(inside, others, !against) };
  },
  alike: async (name, top) => {
    const own = position(name), row = weightsOf(own), product = new Float64Array(d);
    for (let i = 0; i < d; i++) product[i] = dot(row, products, i * d);
    const rows = names.map(([each], i) => ({ name: each, r: dot(weightsOf(i), product) / Math.sqrt(squares[i] * squares[own]) }));
    return rows.filter((each, i) => i !== own && Number.isFinite(each.r)).sort((one, other) => other.r - one.r).slice(0, top);
  },
  keepRegions: async (asked) => {
    regions = Object.fromEntries(Object.entries(asked).map(([name, polygon]) => [name, new Set(within(polygon))]));
    return Object.fromEntries(Object.entries(regions).map(([name, members]) => [name, members.size]));
  },
  tile: async () => new Blob([jpeg], { type: "image/jpeg" }),
  table: async (shown) => {
    const values = shown.map(gene);
    const lines = Array.from({ length: spots }, (_, s) => {
      const inside = Object.keys(regions).filter((name) => regions[name].has(s)).join("; ");
      return [spotNames[s], coords[2 * s] - offset, coords[2 * s + 1] - offset, ...values.map((each) => Number(each[s].toPrecision(6))), inside];
    });
    return csv([["spot", "x", "y", ...shown, "region"], ...lines]);
  },
};
