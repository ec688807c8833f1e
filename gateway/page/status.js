// In which state the model is: asked for often while that changes, seldom while it serves, and not unseen.

import * as api from "./api.js";
import { announce, bytes, byId, element, wait } from "./dom.js";
import { Waterfall, progress, summary } from "./waterfall.js";

const SOON_MS = 700;
const LATE_MS = 5000;
const READY_MS = 15_000;
const BUSY_MS = 2000;
const REDRAW_MS = 200;

const PILLS = {
  starting: "Loading the model",
  ready: "Ready",
  busy: "Busy",
  setup_failed: "Could not load",
  dead: "Starting again",
  stopping: "Stopping",
  stopped: "Stopped",
  unreachable: "No answer",
};
// A title, what it means, and whether it is the server that is in trouble.
const PANELS = {
  starting: ["The model is loading", "Its weights come from the bucket and are checked on the way. Write your prompt meanwhile.", false],
  setup_failed: ["The model could not be loaded", "The server tries again by itself. This is the reason it gives:", true],
  dead: ["The model’s process has ended", "It is being started again. Pictures that were under way may be reported as failed.", true],
  stopping: ["This server is about to stop", "It finishes what it runs and takes nothing new. Another may take its place under this address.", false],
  stopped: ["This server has stopped", "It will not serve again by itself. Its log says why.", true],
  unreachable: ["The server does not answer", "Is this device on the network? The page goes on trying.", true],
};

const serves = ({ state }) => state === "ready" || state === "busy";

export class ModelStatus extends EventTarget {
  now = null;
  #seenAt = 0;
  #waterfall = new Waterfall();
  #nudge = new AbortController();

  constructor() {
    super();
    byId("trouble-waterfall").append(this.#waterfall.element);
    document.addEventListener("visibilitychange", () => this.refresh());
    document.addEventListener("keychange", () => this.refresh()); // more is told to those who have one
    setInterval(() => this.#draw(), REDRAW_MS);
    this.#poll();
  }

  get serving() {
    return this.now !== null && serves(this.now);
  }

  get needsKey() {
    return this.now?.needs_key ?? false;
  }

  /** Ask now rather than later. */
  refresh() {
    this.#nudge.abort();
    this.#nudge = new AbortController();
  }

  /** Returns once requests are served. Throws when the signal is aborted. */
  async untilServing(signal) {
    this.refresh();
    for (;;) {
      await new Promise((resolve, reject) => {
        this.addEventListener("asked", resolve, { once: true });
        signal.addEventListener("abort", () => reject(signal.reason), { once: true });
        if (signal.aborted) reject(signal.reason);
      });
      if (this.serving) return;
    }
  }

  async #poll() {
    let pause = SOON_MS;
    for (;;) {
      const before = this.now?.state;
      try {
        this.now = await api.status();
      } catch {
        this.now = { ...this.now, state: "unreachable" };
      }
      this.#seenAt = performance.now();
      const changed = this.now.state !== before;
      if (changed) this.#tell(before);
      this.#draw();
      this.dispatchEvent(new CustomEvent("asked", { detail: { changed } }));
      // A live waterfall is worth asking for often; a server in trouble is not.
      const calm = this.now.state === "starting" && this.now.cold_start ? 1500 : LATE_MS;
      if (this.serving) pause = this.now.state === "ready" ? READY_MS : BUSY_MS;
      else pause = changed ? SOON_MS : Math.min(pause * 1.4, calm);
      await wait(document.hidden ? 4 * pause : pause, this.#nudge.signal).catch(() => {});
    }
  }

  #tell(before) {
    const { state } = this.now;
    byId("pill").dataset.state = state;
    byId("pill-words").textContent = PILLS[state] ?? state;
    if (before !== undefined || !this.serving) announce(this.serving ? "The model is ready." : (PANELS[state]?.[0] ?? state));
    const panel = byId("trouble");
    panel.hidden = this.serving;
    if (this.serving) return;
    const [title, words, bad] = PANELS[state] ?? [state, "", true];
    byId("trouble-title").textContent = title;
    byId("trouble-words").textContent = words;
    panel.classList.toggle("bad", bad);
  }

  #draw() {
    if (this.now === null) return;
    const since = (performance.now() - this.#seenAt) / 1000;
    const { state, reason, cold_start: coldStart } = this.now;
    if (this.serving) {
      this.#drawFold(coldStart);
      return;
    }
    byId("trouble-reason").hidden = !reason;
    byId("trouble-reason").textContent = reason ?? "";
    // Until the next start writes its own, there is the record of the one before.
    const draws = coldStart?.phases?.length && coldStart.ready_after_s === null && ["starting", "setup_failed"].includes(state);
    if (draws) this.#waterfall.show(coldStart, state === "starting" ? since : 0);
    byId("trouble-waterfall").hidden = !draws;
    this.#drawMeter(state, coldStart);
    byId("fold").hidden = true;
  }

  #drawMeter(state, coldStart) {
    const meter = byId("trouble-meter");
    meter.hidden = !["starting", "dead"].includes(state);
    const known = state === "starting" ? progress(coldStart) : null;
    if (known) meter.value = known.fraction;
    else meter.removeAttribute("value");
    byId("trouble-amount").textContent = known?.words ?? "";
  }

  #drawFold(coldStart) {
    const fold = byId("fold");
    fold.hidden = !coldStart;
    if (!coldStart || fold.dataset.drawn === coldStart.started_at + coldStart.ready_after_s) return;
    fold.dataset.drawn = coldStart.started_at + coldStart.ready_after_s;
    const drawing = new Waterfall();
    drawing.show(coldStart);
    const counters = Object.entries(coldStart.counters ?? {}).filter(([name]) => ["requests", "retries", "hedges", "landed_bytes"].includes(name));
    const counted = counters.map(([name, amount]) => (name === "landed_bytes" ? `${bytes(amount)} verified` : `${amount} ${name}`));
    byId("fold-content").replaceChildren(
      element("p", {}, summary(coldStart)),
      drawing.element,
      counted.length ? element("p", { className: "soft" }, counted.join(" · ")) : "",
    );
  }
}
