// The command that makes a picture again, for a terminal. It never holds the key: the shell puts it in.

import { write } from "./json.js";

/** `input` with its seed, as a curl command for this server. */
export function curlFor(input, needsKey) {
  const address = new URL("predictions/", document.baseURI).href;
  const body = write({ input }, "").replaceAll("'", "'\\''");
  return [
    `curl "${address}$(uuidgen)"`,
    "  -X PUT",
    ...(needsKey ? ['  -H "Authorization: Bearer $KEY"'] : []),
    '  -H "Content-Type: application/json"',
    `  --data-binary '${body}'`,
  ].join(" \\\n");
}

/** Put text where people paste from. The newer way is for pages over HTTPS and on this machine only. */
export async function copy(text) {
  if (window.isSecureContext && navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not allowed: the older way may be
    }
  }
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "unseen";
  const open = document.querySelector("dialog[open]") ?? document.body;
  const focused = document.activeElement;
  open.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}
