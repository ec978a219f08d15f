// The page as a whole: what is shown, the filter, the legend, and the selection.

import { choose, counted, get, grouped, make, post, setVersion, thumbnail } from "/page/api.js";
import { Detail } from "/page/detail.js";
import { Gallery } from "/page/gallery.js";
import { PointMap } from "/page/map.js";
import { COLORS, OTHER, Rows, Selection } from "/page/rows.js";

const at = id => document.getElementById(id);
const selection = new Selection(), loaded = {};
let state, rows, view = "gallery", kind, method, only = null, gallery, maps, detail, lasso = false;

async function start() {
  history.replaceState(null, "", "/"); // the token need not stay in sight
  state = await get("/state");
  setVersion(state.version);
  document.title = `${state.data} · foveola explore`;
  at("data").textContent = state.data;
  at("data").title = state.data;
  method = state.map;
  kind = Object.keys(state.rows)[0];
  choose(at("view"), [["gallery", "Gallery"], ["map", "Map"]], view, show);
  choose(at("kind"), Object.keys(state.rows).map(each => [each, each === "images" ? "Images" : "Objects"]), kind, load);
  at("kind").hidden = Object.keys(state.rows).length < 2;
  gallery = new Gallery(at("gallery"), selection, open);
  detail = new Detail(at("detail"), state, selection, { closed, found, step, sizeOf });
  at("filter").addEventListener("input", () => { clearTimeout(filter.later); filter.later = setTimeout(filter, 120); });
  at("label").addEventListener("change", filter);
  at("size").addEventListener("input", () => gallery.resize(Number(at("size").value)));
  selection.addEventListener("change", showSelection);
  addEventListener("keydown", key);
  await load(kind);
}

async function load(each) {
  kind = each;
  loaded[kind] ||= await Rows.load(kind);
  rows = loaded[kind];
  const named = rows.classes.filter(one => one.text !== "");
  at("label").replaceChildren(make("option", { value: "-1" }, "All classes"),
    ...named.map(one => make("option", { value: one.label }, `${one.text} (${grouped(one.count)})`)));
  at("label-field").hidden = named.length < 2;
  filter();
}

function filter() {
  rows.filter(at("filter").value, Number(at("label").value), only);
  const all = rows.shown.length === rows.count;
  at("count").textContent = all ? counted(rows.count, kind) : `${grouped(rows.shown.length)} of ${counted(rows.count, kind)}`;
  gallery.show(rows, ["No name and class fits the filter. ",
    make("button", { type: "button", class: "link", onclick: clearFilter }, "Show all")]);
  if (view === "map") showMaps();
}

function clearFilter() {
  at("filter").value = "";
  at("label").value = "-1";
  only = null;
  filter();
  showSelection();
}

function show(which) {
  view = which;
  at("gallery").hidden = view !== "gallery";
  at("maps").hidden = view !== "map";
  at("size-field").hidden = view !== "gallery";
  if (view === "map") showMaps();
  else gallery.layout();
}

// -- maps ------------------------------------------------------------------------------------------------------

function showMaps() {
  if (!maps) {
    const how = make("div", { class: "segments", role: "radiogroup", "aria-label": "How the map is made" });
    choose(how, state.methods.map(each => [each, each === "umap" ? "UMAP" : "PCA"]), method, each => { method = each; showMaps(); });
    const tool = make("div", { class: "segments", role: "radiogroup", "aria-label": "What dragging does" });
    choose(tool, [["move", "Move"], ["lasso", "Lasso"]], "move", each => { lasso = each === "lasso"; maps.forEach(map => { map.lassoing = lasso; }); });
    const fit = make("button", { type: "button", class: "plain", onclick: () => maps.forEach(map => map.fit()) }, "Show all");
    const legend = make("div", { id: "legend", "aria-label": "Classes" });
    const side = make("div", { class: "sides" });
    at("maps").replaceChildren(make("div", { class: "row" }, state.methods.length > 1 && how, tool, fit,
      make("span", { class: "hint" }, "Wheel zooms. Shift and drag draws a lasso.")), side, legend);
    maps = state.sides.map((each, i) => new PointMap(side, i, state.sides.length > 1 ? each.name : "", { selection, open, hovered }));
  }
  showLegend();
  maps.forEach(map => map.show(rows, method));
  maps.forEach(map => map.later());
}

