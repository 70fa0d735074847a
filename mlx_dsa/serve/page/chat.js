// Conversations: one for each document and one without, each with its own answer in progress.

import { asLine, events, json, stopped } from "./api.js";
import { Answer } from "./text.js";
import { make, say, Speaker, statistics, tellError, tokens, count } from "./words.js";

const find = (id) => document.getElementById(id);
const log = find("log");
const question = find("question");
const NEAR = 80; // pixels from the end where the view follows the answer

const chats = new Map();
let asked = null; // the chosen document
let whatItRead = () => {};

function chatOf(id) {
  if (!chats.has(id)) {
    const list = make("ol", { class: "plain turns", hidden: true });
    log.append(list);
    chats.set(id, { messages: [], list, running: null });
  }
  return chats.get(id);
}

const here = () => chatOf(asked?.id ?? "");

/** Show the conversation with a document, or the one without. */
export function ask(chosen) {
  asked = chosen;
  refresh();
  log.scrollTop = log.scrollHeight;
}

/** Forget the conversation with a document that is gone. */
export function forget(id) {
  const chat = chats.get(id);
  chat?.running?.abort();
  chat?.list.remove();
  chats.delete(id);
}

function refresh() {
  const shown = here();
  for (const chat of chats.values()) chat.list.hidden = chat !== shown;
  find("welcome").hidden = shown.list.childElementCount > 0;
  find("asked").textContent = asked ? `Asking ${asked.name}` : "Asking the model, without a document";
  const leaving = document.activeElement === find("stop") && !shown.running;
  find("send").hidden = Boolean(shown.running);
  find("stop").hidden = !shown.running;
  find("new-chat").disabled = !shown.list.childElementCount;
  if (leaving) question.focus();
}

function startAnew() {
  const chat = here();
  chat.running?.abort();
  chat.list.remove();
  chats.delete(asked?.id ?? "");
  tellError();
  refresh();
  question.focus();
}

export function stop() {
  here().running?.abort();
}

function addTurn(chat, who, ...content) {
  const turn = make("li", { class: `turn ${who === "You" ? "mine" : "model"}` }, make("h3", { text: who }), ...content);
  chat.list.append(turn);
  return turn;
}

/** What of an answer is in the page, as it comes. */
class Reply {
  constructor(chat) {
    this.place = make("div");
    this.answer = new Answer(this.place);
    this.speaker = new Speaker();
    this.progress = make("progress", { "aria-label": "Reading" });
    this.told = make("span", { text: "Waiting for the model" });
    this.waiting = make("p", { class: "waiting quiet" }, this.progress, this.told);
    this.turn = addTurn(chat, "Model", this.waiting, this.place);
    this.reasoning = null;
    this.end = "";
    this.figure = {};
    this.usage = null;
  }

  take(event) {
    if (event.prompt_progress) this.#read(event.prompt_progress);
    if (event.mlx_dsa) this.figure = event.mlx_dsa;
    if (event.usage) this.usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) return;
    const thought = choice.delta?.reasoning ?? choice.delta?.reasoning_content;
    if (thought) this.#think(thought);
    if (choice.delta?.content) {
      this.waiting.remove();
      this.answer.push(choice.delta.content);
      this.speaker.push(choice.delta.content);
    }
    if (choice.finish_reason) this.end = choice.finish_reason;
  }

  #read({ total, processed }) {
    if (!(total > 0)) return;
    this.progress.max = total;
    this.progress.value = Math.min(processed, total);
    const reading = `Reading: ${count(processed)} of ${tokens(total)}`;
    this.told.textContent = processed < total ? reading : "Thinking of an answer";
  }

  #think(text) {
    this.waiting.remove();
    if (!this.reasoning) {
      this.reasoning = make("div", { class: "text" });
      const fold = make("details", { class: "reasoning" }, make("summary", { text: "Reasoning" }), this.reasoning);
      this.place.before(fold);
      say("The model reasons first.");
    }
    this.reasoning.append(text);
  }

  /** Close it; says whether anything of an answer came. */
  close(remark) {
    this.waiting.remove();
    this.answer.end();
    this.speaker.end();
    if (this.end === "length") remark ||= "Cut here: the limit of tokens for one answer.";
    if (!remark && !this.answer.text) remark = "The model gave no answer.";
    if (remark) {
      this.turn.append(make("p", { class: "quiet", text: remark }));
      say(remark);
    }
    const line = statistics(this.figure, this.usage);
    if (line) {
      this.turn.append(make("p", { class: "statistics quiet", text: line }));
      say(line);
    }
  }
}

function offerWhatItRead(reply, document, messages) {
  const button = make("button", { type: "button", class: "small", text: "What it read" });
  button.addEventListener("click", async () => {
    button.disabled = true;
    button.textContent = "Looking …";
    tellError();
    try {
      const body = { messages, answer: reply.answer.text };
      const { read } = await json(`v1/documents/${encodeURIComponent(document.id)}/read`, { body });
      await whatItRead(document, read);
    } catch (error) {
      tellError(asLine(error));
    }
    button.disabled = false;
    button.textContent = "What it read";
  });
  reply.turn.append(button);
}

async function send(text) {
  const chat = here();
  const document = asked;
  const turn = addTurn(chat, "You", make("div", { class: "text", text }));
  const reply = new Reply(chat);
  const messages = [...chat.messages, { role: "user", content: text }];
  const body = { messages, stream: true, stream_options: { include_usage: true }, return_progress: true };
  if (document) body.document = document.id;
  chat.running = new AbortController();
  tellError();
  refresh();
  log.scrollTop = log.scrollHeight;
  let remark = "";
  let failed = false;
  try {
    for await (const event of events("v1/chat/completions", { body, signal: chat.running.signal })) {
      const follow = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
      reply.take(event);
      if (follow && chat === here()) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    remark = stopped(error) ? "Stopped." : "Broken off.";
    failed = !stopped(error);
    if (failed) tellError(asLine(error));
    if (document && error.status === 404) dispatchEvent(new Event("document-gone"));
  }
  chat.running = null;
  if (!chat.list.isConnected) return; // a new chat began meanwhile
  if (remark && !reply.answer.text) {
    // Nothing came: the question goes back to its field, to be sent again.
    turn.remove();
    reply.turn.remove();
    if (chat === here() && !question.value) question.value = text;
    if (!failed) say("Stopped.");
  } else {
    reply.close(remark);
    chat.messages = [...messages, { role: "assistant", content: reply.answer.text }];
    if (document && reply.answer.text) offerWhatItRead(reply, document, messages);
    if (chat === here()) log.scrollTop = log.scrollHeight;
  }
  refresh();
}

function submit(event) {
  event?.preventDefault();
  const text = question.value.trim();
  if (!text || here().running) return;
  question.value = "";
  question.focus();
  send(text);
}

/** Join the controls; `marks` shows what an answer read. */
export function start(marks) {
  whatItRead = marks;
  find("composer").addEventListener("submit", submit);
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  });
  find("stop").addEventListener("click", stop);
  find("new-chat").addEventListener("click", startAnew);
  refresh();
}
