// The spots as WebGL points, over tiles of the tissue. A view is { x, y, zoom }: the pixel of level 0 in the middle, and
// screen pixels (CSS) a pixel of level 0. Values change by one buffer; range and colours by uniforms, so sliders fetch nothing.

const VERTEX = `#version 300 es
in vec2 place; in float value; in float second; in float mark;
uniform vec2 middle; uniform vec2 half_size; uniform float zoom; uniform float side;
uniform vec2 range; uniform vec2 range_of_second;
out float part; out float part_of_second; out float marked;
void main() {
  gl_Position = vec4((place - middle) * zoom / half_size * vec2(1.0, -1.0), 0.0, 1.0);
  gl_PointSize = max(side, 1.0);
  part = clamp((value - range.x) / (range.y - range.x), 0.0, 1.0);
  part_of_second = clamp((second - range_of_second.x) / (range_of_second.y - range_of_second.x), 0.0, 1.0);
  marked = mark;
}`;
const FRAGMENT = `#version 300 es
precision highp float;
in float part; in float part_of_second; in float marked;
uniform sampler2D ramp; uniform int mode; uniform float opacity; uniform bool round_spots; uniform float side; uniform bool marks;
uniform vec3 first_colour; uniform vec3 second_colour;
out vec4 colour;
void main() {
  vec2 from_middle = gl_PointCoord * 2.0 - 1.0;
  float far = round_spots ? length(from_middle) : max(abs(from_middle.x), abs(from_middle.y));
  if (round_spots && side > 3.0 && far > 1.0) discard;
  vec3 rgb = mode == 1 ? min(first_colour * part + second_colour * part_of_second, vec3(1.0)) : texture(ramp, vec2(part, 0.5)).rgb;
  if (marks && marked > 0.5 && side > 5.0 && far > 0.72) rgb = vec3(1.0) - step(0.5, dot(rgb, vec3(0.33)));
  colour = vec4(rgb * opacity, opacity);
}`;

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255);

export class SpotMap {
  constructor(canvas, coords, info) {
    this.canvas = canvas;
    this.coords = coords;
    this.count = coords.length / 2;
    this.side = info.spot.side; // pixels of level 0
    this.round = info.spot.round;
    const gl = canvas.getContext("webgl2", { premultipliedAlpha: true, antialias: false, preserveDrawingBuffer: true });
    if (!gl) throw new Error("This browser has no WebGL 2, which draws the spots: try another one.");
    this.gl = gl;
    this.program = this.#linked();
    this.uniform = (name) => gl.getUniformLocation(this.program, name);
    this.buffers = {};
    // Near the origin float32 keeps fractions of a pixel, wherever the slide is.
    this.origin = [coords[0] ?? 0, coords[1] ?? 0];
    const places = new Float32Array(coords.length);
    for (let i = 0; i < coords.length; i += 2) {
      places[i] = coords[i] - this.origin[0];
      places[i + 1] = coords[i + 1] - this.origin[1];
    }
    this.#fill("place", places, 2);
    const marks = new Float32Array(this.count);
    for (const spot of info.context) marks[spot] = 1;
    this.#fill("mark", marks, 1);
    this.#fill("value", new Float32Array(this.count), 1);
    this.#fill("second", new Float32Array(this.count), 1);
    this.texture = gl.createTexture();
  }

  #linked() {
    const gl = this.gl;
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    return program;
  }

  #fill(name, numbers, size) {
    const gl = this.gl;
    this.buffers[name] ??= gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
    gl.bufferData(gl.ARRAY_BUFFER, numbers, gl.STATIC_DRAW);
    const at = gl.getAttribLocation(this.program, name);
    if (at < 0) return;
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, size, gl.FLOAT, false, 0, 0);
  }

  setValues(values, second) {
    this.values = [values, second].filter(Boolean);
  }

  setRamp(bytes) {
    const gl = this.gl;
    gl.bindTexture(gl.TEXTURE_2D, this.texture);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, bytes);
    for (const wrap of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, wrap, gl.CLAMP_TO_EDGE);
    for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, filter, gl.LINEAR);
  }

  // panels: [{ left, width }] in CSS pixels, one a gene side by side, or one for all.
  draw(view, panels, look) {
    const gl = this.gl;
    const pixels = devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (this.canvas.width !== Math.round(width * pixels)) this.canvas.width = Math.round(width * pixels);
    if (this.canvas.height !== Math.round(height * pixels)) this.canvas.height = Math.round(height * pixels);
    gl.disable(gl.SCISSOR_TEST);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.useProgram(this.program);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.enable(gl.SCISSOR_TEST);
    const side = this.side * view.zoom * pixels;
    gl.uniform2f(this.uniform("middle"), view.x - this.origin[0], view.y - this.origin[1]);
    gl.uniform1f(this.uniform("zoom"), view.zoom);
    gl.uniform1f(this.uniform("side"), side);
    gl.uniform1f(this.uniform("opacity"), look.opacity);
    gl.uniform1i(this.uniform("round_spots"), this.round);
    gl.uniform1i(this.uniform("marks"), look.marks);
    gl.uniform3fv(this.uniform("first_colour"), rgb(look.two[0]));
    gl.uniform3fv(this.uniform("second_colour"), rgb(look.two[1]));
    const both = look.mode === "colours" && this.values?.length === 2;
    gl.uniform1i(this.uniform("mode"), both ? 1 : 0);
    panels.forEach((panel, i) => {
      if (!this.values?.[i] || this.values[i] !== this.shown) {
        this.shown = this.values?.[i];
        if (this.shown) this.#fill("value", this.shown, 1);
      }
      if (both && this.shownSecond !== this.values[1]) this.#fill("second", (this.shownSecond = this.values[1]), 1);
      const range = look.ranges[i] ?? [0, 1];
      gl.uniform2f(this.uniform("range"), range[0], range[1] > range[0] ? range[1] : range[0] + 1e-6);
      const second = look.ranges[1] ?? [0, 1];
      gl.uniform2f(this.uniform("range_of_second"), second[0], second[1] > second[0] ? second[1] : second[0] + 1e-6);
      const box = [panel.left, 0, panel.width, height].map((n) => Math.round(n * pixels));
      gl.viewport(...box);
      gl.scissor(...box);
      gl.uniform2f(this.uniform("half_size"), panel.width / 2, height / 2);
      if (this.values?.[i]) gl.drawArrays(gl.POINTS, 0, this.count);
    });
  }
}

