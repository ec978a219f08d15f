// Drawing many points: their stamps are blended into the pixels of a canvas, one by one. 100,000 points take a
// few milliseconds on one core, whatever the graphics card, and overlap shows how dense they are.

// Coverage of the pixels around a point by a disc, row by row: [dx, dy, fraction of 256] of each.
function stamp(radius, alpha) {
  const reach = Math.ceil(radius), found = [];
  for (let dy = -reach; dy <= reach; dy++) {
    for (let dx = -reach; dx <= reach; dx++) {
      const share = Math.min(Math.max(radius + 0.5 - Math.hypot(dx, dy), 0), 1) * alpha;
      if (share > 0.02) found.push([dx, dy, Math.round(256 * share)]);
    }
  }
  return found;
}

export const rgb = text => [1, 3, 5].map(at => parseInt(text.slice(at, at + 2), 16));

export class Pixels {
  constructor(context, width, height, background) {
    Object.assign(this, { context, width, height });
    this.image = context.createImageData(width, height);
    this.words = new Int32Array(this.image.data.buffer);
    const [r, g, b] = background;
    this.words.fill(255 << 24 | b << 16 | g << 8 | r);
  }

  // Draw points x, y (pixels) whose entry in `layer` is `which`; `colors` are [r, g, b] of `kinds[i]`.
  draw(x, y, layer, which, kinds, colors, radius, alpha) {
    const { words, width, height } = this, marks = stamp(radius, alpha), reach = Math.ceil(radius);
    const offsets = Int32Array.from(marks, ([dx, dy]) => dy * width + dx);
    const shares = Int32Array.from(marks, mark => mark[2]);
    const red = Int32Array.from(colors, c => c[0]), green = Int32Array.from(colors, c => c[1]);
    const blue = Int32Array.from(colors, c => c[2]);
    for (let i = 0; i < x.length; i++) {
      if (layer[i] !== which) continue;
      const px = Math.round(x[i]), py = Math.round(y[i]);
      if (px < reach || py < reach || px >= width - reach || py >= height - reach) continue;
      const kind = kinds[i], r = red[kind], g = green[kind], b = blue[kind], at = py * width + px;
      for (let j = 0; j < offsets.length; j++) {
        const where = at + offsets[j], share = shares[j], old = words[where];
        const or = old & 255, og = old >> 8 & 255, ob = old >> 16 & 255;
        words[where] = -0x1000000 | ob + ((b - ob) * share >> 8) << 16 | og + ((g - og) * share >> 8) << 8
          | or + ((r - or) * share >> 8);
      }
    }
  }

  show() { this.context.putImageData(this.image, 0, 0); }
}

// Whether points lie in a polygon: which of them, as indices.
export function within(x, y, polygon) {
  const xs = polygon.map(p => p[0]), ys = polygon.map(p => p[1]), found = [];
  const [left, right] = [Math.min(...xs), Math.max(...xs)], [top, bottom] = [Math.min(...ys), Math.max(...ys)];
  for (let i = 0; i < x.length; i++) {
    if (x[i] < left || x[i] > right || y[i] < top || y[i] > bottom) continue;
    let inside = false;
    for (let a = 0, b = polygon.length - 1; a < polygon.length; b = a++) {
      if (ys[a] > y[i] !== ys[b] > y[i] && x[i] < (xs[b] - xs[a]) * (y[i] - ys[a]) / (ys[b] - ys[a]) + xs[a]) {
        inside = !inside;
      }
    }
    if (inside) found.push(i);
  }
  return found;
}
