// Earlier predictions from the bucket, newest first, a page at a time.

import * as api from "./api.js";
import { announce, byId } from "./dom.js";
import { thumbnail } from "./picture.js";

const PAGE = 24;
// Pages without a picture, of failed predictions only, are passed over, but not for ever.
const MOST_EMPTY_PAGES = 4;

export class Gallery {
  #list = byId("gallery-list");
  #more = byId("gallery-more");
  #problem = byId("gallery-problem");
  #context;
  #shown = new Set();
  #before = null;
  #loading = false;

  constructor(context) {
    this.#context = context;
    this.#more.addEventListener("click", () => this.load());
  }

  /** Leave a prediction out: it is on the stage. */
  leaveOut(id) {
    this.#shown.add(id);
  }

  /** Put one that was on the stage in front. */
  putFirst(answer) {
    this.#list.prepend(...this.#figures(answer));
    this.#settle();
  }

  async load() {
    if (this.#loading) return;
    this.#loading = true;
    this.#more.disabled = true;
    this.#problem.hidden = true;
    const had = this.#list.childElementCount;
    try {
      for (let page = 0; page < MOST_EMPTY_PAGES && this.#list.childElementCount === had; page += 1) {
        const { predictions, before } = await api.recent(PAGE, this.#before);
        this.#before = before;
        const fresh = predictions.filter(({ id }) => !this.#shown.has(id));
        this.#list.append(...fresh.flatMap((answer) => this.#figures(answer)));
        if (!before) break;
      }
      this.#more.hidden = !this.#before;
      if (had > 0) this.#goTo(had);
    } catch (error) {
      this.#problem.textContent = `The earlier pictures could not be listed. ${error.message}`;
      this.#problem.hidden = false;
      this.#more.hidden = false;
    } finally {
      this.#loading = false;
      this.#more.disabled = false;
      this.#settle();
    }
  }

  #figures(answer) {
    this.#shown.add(answer.id);
    if (!Array.isArray(answer.output) || typeof answer.input?.prompt !== "string") return [];
    return answer.output.map((_, k) => thumbnail({ answer, k }, this.#context));
  }

  /** With the button gone or far below, whoever uses the keyboard goes on at the first of the new ones. */
  #goTo(had) {
    announce(`${this.#list.childElementCount - had} more pictures.`);
    this.#list.children[had]?.querySelector("button").focus({ preventScroll: true });
  }

  #settle() {
    const { childElementCount: count } = this.#list;
    byId("gallery").hidden = count === 0 && this.#more.hidden && this.#problem.hidden;
    this.#more.querySelector("span").textContent = count === 0 ? "Load earlier pictures" : "Load more";
    document.body.classList.toggle("has-pictures", count > 0);
  }
}