// Tiles of the tissue, asked for as they come into view; a coarser one stands in until then.
export class TissueMap {
  constructor(canvas, tissue, fetchTile, redraw) {
    Object.assign(this, { canvas, tissue, fetchTile, redraw, tiles: new Map() });
  }

  draw(view, panels) {
    const context = this.canvas.getContext("2d");
    const pixels = devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    this.canvas.width = Math.round(width * pixels);
    this.canvas.height = Math.round(height * pixels);
    if (!this.tissue) return;
    const wanted = Math.max(0, Math.min(this.tissue.levels - 1, Math.floor(-Math.log2(view.zoom * pixels))));
    for (const panel of panels) {
      context.save();
      context.setTransform(pixels, 0, 0, pixels, 0, 0);
      context.beginPath();
      context.rect(panel.left, 0, panel.width, height);
      context.clip();
      context.translate(panel.left + panel.width / 2, height / 2);
      context.scale(view.zoom, view.zoom);
      context.translate(-view.x, -view.y);
      const reach = [panel.width / 2 / view.zoom, height / 2 / view.zoom];
      for (const level of new Set([this.tissue.levels - 1, Math.min(wanted + 2, this.tissue.levels - 1), wanted])) {
        this.#drawLevel(context, level, view, reach);
      }
      context.restore();
    }
  }

  #drawLevel(context, level, view, reach) {
    const span = this.tissue.tile * 2 ** level;
    const last = [Math.ceil(this.tissue.width / span) - 1, Math.ceil(this.tissue.height / span) - 1];
    const from = [view.x - reach[0], view.y - reach[1]].map((n) => Math.max(0, Math.floor(n / span)));
    const to = [view.x + reach[0], view.y + reach[1]].map((n, i) => Math.min(last[i], Math.floor(n / span)));
    for (let y = from[1]; y <= to[1]; y++) {
      for (let x = from[0]; x <= to[0]; x++) {
        const picture = this.#tile(level, x, y);
        if (picture) context.drawImage(picture, x * span, y * span, span, span);
      }
    }
  }

  #tile(level, x, y) {
    const key = `${level}/${x}/${y}`;
    if (!this.tiles.has(key)) {
      this.tiles.set(key, null);
      this.fetchTile(level, x, y)
        .then(createImageBitmap)
        .then((picture) => { this.tiles.set(key, picture); this.redraw(); })
        .catch(() => {}); // it stays white; the next view says what is wrong
    }
    return this.tiles.get(key);
  }
}

// Which spot is near a place: the spots of each square of a grid as wide as their pitch.
export class Places {
  constructor(coords, pitch) {
    this.coords = coords;
    this.pitch = pitch;
    this.cells = new Map();
    for (let i = 0; i < coords.length / 2; i++) {
      const key = this.#cell(coords[2 * i], coords[2 * i + 1]);
      const cell = this.cells.get(key);
      if (cell) cell.push(i); else this.cells.set(key, [i]);
    }
  }

  #cell(x, y, dx = 0, dy = 0) {
    return (Math.floor(x / this.pitch) + dx) * 67108864 + Math.floor(y / this.pitch) + dy;
  }

  nearest(x, y, within) {
    let best = -1, least = within * within;
    for (let dx = -1; dx <= 1; dx++) for (let dy = -1; dy <= 1; dy++) {
      for (const i of this.cells.get(this.#cell(x, y, dx, dy)) ?? []) {
        const far = (this.coords[2 * i] - x) ** 2 + (this.coords[2 * i + 1] - y) ** 2;
        if (far <= least) { least = far; best = i; }
      }
    }
    return best;
  }
}
