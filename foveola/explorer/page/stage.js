// An image on which a person clicks a patch or draws a box, with what one encoder makes of it laid over it.

import { get, large, make, place } from "/page/api.js";

const DRAWN = 5; // pixels from which on a click is a box

export class Stage {
  constructor(side, about, height, doing) {
    Object.assign(this, { side, about, ...doing, point: null, drag: null });
    const { image, name, width, height: high, seen } = about;
    this.base = make("img", { src: large(image), alt: name, draggable: "false" });
    this.layer = make("img", { class: "layer", alt: "", draggable: "false", hidden: true });
    this.boxes = make("div", { class: "boxes" });
    this.asked = make("div", { class: "asked", hidden: true });
    this.drawn = make("div", { class: "drawn", hidden: true });
    this.dot = make("div", { class: "point", hidden: true });
    this.frame = make("div", {
      class: "stage", tabindex: "0", role: "application",
      "aria-label": "Image: arrow keys choose a patch, Enter asks; or click a patch, or drag a box",
      onpointerdown: event => this.down(event), onpointermove: event => this.move(event),
      onpointerup: event => this.up(event), onpointercancel: () => this.stop(), onkeydown: event => this.key(event),
    }, this.base, this.layer, this.boxes, this.asked, this.drawn, this.dot);
    this.frame.style.aspectRatio = `${width} / ${high}`;
    this.frame.style.width = `min(100%, ${Math.round(height * width / high)}px)`;
    const box = seen[side];
    if (box && (box[0] > 0.001 || box[1] > 0.001)) {
      const inside = box.map(edge => Math.min(Math.max(edge, 0), 1));
      this.boxes.append(place(make("div", { class: "seen", title: "The encoder sees this part" }), inside));
    }
    about.objects.forEach((object, number) => this.boxes.append(place(make("div", { class: "object" },
      make("button", {
        type: "button", title: `Ask with ${object.label || `object ${number + 1}`}`,
        onpointerdown: event => event.stopPropagation(), onclick: () => this.ask({ object: number }),
      }, object.label || String(number + 1))), object.box)));
    this.note = make("p", { class: "note", "aria-live": "polite" });
  }

  where(event) {
    const frame = this.frame.getBoundingClientRect();
    const share = (at, from, size) => Math.min(Math.max((at - from) / size, 0), 1);
    return [share(event.clientX, frame.left, frame.width), share(event.clientY, frame.top, frame.height)];
  }

  down(event) {
    if (event.button) return;
    this.frame.setPointerCapture(event.pointerId);
    this.drag = { start: this.where(event), x: event.clientX, y: event.clientY, moved: false };
  }

  move(event) {
    if (!this.drag) return;
    this.drag.moved ||= Math.hypot(event.clientX - this.drag.x, event.clientY - this.drag.y) > DRAWN;
    if (!this.drag.moved) return;
    this.drawn.hidden = false;
    place(this.drawn, this.boxTo(event));
  }

  boxTo(event) {
    const [a, b] = [this.drag.start, this.where(event)];
    return [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
  }

  up(event) {
    if (!this.drag) return;
    const box = this.drag.moved ? this.boxTo(event) : null, point = this.drag.start;
    this.stop();
    if (!box) this.ask({ point });
    else if (box[0] < box[2] && box[1] < box[3]) this.ask({ box });
  }

  stop() {
    this.drag = null;
    this.drawn.hidden = true;
  }

  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step && event.key !== "Enter") return;
    event.preventDefault();
    event.stopPropagation();
    if (!step) { this.ask({ point: this.cursor || [0.5, 0.5] }); return; }
    const seen = this.about.seen[this.side] || [0, 0, 1, 1], [rows, columns] = this.about.grids[this.side] || [16, 16];
    const [x, y] = this.cursor || this.point || [0.5, 0.5], size = [(seen[2] - seen[0]) / columns, (seen[3] - seen[1]) / rows];
    this.cursor = [x + step[0] * size[0], y + step[1] * size[1]].map(at => Math.min(Math.max(at, 0.001), 0.999));
    this.mark(this.cursor);
  }

  mark(point) {
    this.dot.hidden = !point;
    if (point) Object.assign(this.dot.style, { left: `${100 * point[0]}%`, top: `${100 * point[1]}%` });
  }

  // Show what was asked: the box that the encoder read, and the point of a patch.
  show(question, asked) {
    this.point = question.point || null;
    if (this.point) this.cursor = null;
    this.mark(this.point);
    this.asked.hidden = !asked;
    if (asked) place(this.asked, asked);
    for (const [number, box] of [...this.boxes.querySelectorAll(".object")].entries()) {
      box.classList.toggle("chosen", number === question.object);
    }
  }

  // Lay what the encoder makes of the image over it; "" takes it away.
  async look(what, head, strength) {
    const asked = this.looked = Symbol("looked");
    this.layer.style.opacity = strength;
    if (!what) { this.layer.hidden = true; this.note.textContent = ""; return; }
    const [x, y] = this.point || [0.5, 0.5];
    this.frame.setAttribute("aria-busy", "true");
    try {
      const { image, note } = await get(`/layer/${this.side}/${this.about.image}/${what}?x=${x}&y=${y}&head=${head}`);
      if (this.looked !== asked) return;
      this.layer.src = image;
      this.layer.classList.toggle("patches", what === "pca" || what === "similarity");
      this.layer.hidden = false;
      if (what !== "pca" && what !== "attention") this.mark([x, y]);
      this.note.textContent = note;
    } catch (error) {
      if (this.looked !== asked) return;
      this.layer.hidden = true;
      this.note.textContent = error.message;
    } finally {
      if (this.looked === asked) this.frame.removeAttribute("aria-busy");
    }
  }
}
