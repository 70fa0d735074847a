// What is kept of a document: its text, shaded by the share of layers that keep each token.
// The text stands in blocks. Only blocks near the view are shaded, the others are plain text, so that 100,000 tokens
// stay quick.

import { asLine, json } from "./api.js";
import { count, make, percent, say, tellError } from "./words.js";

const find = (id) => document.getElementById(id);
const place = find("kept-text");
const BLOCK = 600; // tokens, then up to the end of the line
const SHARES = ["none", "up to 25 %", "26–50 %", "51–75 %", "76–100 %"];

let shown = null; // of the document in view: pieces, layers, bits, counts, level, blocks
let wanted = null; // the document to show once the view is open
let opening = null;
let marks = { id: "", order: [], at: 0 }; // of an answer: id of its document, tokens by share, the one pointed at

const bitsOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const keeps = (bits, token) => (bits[token >> 3] >> (7 - (token & 7))) & 1;

function prepare(id, { pieces, layers, kept }) {
  const bits = kept.map(bitsOf);
  const counts = new Uint16Array(pieces.length);
  for (const layer of bits) for (let token = 0; token < counts.length; token += 1) counts[token] += keeps(layer, token);
  return { id, pieces, layers, bits, counts, level: new Uint8Array(pieces.length), blocks: [] };
}

function cut(pieces) {
  const starts = [];
  for (let start = 0; start < pieces.length; ) {
    starts.push(start);
    let end = start + BLOCK;
    while (end < pieces.length && end < start + 3 * BLOCK && !pieces[end - 1].endsWith("\n")) end += 1;
    start = end;
  }
  return starts.map((start, index) => ({ start, end: starts[index + 1] ?? pieces.length, near: false, stale: true }));
}

/** Join tokens of one shade; a token that was read stands alone. */
function runsOf({ start, end }) {
  const { pieces, level } = shown;
  const read = marks.id === shown.id ? marks.shares : null;
  const leaveOut = find("only-kept").checked;
  const runs = [];
  for (let token = start; token < end; token += 1) {
    const isRead = read?.has(token) ?? false;
    const last = runs.at(-1);
    if (last && !isRead && !last.read && last.level === level[token]) last.text.push(pieces[token]);
    else runs.push({ level: level[token], read: isRead, token, text: [pieces[token]] });
  }
  for (const run of runs) {
    run.text = run.text.join("");
    if (leaveOut && !run.level && !run.read) run.text = run.text.includes("\n") ? " …\n" : " … ";
  }
  return runs;
}

const blankness = (text) => (text.trim() ? "" : "blank"); // white space alone: an underline would not be seen

function fill(block) {
  const runs = runsOf(block);
  if (!block.near) {
    block.element.textContent = runs.map((run) => run.text).join("");
  } else {
    block.element.replaceChildren(
      ...runs.map((run) =>
        run.read
          ? make("mark", { class: `k${run.level} ${blankness(run.text)}`, "data-token": run.token, text: run.text })
          : make("span", { class: `k${run.level}`, text: run.text }),
      ),
    );
  }
  block.stale = false;
}

const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const block = shown?.blocks[target.dataset.block];
      if (block?.element !== target || block.near === isIntersecting) continue;
      block.near = isIntersecting;
      fill(block);
    }
  },
  { root: place, rootMargin: "600px 0px" },
);

function layOut() {
  watcher.disconnect();
  shown.blocks = cut(shown.pieces);
  place.replaceChildren(
    ...shown.blocks.map((block, index) => {
      block.element = make("div", { "data-block": index });
      return block.element;
    }),
  );
  shade();
  place.scrollTop = 0;
  for (const block of shown.blocks) watcher.observe(block.element);
}

function shade() {
  const { counts, bits, layers, level } = shown;
  const layer = Number(find("layer").value);
  const totals = [0, 0, 0, 0, 0];
  for (let token = 0; token < level.length; token += 1) {
    level[token] = layer ? 4 * keeps(bits[layer - 1], token) : Math.ceil((4 * counts[token]) / layers.length);
    totals[level[token]] += 1;
  }
  const name = layer ? `Layer ${layers[layer - 1]}` : "All layers";
  find("layer-name").textContent = name;
  find("layer").setAttribute("aria-valuetext", name);
  const all = level.length;
  const some = all - totals[0];
  const kept = `${count(some)} of ${count(all)} tokens (${percent(some, all)})`;
  find("kept-summary").textContent = layer
    ? `${name} keeps ${kept}.`
    : `At least one layer keeps ${kept}. Shade: share of the ${layers.length} layers.`;
  const legend = layer ? [[0, "dropped"], [4, "kept"]] : SHARES.map((words, index) => [index, words]);
  find("legend").replaceChildren(
    ...legend.map(([index, words]) => {
      const swatch = make("span", { class: `swatch k${index}`, text: "Aa", "aria-hidden": "true" });
      return make("li", {}, swatch, ` ${words}: ${count(totals[index])}`);
    }),
  );
  redraw();
}

