// Messages on the screen.

import { describe } from "./answer.js";
import { siblings } from "./conversations.js";
import { copyButton, render } from "./markdown.js";

export function button(text, label, act, kind = "small") {
  const found = document.createElement("button");
  found.type = "button";
  found.className = kind;
  found.textContent = text;
  if (label) found.setAttribute("aria-label", label);
  found.addEventListener("click", act);
  return found;
}

function part(tag, kind, text = "") {
  const found = document.createElement(tag);
  if (kind) found.className = kind;
  found.textContent = text;
  return found;
}

/** One message. acts: {edit(node, text), regenerate(node), choose(node)}. answer: the one that is computed in this chat,
 * or null: meanwhile no message can be changed. */
export class MessageView {
  constructor(conversation, node, acts, answer) {
    this.conversation = conversation;
    this.node = node;
    this.acts = acts;
    this.answer = answer;
    this.cost = 0; // ms that the last drawing took
    this.drawn = 0;
    this.timer = 0;
    this.element = part("li", node.role);
    this.name = part("h3", "who", node.role === "user" ? "You" : "Answer");
    this.thoughts = document.createElement("details");
    this.thoughts.className = "reasoning";
    this.thoughts.append(part("summary", "", "Reasoning"), part("div", "text"));
    this.text = part("div", "text");
    this.trouble = part("p", "trouble");
    this.tools = part("div", "tools");
    this.element.append(this.name, this.thoughts, this.text, this.trouble, this.tools);
    this.draw();
  }

  get running() {
    return this.answer !== null && this.answer.node === this.node;
  }

  /** A piece has come: draw soon, the less often the longer drawing takes. Timers go on in hidden tabs, frames do not. */
  changed() {
    if (!this.timer) this.timer = setTimeout(() => this.draw(), Math.max(50, 4 * this.cost));
  }

  draw() {
    clearTimeout(this.timer);
    this.timer = 0;
    const start = performance.now();
    const { node } = this;
    const running = this.running;
    this.thoughts.hidden = !node.reasoning;
    if (node.reasoning) {
      this.thoughts.firstChild.textContent = running && !node.content ? "Reasoning…" : "Reasoning";
      this.thoughts.lastChild.replaceChildren(render(node.reasoning));
    }
    if (node.role === "user") this.text.textContent = node.content;
    else this.text.replaceChildren(render(node.content));
    this.element.classList.toggle("running", running);
    this.trouble.textContent = node.error || (running || node.state === "done" ? ""
      : node.state === "partial" ? "Stopped." : "Another tab writes this answer, or was closed meanwhile.");
    this.tools.replaceChildren(...(running ? [] : this.buttons()));
    this.cost = performance.now() - start;
  }

  /** What a running answer waits for: "Reading the prompt, 12 s". */
  waiting(text) {
    if (!this.node.content && !this.node.reasoning) this.text.replaceChildren(part("p", "quiet", text));
  }

  buttons() {
    const { node } = this;
    const found = [copyButton(() => node.content, "Copy this message")];
    if (this.answer) return found;
    if (node.role === "user") found.push(button("Edit", "Edit this message", () => this.edit()));
    else found.push(button("Regenerate", "Answer again", () => this.acts.regenerate(node)));
    const all = siblings(this.conversation, node);
    if (all.length > 1) {
      const at = all.indexOf(node);
      const step = (by, text, label) => {
        const made = button(text, label, () => this.acts.choose(all[at + by]));
        made.disabled = !all[at + by];
        return made;
      };
      found.push(step(-1, "‹", "Earlier version"), part("span", "quiet", `${at + 1} of ${all.length}`),
        step(1, "›", "Later version"));
    }
    if (node.figures) found.push(part("span", "quiet", describe(node.figures)));
    return found;
  }

  edit() {
    const form = part("form", "edit");
    const area = document.createElement("textarea");
    area.value = this.node.content;
    area.rows = Math.min(12, this.node.content.split("\n").length + 1);
    area.setAttribute("aria-label", "Edit the message");
    const send = part("button", "strong", "Send");
    const close = () => {
      form.remove();
      this.text.hidden = this.tools.hidden = false;
      this.tools.querySelector("[aria-label='Edit this message']")?.focus();
    };
    form.append(area, send, button("Cancel", "", close, ""));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim()) this.acts.edit(this.node, area.value);
    });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.text.hidden = this.tools.hidden = true;
    this.element.append(form);
    area.focus();
  }
}
