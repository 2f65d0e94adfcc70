// The page: which genes are shown in which colours, its controls, and what the address holds. The numbers come from
// `source`: the server that sent the page or, in a saved page, the page itself.

import { names as rampNames, ramp } from "./colours.js";
import { save } from "./files.js";
import { completion } from "./search.js";
import { Stage } from "./stage.js";
import { by, guarded, say, state } from "./state.js";
import { tables } from "./tables.js";

const source = globalThis.stpathSource ?? (await import("./server.js")).server;
const draw = () => stage.draw();
let stage, lists;

// ---- Genes and their colours

let asked = 0;
const showGenes = guarded(async (names) => {
  const turn = ++asked;
  const wanted = names.filter(Boolean);
  const values = await Promise.all(wanted.map((name) => (
    state.genes.includes(name) ? state.values[state.genes.indexOf(name)] : source.gene(name))));
  if (turn !== asked) return; // a later one was asked for meanwhile
  Object.assign(state, { genes: wanted, values });
  if (state.hand === null || wanted.length > 1) setRanges();
  ["gene", "second"].forEach((id, i) => {
    if (document.activeElement !== by(id)) by(id).value = wanted[i] ?? ""; // else it is being typed in
  });
  by("pair").hidden = wanted.length < 2;
  stage.spots.setValues(values[0], values[1]);
  stage.refit();
  lists.showAlike(wanted[0]);
  return true;
});

// The lowest and the highest value that colours tell apart: percentiles, of at most 100,000 spots.
function range(values) {
  if (state.percent === 0) {
    let low = Infinity, high = -Infinity;
    for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
    return [low, high];
  }
  const sample = new Float32Array(Math.min(values.length, 100000));
  const step = values.length / sample.length;
  for (let i = 0; i < sample.length; i++) sample[i] = values[Math.floor(i * step)];
  sample.sort();
  const at = (share) => sample[Math.min(sample.length - 1, Math.floor(share * sample.length))];
  return [at(state.percent / 100), at(1 - state.percent / 100)];
}

function setRanges() {
  state.hand = null;
  state.ranges = state.values.map(range);
  showRange();
}

function showRange() {
  const first = state.ranges[0] ?? [0, 1];
  by("low").value = first[0].toPrecision(4);
  by("high").value = first[1].toPrecision(4);
}

function setRamp(name) {
  state.ramp = name;
  const bytes = ramp(name);
  stage.spots.setRamp(bytes);
  by("ramp").getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(bytes), 256, 1), 0, 0);
  draw();
}

// ---- Controls

function wireColours() {
  by("map-of-colours").replaceChildren(...rampNames.map((name) => new Option(name, name)));
  by("map-of-colours").value = state.ramp;
  by("map-of-colours").addEventListener("change", (event) => setRamp(event.target.value));
  setRamp(state.ramp);
  by("percent").value = state.hand ? "hand" : String(state.percent);
  by("percent").addEventListener("change", (event) => {
    if (event.target.value === "hand") { state.hand = state.ranges[0]; return; }
    state.percent = Number(event.target.value);
    setRanges();
    draw();
  });
  for (const id of ["low", "high"]) by(id).addEventListener("change", () => {
    state.hand = state.ranges[0] = [Number(by("low").value), Number(by("high").value)];
    by("percent").value = "hand";
    draw();
  });
  by("opacity").addEventListener("input", (event) => { state.opacity = event.target.value / 100; draw(); });
  by("measured").addEventListener("change", (event) => { state.marks = event.target.checked; draw(); });
}

function wireButtons() {
  for (const button of document.querySelectorAll("[data-pair]")) button.addEventListener("click", () => {
    state.mode = button.dataset.pair;
    showPair();
    stage.refit();
  });
  by("lasso").addEventListener("click", () => stage.startDrawing("lasso"));
  by("box").addEventListener("click", () => stage.startDrawing("box"));
  by("fit").addEventListener("click", () => stage.fit());
  by("theme").addEventListener("click", () => setDark(!state.dark));
  by("picture").addEventListener("click", () => stage.savePicture());
  by("link").addEventListener("click", guarded(() => navigator.clipboard.writeText(location.href)));
  by("table").addEventListener("click", guarded(async () => save(await source.table(state.genes), "spots.csv")));
}

