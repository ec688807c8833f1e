// What a tab remembers over a reload, and a browser for longer. A browser that keeps nothing is no error.

class Memory {
  #name;

  constructor(name) {
    this.#name = name;
  }

  get(key) {
    return this.#try((storage) => storage.getItem(key)) ?? null;
  }

  set(key, text) {
    this.#try((storage) => storage.setItem(key, text));
  }

  forget(key) {
    this.#try((storage) => storage.removeItem(key));
  }

  #try(use) {
    try {
      return use(window[this.#name]);
    } catch {
      return undefined; // switched off, or full
    }
  }
}

export const tab = new Memory("sessionStorage");
export const browser = new Memory("localStorage");
