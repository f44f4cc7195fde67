// Markdown of a model as a document fragment. A model may write anything, and may have been told to by a text that it
// read. So HTML in its text is shown as text, pictures as links, and DOMPurify takes what it does not know out of the
// rest; the page's Content-Security-Policy stands behind both.

import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const TAGS = ["a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
  "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"];
const RULES = { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i, ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true };

function escaped(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");
}

const marked = new Marked({
  gfm: true,
  renderer: {
    html(token) {
      return escaped(token.text);
    },
    image(token) {
      return `<a href="${escaped(token.href)}">${escaped(token.text || token.href)}</a>`;
    },
    heading(token) { // the page itself has the first two levels
      const level = Math.min(6, token.depth + 2);
      return `<h${level}>${this.parser.parseInline(token.tokens)}</h${level}>\n`;
    },
    checkbox(token) {
      return token.checked ? "☑ " : "☐ ";
    },
  },
});

/** text -> DocumentFragment. */
export function render(text) {
  let html;
  try {
    html = marked.parse(text);
  } catch { // too deep for the parser
    html = `<pre>${escaped(text)}</pre>`;
  }
  const fragment = DOMPurify.sanitize(html, RULES);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const element of fragment.querySelectorAll("[class]")) {
    const language = element.tagName === "CODE" && /^language-([\w+#.-]{1,30})$/.exec(element.className);
    element.removeAttribute("class");
    if (language) element.dataset.language = language[1];
  }
  for (const block of fragment.querySelectorAll("pre")) frame(block);
  for (const table of fragment.querySelectorAll("table")) {
    const around = document.createElement("div");
    around.className = "scroll";
    around.tabIndex = 0;
    table.replaceWith(around);
    around.append(table);
  }
  return fragment;
}

/** Puts the language and a button to copy above a block of code. */
function frame(block) {
  const around = document.createElement("div");
  const head = document.createElement("div");
  const name = document.createElement("span");
  around.className = "code";
  head.className = "code-head";
  name.textContent = block.querySelector("code")?.dataset.language || "code";
  head.append(name, copyButton(() => block.textContent, "Copy the code"));
  block.tabIndex = 0; // so that the keyboard can scroll it
  block.replaceWith(around);
  around.append(head, block);
}

export function copyButton(text, label) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "small";
  button.textContent = "Copy";
  button.setAttribute("aria-label", label);
  button.addEventListener("click", async () => {
    const copied = await copy(text());
    button.textContent = copied ? "Copied" : "Not copied";
    document.getElementById("status").textContent = copied ? "Copied." : "The browser did not allow to copy.";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // there is no clipboard over plain HTTP from another machine
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "hidden-visually";
    document.body.append(area);
    area.select();
    try {
      return document.execCommand("copy");
    } finally {
      area.remove();
    }
  }
}
