// One picture: the place where it will be, its previews, itself, and what can be done with it.

import * as api from "./api.js";
import { copy, curlFor } from "./curl.js";
import { announce, button, byId, element } from "./dom.js";
import { integer } from "./json.js";
import { ratioOf } from "./schema.js";

const LONGEST_ALT = 240;
const COPIED_MS = 2000;

/** What a picture is to those who cannot see it: nobody knows more of it than what was asked for. */
export function altOf(prompt, which = "") {
  const words = prompt.trim().replace(/\s+/g, " ");
  const short = words.length > LONGEST_ALT ? `${words.slice(0, LONGEST_ALT).replace(/\s+\S*$/, "")} …` : words;
  return `Generated image${which}: ${short}`;
}

/** The input that gives this one picture again. */
export function inputAgain(input, seed) {
  const { previews, num_outputs: count, seed: first, ...same } = input;
  return seed === null ? same : { ...same, seed };
}

/** The seed of picture k: that of the first and k. */
export function seedOf(answer, k) {
  const first = integer(answer.metrics?.seed ?? answer.input?.seed);
  return first === null ? null : first + BigInt(k);
}

/** Buttons for a picture that is there; `context` is {again, needsKey()}. */
export function actions({ input, seed, url }, context) {
  return element(
    "div",
    { className: "actions" },
    seed === null ? null : button("Again with this seed", { symbol: "again", className: "quiet" }, () => context.again(input, seed)),
    button("Copy curl", { symbol: "copy", className: "quiet" }, (made) => copyCurl(made, inputAgain(input, seed), context.needsKey())),
    element("a", { className: "quiet", href: url, target: "_blank", rel: "noopener noreferrer" }, "Open"),
  );
}

async function copyCurl(made, input, needsKey) {
  const command = curlFor(input, needsKey);
  const words = made.querySelector("span");
  if (!(await copy(command))) {
    byId("curl-text").value = command;
    byId("curl-dialog").showModal();
    byId("curl-text").select();
    return;
  }
  announce("The curl command is on the clipboard.");
  words.textContent = "Copied";
  setTimeout(() => {
    words.textContent = "Copy curl";
  }, COPIED_MS);
}

/** A picture that comes about. */
export class Coming {
  #image = element("img", { alt: "", className: "preview", hidden: true });
  #meter = element("span", { className: "meter", role: "progressbar", "aria-valuemin": "0" });
  #caption = element("figcaption", {});
  #input;
  #number;
  #count;
  element;
  isThere = false;

  constructor(input, number, count) {
    this.#input = input;
    this.#number = number;
    this.#count = count;
    this.#meter.setAttribute("aria-label", count > 1 ? `Image ${number + 1} of ${count}` : "The image");
    const place = element("div", { className: "place" }, this.#image, this.#meter);
    this.element = element("figure", { className: "coming" }, place, this.#caption);
    this.element.style.setProperty("--ratio", ratioOf(input.aspect_ratio));
  }

  progress({ step, steps, preview }) {
    if (this.isThere) return;
    this.#meter.setAttribute("aria-valuemax", steps);
    this.#meter.setAttribute("aria-valuenow", step);
    this.#meter.setAttribute("aria-valuetext", `step ${step} of ${steps}`);
    this.#meter.style.setProperty("--done", step / steps);
    if (preview?.startsWith("data:image/")) {
      this.#image.src = preview;
      this.#image.style.setProperty("--blur", `${(12 * (1 - step / steps) + 2).toFixed(1)}px`);
      this.#image.hidden = false;
    }
  }

  async show({ url, seed }, context) {
    if (this.isThere) return;
    this.isThere = true;
    const which = this.#count > 1 ? `, ${this.#number + 1} of ${this.#count}` : "";
    const image = element("img", { src: url, alt: altOf(this.#input.prompt, which), className: "arriving" });
    const seedWords = seed === null ? null : element("span", { className: "seed" }, `Seed ${seed}`);
    this.#caption.replaceChildren(...[seedWords, actions({ input: this.#input, seed, url }, context)].filter(Boolean));
    try {
      await image.decode();
    } catch {
      this.#fail();
      return;
    }
    this.#meter.remove();
    this.#image.replaceWith(image);
    this.element.classList.replace("coming", "there");
  }

  /** It will not come any more. */
  giveUp() {
    if (!this.isThere) this.element.remove();
  }

  #fail() {
    this.#meter.replaceWith(element("p", { className: "problem" }, "The image is stored, and could not be shown here. Open it by its link."));
  }
}

/** A picture of an earlier prediction: `taken` is {answer, k}. Opens the viewer. */
export function thumbnail({ answer, k }, context) {
  const { input, output } = answer;
  const seed = seedOf(answer, k);
  const which = output.length > 1 ? `, ${k + 1} of ${output.length}` : "";
  const image = element("img", { alt: altOf(input.prompt, which), loading: "lazy", decoding: "async", src: output[k] });
  // A signed URL lasts for an hour or so; the page may be open for longer.
  image.addEventListener("error", () => renew(answer, k, image), { once: true });
  const open = element("button", { type: "button", className: "open", "aria-haspopup": "dialog" }, image);
  open.addEventListener("click", () => view(answer, k, seed, image.src, context));
  const words = element("span", { className: "words" }, input.prompt);
  const caption = element("figcaption", {}, words, seed === null ? null : element("span", { className: "seed" }, `Seed ${seed}`));
  const figure = element("figure", {}, open, caption);
  figure.style.setProperty("--ratio", ratioOf(input.aspect_ratio));
  return figure;
}

async function renew(answer, k, image) {
  try {
    const { output } = await api.prediction(answer.id);
    if (output?.[k]) image.src = output[k];
  } catch {
    // Its words stand in its place.
  }
}

function view(answer, k, seed, url, context) {
  const dialog = byId("viewer");
  const { input, metrics, created_at: created } = answer;
  const leave = (then) => (...values) => {
    dialog.close();
    then(...values);
  };
  byId("viewer-image").replaceChildren(element("img", { src: url, alt: altOf(input.prompt) }));
  byId("viewer-prompt").textContent = input.prompt;
  const facts = [
    ["Seed", seed],
    ["Shape", input.aspect_ratio],
    ["Steps", input.num_inference_steps],
    ["Keep out", input.negative_prompt],
    ["Model", metrics?.model_version?.slice(0, 12)],
    ["Made", created && new Date(created).toLocaleString()],
  ];
  byId("viewer-facts").replaceChildren(
    ...facts
      .filter(([, value]) => value !== null && value !== undefined && value !== "")
      .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))),
  );
  byId("viewer-actions").replaceChildren(actions({ input, seed, url }, { ...context, again: leave(context.again) }));
  dialog.showModal();
}