function wireKeys() {
  const keys = {
    "/": () => by("gene").focus(), l: () => stage.startDrawing("lasso"), r: () => stage.startDrawing("box"), Escape: () => stage.stopDrawing(),
    f: () => stage.fit(), p: () => stage.savePicture(), d: () => setDark(!state.dark), "+": () => stage.zoom(1.25), "-": () => stage.zoom(1 / 1.25),
    ArrowLeft: () => stage.move(-60, 0), ArrowRight: () => stage.move(60, 0), ArrowUp: () => stage.move(0, -60), ArrowDown: () => stage.move(0, 60),
  };
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const work = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (work) { event.preventDefault(); work(); }
  });
}

function wireSearch() {
  const find = (text) => source.search(text, 12);
  completion(by("gene"), { find, take: (name) => showGenes([name, state.genes[1]]), clear: () => {} });
  completion(by("second"), { find, take: (name) => showGenes([state.genes[0], name]), clear: () => showGenes(state.genes.slice(0, 1)) });
}

function showPair() {
  for (const button of document.querySelectorAll("[data-pair]")) button.setAttribute("aria-pressed", String(button.dataset.pair === state.mode));
}

function setDark(dark) {
  state.dark = dark;
  document.documentElement.classList.toggle("dark", dark);
  if (stage) draw();
}

// ---- What the address holds

function keepLink() {
  const { genes, view, ramp, mode, chosen, against, percent, hand } = state;
  const kept = { genes, view: [view.x, view.y, view.zoom].map((n) => Number(n.toPrecision(7))), ramp, mode, chosen, against, percent, hand,
    regions: state.regions.map(({ name, polygon }) => ({ name, polygon })) };
  history.replaceState(null, "", `${location.pathname}${location.search}#${encodeURIComponent(JSON.stringify(kept))}`);
}

function kept() {
  try { return JSON.parse(decodeURIComponent(location.hash.slice(1))) ?? {}; } catch { return {}; }
}

// ---- Begin

function describe(info) {
  document.title = `${info.name} · stpath view`;
  by("name").textContent = info.name;
  const note = info.provenance.note ? ` · ${info.provenance.note}` : "";
  by("facts").textContent = `${info.spots.toLocaleString("en")} spots, ${info.genes.toLocaleString("en")} genes, ${info.units}${note}`;
  by("context").hidden = !info.context.length;
  const warnings = [info.decoded
    ? "Values are predicted from the tissue's image, in log1p of raw counts. They are not measured."
    : "Values are those that the file holds."];
  if (info.error) warnings.push(`This page decodes them from ${info.weights} weights: within ${info.error.toExponential(1)} (relative L2).`);
  if (info.context.length) warnings.push(`${info.context.length.toLocaleString("en")} spots were measured: their counts were given to the model as context.`);
  if (info.spread) warnings.push(`They are means of ${info.provenance.samples} samples;${info.spread} behind a gene's name shows their standard deviation.`);
  by("warning").textContent = warnings.join(" ");
}

async function begin() {
  setDark(state.dark);
  const info = await source.info();
  describe(info);
  const before = kept();
  for (const name of ["ramp", "mode", "percent", "hand", "against"]) if (before[name] !== undefined) state[name] = before[name];
  if (!rampNames.includes(state.ramp)) state.ramp = "viridis";
  stage = new Stage(info, await source.spots(), source, { onDraw: keepLink, onRegion: (corners) => lists.add(corners) });
  lists = tables({ source, draw, showGenes });
  wireColours();
  wireButtons();
  wireKeys();
  wireSearch();
  showPair();
  stage.fit();
  if (Array.isArray(before.view)) stage.show(...before.view);
  const hand = state.hand;
  await showGenes(before.genes?.length ? before.genes : info.spread ? [info.first, info.first + info.spread] : [info.first]);
  if (hand) { state.hand = state.ranges[0] = hand; showRange(); draw(); }
  await lists.restore(before.regions ?? [], before.chosen ?? -1);
  document.documentElement.dataset.ready = "yes";
}

begin().catch((error) => say(error.message));
