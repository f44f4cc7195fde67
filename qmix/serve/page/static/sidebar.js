// The list of chats, and the question before one is renamed or deleted.

import { button } from "./messages.js";

const byId = (id) => document.getElementById(id);

export class Sidebar {
  /** remove(id), rename(id, title) and fresh(): what the page does then. */
  constructor(store, remove, rename, fresh) {
    this.store = store;
    this.remove = remove;
    this.rename = rename;
    this.shown = "";
    byId("new").addEventListener("click", fresh);
    byId("menu").addEventListener("click", () => this.open(!document.body.classList.contains("with-side")));
    byId("list").addEventListener("click", (event) => { if (event.target.closest("a")) this.close(); });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && document.body.classList.contains("with-side")) {
        this.close();
        byId("menu").focus();
      }
    });
  }

  /** On narrow screens the list is behind a button. */
  open(shown) {
    document.body.classList.toggle("with-side", shown);
    byId("menu").setAttribute("aria-expanded", String(shown));
    if (shown) byId("new").focus();
  }

  close() {
    this.open(false);
  }

  async draw(id) {
    this.shown = id;
    const titles = await this.store.titles();
    const focused = document.activeElement?.closest?.("#list li")?.dataset.id;
    byId("list").replaceChildren(...titles.map((one) => this.line(one)));
    if (focused) byId("list").querySelector(`[data-id="${CSS.escape(focused)}"] a`)?.focus();
  }

  line({ id, title }) {
    const name = title || "Untitled";
    const item = document.createElement("li");
    const link = document.createElement("a");
    item.dataset.id = id;
    link.href = "#" + id;
    link.textContent = name;
    if (id === this.shown) link.setAttribute("aria-current", "page");
    item.append(link, button("Rename", `Rename ${name}`, () => this.askTitle(id, name)),
      button("Delete", `Delete ${name}`, () => this.askDelete(id, name)));
    return item;
  }

  async askTitle(id, name) {
    const title = await ask("Rename the chat", "", "Rename", name);
    if (title) await this.rename(id, title);
  }

  async askDelete(id, name) {
    if (await ask("Delete the chat?", `${name} is removed from this browser, with all its messages.`, "Delete", null)) {
      await this.remove(id);
    }
  }
}

/** A dialog. value: of its field, null for none. What was typed, or true; null where it was cancelled. */
function ask(title, text, action, value) {
  const dialog = byId("ask");
  byId("ask-title").textContent = title;
  byId("ask-text").textContent = text;
  byId("ask-text").hidden = !text;
  byId("ask-save").textContent = action;
  byId("ask-value").hidden = byId("ask-label").hidden = value === null;
  byId("ask-value").required = value !== null;
  byId("ask-value").value = value || "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      if (dialog.returnValue !== "save") resolve(null);
      else resolve(value === null ? true : byId("ask-value").value.trim());
    }, { once: true });
  });
}
