// The page: what is shown, what is drawn round, and what the address holds. The numbers come from `source`: the server
// that sent the page or, in a saved page, the page itself.

import { names as rampNames, ofRegions, ramp, two } from "./colours.js";
import { Places, SpotMap, TissueMap } from "./map.js";
import { tables } from "./tables.js";

const source = globalThis.stpathSource ?? (await import("./server.js")).server;
const by = (id) => document.getElementById(id);
const state = {
  genes: [], values: [], ranges: [], hand: null, percent: 1, ramp: "viridis", mode: "side", opacity: 0.85, marks: true,
  view: null, regions: [], chosen: -1, against: "rest", drawing: null, dark: matchMedia("(prefers-color-scheme: dark)").matches,
};
let info, coords, map, tissue, places;

function say(message) {
  by("message").textContent = message;
  by("message").hidden = !message;
}

const guarded = (work) => async (...given) => {
  try { const done = await work(...given); if (done !== undefined) say(""); return done; } catch (error) { say(error.message); }
};

// ---- Genes

function range(values) {
  const sample = new Float32Array(Math.min(values.length, 100000));
  const step = values.length / sample.length;
  for (let i = 0; i < sample.length; i++) sample[i] = values[Math.floor(i * step)];
  sample.sort();
  if (state.percent === 0) {
    let low = Infinity, high = -Infinity;
    for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
    return [low, high];
  }
  const at = (share) => sample[Math.min(sample.length - 1, Math.floor(share * sample.length))];
  return [at(state.percent / 100), at(1 - state.percent / 100)];
}

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
  map.setValues(values[0], values[1]);
  draw();
  lists.showAlike(wanted[0]);
  return true;
});

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

function completion(input, at) {
  const list = by("found");
  let turn = 0, chosen = -1;
  const close = () => { list.hidden = true; input.setAttribute("aria-expanded", "false"); chosen = -1; };
  const take = (name) => {
    close();
    const names = [...state.genes];
    names[at] = name;
    showGenes(names);
  };
  const search = guarded(async () => {
    const own = ++turn;
    const text = input.value.trim();
    if (!text) { close(); return; }
    const found = await source.search(text, 12);
    if (own !== turn || document.activeElement !== input) return;
    list.replaceChildren(...found.map((name) => {
      const item = document.createElement("li");
      item.textContent = name;
      item.setAttribute("role", "option");
      item.addEventListener("pointerdown", (event) => { event.preventDefault(); take(name); });
      return item;
    }));
    list.style.top = `${input.offsetTop + input.offsetHeight}px`;
    list.hidden = !found.length;
    input.setAttribute("aria-expanded", String(found.length > 0));
    chosen = -1;
  });
  input.addEventListener("input", search);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    const items = [...list.children];
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!items.length || list.hidden) return;
      chosen = (chosen + (event.key === "ArrowDown" ? 1 : items.length - 1) + (chosen < 0 && event.key === "ArrowUp" ? 1 : 0)) % items.length;
      items.forEach((item, i) => item.setAttribute("aria-selected", String(i === chosen)));
      items[chosen].scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter") {
      const text = input.value.trim();
      const names = list.hidden ? [] : items.map((item) => item.textContent);
      const name = names[chosen] ?? names.find((each) => each.toLowerCase() === text.toLowerCase()) ?? names[0] ?? text;
      if (text) { input.value = name; take(name); } else if (at) showGenes(state.genes.slice(0, at));
      turn++;
    } else if (event.key === "Escape") { close(); input.blur(); }
    event.stopPropagation();
  });
  input.addEventListener("search", () => { if (!input.value && at) showGenes(state.genes.slice(0, at)); });
}

// ---- The map

const panels = () => {
  const width = by("stage").clientWidth;
  const count = state.mode === "side" ? Math.max(1, state.genes.length) : 1;
  return Array.from({ length: count }, (_, i) => ({ left: (i * width) / count, width: width / count }));
};

let waiting = false;
function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    if (!map) return;
    const parts = panels();
    tissue.draw(state.view, parts);
    map.draw(state.view, parts, { ...state, two });
    drawOver(parts);
    keepLink();
  });
}

