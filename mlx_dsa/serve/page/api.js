// Requests to the server: key, errors as one line, streams of events.

import { askForKey } from "./words.js";

const KEY = "mlx-dsa-key";

/** What went wrong, in words for the person. */
export class Problem extends Error {
  constructor(text, status = 0) {
    super(text);
    this.status = status;
  }
}

export const stopped = (error) => error?.name === "AbortError";

/** The one line to show for an error. */
export function asLine(error) {
  if (error instanceof Problem) return error.message;
  return `Something went wrong in this page: ${error?.message ?? error}`;
}

async function problemOf(response) {
  let told;
  try {
    const body = JSON.parse(await response.text());
    told = body.error?.message ?? body.error;
  } catch {
    // Not the server's own answer: the status has to do.
  }
  const text = typeof told === "string" && told ? told : `The server answered ${response.status}.`;
  const wait = Number(response.headers.get("Retry-After"));
  return new Problem(wait > 0 ? `${text} Try again in ${wait} s.` : text, response.status);
}

/** Send a request; where a key is missing, ask for it and send again. */
export async function request(path, { body, method, signal } = {}) {
  for (let asked = false; ; asked = true) {
    const key = sessionStorage.getItem(KEY);
    const headers = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, {
        method: method ?? (body === undefined ? "GET" : "POST"),
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
      });
    } catch (error) {
      if (stopped(error)) throw error;
      throw new Problem("The server does not answer. Is it still running?");
    }
    if (asked && response.status !== 401) dispatchEvent(new Event("key-accepted"));
    if (response.ok) return response;
    if (response.status !== 401) throw await problemOf(response);
    // Another request may have brought a key meanwhile.
    if (sessionStorage.getItem(KEY) === key) {
      const given = await askForKey(Boolean(key));
      signal?.throwIfAborted();
      if (!given) throw new Problem("The server wants an API key. Nothing was sent.", 401);
      sessionStorage.setItem(KEY, given);
    }
  }
}

export const json = async (path, options) => (await request(path, options)).json();

/** Yield the objects of a stream of server-sent events, up to [DONE]. */
export async function* events(path, options) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (stopped(error)) throw error;
        throw new Problem("The connection broke off.");
      }
      const lines = (rest + (part.value ?? "")).split(/\r\n|\n|\r(?!$)/);
      rest = part.done ? "" : lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments keep the line open
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Problem(event.error.message ?? String(event.error));
        yield event;
      }
      if (part.done) throw new Problem("The connection ended before the answer was complete.");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
