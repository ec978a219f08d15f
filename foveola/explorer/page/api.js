// Questions to the server, and elements of the page. Text goes in as text: nothing is ever parsed as HTML.

let version = "";

export const setVersion = text => { version = text; };

export async function get(path) {
  return read(await fetch(path));
}

export async function post(path, values) {
  const headers = { "Content-Type": "application/json" };
  return read(await fetch(path, { method: "POST", headers, body: JSON.stringify(values) }));
}

async function read(answer) {
  const type = answer.headers.get("Content-Type") || "";
  const value = type.startsWith("application/json") ? await answer.json() : null;
  if (!answer.ok) throw new Error(value?.error || "The page is not served any more: start foveola explore again.");
  return value;
}

// The points of a map as Float32Array, or null while they are computed.
export async function points(kind, side, method) {
  const answer = await fetch(`/map/${kind}/${side}/${method}`);
  if (answer.status === 202) return null;
  if (!answer.ok) throw new Error((await answer.json()).error);
  return new Float32Array(await answer.arrayBuffer());
}

export const thumbnail = (image, object = -1) =>
  `/thumbnail/${image}${object >= 0 ? `/${object}` : ""}?v=${version}`;

export const large = image => `/image/${image}?v=${version}`;

// An element with attributes, listeners (onclick: ...) and children; null and false are left out.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== false));
  return element;
}

// One of several choices, as buttons that arrow keys go through. `options` are [value, text, reason it is off].
export function choose(parent, options, value, changed) {
  const buttons = options.map(([each, text, off]) => make("button", {
    type: "button", role: "radio", disabled: Boolean(off), title: off || null, "data-value": each,
    onclick: () => { mark(each); changed(each); },
  }, text));
  const mark = chosen => buttons.forEach(button => {
    const on = button.dataset.value === String(chosen);
    button.setAttribute("aria-checked", on);
    button.tabIndex = on ? 0 : -1;
  });
  parent.onkeydown = event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const open = buttons.filter(button => !button.disabled);
    const next = open[(open.indexOf(document.activeElement) + step + open.length) % open.length];
    next.focus();
    next.click();
    event.preventDefault();
    event.stopPropagation();
  };
  mark(value);
  parent.replaceChildren(...buttons);
  return mark;
}

export const grouped = number => number.toLocaleString("en");

export const counted = (number, word) => `${grouped(number)} ${number === 1 ? word.replace(/s$/, "") : word}`;

// A square with a thumbnail in its own shape, and the box of what was found on it.
export function picture(image, object, width, height, box = null) {
  const long = Math.max(width, height) || 1;
  const inner = make("div", { class: "fit" });
  if (object < 0) {
    inner.style.width = `${100 * width / long}%`;
    inner.style.height = `${100 * height / long}%`;
  }
  const shown = make("img", { src: thumbnail(image, object), alt: "", draggable: "false", decoding: "async" });
  shown.addEventListener("error", () => inner.classList.add("broken"), { once: true });
  inner.append(shown);
  if (box && object < 0) inner.append(place(make("div", { class: "found" }), box));
  return make("div", { class: "square" }, inner);
}

// Lay an element over the part of its parent that a box of the unit square says.
export function place(element, [x0, y0, x1, y1]) {
  Object.assign(element.style, {
    left: `${100 * x0}%`, top: `${100 * y0}%`, width: `${100 * (x1 - x0)}%`, height: `${100 * (y1 - y0)}%`,
  });
  return element;
}
