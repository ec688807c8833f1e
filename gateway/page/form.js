// The form of a wish: its fields follow the server's schema, and a reload finds them as they were.

import { byId, element } from "./dom.js";
import { integer, parse, write } from "./json.js";
import { tab } from "./memory.js";
import { ratioOf, valueOf } from "./schema.js";

const NAME = "form";
const TAKEN = "taken";
// Those with a place of their own; `previews` is the page's to ask for, and the last is of no effect.
const PLACES = { aspect_ratio: "field-shape", num_outputs: "field-count", num_inference_steps: "field-steps", seed: "field-seed" };
const NOT_SHOWN = ["prompt", "previews", "max_sequence_length"];
const WORDS = {
  aspect_ratio: "Shape",
  num_outputs: "Images",
  num_inference_steps: "Steps",
  seed: "Seed",
  guidance_scale: "Guidance",
  output_format: "File format",
  output_quality: "Quality",
  negative_prompt: "Keep out",
  prompt_weighting: "Read (weights)1.3 in prompts",
};
const PLACEHOLDERS = { num_inference_steps: "model’s own", guidance_scale: "model’s own", seed: "random", model: "the first" };
const MOST_SEGMENTS = 8;

export class Form {
  #form = byId("wish");
  #prompt = byId("prompt");
  #inputs = new Map();
  /** By name, what is written in the fields, and what is to be in those that have not come yet. */
  #held = remembered(NAME);
  /** An earlier input as it was, until the fields come: no text says by itself whether it is a number. */
  #taken = remembered(TAKEN);

