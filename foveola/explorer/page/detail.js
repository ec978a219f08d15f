// One image: what is asked of it, what each encoder makes of it, and what each finds most alike.

import { choose, counted, get, make, picture, post } from "/page/api.js";
import { Stage } from "/page/stage.js";

const LAYERS = [["", "Image"], ["pca", "Features"], ["attention", "Attention"], ["reads", "Patch reads"],
  ["similarity", "Like the patch"]];

export class Detail {
  constructor(parent, state, selection, doing) {
    Object.assign(this, { parent, state, selection, ...doing, question: {}, look: "", head: 0, strength: 0.75 });
    const kinds = new Set(state.sides.flatMap(side => side.kinds));
    this.find = ["images", "objects", "patches"].find(kind => kinds.has(kind)) || "images";
    this.masked = kinds.has("objects") || !kinds.has("crops");
    this.own = false;
    this.kinds = kinds;
    selection.addEventListener("change", () => this.check());
  }

  async open(image, object = -1) {
    const asked = this.opened = Symbol("opened");
    let about;
    try {
      about = await get(`/about/${image}`);
    } catch (error) {
      this.parent.replaceChildren(this.bar(null), make("p", { class: "problem" }, error.message));
      this.parent.hidden = false;
      return;
    }
    if (this.opened !== asked) return;
    this.about = about;
    this.parent.hidden = false;
    this.build();
    await this.ask(object >= 0 ? { object } : {});
  }

  close() {
    this.opened = null;
    this.parent.hidden = true;
    this.parent.replaceChildren();
    this.about = null;
    this.closed();
  }

