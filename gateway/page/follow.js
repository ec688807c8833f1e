// One prediction from its first request to its end, over dropped connections and silent ones.

import * as api from "./api.js";
import { wait } from "./dom.js";
import { eventsOf } from "./events.js";

const FIRST_PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 10_000;
// A phone that slept has a connection that is dead without a sign of it.
const SILENCE_MS = 20_000;
const NOT_FOUND = 404;

export const isOver = (answer) => ["succeeded", "failed", "canceled"].includes(answer?.status);

/**
 * The prediction's answer once it is over. `tell` hears {kind: "started" | "progress" | "stored" | "lost" | "found"}.
 * The same id again joins the prediction or gives its result, so nothing is made twice. Throws what api.put throws,
 * except Unreachable: the prediction goes on without us, so it is looked for until it is found.
 */
export async function follow(id, input, { signal, tell }) {
  let pause = FIRST_PAUSE_MS;
  const heard = (event) => {
    pause = FIRST_PAUSE_MS;
    tell(event);
  };
  for (;;) {
    try {
      const answer = await join(id, input, signal, heard);
      if (answer) return answer;
    } catch (error) {
      if (!(error instanceof api.Unreachable)) throw error;
      tell({ kind: "lost" });
    }
    let seen;
    do {
      await wait(pause, signal);
      pause = Math.min(pause * 1.6, LONGEST_PAUSE_MS);
      seen = await lookUp(id, signal);
      if (seen === undefined) tell({ kind: "lost" });
    } while (seen === undefined);
    if (isOver(seen)) return seen;
    tell({ kind: "found" });
  }
}

/** Its answer, or null where it goes on and there is nothing more to read. */
async function join(id, input, signal, heard) {
  const stopping = new AbortController();
  const either = AbortSignal.any([signal, stopping.signal]);
  const life = { heardAt: Date.now() };
  try {
    const response = await api.put(id, input, either);
    if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      const answer = await api.read(response);
      return isOver(answer) ? answer : null;
    }
    return await Promise.race([readEvents(response, heard, life), watchOver(id, life, either)]);
  } finally {
    stopping.abort();
  }
}

async function readEvents(response, heard, life) {
  for await (const { name, data } of eventsOf(response)) {
    life.heardAt = Date.now();
    if (name === "completed") return data;
    if (name === "start") heard({ kind: "started" });
    if (name === "metric" && data.value !== null && ["progress", "stored"].includes(data.name)) {
      heard({ kind: data.name, ...data.value });
    }
  }
  return null;
}

/** Looks for the prediction itself where its events have been silent for long. */
async function watchOver(id, life, signal) {
  for (;;) {
    await wait(life.heardAt + SILENCE_MS - Date.now(), signal);
    if (Date.now() - life.heardAt < SILENCE_MS) continue;
    const seen = await lookUp(id, signal);
    if (isOver(seen)) return seen;
    life.heardAt = Date.now();
  }
}

/** The prediction as the server knows it; null where it knows none, undefined where it does not answer. */
async function lookUp(id, signal) {
  try {
    return await api.prediction(id, signal);
  } catch (error) {
    if (error instanceof api.Unreachable) return undefined;
    if (error instanceof api.Refused && error.status === NOT_FOUND) return null;
    if (error instanceof api.Refused && error.status >= 500) return undefined;
    throw error;
  }
}
