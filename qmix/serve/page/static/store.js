// Keeps conversations in IndexedDB, and tells other tabs of changes. Where the browser has no room, or keeps nothing
// (private windows), they stay in memory, and the page says so.
//
// Two tabs may change one conversation. Each save names the revision that it began from; where another tab has saved
// since, the later one becomes a conversation of its own, and neither is lost.

import { newId } from "./conversations.js";

const NAME = "qmix";
const VERSION = 1;

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error || new DOMException("aborted", "AbortError"));
    transaction.onerror = () => {};
  });
}

export class Store {
  /** trouble: told a line for people when something cannot be kept. changed: told {id, gone} of other tabs. */
  constructor(trouble, changed) {
    this.trouble = trouble;
    this.database = null;
    this.memory = new Map(); // what could not be kept
    this.channel = typeof BroadcastChannel === "function" ? new BroadcastChannel(NAME) : null;
    if (this.channel) this.channel.onmessage = (event) => changed(event.data);
  }

  async open() {
    try {
      const request = indexedDB.open(NAME, VERSION);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("conversations", { keyPath: "id" });
        request.result.createObjectStore("titles", { keyPath: "id" });
      };
      this.database = await done(request);
      this.database.onversionchange = () => this.database.close();
    } catch {
      this.trouble("This browser keeps nothing for this page: chats are lost when the tab is closed.");
    }
  }

  /** [{id, title, updated}], the last one used first. */
  async titles() {
    let found = [];
    try {
      if (this.database) found = await done(this.database.transaction("titles").objectStore("titles").getAll());
    } catch (error) {
      this.trouble(`The browser did not give the list of chats (${error.message}).`);
    }
    const kept = found.filter((one) => !this.memory.has(one.id));
    return [...kept, ...Array.from(this.memory.values(), summary)].sort((a, b) => b.updated - a.updated);
  }

  async load(id) {
    if (this.memory.has(id)) return this.memory.get(id);
    if (!this.database) return null;
    try {
      return await done(this.database.transaction("conversations").objectStore("conversations").get(id)) || null;
    } catch (error) {
      this.trouble(`The browser did not give this chat (${error.message}).`);
      return null;
    }
  }

  /** Keep a conversation. Where another tab has changed it, it gets an id of its own first; true then. */
  async save(conversation) {
    let forked = false;
    if (!this.database) {
      this.memory.set(conversation.id, conversation);
      return false;
    }
    const before = conversation.revision;
    try {
      const transaction = this.database.transaction(["conversations", "titles"], "readwrite");
      const ended = finished(transaction);
      const all = transaction.objectStore("conversations");
      const there = await done(all.get(conversation.id));
      if (there && there.revision !== before) {
        forked = true;
        conversation.id = newId();
        conversation.title += " (from another tab)";
      }
      conversation.revision = before + 1;
      all.put(conversation);
      transaction.objectStore("titles").put(summary(conversation));
      await ended;
      this.memory.delete(conversation.id);
    } catch (error) {
      conversation.revision = before;
      this.memory.set(conversation.id, conversation);
      this.trouble(error && error.name === "QuotaExceededError"
        ? "The browser's storage is full: this chat is lost when the tab is closed. Delete other chats to make room."
        : `The browser did not keep this chat (${error ? error.message : "no reason given"}).`);
      return false;
    }
    this.tell({ id: conversation.id, gone: false });
    return forked;
  }

  /** Whether it is gone. */
  async remove(id) {
    try {
      if (this.database) {
        const transaction = this.database.transaction(["conversations", "titles"], "readwrite");
        const ended = finished(transaction);
        transaction.objectStore("conversations").delete(id);
        transaction.objectStore("titles").delete(id);
        await ended;
      }
    } catch (error) {
      this.trouble(`The browser did not delete this chat (${error.message}).`);
      return false;
    }
    this.memory.delete(id);
    this.tell({ id, gone: true });
    return true;
  }

  tell(change) {
    if (this.channel) this.channel.postMessage(change);
  }
}

function summary(conversation) {
  return { id: conversation.id, title: conversation.title, updated: conversation.updated };
}

/** A small value of localStorage; null where there is none, or storage is switched off. */
export function remembered(key) {
  try {
    return JSON.parse(localStorage.getItem("qmix." + key));
  } catch {
    return null;
  }
}

export function remember(key, value) {
  try {
    localStorage.setItem("qmix." + key, JSON.stringify(value));
  } catch { /* full or switched off: the next visit starts without it */ }
}