  bar(about) {
    const button = (text, label, onclick) => make("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick }, text);
    this.box = about && make("input", { type: "checkbox", onchange: () => this.selection.toggle(about.image) });
    return make("div", { class: "bar" },
      make("div", { class: "name" },
        make("h2", { title: about?.name || "" }, about?.name || "This image cannot be shown"),
        about && make("p", {}, [about.label, `${about.width} × ${about.height}`,
          about.objects.length && counted(about.objects.length, "objects")].filter(Boolean).join(" · "))),
      about && make("label", { class: "tick" }, this.box, "Select"),
      about && button("‹", "Previous image (P)", () => this.step(-1)),
      about && button("›", "Next image (N)", () => this.step(1)),
      button("×", "Close (Esc)", () => this.close()));
  }

  build() {
    const { about, state } = this, several = state.sides.length > 1;
    this.stages = state.sides.map((_, side) => new Stage(side, about, several ? 300 : 360, { ask: q => this.ask(q) }));
    this.results = state.sides.map(() => make("div", { class: "hits" }));
    const column = (side, ...parts) => make("div", { class: "column" },
      several && make("h3", { title: side.name }, side.name), parts);
    const able = state.sides.some(side => !side.why);
    this.asking = make("p", { class: "asking" });
    this.parent.replaceChildren(this.bar(about),
      make("div", { class: "columns" }, state.sides.map((side, i) => column(side, this.stages[i].frame, this.stages[i].note))),
      able ? this.lookRow() : make("p", { class: "problem" }, state.sides[0].why,
        " Patches, boxes and layers that need it are switched off; what the features hold can be asked."),
      this.askRow(),
      make("div", { class: "columns" }, state.sides.map((side, i) => column(side, this.results[i]))));
    this.check();
    this.parent.scrollTop = 0;
  }

  lookRow() {
    const layers = make("div", { class: "segments", role: "radiogroup", "aria-label": "Layer" });
    choose(layers, LAYERS, this.look, what => { this.look = what; this.relook(); });
    const heads = Math.max(...this.state.sides.map(side => side.heads));
    const head = make("select", { "aria-label": "Head of the attention", onchange: () => { this.head = Number(head.value); this.relook(); } },
      make("option", { value: "0" }, "all heads"),
      Array.from({ length: heads }, (_, i) => make("option", { value: i + 1 }, `head ${i + 1}`)));
    head.value = this.head;
    this.headField = head;
    const strength = make("input", { type: "range", min: "0", max: "1", step: "0.05", value: this.strength,
      "aria-label": "How much the layer covers", oninput: () => {
        this.strength = Number(strength.value);
        this.stages.forEach(stage => { stage.layer.style.opacity = this.strength; });
      } });
    this.strengthField = make("label", { class: "slider" }, make("span", {}, "Cover"), strength);
    const row = make("div", { class: "row" }, make("span", { class: "what" }, "Show"), layers, head, this.strengthField);
    this.relook();
    return row;
  }

  relook() {
    this.headField.hidden = !["attention", "reads"].includes(this.look);
    this.strengthField.hidden = !this.look;
    this.stages.forEach(stage => stage.look(this.look, this.head, this.strength));
  }

  askRow() {
    const lacking = kind => this.kinds.has(kind) ? "" : this.state.sides[0].lacking[kind] || `there are no ${kind}`;
    const find = make("div", { class: "segments", role: "radiogroup", "aria-label": "What is searched" });
    const objects = this.kinds.has("objects") || this.kinds.has("crops");
    choose(find, [["images", "Images", lacking("images")],
      ["objects", "Objects", objects ? "" : lacking("objects")],
      ["patches", "Patches", lacking("patches")]], this.find, kind => { this.find = kind; this.ask(this.question); });
    const read = make("div", { class: "segments", role: "radiogroup", "aria-label": "How objects are read" });
    choose(read, [["mask", "by their mask", ""], ["crop", "cut out", ""]], this.masked ? "mask" : "crop",
      how => { this.masked = how === "mask"; this.ask(this.question); });
    this.readField = make("div", { class: "row" }, make("span", { class: "what" }, "Read objects"), read);
    const own = make("input", { type: "checkbox", onchange: () => { this.own = own.checked; this.ask(this.question); } });
    own.checked = this.own;
    return make("div", { class: "question" },
      make("div", { class: "row" }, make("span", { class: "what" }, "Most alike"), find, this.readField,
        make("label", { class: "tick" }, own, "also in this image")),
      this.asking);
  }

  async ask(question) {
    const asked = this.sent = Symbol("sent");
    // A patch is best compared with patches, an object with objects: until a person says otherwise.
    this.question = question;
    const whole = !("point" in question || "box" in question || "object" in question);
    this.readField.hidden = whole && this.find !== "objects" || this.find === "patches";
    this.say(question, whole);
    this.stages.forEach(stage => stage.show(question, question.box || null));
    if (this.look === "reads" || this.look === "similarity") this.relook();
    this.results.forEach(result => result.setAttribute("aria-busy", "true"));
    const values = { ...question, image: this.about.image, find: this.find, masked: this.masked, own: this.own };
    let answers;
    try {
      answers = await post("/ask", values);
    } catch (error) {
      answers = this.state.sides.map(() => ({ error: error.message }));
    }
    if (this.sent !== asked) return;
    answers.forEach((answer, side) => {
      this.results[side].removeAttribute("aria-busy");
      this.stages[side].show(question, answer.asked || question.box || null);
      this.results[side].replaceChildren(...this.hits(answer));
    });
    this.found(this.about.image, question, answers);
  }

  say(question, whole) {
    const what = "object" in question ? this.about.objects[question.object]?.label || `object ${question.object + 1}`
      : "box" in question ? "the box" : "point" in question ? "the patch" : "the whole image";
    const parts = [make("span", {}, "Asked with "), make("strong", {}, what), "."];
    if (!whole) parts.push(" ", make("button", { type: "button", class: "link", onclick: () => this.ask({}) }, "Ask with the whole image"));
    else parts.push(" Click a patch, drag a box, or pick an object to ask with a part of it.");
    this.asking.replaceChildren(...parts);
  }

  hits(answer) {
    if (answer.error) return [make("p", { class: "problem" }, sentence(answer.error))];
    if (!answer.hits.length) return [make("p", { class: "empty" }, "Nothing else was found.")];
    return answer.hits.map((hit, rank) => {
      const [wide, high] = this.sizeOf(hit.image_index);
      const part = hit.patch || hit.object >= 0 ? hit.box : null;
      const shown = picture(hit.image_index, hit.patch ? -1 : hit.object, wide, high, part);
      return make("button", {
        type: "button", class: "hit", title: `${hit.name}\ncosine ${hit.similarity.toFixed(4)}`, "data-name": hit.name,
        onclick: event => event.ctrlKey || event.metaKey ? this.selection.toggle(hit.image_index)
          : this.open(hit.image_index, hit.patch ? -1 : hit.object),
      }, shown, make("span", { class: "caption" }, make("b", {}, String(rank + 1)), hit.similarity.toFixed(3),
        hit.label && make("span", { class: "label" }, hit.label)));
    });
  }

  check() {
    if (this.about && this.box) this.box.checked = this.selection.has(this.about.image);
  }
}

const sentence = text => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?)]$/.test(text) ? "" : ".");
