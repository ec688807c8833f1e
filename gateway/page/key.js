// The caller's key: kept by the tab, or by the browser where the person says so, and asked for in a dialog.

import { byId } from "./dom.js";
import { browser, tab } from "./memory.js";

const NAME = "key";

let key = tab.get(NAME) ?? browser.get(NAME);
let asking = null;

export const current = () => key;

/**
 * Ask the person for a key until one is good. Whoever asks meanwhile waits for the same dialog.
 * Resolves to the key, or to null where the person would rather not.
 */
export function request({ wrong, isGood }) {
  asking ??= ask(wrong, isGood).finally(() => {
    asking = null;
  });
  return asking;
}

function ask(wrong, isGood) {
  const dialog = byId("key-dialog");
  const form = byId("key-form");
  const field = byId("key-field");
  const problem = byId("key-problem");
  const submit = byId("key-submit");
  const say = (words) => {
    problem.textContent = words;
    problem.hidden = !words;
    field.setAttribute("aria-invalid", String(Boolean(words)));
  };

  field.value = "";
  byId("key-remember").checked = browser.get(NAME) !== null;
  say(wrong ? "The key that was used so far is not known here any more." : "");
  dialog.showModal();
  field.focus();

  return new Promise((resolve) => {
    const listening = new AbortController();
    const options = { signal: listening.signal };
    let given = null;

    const attempt = async (event) => {
      event.preventDefault();
      const candidate = field.value.trim();
      if (!candidate) return say("Enter the key first.");
      submit.disabled = true;
      try {
        if (await isGood(candidate)) {
          given = candidate;
          keep(candidate, byId("key-remember").checked);
          dialog.close();
        } else {
          say("This key is not known here. Is it whole, without a blank or a line break?");
          field.select();
        }
      } catch (error) {
        say(error.message);
      } finally {
        submit.disabled = false;
        field.focus();
      }
    };
    form.addEventListener("submit", attempt, options);
    byId("key-dismiss").addEventListener("click", () => dialog.close(), options);
    dialog.addEventListener(
      "close",
      () => {
        listening.abort();
        field.value = "";
        resolve(given);
      },
      options,
    );
  });
}

function keep(candidate, lasting) {
  key = candidate;
  document.dispatchEvent(new Event("keychange"));
  tab.set(NAME, candidate);
  if (lasting) browser.set(NAME, candidate);
  else browser.forget(NAME);
}
