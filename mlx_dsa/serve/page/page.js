// Joins the parts of the page: views, documents, chat.

import { json } from "./api.js";
import * as chat from "./chat.js";
import * as documents from "./documents.js";
import * as kept from "./kept.js";
import { tellError } from "./words.js";

const find = (id) => document.getElementById(id);
const tabs = [find("tab-chat"), find("tab-kept")];
const openKept = kept.start();

function view(tab) {
  for (const one of tabs) {
    const on = one === tab;
    one.setAttribute("aria-selected", String(on));
    one.tabIndex = on ? 0 : -1;
    find(one.getAttribute("aria-controls")).hidden = !on;
  }
  find("new-chat").hidden = tab !== tabs[0];
  return tab === tabs[1] ? openKept() : undefined;
}

for (const tab of tabs) {
  tab.addEventListener("click", () => view(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[1 - tabs.indexOf(tab)];
    other.focus();
    view(other);
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !find("confirm").open) chat.stop();
});
find("error-close").addEventListener("click", () => {
  tellError();
  (find("panel-chat").hidden ? tabs[1] : find("question")).focus();
});

// Beside the chat where there is room, folded above it where there is not.
const wide = matchMedia("(min-width: 50rem)");
const fold = () => (find("side").open = wide.matches);
wide.addEventListener("change", fold);
fold();

chat.start(async (one, read) => {
  documents.choose(one.id);
  view(tabs[1]);
  await kept.mark(one.id, read);
});
documents.start(
  (one) => {
    chat.ask(one);
    kept.show(one);
  },
  (id) => chat.forget(id),
);

json("v1/models")
  .then(({ data }) => {
    const id = data?.[0]?.id ?? "";
    find("model").textContent = id.split("/").pop();
    find("model").title = id;
  })
  .catch(() => {}); // the list of documents tells what is wrong
