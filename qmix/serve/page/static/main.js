// The page: which chat is shown, what is asked, and what the buttons do.

import { Answer } from "./answer.js";
import { getJson, hasKey, health, useKey } from "./api.js";
import { ROOT, addNode, choose, newConversation, path } from "./conversations.js";
import { MessageView } from "./messages.js";
import { Panel } from "./panel.js";
import { initialSettings, SettingsDialog } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";

const NEAR_END = 80; // px from the end of the log from which it follows an answer
const LOADING_EVERY = 2000; // ms between two looks whether the model is loaded
const byId = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.store = new Store((line) => this.notice(line), (change) => this.changedElsewhere(change));
    this.conversation = newConversation(initialSettings());
    this.answers = new Map(); // of chats by their object: one may go on while another one is shown
    this.views = new Map(); // node id -> view, of the chat that is shown
    this.deleted = new Set(); // ids of chats that are not kept any more, though an answer may still be written to them
    this.model = null;
    this.panel = new Panel(() => this.askKey());
    this.sidebar = new Sidebar(this.store, (id) => this.remove(id), (id, title) => this.rename(id, title),
      () => this.fresh());
    new SettingsDialog(() => this.conversation.settings, (settings) => this.newSettings(settings));
    this.wire();
  }

  async start() {
    await this.store.open();
    await this.openHash();
    await this.connect();
  }

  wire() {
    const question = byId("question");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    question.addEventListener("input", () => this.fit());
    question.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    byId("stop").addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    });
    byId("notice-close").addEventListener("click", () => { byId("notice").hidden = true; });
    byId("key").addEventListener("close", () => this.keyGiven());
    for (const cancel of document.querySelectorAll("dialog [data-close]")) { // a submit button would be what Enter does
      cancel.addEventListener("click", () => cancel.closest("dialog").close());
    }
    window.addEventListener("hashchange", () => this.openHash());
  }

  // ---- the server

  /** Which model is there; asks for a key, or waits while the model is loaded. */
  async connect() {
    try {
      const { data } = await getJson("/v1/models");
      this.model = data[0].id;
      byId("model").textContent = this.model;
      document.title = `${this.model} - qmix`;
      const { ok, loading } = await health();
      byId("model").textContent = this.model + (loading ? " (loading)" : "");
      if (!ok && loading) setTimeout(() => this.connect(), LOADING_EVERY);
    } catch (error) {
      if (error.status === 401) this.askKey();
      else this.notice(error.message);
    }
  }

  askKey() {
    const dialog = byId("key");
    if (dialog.open) return;
    byId("key-text").textContent = hasKey() ? "The server does not take this key. Another one?"
      : "This server asks for a key. It is kept until this tab is closed.";
    byId("key-value").value = "";
    dialog.returnValue = "";
    dialog.showModal();
  }

  keyGiven() {
    if (byId("key").returnValue !== "save") return;
    const value = byId("key-value").value.trim();
    if (/[^\x21-\x7e]/.test(value)) {
      this.notice("This key has characters that a request cannot carry.");
      return;
    }
    useKey(value);
    this.connect();
    this.panel.resume();
  }

  // ---- chats

  get answer() {
    return this.answers.get(this.conversation) || null;
  }

  /** The chat that the address names; a new one where it names none. */
  async openHash() {
    const id = location.hash.slice(1);
    if (id === this.conversation.id) return;
    let found = null;
    if (id) {
      found = Array.from(this.answers.keys()).find((one) => one.id === id) || await this.store.load(id);
      if (!found) this.notice("There is no such chat in this browser any more.");
    }
    this.show(found || newConversation(initialSettings()));
  }

  fresh() {
    this.show(newConversation(initialSettings()));
    byId("question").focus();
  }

  show(conversation) {
    this.conversation = conversation;
    this.address();
    this.draw();
    byId("log").scrollTop = byId("log").scrollHeight;
    this.sidebar.close();
  }

  /** The address names the chat once it is kept, so that a reload finds it. */
  address() {
    const { id, revision } = this.conversation;
    const hash = revision || this.store.memory.has(id) ? "#" + id : "";
    if (location.hash !== hash) history.replaceState(null, "", hash || location.pathname);
    this.sidebar.draw(id);
  }

  async keep(conversation) {
    if (this.deleted.has(conversation.id)) return;
    if (await this.store.save(conversation)) {
      this.notice("Another tab changed this chat at the same time, so it is a chat of its own now.");
    }
    if (conversation === this.conversation) this.address();
    else this.sidebar.draw(this.conversation.id);
  }

  async newSettings(settings) {
    this.conversation.settings = settings;
    if (this.conversation.revision) await this.keep(this.conversation);
  }

  async rename(id, title) {
    const own = Array.from(this.answers.keys()).find((one) => one.id === id);
    const conversation = this.conversation.id === id ? this.conversation : own || await this.store.load(id);
    if (!conversation) return;
    conversation.title = title;
    await this.keep(conversation);
    this.draw();
  }

  /** Marked before the store is asked: an answer keeps its chat from time to time, and once more when it is stopped. */
  async remove(id) {
    this.deleted.add(id);
    if (!await this.store.remove(id)) {
      this.deleted.delete(id);
      return;
    }
    for (const [conversation, answer] of this.answers) if (conversation.id === id) answer.stop();
    if (this.conversation.id === id) this.fresh();
    else this.sidebar.draw(this.conversation.id);
  }

  /** Another tab has kept or deleted a chat. */
  async changedElsewhere({ id, gone }) {
    if (gone) {
      for (const [conversation, answer] of this.answers) {
        if (conversation.id !== id) continue;
        this.deleted.add(id); // until the next question
        if (conversation !== this.conversation) answer.stop();
      }
    }
    if (id === this.conversation.id && (gone || !this.answer)) {
      const found = gone ? null : await this.store.load(id);
      const editing = document.querySelector("form.edit");
      if (found && !editing && !this.answer && this.conversation.id === id) {
        this.conversation = found;
        this.draw();
      } else if (gone) {
        this.conversation.revision = 0; // what is written here now is kept anew
        this.notice("Another tab deleted this chat. It is kept again if you go on with it.");
      }
    }
    this.sidebar.draw(this.conversation.id);
  }

  // ---- messages

  send() {
    const question = byId("question");
    if (!question.value.trim() || this.answer) return;
    const shown = path(this.conversation);
    const node = addNode(this.conversation, shown.length ? shown[shown.length - 1].id : ROOT, "user", question.value);
    question.value = "";
    this.fit();
    this.ask(node);
  }

  /** Answer a user's message. */
  async ask(user) {
    const { conversation } = this;
    if (this.answer) return;
    const node = addNode(conversation, user.id, "assistant", "");
    const answer = new Answer(conversation, node, this.model || undefined, () => this.piece(conversation, node),
      () => this.keep(conversation));
    this.answers.set(conversation, answer);
    this.deleted.delete(conversation.id);
    this.draw();
    this.scroll(true);
    // What was pressed is gone; the keyboard goes on at the button that has come.
    if (document.activeElement !== byId("question")) byId("stop").focus();
    this.say("Waiting for the answer.");
    const clock = setInterval(() => {
      const seconds = Math.round((performance.now() - answer.started) / 1000);
      if (conversation === this.conversation) this.views.get(node.id)?.waiting(`Waiting for the first word, ${seconds} s`);
    }, 1000);
    const error = await answer.run();
    clearInterval(clock);
    this.answers.delete(conversation);
    if (conversation === this.conversation) {
      const near = this.nearEnd();
      const stopped = document.activeElement === byId("stop");
      this.draw();
      if (stopped && matchMedia("(pointer: fine)").matches) byId("question").focus();
      if (near) this.scroll(true);
    }
    this.say(error ? "The answer failed: " + error.message : node.state === "done" ? "The answer is complete."
      : "Stopped.");
    if (error && error.status === 401) this.askKey();
  }

  stop() {
    if (this.answer) this.answer.stop();
  }

  piece(conversation, node) {
    if (conversation !== this.conversation) return;
    const near = this.nearEnd();
    this.views.get(node.id)?.changed();
    if (near) this.scroll();
  }

  /** Draw the whole chat. */
  draw() {
    const { conversation } = this;
    const running = this.answer;
    const acts = { choose: (node) => this.choose(node), regenerate: (node) => this.regenerate(node),
      edit: (node, text) => this.ask(addNode(this.conversation, node.parent, "user", text)) };
    const unfolded = new Set(Array.from(this.views.values()).filter((view) => view.thoughts.open)
      .map((view) => view.node.id));
    this.views.clear();
    const shown = path(conversation);
    for (const node of shown) {
      const view = new MessageView(conversation, node, acts, running);
      view.thoughts.open = unfolded.has(node.id);
      this.views.set(node.id, view);
    }
    byId("messages").replaceChildren(...Array.from(this.views.values(), (view) => view.element));
    byId("welcome").hidden = shown.length > 0;
    byId("messages").hidden = shown.length === 0;
    byId("title").textContent = conversation.title || "New chat";
    byId("stop").hidden = !running;
    byId("send").hidden = Boolean(running);
  }

  choose(node) {
    if (this.answer) return;
    choose(this.conversation, node);
    this.keep(this.conversation);
    this.draw();
    this.views.get(node.id)?.element.querySelector(".tools button")?.focus();
  }

  regenerate(node) {
    this.ask(this.conversation.nodes[node.parent]);
  }

  // ---- the window

  nearEnd() {
    const log = byId("log");
    return log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END;
  }

  scroll(now = false) {
    const end = () => { byId("log").scrollTop = byId("log").scrollHeight; };
    if (now) end();
    else setTimeout(end, 120); // once the piece is drawn
  }

  /** The box grows with what is written in it. */
  fit() {
    const question = byId("question");
    question.style.height = "auto";
    question.style.height = `${Math.min(question.scrollHeight + 2, window.innerHeight * 0.4)}px`;
  }

  /** For screen readers. */
  say(line) {
    byId("status").textContent = line;
  }

  notice(line) {
    const notice = byId("notice");
    notice.firstElementChild.textContent = line;
    notice.hidden = false;
  }
}

new Page().start();
