// A map of rows by one encoder: move, zoom, look at points, and draw around some of them.

import { make, points } from "/page/api.js";
import { Pixels, rgb, within } from "/page/points.js";

const POLL = 1500, NEAR = 9, CLICK = 4;

export class PointMap {
  constructor(parent, side, title, doing) {
    Object.assign(this, { side, ...doing, rows: null, x: null, lasso: null, drag: null, hits: [], lassoing: false });
    this.canvas = make("canvas", {
      tabindex: "0", role: "img",
      "aria-label": `Map of ${title}: arrow keys move, plus and minus zoom, 0 shows all`,
      onpointerdown: event => this.down(event), onpointermove: event => this.move(event),
      onpointerup: event => this.up(event), onpointercancel: () => { this.drag = this.lasso = null; this.later(); },
      onpointerleave: () => this.hover(null), onkeydown: event => this.key(event),
    });
    this.canvas.addEventListener("wheel", event => this.wheel(event), { passive: false });
    this.note = make("p", { class: "note", "aria-live": "polite" });
    this.box = make("div", { class: "map" }, title && make("h2", { title }, title), this.canvas, this.note);
    parent.append(this.box);
    this.context = this.canvas.getContext("2d", { alpha: false });
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.later());
    this.selection.addEventListener("change", () => this.later());
  }

  async show(rows, method) {
    const asked = this.asked = Symbol("asked");
    if (this.rows !== rows) { this.rows = rows; this.x = null; this.hits = []; this.layer = null; this.later(); }
    try {
      let found = await points(rows.kind, this.side, method);
      if (found === null) {
        this.say("UMAP is at work (its program is compiled first, about half a minute of a core; then 1,000 points take seconds, 10,000 about a minute): until it is ready, this map shows the first two principal components.");
        const meanwhile = await points(rows.kind, this.side, "pca");
        if (this.asked !== asked) return;
        this.take(meanwhile);
        while (found === null) {
          await new Promise(done => setTimeout(done, POLL));
          if (this.asked !== asked) return;
          found = await points(rows.kind, this.side, method);
        }
      }
      if (this.asked !== asked) return;
      this.take(found);
      this.say(method === "umap" ? "UMAP: points that lie close together look alike to this encoder."
        : "First two principal components of the features.");
    } catch (error) {
      if (this.asked === asked) this.say(error.message);
    }
  }

  say(text) { this.note.textContent = text; }

  take(values) {
    const count = values.length / 2;
    this.x = new Float32Array(count);
    this.y = new Float32Array(count);
    for (let i = 0; i < count; i++) { this.x[i] = values[2 * i]; this.y[i] = -values[2 * i + 1]; }
    this.sx = new Float32Array(count);
    this.sy = new Float32Array(count);
    this.fit();
  }

  // Show all points.
  fit() {
    if (!this.x) return;
    let [left, right, top, bottom] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < this.x.length; i++) {
      left = Math.min(left, this.x[i]); right = Math.max(right, this.x[i]);
      top = Math.min(top, this.y[i]); bottom = Math.max(bottom, this.y[i]);
    }
    this.bounds = [left, right, top, bottom];
    const { width, height } = this.canvas;
    const scale = 0.92 * Math.min(width / Math.max(right - left, 1e-9), height / Math.max(bottom - top, 1e-9));
    this.least = scale / 2;
    this.at = { scale, x: width / 2 - scale * (left + right) / 2, y: height / 2 - scale * (top + bottom) / 2 };
    this.later();
  }

  resize() {
    const ratio = devicePixelRatio || 1;
    const width = Math.round(this.canvas.clientWidth * ratio), height = Math.round(this.canvas.clientHeight * ratio);
    if (!width || !height || (width === this.canvas.width && height === this.canvas.height)) return;
    this.canvas.width = width;
    this.canvas.height = height;
    this.fit();
    this.draw();
  }

  later() {
    this.waiting ||= requestAnimationFrame(() => { this.waiting = 0; this.draw(); });
  }

  draw() {
    const { width, height } = this.canvas;
    if (!width || !height) return;
    const began = performance.now(), style = getComputedStyle(this.canvas), ratio = devicePixelRatio || 1;
    const ink = name => style.getPropertyValue(name).trim();
    const pixels = new Pixels(this.context, width, height, rgb(ink("--card")));
    if (this.x) {
      const { rows, x, y, sx, sy, at } = this, count = x.length;
      for (let i = 0; i < count; i++) { sx[i] = x[i] * at.scale + at.x; sy[i] = y[i] * at.scale + at.y; }
      this.layer ||= new Uint8Array(count);
      for (let i = 0; i < count; i++) this.layer[i] = this.selection.has(rows.image[i]) ? 2 : rows.inside[i];
      const radius = ratio * Math.min(Math.max(
        0.3 * Math.sqrt(width * height / count) / ratio * Math.sqrt(at.scale / this.least / 2), 1.3), 5);
      const colors = rows.color.map(rgb), gray = rows.color.map(() => rgb(ink("--faint")));
      pixels.draw(sx, sy, this.layer, 0, rows.label, gray, Math.max(radius - ratio / 2, 1), 0.6);
      pixels.draw(sx, sy, this.layer, 1, rows.label, colors, radius, 0.8);
      const accent = rows.color.map(() => rgb(ink("--accent")));
      pixels.draw(sx, sy, this.layer, 2, rows.label, accent, radius + 1.5 * ratio, 1);
      pixels.draw(sx, sy, this.layer, 2, rows.label, colors, Math.max(radius - 0.5, 1), 1);
    }
    pixels.show();
    this.overlay(ink, ratio);
    performance.clearMeasures("map");
    performance.measure("map", { start: began, end: performance.now() });
  }

  // Rings around what was asked, what was found, and what is under the pointer; the line that is being drawn.
  overlay(ink, ratio) {
    const { context } = this;
    const ring = (row, radius, color) => {
      context.beginPath();
      context.arc(this.sx[row], this.sy[row], radius * ratio, 0, 7);
      context.lineWidth = 2 * ratio;
      context.strokeStyle = color;
      context.stroke();
    };
    if (this.x) {
      this.hits.forEach((row, rank) => ring(row, rank ? 6 : 9, ink(rank ? "--ink" : "--accent")));
      if (this.near !== null && this.near !== undefined) ring(this.near, 8, ink("--ink"));
    }
    if (!this.lasso) return;
    context.beginPath();
    this.lasso.forEach(([x, y]) => context.lineTo(x, y));
    context.closePath();
    context.lineWidth = 1.5 * ratio;
    context.strokeStyle = ink("--accent");
    context.stroke();
  }

  // Mark rows: the first one asked, others found.
  mark(rows) {
    this.hits = rows;
    this.later();
  }

  where(event) {
    const frame = this.canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
    return [(event.clientX - frame.left) * ratio, (event.clientY - frame.top) * ratio];
  }

  nearest([x, y]) {
    if (!this.x) return null;
    let best = null, least = (NEAR * (devicePixelRatio || 1)) ** 2;
    for (let i = 0; i < this.sx.length; i++) {
      const away = (this.sx[i] - x) ** 2 + (this.sy[i] - y) ** 2;
      if (away < least && this.layer?.[i]) { least = away; best = i; }
    }
    return best;
  }

  down(event) {
    if (event.button || !this.x) return;
    this.canvas.setPointerCapture(event.pointerId);
    const at = this.where(event);
    this.drag = { at, start: at, moved: false };
    if (this.lassoing || event.shiftKey) this.lasso = [at];
    this.hover(null);
  }

  move(event) {
    const at = this.where(event);
    if (!this.drag) { this.hover(this.nearest(at), event); return; }
    this.drag.moved ||= Math.hypot(at[0] - this.drag.start[0], at[1] - this.drag.start[1]) > CLICK;
    if (this.lasso) this.lasso.push(at);
    else if (this.drag.moved) { this.at.x += at[0] - this.drag.at[0]; this.at.y += at[1] - this.drag.at[1]; }
    this.drag.at = at;
    this.later();
  }

  up(event) {
    const { drag, lasso } = this;
    this.drag = this.lasso = null;
    if (!drag) return;
    if (!drag.moved) {
      const row = this.nearest(this.where(event));
      if (row !== null && (event.ctrlKey || event.metaKey)) this.selection.toggle(this.rows.image[row]);
      else if (row !== null) this.open(row);
    } else if (lasso) {
      const inside = within(this.sx, this.sy, lasso).filter(row => this.rows.inside[row]);
      this.selection.add(inside.map(row => this.rows.image[row]));
    }
    this.later();
  }

  wheel(event) {
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), this.where(event));
  }

  zoom(factor, [x, y] = [this.canvas.width / 2, this.canvas.height / 2]) {
    if (!this.x) return;
    const scale = Math.min(Math.max(this.at.scale * factor, this.least), this.least * 2000);
    const by = scale / this.at.scale;
    this.at = { scale, x: x - (x - this.at.x) * by, y: y - (y - this.at.y) * by };
    this.later();
  }

  key(event) {
    const step = 60 * (devicePixelRatio || 1);
    const move = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
    if (move && this.x) { this.at.x += move[0]; this.at.y += move[1]; this.later(); }
    else if (event.key === "+" || event.key === "=") this.zoom(1.3);
    else if (event.key === "-") this.zoom(1 / 1.3);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
  }

  hover(row, event) {
    if (row !== this.near) { this.near = row; this.later(); }
    this.canvas.style.cursor = row === null ? "" : "pointer";
    this.hovered(row, event);
  }
}
