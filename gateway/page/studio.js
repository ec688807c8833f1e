// The stage: one wish at a time from the button to its pictures, over reloads, queues and dropped connections.

import * as api from "./api.js";
import { announce, byId } from "./dom.js";
import { follow } from "./follow.js";
import { integer, parse, write } from "./json.js";
import { tab } from "./memory.js";
import { Coming, seedOf } from "./picture.js";

const NAME = "running";
const UNPROCESSABLE = 422;
const TOO_MANY = 429;
const UNAVAILABLE = 503;
const UNAUTHORIZED = 401;

export class Studio {
  #model;
  #form;
  #gallery;
  #context;
  #run = null;
  #finished = null;
  #countdown = null;

  constructor({ model, form, gallery, context }) {
    this.#model = model;
    this.#form = form;
    this.#gallery = gallery;
    this.#context = context;
    byId("cancel").addEventListener("click", () => this.#cancel());
    byId("retry").addEventListener("click", () => this.#retry());
  }

  make(input) {
    if (!this.#run) this.#start(newId(), input);
  }

  /** Go on with what a reload interrupted. */
  resume() {
    try {
      const { id, input } = parse(tab.get(NAME) ?? "null") ?? {};
      if (!id) return;
      if (input.seed !== undefined) input.seed = integer(input.seed);
      this.#start(id, input);
    } catch {
      tab.forget(NAME);
    }
  }

  #start(id, input) {
    if (this.#finished) this.#gallery.putFirst(this.#finished);
    this.#finished = null;
    const count = Number(input.num_outputs ?? 1);
    const pictures = Array.from({ length: count }, (_, number) => new Coming(input, number, count));
    const run = { id, input, pictures, leaving: new AbortController(), lost: false, canceling: false };
    this.#run = run;
    tab.set(NAME, write({ id, input }));
    this.#gallery.leaveOut(id);
    byId("stage-pictures").replaceChildren(...pictures.map((picture) => picture.element));
    byId("stage-pictures").dataset.count = count;
    byId("stage").hidden = false;
    byId("stage").setAttribute("aria-busy", "true");
    this.#problem(null);
    this.#say(this.#inLine());
    this.#working(true);
    byId("stage").scrollIntoView({ block: "nearest" });
    announce(count > 1 ? `${count} images are being made.` : "The image is being made.");
    this.#follow(run);
  }

  async #follow(run) {
    const { signal } = run.leaving;
    try {
      for (;;) {
        try {
          const answer = await follow(run.id, run.input, { signal, tell: (event) => this.#hear(run, event) });
          await this.#finish(run, answer);
          return;
        } catch (error) {
          if (!(error instanceof api.Refused) || error.status !== UNAVAILABLE || !(await this.#isLoading())) throw error;
          this.#say("The model is not ready yet. This begins by itself as soon as it is.");
          await this.#model.untilServing(signal);
          this.#say(this.#inLine());
        }
      }
    } catch (error) {
      if (signal.aborted) this.#end(run, "Canceled");
      else this.#refuse(run, error);
    }
  }

  async #isLoading() {
    try {
      return ["starting", "dead", "setup_failed"].includes((await api.status()).state);
    } catch {
      return false;
    }
  }

  #hear(run, event) {
    if (this.#run !== run) return;
    if (event.kind === "lost") {
      if (!run.lost) announce("The connection is lost. The pictures go on being made.");
      run.lost = true;
      this.#say("The connection is lost. The server goes on, and this page looks for it again.");
      return;
    }
    if (run.lost) announce("The connection is back.");
    run.lost = false;
    const picture = run.pictures[event.image];
    if (event.kind === "started" || event.kind === "found") this.#say("Under way");
    if (event.kind === "progress" && picture) {
      picture.progress(event);
      const which = run.pictures.length > 1 ? `Image ${event.image + 1} of ${run.pictures.length}: step` : "Step";
      this.#say(`${which} ${event.step} of ${event.steps}`);
    }
    if (event.kind === "stored" && picture && !picture.isThere) {
      picture.show({ url: event.url, seed: integer(event.seed) }, this.#context);
      announce(run.pictures.length > 1 ? `Image ${event.image + 1} of ${run.pictures.length} is there.` : "The image is there.");
    }
  }

  async #finish(run, answer) {
    // An answer that came by its record lacks what the page knows, and one by the stream may lack the input.
    const whole = { ...answer, id: run.id, input: answer.input ?? run.input };
    const urls = Array.isArray(answer.output) ? answer.output : [];
    urls.forEach((url, k) => run.pictures[k]?.show({ url, seed: seedOf(whole, k) }, this.#context));
    this.#finished = urls.length ? whole : null;
    if (answer.status === "failed") {
      const words = answer.error ?? "The server does not say why.";
      this.#end(run, "");
      this.#problem({ title: urls.length ? "Not all pictures could be made" : "This could not be made", words, run, again: newId() });
    } else {
      this.#end(run, answer.status === "canceled" ? "Canceled" : took(answer));
      announce(answer.status === "canceled" ? "Canceled." : "All done.");
    }
  }

  #refuse(run, error) {
    this.#end(run, "");
    const { status, problems = [], retryAfter = null } = error;
    if (status === UNPROCESSABLE && problems.length && this.#form.complain(problems)) {
      announce(error.message);
      byId("stage").hidden = true;
      return;
    }
    const title = titleOf(error);
    this.#problem({ title, words: error.message, run, again: run.id, retryAfter: status === TOO_MANY ? (retryAfter ?? 5) : retryAfter });
  }

  #end(run, words) {
    run.pictures.forEach((picture) => picture.giveUp());
    this.#run = null;
    tab.forget(NAME);
    this.#say(words);
    byId("stage").setAttribute("aria-busy", "false");
    this.#working(false);
    this.#model.refresh();
  }

  async #cancel() {
    const run = this.#run;
    if (!run || run.canceling) return;
    run.canceling = true; // the button stays as it is, or it would lose the focus
    this.#say("Canceling");
    try {
      await api.cancel(run.id); // its events then say that it is over
    } catch {
      run.leaving.abort(); // it is not there yet, or out of reach
    }
  }

  #retry() {
    const { run, again } = this.#offer;
    if (!this.#run) this.#start(again, run.input);
  }

  #offer = null;

  /** Say what went wrong, and offer to try again; or, with null, take that back. */
  #problem(problem) {
    clearInterval(this.#countdown);
    byId("problem").hidden = problem === null;
    this.#offer = problem;
    if (problem === null) return;
    byId("problem-title").textContent = problem.title;
    byId("problem-words").textContent = problem.words;
    this.#count(problem.retryAfter ?? null);
    announce(`${problem.title}. ${problem.words}`);
    byId("stage").hidden = false;
    byId("problem").scrollIntoView({ block: "nearest" });
    if (document.activeElement === document.body) byId("retry").focus({ preventScroll: true });
  }

  #count(retryAfter) {
    const line = byId("problem-wait");
    line.hidden = retryAfter === null;
    if (retryAfter === null) return;
    const until = performance.now() + retryAfter * 1000;
    const show = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      line.textContent = left > 0 ? `Likely to work in ${left} s.` : "Likely to work now.";
      if (left <= 0) clearInterval(this.#countdown);
    };
    this.#countdown = setInterval(show, 500);
    show();
  }

  #inLine() {
    const waiting = this.#model.now?.queue?.waiting ?? 0;
    return waiting > 0 ? `In line, ${waiting} before this` : "In line";
  }

  #say(words) {
    byId("stage-line").textContent = words;
  }

  #working(is) {
    const hadFocus = document.activeElement === byId("cancel");
    byId("cancel").hidden = !is;
    byId("generate").setAttribute("aria-disabled", String(is));
    byId("generate").querySelector("span").textContent = is ? "Generating" : "Generate";
    if (!is && hadFocus) byId("generate").focus({ preventScroll: true });
  }
}

function titleOf({ status }) {
  if (status === TOO_MANY) return "There is no room just now";
  if (status === UNAUTHORIZED) return "A key is needed";
  if (status === UNPROCESSABLE) return "The model cannot take this";
  return "The server cannot do this now";
}

function took({ metrics }) {
  const seconds = metrics?.predict_time;
  return typeof seconds === "number" ? `Made in ${seconds.toFixed(1)} s` : "";
}

/** A random UUID. The browser's own function is for pages over HTTPS and on this machine only. */
function newId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const octets = crypto.getRandomValues(new Uint8Array(16));
  octets[6] = (octets[6] & 0x0f) | 0x40;
  octets[8] = (octets[8] & 0x3f) | 0x80;
  const digits = Array.from(octets, (octet) => octet.toString(16).padStart(2, "0")).join("");
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