function fit() {
  let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
  for (let i = 0; i < coords.length; i += 2) {
    left = Math.min(left, coords[i]); right = Math.max(right, coords[i]);
    top = Math.min(top, coords[i + 1]); bottom = Math.max(bottom, coords[i + 1]);
  }
  const margin = 2 * info.spot.side;
  const [width, height] = [right - left + margin, bottom - top + margin];
  const zoom = Math.min(panels()[0].width / width, by("stage").clientHeight / height);
  state.view = { x: (left + right) / 2, y: (top + bottom) / 2, zoom };
  draw();
}

function toScreen(panel, [x, y]) {
  return [panel.left + panel.width / 2 + (x - state.view.x) * state.view.zoom, by("stage").clientHeight / 2 + (y - state.view.y) * state.view.zoom];
}

function toSlide(event) {
  const box = by("stage").getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const panel = panels().find((part) => x < part.left + part.width) ?? panels()[0];
  return [(x - panel.left - panel.width / 2) / state.view.zoom + state.view.x, (y - box.height / 2) / state.view.zoom + state.view.y];
}

function outline(context, panel, corners, colour, width) {
  context.beginPath();
  corners.forEach((corner, i) => context[i ? "lineTo" : "moveTo"](...toScreen(panel, corner)));
  context.closePath();
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke();
}

function drawOver(parts) {
  const canvas = by("over");
  const pixels = devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * pixels);
  canvas.height = Math.round(canvas.clientHeight * pixels);
  const context = canvas.getContext("2d");
  context.scale(pixels, pixels);
  for (const panel of parts) {
    context.save();
    context.beginPath();
    context.rect(panel.left, 0, panel.width, canvas.clientHeight);
    context.clip();
    state.regions.forEach((region, i) => outline(context, panel, region.polygon, region.colour, i === state.chosen ? 3 : 2));
    if (state.drawing?.corners.length) outline(context, panel, state.drawing.corners, "#0b62d6", 2);
    context.restore();
  }
  by("titles").replaceChildren(...(state.mode === "colours" && state.genes.length > 1 ? state.genes : state.genes.slice(0, parts.length)).map((name, i) => {
    const title = document.createElement("span");
    title.textContent = name;
    if (state.mode === "colours" && state.genes.length > 1) title.style.color = two[i];
    return title;
  }));
  drawScale();
}

function drawScale() {
  const bar = by("scale");
  bar.hidden = !info.microns_a_pixel;
  if (bar.hidden) return;
  const microns = 120 / state.view.zoom * info.microns_a_pixel;
  const power = 10 ** Math.floor(Math.log10(microns));
  const length = power * [5, 2, 1].find((times) => times * power <= microns);
  bar.style.width = `${(length / info.microns_a_pixel) * state.view.zoom}px`;
  bar.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
}

function zoomAt(event, times) {
  const before = toSlide(event);
  state.view.zoom = Math.min(64, Math.max(1e-4, state.view.zoom * times));
  const after = toSlide(event);
  state.view.x += before[0] - after[0];
  state.view.y += before[1] - after[1];
  draw();
}

function hover(event) {
  const label = by("hover");
  places ??= new Places(coords, info.spot.pitch);
  const spot = places.nearest(...toSlide(event), Math.max(info.spot.side * 0.75, 3 / state.view.zoom));
  label.hidden = spot < 0;
  if (spot < 0) return;
  const values = state.genes.map((name, i) => `${name} ${state.values[i][spot].toFixed(3)}`);
  const measured = measuredSpots.has(spot) ? "measured here: its counts were given to the model" : null;
  label.textContent = [...values, `spot ${spot}`, measured].filter(Boolean).join("\n");
  const box = by("stage").getBoundingClientRect();
  label.style.left = `${Math.min(event.clientX - box.left + 14, box.width - label.offsetWidth - 4)}px`;
  label.style.top = `${Math.min(event.clientY - box.top + 14, box.height - label.offsetHeight - 4)}px`;
}
let measuredSpots = new Set();

function startDrawing(kind) {
  state.drawing = state.drawing?.kind === kind ? null : { kind, corners: [], down: false };
  for (const id of ["lasso", "box"]) by(id).setAttribute("aria-pressed", String(state.drawing?.kind === id));
  by("stage").classList.toggle("drawing", Boolean(state.drawing));
  draw();
}

