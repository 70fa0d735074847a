// An answer as text: white space is kept, fenced code gets a frame and a copy button. Nothing is ever parsed as markup.

import { make, say } from "./words.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const MAYBE_FENCE = /^ {0,3}(`|~|$)/; // shown only once the line is whole

/** Takes pieces of text as they come, and shows them in `place`. */
export class Answer {
  text = "";
  #place;
  #node = null;
  #line = ""; // of the last line, what is not shown yet
  #begun = false; // part of the last line is shown
  #fence = "";

  constructor(place) {
    this.#place = place;
  }

  push(piece) {
    this.text += piece;
    const lines = (this.#line + piece).split("\n");
    this.#line = lines.pop();
    for (const line of lines) this.#whole(line);
    if (this.#line && (this.#begun || !MAYBE_FENCE.test(this.#line))) {
      this.#show(this.#line);
      this.#line = "";
      this.#begun = true;
    }
  }

  end() {
    if (this.#line) this.#whole(this.#line, "");
    this.#line = "";
  }

  #whole(line, ending = "\n") {
    const fence = this.#begun ? null : FENCE.exec(line);
    this.#begun = false;
    if (fence && !this.#fence) {
      this.#fence = fence[1];
      this.#openCode(fence[2].trim());
    } else if (fence && this.#closes(fence)) {
      this.#fence = "";
      this.#node = null;
    } else {
      this.#show(line + ending);
    }
  }

  #closes([, marks, rest]) {
    return marks[0] === this.#fence[0] && marks.length >= this.#fence.length && !rest.trim();
  }

  #openCode(language) {
    if (this.#node) this.#node.data = this.#node.data.trimEnd(); // around code the frame is space enough
    const code = make("code");
    const copy = make("button", { type: "button", text: "Copy", class: "small" });
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        say("Copied.");
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code); // no clipboard without https: leave it selected
        copy.textContent = "Selected";
      }
      setTimeout(() => (copy.textContent = "Copy"), 2000);
    });
    const head = make("div", { class: "code-head" }, make("span", { text: language || "code" }), copy);
    const frame = make("pre", { tabindex: "0", role: "region", "aria-label": `Code: ${language || "text"}` }, code);
    this.#place.append(make("div", { class: "code" }, head, frame));
    this.#node = code.appendChild(document.createTextNode(""));
  }

  #show(text) {
    if (!this.#node) {
      const block = make("div", { class: "text" });
      this.#place.append(block);
      this.#node = block.appendChild(document.createTextNode(""));
      text = text.replace(/^\n+/, "");
      if (!text) {
        block.remove();
        this.#node = null;
        return;
      }
    }
    this.#node.appendData(text);
  }
}
