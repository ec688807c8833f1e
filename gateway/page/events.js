// Server-sent events from a response's body. EventSource cannot send a body or a key, so fetch reads them.

import { Unreachable } from "./api.js";
import { parse } from "./json.js";

/** Yields {name, data} for each event, data being parsed JSON. Throws Unreachable where the stream breaks off. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A chunk may end between the two characters of a line's end.
      const text = rest + value;
      const complete = text.endsWith("\r") ? text.slice(0, -1) : text;
      const blocks = complete.split(/\r\n\r\n|\n\n|\r\r/);
      rest = blocks.pop() + text.slice(complete.length);
      for (const block of blocks) yield readBlock(block);
    }
  } catch (error) {
    if (error instanceof SyntaxError || error.name === "AbortError") throw error;
    throw new Unreachable();
  } finally {
    reader.cancel().catch(() => {});
  }
}

function readBlock(block) {
  let name = "message";
  const data = [];
  for (const line of block.split(/\r\n|\n|\r/)) {
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (field === "event") name = value;
    if (field === "data") data.push(value);
  }
  // A comment is a sign of life and nothing else.
  return data.length ? { name, data: parse(data.join("\n")) } : { name: "comment", data: null };
}
