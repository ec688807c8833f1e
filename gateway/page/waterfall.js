// A cold start's phases as bars on one clock: solid where READY waited, in motion while it goes on.

import { bytes, element, seconds } from "./dom.js";

const NAMES = {
  manifest: "Find the model",
  clients: "Connect",
  imports: "Load libraries",
  bytes: "Read the weights",
  verification: "Check every byte",
  build: "Build the pipeline",
  compiled: "Fetch compiled code",
  "warm-up": "Warm up",
  "further models": "Further models",
};

/** The waterfall of one cold start, which can be shown anew as it goes on. */
export class Waterfall {
  element = element("div", { className: "waterfall" });
  #rows = [];
  #drawn = "";

  /** `sinceSeen` is how many seconds ago the document was current: phases that go on reach as far as now. */
  show(document, sinceSeen = 0) {
    const { phases = [], critical_path: path = [], ready_after_s: ready = null } = document;
    const last = Math.max(0.001, ready ?? 0, ...phases.map((phase) => phase.end_s ?? phase.start_s));
    const goesOn = phases.some((phase) => phase.in_progress);
    const now = goesOn ? last + sinceSeen : last;
    const drawn = JSON.stringify(phases.map((phase) => [phase.name, phase.in_progress, phase.failed]));
    if (drawn !== this.#drawn) {
      this.#drawn = drawn;
      this.#rows = phases.map(row);
      const list = element("ol", { "aria-label": "Phases of the start" }, ...this.#rows.map((made) => made.element));
      this.element.replaceChildren(list, ...(goesOn ? [] : [legend()]));
    }
    phases.forEach((phase, at) => {
      const end = phase.in_progress ? now : (phase.end_s ?? now);
      const waited = phase.in_progress
        ? []
        : path.filter((part) => part.name === phase.name && part.start_s >= phase.start_s && part.end_s <= end);
      this.#rows[at].show(phase, end, waited, now);
    });
  }
}

function row(phase) {
  const track = element("span", { className: "track", "aria-hidden": "true" });
  const took = element("span", { className: "took" });
  const noted = element("span", { className: "note" });
  const name = element("span", { className: "name" }, NAMES[phase.name] ?? phase.name);
  const state = phase.failed ? "failed" : phase.in_progress ? "running" : "";
  return {
    element: element("li", { className: state }, name, track, took, noted),
    show(current, end, waited, now) {
      const whole = bar("bar", current.start_s, end, now);
      track.replaceChildren(whole, ...waited.map((part) => bar("waited", part.start_s, part.end_s, now)));
      took.textContent = seconds(end - current.start_s);
      noted.textContent = note(current, end);
    },
  };
}

function legend() {
  const key = (kind) => element("span", { className: `key ${kind}` });
  return element("p", { className: "legend" }, key("waited"), "waited for", key("bar"), "meanwhile");
}

function bar(kind, start, end, now) {
  const drawn = element("span", { className: kind });
  drawn.style.setProperty("left", `${(100 * start) / now}%`);
  drawn.style.setProperty("width", `${(100 * Math.max(0, end - start)) / now}%`);
  return drawn;
}

function note(phase, end) {
  if (phase.failed) return "failed";
  if (typeof phase.bytes === "number") {
    if (phase.in_progress && phase.total_bytes) return `${bytes(phase.bytes)} of ${bytes(phase.total_bytes)}`;
    const rate = phase.bytes / (end - phase.start_s);
    return Number.isFinite(rate) ? `${bytes(phase.bytes)} at ${bytes(rate)}/s` : bytes(phase.bytes);
  }
  if (typeof phase.seconds_of_cpu === "number") return `${seconds(phase.seconds_of_cpu)} of CPU`;
  return phase.in_progress ? "now" : "";
}

/** How far the weights are, {fraction, words}, while they are read and how much there is to read is known. */
export function progress(document) {
  const reading = document?.phases?.find((phase) => phase.name === "bytes" && phase.in_progress && phase.total_bytes);
  if (!reading) return null;
  return {
    fraction: Math.min(1, reading.bytes / reading.total_bytes),
    words: `${bytes(reading.bytes)} of ${bytes(reading.total_bytes)} read and checked`,
  };
}

/** What a cold start was, in one line. */
export function summary({ model, version, ready_after_s: ready, phases = [] }) {
  const weights = phases.find((phase) => phase.name === "bytes" && !phase.in_progress);
  const size = weights ? `, ${bytes(weights.bytes)} of weights` : "";
  const what = [model, version && `version ${version.slice(0, 8)}`].filter(Boolean).join(", ");
  return `${what ? `${what}: ` : ""}${ready === null ? "not ready" : `ready after ${seconds(ready)}`}${size}`;
}
