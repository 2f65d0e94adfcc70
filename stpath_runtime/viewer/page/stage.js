// The middle of the page: the maps of the shown genes, what is drawn over them, and what a pointer does there.

import { two } from "./colours.js";
import { save } from "./files.js";
import { Places, SpotMap, TissueMap } from "./map.js";
import { by, say, state } from "./state.js";

const MOST_ZOOM = 64, LEAST_ZOOM = 1e-4; // screen pixels a pixel of level 0

export class Stage {
  // onDraw() is called after each picture, onRegion(corners) when one was drawn round, in pixels of level 0.
  constructor(info, coords, source, { onDraw, onRegion }) {
    Object.assign(this, { info, coords, source, onDraw, onRegion, waiting: false, fitted: true });
    this.box = by("stage");
    this.measured = new Set(info.context);
    this.names = new Map(); // of the spots that were pointed at
    this.spots = new SpotMap(by("spots"), coords, info);
    this.tissue = new TissueMap(by("tissue"), info.tissue, source.tile, () => this.draw());
    this.#listen();
  }

  // ---- What is seen

  // The maps side by side, one a gene, or the only one.
  panels() {
    const width = this.box.clientWidth;
    const count = state.mode === "side" ? Math.max(1, state.genes.length) : 1;
    return Array.from({ length: count }, (_, i) => ({ left: (i * width) / count, width: width / count }));
  }

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      const panels = this.panels();
      this.tissue.draw(state.view, panels);
      this.spots.draw(state.view, panels, { ...state, two });
      this.#drawOver(panels);
      this.#showTitles(panels);
      this.#showScale();
      this.onDraw();
    });
  }

  fit() {
    const { coords, info, box } = this;
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < coords.length; i += 2) {
      left = Math.min(left, coords[i]); right = Math.max(right, coords[i]);
      top = Math.min(top, coords[i + 1]); bottom = Math.max(bottom, coords[i + 1]);
    }
    const margin = 2 * info.spot.side;
    const [width, height] = [right - left + margin, bottom - top + margin];
    const zoom = Math.min(this.panels()[0].width / width, box.clientHeight / height);
    this.show((left + right) / 2, (top + bottom) / 2, zoom);
    this.fitted = true;
  }

  // As before; but all of it where all was seen, as the maps may have become more, or narrower.
  refit() {
    if (this.fitted) this.fit(); else this.draw();
  }

  // By so many screen pixels.
  move(x, y) {
    const { view } = state;
    this.show(view.x + x / view.zoom, view.y + y / view.zoom, view.zoom);
  }

  zoom(times) {
    this.show(state.view.x, state.view.y, Math.min(MOST_ZOOM, Math.max(LEAST_ZOOM, state.view.zoom * times)));
  }

  // A place of the slide in the middle, by screen pixels a pixel of level 0.
  show(x, y, zoom) {
    state.view = { x, y, zoom };
    this.fitted = false;
    this.draw();
  }

  // So that what is under the pointer stays there.
  #zoomAt(event, times) {
    const before = this.#toSlide(event);
    this.zoom(times);
    this.#keepUnder(event, before);
  }

  #keepUnder(event, place) {
    const now = this.#toSlide(event), { view } = state;
    this.show(view.x + place[0] - now[0], view.y + place[1] - now[1], view.zoom);
  }

  #toScreen(panel, [x, y]) {
    const { x: middle, y: centre, zoom } = state.view;
    return [panel.left + panel.width / 2 + (x - middle) * zoom, this.box.clientHeight / 2 + (y - centre) * zoom];
  }

  #toSlide(event) {
    const box = this.box.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const panels = this.panels();
    const panel = panels.find((part) => x < part.left + part.width) ?? panels[0];
    const { x: middle, y: centre, zoom } = state.view;
    return [(x - panel.left - panel.width / 2) / zoom + middle, (y - box.height / 2) / zoom + centre];
  }

  // ---- What is drawn over the spots

  #drawOver(panels) {
    const canvas = by("over");
    const pixels = devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * pixels);
    canvas.height = Math.round(canvas.clientHeight * pixels);
    const context = canvas.getContext("2d");
    context.scale(pixels, pixels);
    for (const panel of panels) {
      context.save();
      context.beginPath();
      context.rect(panel.left, 0, panel.width, canvas.clientHeight);
      context.clip();
      state.regions.forEach((region, i) => this.#outline(context, panel, region.polygon, region.colour, i === state.chosen ? 3 : 2));
      if (state.drawing?.corners.length) this.#outline(context, panel, state.drawing.corners, "#0b62d6", 2);
      context.restore();
    }
  }

  #outline(context, panel, corners, colour, width) {
    context.beginPath();
    corners.forEach((corner, i) => context[i ? "lineTo" : "moveTo"](...this.#toScreen(panel, corner)));
    context.closePath();
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.stroke();
  }

  #showTitles(panels) {
    const coloured = state.mode === "colours" && state.genes.length > 1;
    const names = coloured ? state.genes : state.genes.slice(0, panels.length);
    by("titles").replaceChildren(...names.map((name, i) => {
      const title = document.createElement("span");
      title.textContent = name;
      if (coloured) title.style.color = two[i];
      return title;
    }));
  }

  #showScale() {
    const bar = by("scale"), micronsPerPixel = this.info.microns_a_pixel;
    bar.hidden = !micronsPerPixel;
    if (bar.hidden) return;
    const microns = 120 / state.view.zoom * micronsPerPixel; // of the longest bar
    const power = 10 ** Math.floor(Math.log10(microns));
    const length = power * [5, 2, 1].find((times) => times * power <= microns);
    bar.style.width = `${(length / micronsPerPixel) * state.view.zoom}px`;
    bar.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  }

  #showSpot(event) {
    const { coords, info, box } = this;
    const label = by("hover");
    this.places ??= new Places(coords, info.spot.pitch);
    const spot = this.places.nearest(...this.#toSlide(event), Math.max(info.spot.side * 0.75, 3 / state.view.zoom));
    this.hovered = spot;
    label.hidden = spot < 0;
    if (spot < 0) return;
    if (!this.names.has(spot)) this.#findName(spot);
    label.textContent = this.#describe(spot);
    const { left, top, width, height } = box.getBoundingClientRect();
    label.style.left = `${Math.min(event.clientX - left + 14, width - label.offsetWidth - 4)}px`;
    label.style.top = `${Math.min(event.clientY - top + 14, height - label.offsetHeight - 4)}px`;
  }

  #describe(spot) {
    const values = state.genes.map((name, i) => `${name} ${state.values[i][spot].toFixed(3)}`);
    const measured = this.measured.has(spot) ? "measured here: its counts were given to the model" : null;
    return [...values, this.names.get(spot), measured].filter(Boolean).join("\n");
  }

  // Its number stands for it until it is there.
  #findName(spot) {
    this.names.set(spot, `spot ${spot}`);
    this.source.spot(spot).then((name) => {
      this.names.set(spot, name);
      if (this.hovered === spot) by("hover").textContent = this.#describe(spot);
    }).catch((error) => say(error.message));
  }

  // ---- What a pointer does

  // "lasso" or "box": the next drag draws one. Asked for again, it does not.
  startDrawing(kind) {
    state.drawing = state.drawing?.kind === kind ? null : { kind, corners: [], down: false };
    for (const id of ["lasso", "box"]) by(id).setAttribute("aria-pressed", String(state.drawing?.kind === id));
    this.box.classList.toggle("drawing", Boolean(state.drawing));
    this.draw();
  }

  stopDrawing() {
    if (state.drawing) this.startDrawing(state.drawing.kind);
  }

  #drawTo([x, y]) {
    const { kind, corners } = state.drawing;
    if (kind === "box") state.drawing.corners = [corners[0], [x, corners[0][1]], [x, y], [corners[0][0], y]];
    else if (Math.hypot(x - corners.at(-1)[0], y - corners.at(-1)[1]) * state.view.zoom > 3) corners.push([x, y]);
    this.draw();
  }

  #listen() {
    const { box } = this;
    let held = null; // the place that a drag moves
    box.addEventListener("pointerdown", (event) => {
      box.setPointerCapture(event.pointerId);
      if (state.drawing) Object.assign(state.drawing, { down: true, corners: [this.#toSlide(event)] });
      else held = this.#toSlide(event);
    });
    box.addEventListener("pointermove", (event) => {
      if (state.drawing?.down) this.#drawTo(this.#toSlide(event));
      else if (held) this.#keepUnder(event, held);
      else this.#showSpot(event);
    });
    box.addEventListener("pointerup", () => {
      held = null;
      if (!state.drawing?.down) return;
      const { corners } = state.drawing;
      this.stopDrawing();
      if (corners.length >= 3) this.onRegion(corners.map((corner) => corner.map((n) => Math.round(n * 10) / 10)));
    });
    box.addEventListener("pointerleave", () => { by("hover").hidden = true; this.hovered = -1; });
    box.addEventListener("wheel", (event) => { event.preventDefault(); this.#zoomAt(event, Math.exp(-event.deltaY * 0.0015)); }, { passive: false });
    box.addEventListener("dblclick", (event) => this.#zoomAt(event, 2));
    new ResizeObserver(() => this.refit()).observe(box);
  }

  // ---- As a picture

  savePicture() {
    const whole = document.createElement("canvas");
    Object.assign(whole, { width: by("spots").width, height: by("spots").height });
    const context = whole.getContext("2d");
    const pixels = devicePixelRatio || 1;
    context.fillStyle = getComputedStyle(document.body).backgroundColor;
    context.fillRect(0, 0, whole.width, whole.height);
    for (const id of ["tissue", "spots", "over"]) context.drawImage(by(id), 0, 0, whole.width, whole.height);
    context.font = `600 ${14 * pixels}px system-ui, sans-serif`;
    context.fillStyle = getComputedStyle(document.body).color;
    context.textAlign = "center";
    const panels = this.panels();
    if (panels.length > 1) panels.forEach((panel, i) => context.fillText(state.genes[i], (panel.left + panel.width / 2) * pixels, 22 * pixels));
    else context.fillText(state.genes.join(" and "), whole.width / 2, 22 * pixels);
    const bar = by("scale");
    if (!bar.hidden) {
      const long = bar.offsetWidth * pixels;
      context.fillRect(whole.width - long - 14 * pixels, whole.height - 16 * pixels, long, 3 * pixels);
      context.fillText(bar.textContent, whole.width - 14 * pixels - long / 2, whole.height - 22 * pixels);
    }
    whole.toBlob((blob) => save(blob, `${state.genes.join("_") || "spots"}.png`));
  }
}