function showLegend() {
  const chosen = Number(at("label").value);
  const named = rows.classes.filter(each => each.text !== "");
  const entry = (color, text, count, label) => {
    const dot = make("i", { class: "dot" });
    dot.style.background = color;
    return make(label === null ? "span" : "button", {
      type: label === null ? null : "button", class: "entry", "aria-pressed": label === null ? null : String(label === chosen),
      onclick: () => { if (label === null) return; at("label").value = label === chosen ? "-1" : label; filter(); },
    }, dot, text, make("small", {}, grouped(count)));
  };
  const first = named.slice(0, COLORS.length), others = rows.count - first.reduce((sum, each) => sum + each.count, 0);
  at("legend").replaceChildren(...(named.length < 2 ? [] : [
    ...first.map(each => entry(rows.color[each.label], each.text, each.count, each.label)),
    ...(others ? [entry(OTHER, named.length > first.length ? `${named.length - first.length} other classes` : "no class", others, null)] : []),
  ]));
}

function hovered(row, event) {
  const box = at("hover");
  box.hidden = row === null;
  if (row === null) return;
  if (box.dataset.row !== `${kind} ${row}`) {
    box.dataset.row = `${kind} ${row}`;
    box.replaceChildren(make("img", { src: thumbnail(rows.image[row], rows.object[row]), alt: "" }),
      make("span", {}, rows.labelOf(row) || rows.nameOf(row).split("/").pop()));
  }
  const left = event.clientX + 16, top = event.clientY + 16;
  box.style.left = `${left + 170 > innerWidth ? event.clientX - 176 : left}px`;
  box.style.top = `${top + 190 > innerHeight ? event.clientY - 190 : top}px`;
}

// -- the open image --------------------------------------------------------------------------------------------

function open(row) {
  document.body.classList.add("open");
  detail.row = row;
  detail.open(rows.image[row], rows.object[row]);
}

function closed() {
  document.body.classList.remove("open");
  maps?.forEach(map => map.mark([]));
  (view === "map" ? maps[0].canvas : gallery.inner).focus({ preventScroll: true });
}

// Open the next row that is shown; from an image that was found, from its own row on.
function step(by) {
  const here = rows.find(detail.about.image, -1) ?? detail.row;
  const now = rows.shown.indexOf(rows.image[detail.row] === detail.about.image ? detail.row : here);
  const next = Math.min(Math.max(now + by, 0), rows.shown.length - 1);
  gallery.goTo(next);
  open(rows.shown[next]);
}

function sizeOf(image) {
  const each = loaded[kind], row = each.find(image, -1) ?? each.image.indexOf(image);
  return row >= 0 ? [each.width[row], each.height[row]] : [1, 1];
}

function found(image, question, answers) {
  maps?.forEach((map, side) => {
    const hits = answers[side].hits || [];
    const asked = rows.find(image, kind === "objects" ? question.object ?? -1 : -1);
    const places = hits.map(hit => rows.find(hit.image_index, kind === "objects" ? hit.object : -1));
    map.mark([asked, ...places].filter(row => row !== undefined));
  });
}

function key(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
  if (event.key === "Escape" && !at("detail").hidden) detail.close();
  else if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "/") { at("filter").focus(); event.preventDefault(); }
  else if (!at("detail").hidden && event.key.toLowerCase() === "n") step(1);
  else if (!at("detail").hidden && event.key.toLowerCase() === "p") step(-1);
}

// -- the selection ---------------------------------------------------------------------------------------------

function showSelection() {
  const footer = at("selection"), count = selection.images.size;
  footer.hidden = !count;
  if (!count) { if (only) clearFilter(); return; }
  const button = (text, onclick, pressed = null) => make("button", { type: "button", class: "plain", onclick, "aria-pressed": pressed }, text);
  footer.replaceChildren(make("strong", {}, `${counted(count, "images")} selected`),
    button("Show these only", () => { only = only ? null : selection.images; filter(); showSelection(); }, String(Boolean(only))),
    button("Clear", () => selection.clear()),
    button("Download list", download),
    make("span", { id: "said", "aria-live": "polite" }));
}

async function download() {
  const said = at("said");
  try {
    const made = await post("/selection", { images: [...selection.images] });
    const link = make("a", { href: URL.createObjectURL(new Blob([made.text], { type: "text/plain" })), download: "selection.txt" });
    link.click();
    URL.revokeObjectURL(link.href);
    if (made.data) said.replaceChildren("Read it with ", make("code", {}, `data='${made.data}'`), " beside the file.");
    else said.textContent = `No data string reads this list: ${made.why}.`;
  } catch (error) {
    said.textContent = error.message;
  }
}

start().catch(error => at("main").replaceChildren(make("p", { class: "problem" }, error.message)));
