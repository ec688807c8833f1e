// The gateway's HTTP interface, as this page uses it. Whoever asks gets an answer, a Refused or an Unreachable.

import { parse, write } from "./json.js";
import * as key from "./key.js";

const UNAUTHORIZED = 401;
// A proxy's words for a server that it cannot reach.
const OUT_OF_REACH = [502, 504];

/** The server answered, and will not do it: `problems` are of single inputs, `retryAfter` is in seconds. */
export class Refused extends Error {
  constructor(status, message, { problems = [], retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.problems = problems;
    this.retryAfter = retryAfter;
  }
}

/** There was no answer, or it broke off. */
export class Unreachable extends Error {
  constructor() {
    super("The server does not answer. Is this device on the network?");
  }
}

/** The response, where it is a good one. A key is asked for where one is needed. */
export async function ask(path, options = {}) {
  for (;;) {
    const used = key.current();
    const response = await send(path, options, used);
    if (response.ok) return response;
    if (OUT_OF_REACH.includes(response.status)) throw new Unreachable();
    if (response.status !== UNAUTHORIZED) throw await refusal(response);
    if (key.current() === used) {
      const given = await key.request({ wrong: used !== null, isGood });
      if (given === null) throw new Refused(UNAUTHORIZED, "This server wants a key before it does that.");
    }
    options.signal?.throwIfAborted();
  }
}

export async function askJson(path, options) {
  return read(await ask(path, options));
}

/** What a response says; Unreachable where it breaks off. */
export async function read(response) {
  let text;
  try {
    text = await response.text();
  } catch {
    throw new Unreachable();
  }
  return parse(text);
}

export const status = () => askJson("status");
export const schema = () => askJson("openapi.json");
export const prediction = (id, signal) => askJson(`predictions/${encodeURIComponent(id)}`, { signal });
export const cancel = (id) => ask(`predictions/${encodeURIComponent(id)}/cancel`, { method: "POST" });

export function recent(limit, before) {
  const query = new URLSearchParams({ limit });
  if (before) query.set("before", before);
  return askJson(`predictions?${query}`);
}

/** Begin a prediction, or join it where it runs. It goes on when this page leaves. */
export function put(id, input, signal) {
  return ask(`predictions/${encodeURIComponent(id)}`, {
    method: "PUT",
    body: write({ input }),
    headers: { "Content-Type": "application/json", Accept: "text/event-stream", Prefer: "respond-async", "X-Requested-By": "page" },
    signal,
  });
}

async function isGood(candidate) {
  const response = await send("predictions?limit=1", {}, candidate);
  // Anything else, a queue that is full or a bucket that is gone, comes after the key was looked at.
  return response.status !== UNAUTHORIZED;
}

async function send(path, { headers = {}, ...options }, used) {
  const sent = { Accept: "application/json", ...headers };
  if (used !== null) sent.Authorization = `Bearer ${used}`;
  try {
    return await fetch(new URL(path, document.baseURI), { cache: "no-store", ...options, headers: sent });
  } catch (error) {
    options.signal?.throwIfAborted();
    if (error instanceof TypeError) throw new Unreachable();
    throw error;
  }
}

async function refusal(response) {
  let detail;
  try {
    ({ detail } = parse(await response.text()));
  } catch {
    detail = undefined; // a proxy's page, or nothing
  }
  const problems = Array.isArray(detail)
    ? detail.map(({ loc = [], msg = "" }) => ({ input: String(loc.at(-1) ?? ""), words: String(msg) }))
    : [];
  const words = problems.length
    ? problems.map((problem) => `${problem.input}: ${problem.words}`).join(". ")
    : typeof detail === "string" && detail
      ? detail
      : `The server answered with status ${response.status} and no explanation.`;
  return new Refused(response.status, words, { problems, retryAfter: retryAfter(response) });
}

/** Seconds until asking again is welcome; null where the server does not say. */
function retryAfter(response) {
  const value = response.headers.get("Retry-After");
  if (!value) return null;
  const amount = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(amount) ? Math.max(0, Math.ceil(amount)) : null;
}