function wireStage() {
  const stage = by("stage");
  let held = null;
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    if (state.drawing) Object.assign(state.drawing, { down: true, corners: [toSlide(event)] });
    else held = toSlide(event);
  });
  stage.addEventListener("pointermove", (event) => {
    if (state.drawing?.down) {
      const { kind, corners } = state.drawing;
      const [x, y] = toSlide(event);
      if (kind === "box") state.drawing.corners = [corners[0], [x, corners[0][1]], [x, y], [corners[0][0], y]];
      else if (Math.hypot(x - corners.at(-1)[0], y - corners.at(-1)[1]) * state.view.zoom > 3) corners.push([x, y]);
      draw();
    } else if (held) {
      const now = toSlide(event);
      state.view.x += held[0] - now[0];
      state.view.y += held[1] - now[1];
      draw();
    } else hover(event);
  });
  stage.addEventListener("pointerup", () => {
    held = null;
    if (!state.drawing?.down) return;
    const { corners } = state.drawing;
    startDrawing(state.drawing.kind); // done
    if (corners.length >= 3) lists.add(corners.map((corner) => corner.map((n) => Math.round(n * 10) / 10)));
  });
  stage.addEventListener("pointerleave", () => { by("hover").hidden = true; });
  stage.addEventListener("wheel", (event) => { event.preventDefault(); zoomAt(event, Math.exp(-event.deltaY * 0.0015)); }, { passive: false });
  stage.addEventListener("dblclick", (event) => zoomAt(event, 2));
  new ResizeObserver(draw).observe(stage);
}

// ---- What the address holds

function keepLink() {
  const { genes, view, mode, chosen, against, percent, hand } = state;
  const kept = { genes, view: [view.x, view.y, view.zoom].map((n) => Number(n.toPrecision(7))), ramp: state.ramp, mode, chosen, against, percent, hand,
    regions: state.regions.map(({ name, polygon }) => ({ name, polygon })) };
  history.replaceState(null, "", `${location.pathname}${location.search}#${encodeURIComponent(JSON.stringify(kept))}`);
}

function kept() {
  try { return JSON.parse(decodeURIComponent(location.hash.slice(1))) ?? {}; } catch { return {}; }
}

// ---- Save

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function picture() {
  const whole = document.createElement("canvas");
  Object.assign(whole, { width: by("spots").width, height: by("spots").height });
  const context = whole.getContext("2d");
  context.fillStyle = getComputedStyle(document.body).backgroundColor;
  context.fillRect(0, 0, whole.width, whole.height);
  for (const id of ["tissue", "spots", "over"]) context.drawImage(by(id), 0, 0, whole.width, whole.height);
  const pixels = devicePixelRatio || 1;
  context.font = `600 ${14 * pixels}px system-ui, sans-serif`;
  context.fillStyle = getComputedStyle(document.body).color;
  context.textAlign = "center";
  const parts = panels();
  if (parts.length > 1) parts.forEach((part, i) => context.fillText(state.genes[i], (part.left + part.width / 2) * pixels, 22 * pixels));
  else context.fillText(state.genes.join(" and "), whole.width / 2, 22 * pixels);
  const bar = by("scale");
  if (!bar.hidden) {
    const long = bar.offsetWidth * pixels;
    context.fillRect(whole.width - long - 14 * pixels, whole.height - 16 * pixels, long, 3 * pixels);
    context.fillText(bar.textContent, whole.width - 14 * pixels - long / 2, whole.height - 22 * pixels);
  }
  whole.toBlob((blob) => save(blob, `${state.genes.join("_") || "spots"}.png`));
}

// ---- Begin

