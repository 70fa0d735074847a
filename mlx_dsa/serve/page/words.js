// Numbers in words, and the three places that speak to the person: error line, spoken updates, key field.

const find = (id) => document.getElementById(id);
const figures = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SPOKEN = 20; // updates that stay in the page for a screen reader

/** Make an element; `content` is text or elements, never markup. */
export function make(tag, { text, ...settings } = {}, ...content) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  if (text !== undefined) element.textContent = text;
  element.append(...content);
  return element;
}

export const count = (number) => figures.format(number);

export const tokens = (number) => `${count(number)} ${number === 1 ? "token" : "tokens"}`;

export function bytes(number) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${unit && number < 10 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

export function percent(part, whole) {
  const share = whole ? (100 * part) / whole : 0;
  return `${share > 0 && share < 10 ? share.toFixed(1) : Math.round(share)} %`;
}

function seconds(number) {
  return number < 1 ? `${Math.max(1, Math.round(number * 1000))} ms` : `${number.toFixed(number < 10 ? 1 : 0)} s`;
}

const known = (number) => typeof number === "number" && Number.isFinite(number);

/** The line under an answer: what is known of tokens, entries, memory and speed. */
export function statistics(figure, usage) {
  const line = [];
  if (known(figure.tokens_seen)) line.push(`${tokens(figure.tokens_seen)} seen`);
  if (known(figure.entries_kept)) {
    const share = figure.tokens_seen > 0 ? ` (${percent(figure.entries_kept, figure.tokens_seen)})` : "";
    line.push(`${count(figure.entries_kept)} entries kept${share}`);
  }
  if (known(figure.kv_bytes)) {
    const dense = known(figure.dense_kv_bytes) ? `, dense ${bytes(figure.dense_kv_bytes)}` : "";
    line.push(`KV memory ${bytes(figure.kv_bytes)}${dense}`);
  }
  if (known(figure.generation_tps)) line.push(`${figure.generation_tps.toFixed(1)} tokens/s`);
  if (known(figure.first_token_s)) line.push(`first token after ${seconds(figure.first_token_s)}`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (known(cached) && cached > 0) line.push(`${tokens(cached)} re-used`);
  return line.join("\u00a0· "); // a line never begins with the dot
}

/** Show one clear line; no text hides it. */
export function tellError(text = "") {
  find("error-text").textContent = text;
  find("error").hidden = !text;
}

/** Say something to a screen reader, once it is quiet. */
export function say(text) {
  const live = find("live");
  live.append(make("p", { text }));
  while (live.childElementCount > SPOKEN) live.firstElementChild.remove();
}

/** Gather streamed text, and say it sentence by sentence. */
export class Speaker {
  #text = "";

  push(text) {
    this.#text += text;
    const end = Math.max(...[...this.#text.matchAll(/[.!?]\s|\n/g)].map((match) => match.index + 1), 0);
    if (end) {
      this.#say(this.#text.slice(0, end));
      this.#text = this.#text.slice(end);
    }
  }

  end() {
    this.#say(this.#text);
    this.#text = "";
  }

  #say(text) {
    if (text.trim()) say(text.trim());
  }
}

/** Ask for the key; gives it, or nothing where the person cancels. */
let asking = null;
export function askForKey(hadKey) {
  const form = find("key-form");
  asking ??= new Promise((resolve) => {
    const before = document.activeElement;
    const hint = "This server asks for a key. It is forgotten when you close the tab.";
    find("key-hint").textContent = hadKey ? `The server did not accept that key. ${hint}` : hint;
    form.hidden = false;
    find("key").focus();
    const done = (key) => {
      const inside = form.contains(document.activeElement);
      form.hidden = true;
      form.onsubmit = find("key-cancel").onclick = null;
      find("key").value = "";
      asking = null;
      if (inside && before?.isConnected) before.focus();
      resolve(key);
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      done(find("key").value.trim());
    };
    find("key-cancel").onclick = () => done("");
  });
  return asking;
}
