// Thumbnails of all rows that are shown, of which only those in sight are on the page.

import { make, picture } from "/page/api.js";

const GAP = 10, CAPTION = 24, AROUND = 2;

export class Gallery {
  constructor(parent, selection, open) {
    Object.assign(this, { parent, selection, open, size: 132, active: 0, tiles: new Map(), rows: null });
    this.inner = make("div", {
      class: "tiles", role: "listbox", tabindex: "0", "aria-multiselectable": "true",
      "aria-label": "Images: arrow keys move, Enter opens, Space selects",
      onkeydown: event => this.key(event), onclick: event => this.click(event),
      onfocus: () => this.mark(), onblur: () => this.mark(),
    });
    this.empty = make("div", { class: "empty", hidden: true });
    parent.append(this.inner, this.empty);
    parent.addEventListener("scroll", () => this.later(), { passive: true });
    new ResizeObserver(() => this.layout()).observe(parent);
    selection.addEventListener("change", () => this.mark());
  }

  show(rows, emptyText) {
    this.rows = rows;
    this.active = 0;
    this.empty.replaceChildren(...emptyText);
    this.empty.hidden = rows.shown.length > 0;
    this.parent.scrollTop = 0;
    this.clear();
    this.layout();
  }

  resize(size) {
    const first = Math.floor(this.parent.scrollTop / (this.high || 1)) * (this.columns || 1);
    this.size = size;
    this.layout();
    this.parent.scrollTop = Math.floor(first / this.columns) * this.high;
  }

  clear() {
    for (const tile of this.tiles.values()) tile.remove();
    this.tiles.clear();
  }

  layout() {
    const width = this.inner.clientWidth;
    if (!this.rows || !width) return;
    this.columns = Math.max(1, Math.floor((width + GAP) / (this.size + GAP)));
    this.cell = (width - GAP * (this.columns - 1)) / this.columns;
    this.high = this.cell + CAPTION + GAP;
    this.inner.style.height = `${Math.ceil(this.rows.shown.length / this.columns) * this.high}px`;
    this.draw(true);
  }

  later() {
    this.waiting ||= requestAnimationFrame(() => { this.waiting = 0; this.draw(false); });
  }

  draw(moved) {
    if (!this.columns || !this.parent.clientHeight) return;
    const { scrollTop, clientHeight } = this.parent, count = this.rows.shown.length;
    const from = Math.max(0, Math.floor(scrollTop / this.high) - AROUND) * this.columns;
    const to = Math.min(count, (Math.ceil((scrollTop + clientHeight) / this.high) + AROUND) * this.columns);
    for (const [index, tile] of this.tiles) {
      if (index >= from && index < to) continue;
      tile.querySelector("img").removeAttribute("src"); // what was not loaded yet need not be
      tile.remove();
      this.tiles.delete(index);
    }
    for (let index = from; index < to; index++) {
      const old = this.tiles.get(index), tile = old || this.tile(index);
      if (!old) { this.tiles.set(index, tile); this.inner.append(tile); }
      if (!old || moved) this.put(tile, index);
    }
    this.mark();
  }

  put(tile, index) {
    const x = (index % this.columns) * (this.cell + GAP), y = Math.floor(index / this.columns) * this.high;
    tile.style.transform = `translate(${x}px, ${y}px)`;
    tile.style.width = `${this.cell}px`;
  }

  tile(index) {
    const { rows } = this, row = rows.shown[index], label = rows.labelOf(row), name = rows.nameOf(row);
    const dot = make("i", { class: "dot" });
    dot.style.background = rows.colorOf(row);
    return make("div", { class: "tile", role: "option", id: `tile-${index}`, title: name, "data-index": index },
      picture(rows.image[row], rows.object[row], rows.width[row], rows.height[row]),
      make("span", { class: "check", title: "Select" }),
      make("span", { class: "caption" }, label && dot, label || name.split("/").pop()));
  }

  mark() {
    const focused = document.activeElement === this.inner;
    for (const [index, tile] of this.tiles) {
      tile.setAttribute("aria-selected", this.selection.has(this.rows.image[this.rows.shown[index]]));
      tile.classList.toggle("active", focused && index === this.active);
    }
    if (this.tiles.has(this.active)) this.inner.setAttribute("aria-activedescendant", `tile-${this.active}`);
  }

  click(event) {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    this.active = Number(tile.dataset.index);
    const row = this.rows.shown[this.active];
    if (event.target.closest(".check") || event.ctrlKey || event.metaKey) this.selection.toggle(this.rows.image[row]);
    else this.open(row);
    this.mark();
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.parent.clientHeight / this.high)) * this.columns;
    const last = this.rows.shown.length - 1;
    const to = { ArrowRight: this.active + 1, ArrowLeft: this.active - 1, ArrowDown: this.active + this.columns,
      ArrowUp: this.active - this.columns, PageDown: this.active + page, PageUp: this.active - page,
      Home: 0, End: last }[event.key];
    if (to === undefined && event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    if (last < 0) return;
    if (to !== undefined) this.goTo(Math.min(Math.max(to, 0), last));
    else if (event.key === "Enter") this.open(this.rows.shown[this.active]);
    else this.selection.toggle(this.rows.image[this.rows.shown[this.active]]);
  }

  goTo(index) {
    this.active = index;
    const top = Math.floor(index / this.columns) * this.high, bottom = top + this.high;
    if (top < this.parent.scrollTop) this.parent.scrollTop = top;
    else if (bottom > this.parent.scrollTop + this.parent.clientHeight) {
      this.parent.scrollTop = bottom - this.parent.clientHeight + GAP;
    }
    this.draw(false);
  }
}
