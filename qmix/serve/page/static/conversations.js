// Conversations, as trees of messages: an edited question or another answer is a sibling of the first one, and nothing
// that was written is lost.
//
//   conversation  {id, title, created, updated, revision, settings, nodes: {id: node}, chosen: {parent id: child id}}
//   node          {id, parent, role, content, reasoning, state, error, figures}; parent "" is the root
//   state         "done", "partial" (stopped, or cut off) or "running" (a tab still writes it, or was closed meanwhile)

export const ROOT = "";

export function newId() {
  // crypto.randomUUID needs a secure context; a server reached over plain HTTP by another machine has none.
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(settings) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, revision: 0, settings: { ...settings }, nodes: {},
    chosen: {} };
}

export function children(conversation, parent) {
  return Object.values(conversation.nodes).filter((node) => node.parent === parent);
}

/** The messages that are shown, first to last. */
export function path(conversation) {
  const found = [];
  for (let id = conversation.chosen[ROOT]; id && conversation.nodes[id]; id = conversation.chosen[id]) {
    found.push(conversation.nodes[id]);
  }
  return found;
}

/** The messages before `node`, and itself. */
export function upTo(conversation, node) {
  const found = [];
  for (let one = node; one; one = conversation.nodes[one.parent]) found.unshift(one);
  return found;
}

export function addNode(conversation, parent, role, content) {
  const node = { id: newId(), parent, role, content, reasoning: "", state: "done", error: "", figures: null };
  conversation.nodes[node.id] = node;
  conversation.chosen[parent] = node.id;
  if (role === "user" && !conversation.title) conversation.title = titleOf(content);
  return node;
}

export function siblings(conversation, node) {
  return children(conversation, node.parent);
}

/** Show another version of a message; what followed that one comes with it. */
export function choose(conversation, node) {
  conversation.chosen[node.parent] = node.id;
}

export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 60 ? line.slice(0, 59) + "…" : line;
}

/** What the server is sent. An answer that failed before its first word is left out, and the questions before and after
 * it are one: templates refuse two in a row. */
export function toMessages(conversation, nodes) {
  const found = [];
  const system = (conversation.settings.system || "").trim();
  if (system) found.push({ role: "system", content: system });
  for (const node of nodes) {
    if (node.role === "assistant" && !node.content && !node.reasoning) continue;
    const last = found[found.length - 1];
    if (node.role === "user" && last && last.role === "user") {
      last.content += "\n\n" + node.content;
      continue;
    }
    const message = { role: node.role, content: node.content };
    if (node.reasoning) message.reasoning_content = node.reasoning;
    found.push(message);
  }
  return found;
}
