// What the model takes, read from the server's own description of its inputs.

import { integer } from "./json.js";

// Integers on the server have 64 bits; Cog rounds the bound in its schema up to the next one that a float can hold.
const LARGEST_INTEGER = 2n ** 63n - 1n;

/** Inputs by name, in the server's order: {name, kind, title, description, choices, fallback, least, most}. */
export function inputsOf(document) {
  const schemas = document?.components?.schemas ?? {};
  const resolve = (schema) => {
    const parts = [...(schema.allOf ?? []), ...(schema.$ref ? [{ $ref: schema.$ref }] : [])];
    const merged = {};
    for (const { $ref, ...rest } of parts) {
      const target = $ref?.startsWith("#/components/schemas/") ? schemas[$ref.slice("#/components/schemas/".length)] : {};
      Object.assign(merged, resolve(target ?? {}), rest);
    }
    const { allOf, $ref, ...own } = schema;
    return { ...merged, ...own };
  };
  const inputs = Object.entries(schemas.Input?.properties ?? {})
    .map(([name, property]) => [property["x-order"] ?? Infinity, read(name, resolve(property))])
    .sort(([first], [second]) => first - second);
  return new Map(inputs.map(([, input]) => [input.name, input]));
}

function read(name, { type, title, description, enum: choices, default: fallback, minimum, maximum }) {
  const input = { name, title: title ?? name, description: description ?? "", choices: choices ?? null };
  input.kind = choices ? "choice" : (type ?? "string");
  input.fallback = fallback ?? null;
  input.least = minimum ?? null;
  input.most = maximum ?? null;
  if (input.kind === "integer") {
    input.fallback = integer(fallback);
    input.least = integer(minimum) ?? -LARGEST_INTEGER;
    const most = integer(maximum) ?? LARGEST_INTEGER;
    input.most = most > LARGEST_INTEGER ? LARGEST_INTEGER : most;
  }
  return input;
}

/** What a person wrote, as the input's value; undefined for nothing. Throws RangeError with words for them. */
export function valueOf(input, text) {
  if (input.kind === "boolean") return text === "true" ? true : undefined;
  const written = input.kind === "string" ? text : text.trim();
  if (written === "") return undefined;
  if (input.kind === "integer") {
    const value = integer(written);
    if (value === null || value < input.least || value > input.most) {
      throw new RangeError(`Enter a whole number from ${input.least} to ${input.most}.`);
    }
    return value;
  }
  if (input.kind === "number") {
    const value = Number(written);
    if (!Number.isFinite(value) || (input.least ?? value) > value || (input.most ?? value) < value) {
      throw new RangeError(`Enter a number from ${input.least} to ${input.most}.`);
    }
    return value;
  }
  return written;
}

/** Width over height of a shape such as "16:9"; 1 for any other words. */
export function ratioOf(shape) {
  const [, width, height] = /^(\d+):(\d+)$/.exec(shape ?? "") ?? [null, 1, 1];
  return Number(width) / Number(height) || 1;
}
