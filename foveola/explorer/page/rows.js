// What is shown: rows of a kind with their names and classes, the filter on them, and the selected images.

import { get } from "/page/api.js";

// Colours of the most frequent classes, legible on light and on dark.
export const COLORS = ["#3f83c8", "#e0792f", "#37a169", "#c9527f", "#8a6fd0", "#b58d24", "#22a2a6", "#d04a4a",
  "#7a9a2e", "#a8694a", "#5d79e8", "#c583b5"];
export const OTHER = "#8b95a1";

export class Rows {
  constructor(kind, values) {
    Object.assign(this, values, { kind });
    this.count = this.image.length;
    this.lower = this.names.map(name => name.toLowerCase());
    const counts = new Int32Array(this.labels.length);
    for (const label of this.label) counts[label]++;
    // Classes by falling count; the empty one, of rows without a class, is last and has no colour.
    this.classes = [...counts.keys()].map(label => ({ label, text: this.labels[label], count: counts[label] }))
      .sort((a, b) => (a.text === "") - (b.text === "") || b.count - a.count);
    this.color = new Array(this.labels.length).fill(OTHER);
    this.classes.slice(0, COLORS.length).forEach((each, rank) => {
      if (each.text !== "" && this.labels.length > 1) this.color[each.label] = COLORS[rank];
    });
    this.shown = Int32Array.from({ length: this.count }, (_, row) => row);
    this.inside = new Uint8Array(this.count).fill(1);
    this.places = null;
  }

  static async load(kind) {
    return new Rows(kind, await get(`/rows/${kind}`));
  }

  nameOf(row) { return this.names[this.name[row]]; }

  labelOf(row) { return this.labels[this.label[row]]; }

  colorOf(row) { return this.color[this.label[row]]; }

  // Keep rows whose name has the text in it, of one class (-1: of any), and of these images (null: of all).
  filter(text, label, images) {
    const words = text.toLowerCase().trim();
    const fits = this.lower.map(name => name.includes(words));
    const shown = [];
    for (let row = 0; row < this.count; row++) {
      const keep = fits[this.name[row]] && (label < 0 || this.label[row] === label)
        && (!images || images.has(this.image[row]));
      this.inside[row] = keep ? 1 : 0;
      if (keep) shown.push(row);
    }
    this.shown = Int32Array.from(shown);
  }

  // The row of an image, or of an object in it; undefined where it has none.
  find(image, object) {
    if (!this.places) {
      this.places = new Map();
      for (let row = 0; row < this.count; row++) this.places.set(`${this.image[row]} ${this.object[row]}`, row);
    }
    return this.places.get(`${image} ${object}`);
  }
}

// The selected images, and who wants to know of changes.
export class Selection extends EventTarget {
  images = new Set();

  has(image) { return this.images.has(image); }

  toggle(image) {
    if (!this.images.delete(image)) this.images.add(image);
    this.changed();
  }

  add(images) {
    for (const image of images) this.images.add(image);
    this.changed();
  }

  clear() {
    this.images.clear();
    this.changed();
  }

  changed() { this.dispatchEvent(new Event("change")); }
}
