// One answer: streams it into its node of the conversation, and keeps that from time to time.

import { chat } from "./api.js";
import { toMessages, upTo } from "./conversations.js";
import { sampling } from "./settings.js";

const KEEP_EVERY = 2000; // ms between two saves, so that a reload in the middle loses little

export class Answer {
  /** changed: told after each piece. keep: saves the conversation. */
  constructor(conversation, node, model, changed, keep) {
    this.conversation = conversation;
    this.node = node;
    this.model = model;
    this.changed = changed;
    this.keep = keep;
    this.controller = new AbortController();
    this.started = performance.now();
  }

  stop() {
    this.controller.abort();
  }

  /** Until the answer has ended, whatever ended it; the error where one did. */
  async run() {
    const { conversation, node } = this;
    const asked = conversation.nodes[node.parent];
    let kept = performance.now();
    let first = 0;
    let last = 0;
    let failed = null;
    node.state = "running";
    await this.keep();
    try {
      const body = { model: this.model, messages: toMessages(conversation, upTo(conversation, asked)),
        ...sampling(conversation.settings) };
      for await (const chunk of chat(body, this.controller.signal)) {
        const choice = chunk.choices[0];
        if (choice && (choice.delta.content || choice.delta.reasoning_content)) {
          last = performance.now();
          first ||= last;
          node.content += choice.delta.content || "";
          node.reasoning += choice.delta.reasoning_content || "";
          this.changed();
        }
        if (choice && choice.finish_reason === "length") {
          node.error = "The answer ends here because its length limit or the context is reached.";
        }
        if (chunk.usage) node.figures = figures(chunk.usage, first - this.started, last - first);
        if (performance.now() - kept > KEEP_EVERY) {
          kept = performance.now();
          await this.keep();
        }
      }
      node.state = "done";
    } catch (error) {
      node.state = "partial";
      if (error.name !== "AbortError") {
        failed = error;
        node.error = error.message;
      }
    }
    conversation.updated = Date.now();
    await this.keep();
    return failed;
  }
}

function figures(usage, firstMs, restMs) {
  const tokens = usage.completion_tokens;
  return { tokens, prompt: usage.prompt_tokens, cached: usage.prompt_tokens_details?.cached_tokens || 0,
    firstSeconds: firstMs / 1000, rate: tokens > 1 && restMs > 0 ? (tokens - 1) / (restMs / 1000) : null };
}

/** "212 tokens, 8.1 tokens/s, first after 1.2 s, 40 of 52 prompt tokens from the cache". */
export function describe(found) {
  const parts = [`${found.tokens} token${found.tokens === 1 ? "" : "s"}`];
  if (found.rate) parts.push(`${found.rate < 10 ? found.rate.toFixed(1) : Math.round(found.rate)} tokens/s`);
  parts.push(`first after ${found.firstSeconds.toFixed(1)} s`);
  if (found.cached) parts.push(`${found.cached} of ${found.prompt} prompt tokens from the cache`);
  return parts.join(", ");
}