/** Draw again what is near the view; the rest matters only where its text changes. */
function redraw(textChanges = find("only-kept").checked) {
  for (const block of shown.blocks) if (block.near || block.stale || textChanges) fill(block);
  showCurrent();
}

const markOf = (token) => place.querySelector(`[data-token="${token}"]`);

function showCurrent() {
  const token = marks.order[marks.at];
  place.querySelector("mark.current")?.classList.remove("current");
  if (marks.id === shown.id && token !== undefined) markOf(token)?.classList.add("current");
}

function nameOf(piece) {
  if (piece.trim()) return `“${piece.trim()}”`;
  return piece.includes("\n") ? "a line break" : "a space";
}

function showBar() {
  const ours = shown && marks.id === shown.id && marks.order.length > 0;
  find("read-bar").hidden = !ours;
  if (!ours) return;
  const token = marks.order[marks.at];
  const place = `${marks.at + 1} of ${marks.order.length}: ${nameOf(shown.pieces[token])}`;
  const share = `${percent(marks.shares.get(token), 1)} of its attention`;
  const layers = `kept by ${shown.counts[token]} of ${shown.layers.length} layers`;
  find("read-text").textContent = `${place}, ${share}, ${layers}.`;
}

function step(by) {
  marks.at = (marks.at + by + marks.order.length) % marks.order.length;
  const token = marks.order[marks.at];
  const block = shown.blocks.find(({ end }) => token < end);
  block.near = true;
  fill(block);
  showCurrent();
  markOf(token)?.scrollIntoView({ block: "center" });
  showBar();
}

function clear() {
  marks = { id: "", order: [], at: 0 };
  showBar();
  redraw();
  place.focus();
}

const isNeeded = () => wanted && wanted.id !== shown?.id && !find("panel-kept").hidden;

async function fetchWanted() {
  while (isNeeded()) {
    const one = wanted;
    find("kept-hint").textContent = `Fetching what is kept of ${one.name} …`;
    try {
      const kept = await json(`v1/documents/${encodeURIComponent(one.id)}/kept`);
      if (wanted?.id !== one.id) continue; // another was chosen meanwhile
      shown = prepare(one.id, kept);
    } catch (error) {
      if (wanted?.id === one.id) find("kept-hint").textContent = `What is kept of ${one.name} is not known.`;
      return tellError(asLine(error));
    }
    find("kept-hint").hidden = true;
    find("kept-view").hidden = false;
    find("layer").max = shown.layers.length;
    find("layer").value = 0;
    layOut();
    showBar();
    say(find("kept-summary").textContent);
  }
}

function open() {
  if (isNeeded()) opening ??= fetchWanted().finally(() => (opening = null));
  return opening;
}

/** Show a document (or none) the next time that the view is open. */
export function show(one) {
  wanted = one;
  if (one?.id === shown?.id && one) return;
  shown = null;
  watcher.disconnect();
  place.replaceChildren();
  find("kept-view").hidden = true;
  find("kept-hint").hidden = false;
  find("kept-hint").textContent = "Choose a document to see what is kept of it.";
  open();
}

/** Underline the tokens that an answer read most: pairs of token and share. */
export async function mark(id, read) {
  await open();
  if (shown?.id !== id) return;
  const shares = new Map(read.filter(([token]) => token in shown.pieces));
  marks = { id, shares, order: [...shares.keys()].sort((one, other) => shares.get(other) - shares.get(one)), at: 0 };
  redraw();
  showBar();
  if (marks.order.length) {
    step(0);
    find("read-next").focus();
  } else tellError("The server named nothing that this answer read.");
}

/** Join the controls; gives what to call when the view opens. */
export function start() {
  find("layer").addEventListener("input", shade);
  find("only-kept").addEventListener("change", () => redraw(true));
  find("read-previous").addEventListener("click", () => step(-1));
  find("read-next").addEventListener("click", () => step(1));
  find("read-clear").addEventListener("click", clear);
  return open;
}
