// The page's parts, put together. Each knows its own part of the document, and main who needs whom.

import * as api from "./api.js";
import { announce, byId, wait } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { inputsOf } from "./schema.js";
import { ModelStatus } from "./status.js";
import { Studio } from "./studio.js";

const LONGEST_PAUSE_MS = 2000;

const model = new ModelStatus();
const context = {
  needsKey: () => model.needsKey,
  again(input, seed) {
    form.take(input, seed);
    announce("The form holds this picture’s prompt and seed.");
  },
};
const gallery = new Gallery(context);
const form = new Form({ submit: (input) => studio.make(input) });
const studio = new Studio({ model, form, gallery, context });

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("[data-close]")?.addEventListener("click", () => dialog.close());
  // A click beside what a dialog shows lands on the dialog itself.
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.id !== "key-dialog" && dialog.close());
}

/** The fields, as soon as the server can describe them. */
async function offerInputs() {
  for (let pause = 500; !form.isComplete; pause = Math.min(pause * 1.5, LONGEST_PAUSE_MS)) {
    try {
      form.offer(inputsOf(await api.schema()));
    } catch {
      await wait(pause);
    }
  }
}

offerInputs();
studio.resume();
gallery.load();
byId("prompt").focus({ preventScroll: true });
