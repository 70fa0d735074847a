// Documents: added by a drop, a file or pasted text; read with a progress bar; chosen to be asked; deleted.

import { asLine, events, json, stopped } from "./api.js";
import { bytes, count, make, say, tellError, tokens } from "./words.js";

const find = (id) => document.getElementById(id);
let list = [];
let chosen = "";
let missing = false; // the server did not give its list
let onChoice = () => {};
let onDelete = () => {};

const path = (id) => `v1/documents/${encodeURIComponent(id)}`;

/** Ask the server what it has. */
export async function load() {
  try {
    missing = false;
    list = (await json("v1/documents")).data ?? [];
  } catch (error) {
    missing = true;
    tellError(asLine(error));
  }
  show();
  if (chosen && !list.some((one) => one.id === chosen)) choose("");
}

function facts(one) {
  const line = [];
  if (Number.isFinite(one.tokens)) line.push(tokens(one.tokens));
  if (Number.isFinite(one.entries)) line.push(`${count(one.entries)} kept`);
  if (Number.isFinite(one.bytes)) line.push(bytes(one.bytes));
  return line.join(", ");
}

function option(id, name, detail, ...more) {
  const input = make("input", { type: "radio", name: "document", value: id });
  input.checked = id === chosen;
  input.addEventListener("change", () => choose(id));
  const words = make("span", { class: "words" }, make("span", { class: "name", text: name }));
  if (detail) words.append(make("span", { class: "quiet", text: detail }));
  return make("div", { class: "option" }, make("label", {}, input, words), ...more);
}

function show() {
  const place = find("documents");
  const focused = place.contains(document.activeElement) ? document.activeElement.value : null;
  place.querySelectorAll(".option").forEach((old) => old.remove());
  place.append(option("", "The model alone", "No document"));
  for (const one of list) {
    const name = one.name || one.id;
    const button = make("button", { type: "button", class: "small", "aria-label": `Delete ${name}`, text: "Delete" });
    button.addEventListener("click", () => remove(one, name));
    place.append(option(one.id, name, facts(one), button));
  }
  if (focused !== null) place.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
}

/** Choose the document to ask; "" is none. */
export function choose(id) {
  chosen = id;
  const one = list.find((other) => other.id === id) ?? null;
  for (const input of find("documents").querySelectorAll("input")) input.checked = input.value === id;
  find("chosen").textContent = one ? one.name || one.id : "";
  onChoice(one && { ...one, name: one.name || one.id });
}

async function remove(one, name) {
  const dialog = find("confirm");
  find("confirm-text").textContent = `Delete ${name}? To ask it again, it has to be read again.`;
  dialog.returnValue = "no";
  dialog.showModal();
  // In a loop: the event of an earlier question may come late.
  while (dialog.open) await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "yes") return;
  tellError();
  try {
    await json(path(one.id), { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) return tellError(asLine(error));
  }
  list = list.filter((other) => other.id !== one.id);
  onDelete(one.id);
  if (chosen === one.id) choose("");
  show();
  find("documents").querySelector("input:checked")?.focus();
  say(`${name} is deleted.`);
}

/** Have the server read a text; its progress is a line with a bar. */
async function read(name, text) {
  const control = new AbortController();
  const bar = make("progress", { "aria-label": `Reading ${name}` });
  const told = make("span", { class: "quiet", text: "Waiting" });
  const label = `Cancel reading ${name}`;
  const cancel = make("button", { type: "button", class: "small", text: "Cancel", "aria-label": label });
  cancel.addEventListener("click", () => control.abort());
  const below = make("div", { class: "row" }, told, cancel);
  const line = make("li", {}, make("span", { class: "name", text: name }), bar, below);
  find("readings").append(line);
  say(`Reading ${name}.`);
  let done = null;
  try {
    const options = { body: { text, name }, signal: control.signal };
    for await (const event of events("v1/documents?stream=true", options)) {
      if (event.object === "document") done = event;
      else if (event.total > 0) {
        bar.max = event.total;
        bar.value = event.tokens;
        told.textContent = `${count(event.tokens)} of ${tokens(event.total)}`;
      }
    }
  } catch (error) {
    if (stopped(error)) say(`Reading ${name} is cancelled.`);
    else tellError(`${name}: ${asLine(error)}`);
  }
  const focused = line.contains(document.activeElement);
  line.remove();
  if (done) {
    list = [done, ...list.filter((other) => other.id !== done.id)];
    show();
    choose(done.id);
    say(`${name} is ready. You can ask it now.`);
  }
  if (focused) (done ? find("documents").querySelector("input:checked") : find("choose-file")).focus();
}

async function readFile(file) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    return tellError(`${file.name} is not a text file in UTF-8. Save it as plain text and add that.`);
  }
  if (text.includes("\0")) return tellError(`${file.name} is not a text file. Save it as plain text and add that.`);
  if (!text.trim()) return tellError(`${file.name} is empty.`);
  return read(file.name, text);
}

function addFiles(files) {
  tellError();
  for (const file of files) readFile(file);
}

function joinDrop() {
  const area = document.body;
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  area.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    find("drop").classList.add("over");
  });
  area.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) find("drop").classList.remove("over");
  });
  area.addEventListener("drop", (event) => {
    find("drop").classList.remove("over");
    if (!holdsFiles(event)) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
}

function joinPaste() {
  const form = find("paste");
  const button = find("show-paste");
  const open = (shown) => {
    form.hidden = !shown;
    button.setAttribute("aria-expanded", String(shown));
  };
  button.addEventListener("click", () => {
    open(form.hidden);
    if (!form.hidden) find("paste-text").focus();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = find("paste-text").value;
    if (!text.trim()) return;
    const first = text.trim().split(/\s+/).slice(0, 5).join(" ").slice(0, 40);
    tellError();
    read(find("paste-name").value.trim() || first, text);
    form.reset();
    open(false);
    button.focus();
  });
}

/** Join the controls; told are the chosen document (or none) and the id of a deleted one. */
export function start(choice, deletion) {
  onChoice = choice;
  onDelete = deletion;
  const file = find("file");
  find("choose-file").addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    addFiles([...file.files]);
    file.value = "";
  });
  joinDrop();
  joinPaste();
  addEventListener("key-accepted", () => missing && load());
  addEventListener("document-gone", load);
  show();
  load();
}