  constructor({ submit }) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      const input = this.read();
      if (input) submit(input);
    });
    this.#form.addEventListener("input", (event) => {
      this.#mark(event.target.name, "");
      this.#keep(this.#texts());
    });
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.#form.requestSubmit();
      }
    });
    this.#fill(this.#held);
    // As it was remembered, a long one is its digits.
    if ("seed" in this.#taken) this.#taken.seed = integer(this.#taken.seed);
  }

  get isComplete() {
    return this.#inputs.size > 0;
  }

  /** Build the fields that the server's inputs need. */
  offer(inputs) {
    this.#inputs = inputs;
    for (const place of [...Object.values(PLACES), "field-more"]) byId(place).replaceChildren();
    for (const input of inputs.values()) {
      if (NOT_SHOWN.includes(input.name)) continue;
      byId(PLACES[input.name] ?? "field-more").append(field(input));
    }
    byId("field-hint").hidden = true;
    byId("more").hidden = byId("field-more").childElementCount === 0;
    this.#fill(this.#held);
    this.#expect({});
  }

  /** The input as it is to be sent; null where something is wrong, which is then said beside its field. */
  read() {
    const texts = this.#texts();
    const input = { ...this.#taken };
    const problems = [];
    if (!texts.prompt?.trim()) problems.push({ input: "prompt", words: "Say what the picture should show." });
    else input.prompt = texts.prompt;
    for (const [name, described] of this.#inputs) {
      if (!(name in texts) || name === "prompt") continue;
      try {
        const value = valueOf(described, texts[name]);
        if (value !== undefined && value !== described.fallback) input[name] = value;
      } catch (error) {
        if (!(error instanceof RangeError)) throw error;
        problems.push({ input: name, words: error.message });
      }
    }
    if (this.#inputs.has("previews")) input.previews = true;
    this.complain(problems);
    return problems.length ? null : input;
  }

  /** Say beside each field what is wrong with it, and go to the first. False where a problem has no field. */
  complain(problems) {
    this.#form.querySelectorAll("[data-problem]").forEach((place) => this.#mark(place.dataset.problem, ""));
    const placed = problems.filter(({ input, words }) => this.#mark(input, words));
    if (placed.length) {
      const first = this.#form.querySelector(`[name="${CSS.escape(placed[0].input)}"]`);
      first.closest("details")?.setAttribute("open", "");
      first.focus();
    }
    return placed.length === problems.length;
  }

  /** Take over an earlier prediction's input, with the seed of one of its pictures. */
  take(input, seed) {
    const { num_outputs: count, previews, max_sequence_length: ignored, ...same } = input;
    const taken = Object.entries({ ...same, seed }).filter(([, value]) => value !== null && value !== undefined);
    this.#keep(Object.fromEntries(taken.map(([name, value]) => [name, String(value)])));
    if (!this.isComplete) this.#expect(Object.fromEntries(taken));
    this.#form.reset();
    this.#fill(this.#held);
    this.complain([]);
    this.#prompt.focus({ preventScroll: true });
    this.#form.scrollIntoView({ block: "start" });
  }

  #mark(name, words) {
    const place = [...this.#form.querySelectorAll("[data-problem]")].find((found) => found.dataset.problem === name);
    if (!place) return false;
    place.textContent = words;
    place.hidden = !words;
    for (const control of this.#form.elements) {
      if (control.name === name) control.setAttribute("aria-invalid", String(Boolean(words)));
    }
    return true;
  }

  #texts() {
    const texts = Object.fromEntries(new FormData(this.#form));
    for (const control of this.#form.elements) {
      if (control.type === "checkbox") texts[control.name] = String(control.checked);
    }
    const coming = Object.entries(this.#held).filter(([name]) => !this.#form.elements.namedItem(name));
    return { ...Object.fromEntries(coming), ...texts };
  }

  #keep(texts) {
    this.#held = texts;
    tab.set(NAME, write(texts));
  }

  #expect(taken) {
    this.#taken = taken;
    tab.set(TAKEN, write(taken));
  }

  #fill(values) {
    for (const [name, value] of Object.entries(values)) {
      const control = this.#form.elements.namedItem(name);
      if (!control) continue;
      if (control.type === "checkbox") control.checked = value === "true";
      else control.value = value;
    }
  }
}

function remembered(name) {
  try {
    return parse(tab.get(name) ?? "{}") ?? {};
  } catch {
    return {};
  }
}

function field(input) {
  const words = WORDS[input.name] ?? input.title;
  const problem = element("p", { className: "problem", id: `problem-${input.name}`, "data-problem": input.name, hidden: true });
  const options = segments(input);
  if (options) {
    const legend = element("legend", { title: input.description }, words);
    const group = element("div", { className: input.name === "aspect_ratio" ? "shapes" : "segments" });
    group.append(...options.map((option) => segment(input, option)));
    return element("fieldset", { className: "field" }, legend, group, problem);
  }
  const id = `input-${input.name}`;
  const control = single(input, id);
  control.setAttribute("aria-describedby", `hint-${input.name} problem-${input.name}`);
  const hint = element("span", { className: "unseen", id: `hint-${input.name}` }, input.description);
  const label = element("label", { htmlFor: id, title: input.description }, words);
  const kind = input.kind === "boolean" ? "field ticked" : "field";
  const inside = input.kind === "boolean" ? [control, label] : [label, control];
  return element("div", { className: kind }, ...inside, hint, problem);
}

/** The values that are few enough to lie side by side, or null. */
function segments(input) {
  if (input.name === "aspect_ratio" && input.choices) return input.choices;
  if (input.name !== "num_outputs" || input.kind !== "integer") return null;
  const count = input.most - input.least + 1n;
  return count > MOST_SEGMENTS ? null : Array.from({ length: Number(count) }, (_, at) => String(input.least + BigInt(at)));
}

function segment(input, value) {
  const checked = String(value) === String(input.fallback);
  const control = element("input", { type: "radio", name: input.name, value, checked, defaultChecked: checked });
  const children = [control];
  if (input.name === "aspect_ratio") {
    const drawing = element("span", { className: "shape", "aria-hidden": "true" });
    const ratio = ratioOf(value);
    drawing.style.setProperty("--width", Math.min(1, ratio).toFixed(3));
    drawing.style.setProperty("--height", Math.min(1, 1 / ratio).toFixed(3));
    children.push(drawing);
  }
  return element("label", {}, ...children, element("span", {}, String(value)));
}

function single(input, id) {
  const shared = { id, name: input.name };
  if (input.choices) {
    const options = input.choices.map((choice) => element("option", { value: choice, defaultSelected: choice === input.fallback }, choice));
    return element("select", shared, ...options);
  }
  if (input.kind === "boolean") return element("input", { ...shared, type: "checkbox", value: "true", defaultChecked: input.fallback === true });
  // Not type=number: it would round a long seed, and change with the wheel.
  const numeric = { integer: "numeric", number: "decimal" }[input.kind];
  const placeholder = PLACEHOLDERS[input.name] ?? "";
  const defaultValue = input.fallback === null ? "" : String(input.fallback);
  return element("input", { ...shared, type: "text", inputMode: numeric, placeholder, defaultValue, autocomplete: "off" });
}
