// The few things about elements that every part of the page needs.

/** An element with properties (or `aria-*`, `data-*`, `role` attributes) and children. Text is always text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "role" || name === "for" || name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function icon(name) {
  const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawing.setAttribute("class", "icon");
  drawing.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  drawing.append(use);
  return drawing;
}

export function button(words, { symbol, ...properties }, action) {
  const made = element("button", { type: "button", ...properties }, symbol ? icon(symbol) : null, element("span", {}, words));
  made.addEventListener("click", () => action(made));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Say something to those who do not see the page. The same words twice are said twice. */
export function announce(words) {
  const region = byId("announcements");
  region.textContent = region.textContent === words ? `${words}\u00a0` : words;
}

export function seconds(amount) {
  if (amount >= 60) return `${Math.floor(amount / 60)} min ${Math.round(amount % 60)} s`;
  return `${amount.toFixed(amount < 0.1 ? 3 : amount < 10 ? 2 : 1)} s`;
}

export function bytes(count) {
  const [unit, size, digits] = count >= 1e9 ? ["GB", 1e9, 2] : count >= 1e6 ? ["MB", 1e6, 0] : ["kB", 1e3, 0];
  return `${(count / size).toFixed(digits)} ${unit}`;
}

/** Wait, or return early where the browser is back on a network. Throws when the signal is aborted. */
export function wait(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const end = (settle) => (event) => {
      clearTimeout(timer);
      window.removeEventListener("online", over);
      signal?.removeEventListener("abort", stopped);
      settle(event?.type === "abort" ? signal.reason : undefined);
    };
    const over = end(resolve);
    const stopped = end(reject);
    const timer = setTimeout(over, milliseconds);
    window.addEventListener("online", over);
    signal?.addEventListener("abort", stopped);
    if (signal?.aborted) stopped({ type: "abort" });
  });
}