function wireControls() {
  by("map-of-colours").replaceChildren(...rampNames.map((name) => new Option(name, name)));
  by("map-of-colours").value = state.ramp;
  const setRamp = () => {
    const bytes = ramp(state.ramp);
    map.setRamp(bytes);
    by("ramp").getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(bytes), 256, 1), 0, 0);
    draw();
  };
  by("map-of-colours").addEventListener("change", (event) => { state.ramp = event.target.value; setRamp(); });
  setRamp();
  by("percent").value = state.hand ? "hand" : String(state.percent);
  by("percent").addEventListener("change", (event) => {
    if (event.target.value === "hand") { state.hand = state.ranges[0]; return; }
    state.percent = Number(event.target.value);
    setRanges();
    draw();
  });
  for (const id of ["low", "high"]) by(id).addEventListener("change", () => {
    const range = [Number(by("low").value), Number(by("high").value)];
    state.hand = state.ranges[0] = range;
    by("percent").value = "hand";
    draw();
  });
  by("opacity").addEventListener("input", (event) => { state.opacity = event.target.value / 100; draw(); });
  by("measured").addEventListener("change", (event) => { state.marks = event.target.checked; draw(); });
  for (const button of document.querySelectorAll("[data-pair]")) button.addEventListener("click", () => {
    state.mode = button.dataset.pair;
    showPair();
    draw();
  });
  by("lasso").addEventListener("click", () => startDrawing("lasso"));
  by("box").addEventListener("click", () => startDrawing("box"));
  by("fit").addEventListener("click", fit);
  by("theme").addEventListener("click", () => theme(!state.dark));
  by("picture").addEventListener("click", picture);
  by("link").addEventListener("click", guarded(() => navigator.clipboard.writeText(location.href)));
  by("table").addEventListener("click", guarded(async () => save(await source.table(state.genes), "spots.csv")));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = 60 / state.view.zoom;
    const keys = {
      "/": () => by("gene").focus(), l: () => startDrawing("lasso"), r: () => startDrawing("box"), f: fit, p: picture, d: () => theme(!state.dark),
      Escape: () => state.drawing && startDrawing(state.drawing.kind),
      "+": () => { state.view.zoom *= 1.25; draw(); }, "-": () => { state.view.zoom /= 1.25; draw(); },
      ArrowLeft: () => { state.view.x -= step; draw(); }, ArrowRight: () => { state.view.x += step; draw(); },
      ArrowUp: () => { state.view.y -= step; draw(); }, ArrowDown: () => { state.view.y += step; draw(); },
    };
    const work = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (work) { event.preventDefault(); work(); }
  });
}

function showPair() {
  for (const button of document.querySelectorAll("[data-pair]")) button.setAttribute("aria-pressed", String(button.dataset.pair === state.mode));
}

function theme(dark) {
  state.dark = dark;
  document.documentElement.classList.toggle("dark", dark);
  if (map) draw();
}

let lists;
async function begin() {
  theme(state.dark);
  info = await source.info();
  document.title = `${info.name} · stpath view`;
  by("name").textContent = info.name;
  const note = info.provenance.note ? ` · ${info.provenance.note}` : "";
  by("facts").textContent = `${info.spots.toLocaleString("en")} spots, ${info.genes.toLocaleString("en")} genes, ${info.units}${note}`;
  by("warning").textContent = info.decoded
    ? "Values are predicted from the tissue's image, in log1p of raw counts. They are not measured."
    : "Values are those that the file holds.";
  if (info.error) by("warning").textContent += ` This page decodes them from ${info.weights} weights: within ${info.error.toExponential(1)} (relative L2).`;
  if (info.context.length) {
    by("context").hidden = false;
    by("warning").textContent += ` ${info.context.length.toLocaleString("en")} spots were measured: their counts were given to the model as context.`;
  }
  if (info.spread) by("warning").textContent += ` They are means of ${info.provenance.samples} samples;${info.spread} behind a gene's name shows their standard deviation.`;
  measuredSpots = new Set(info.context);
  coords = await source.spots();
  map = new SpotMap(by("spots"), coords, info);
  tissue = new TissueMap(by("tissue"), info.tissue, source.tile, draw);
  const before = kept();
  for (const name of ["ramp", "mode", "percent", "hand", "against"]) if (before[name] !== undefined) state[name] = before[name];
  if (!rampNames.includes(state.ramp)) state.ramp = "viridis";
  lists = tables({ state, source, by, draw, save, guarded, showGenes, colours: ofRegions });
  wireControls();
  showPair();
  wireStage();
  completion(by("gene"), 0);
  completion(by("second"), 1);
  fit();
  if (Array.isArray(before.view)) [state.view.x, state.view.y, state.view.zoom] = before.view;
  const hand = state.hand;
  await showGenes(before.genes?.length ? before.genes : info.spread ? [info.first, info.first + info.spread] : [info.first]);
  if (!Array.isArray(before.view)) fit(); // of as many maps as there are by now
  if (hand) { state.hand = state.ranges[0] = hand; showRange(); draw(); }
  await lists.restore(before.regions ?? [], before.chosen ?? -1);
  document.documentElement.dataset.ready = "yes";
}

begin().catch((error) => say(error.message));
