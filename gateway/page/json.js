// JSON without loss: seeds go up to 2^63 - 1, and JavaScript's own numbers are exact up to 2^53 only.

const TOKEN = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;
const LONG_INTEGER = /^-?\d{16,}$/;

/** Like JSON.parse, but an integer of 16 digits or more becomes a string of its digits. */
export function parse(text) {
  return JSON.parse(text.replace(TOKEN, (token) => (LONG_INTEGER.test(token) ? `"${token}"` : token)));
}

/** Like JSON.stringify, and a BigInt is written as the integer it is. With an indent, on several lines. */
export function write(value, indent = null) {
  if (typeof value === "bigint") return value.toString();
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const deeper = indent === null ? null : `${indent}  `;
  const [open, close, parts] = Array.isArray(value)
    ? ["[", "]", value.map((item) => write(item, deeper))]
    : ["{", "}", Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${write(item, deeper)}`)];
  if (indent === null || parts.length === 0) return open + parts.join(", ") + close;
  return `${open}\n${parts.map((part) => deeper + part).join(",\n")}\n${indent}${close}`;
}

/** The integer that `parse` or a person wrote, as a BigInt; null for anything else. */
export function integer(value) {
  if (typeof value === "bigint") return value;
  if (typeof value === "number") return Number.isInteger(value) ? BigInt(value) : null;
  return typeof value === "string" && /^-?\d+$/.test(value) ? BigInt(value) : null;
}
