// System prompt, sampling and colours. A setting that is empty is not sent, and the server's own default holds.

import { remember, remembered } from "./store.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 100, hint: "0 takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1 },
  { name: "top_k", label: "Top k", min: 0, whole: true, hint: "0 switches it off" },
  { name: "min_p", label: "Min p", min: 0, max: 1 },
  { name: "repeat_penalty", label: "Repeat penalty", min: 0.01, max: 100, hint: "1 switches it off" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2 },
  { name: "max_tokens", label: "Longest answer", min: 1, whole: true, hint: "tokens" },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, whole: true,
    hint: "the same answer again" },
];
const EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh"];
const byId = (id) => document.getElementById(id);

/** What a request has of them. */
export function sampling(settings) {
  const found = {};
  for (const { name } of FIELDS) if (typeof settings[name] === "number") found[name] = settings[name];
  if (settings.reasoning_effort) found.reasoning_effort = settings.reasoning_effort;
  return found;
}

/** Those that a new chat begins with. */
export function initialSettings() {
  const found = remembered("settings");
  return found && typeof found === "object" ? found : {};
}

export class SettingsDialog {
  /** current: the settings of the chat that is shown; save: told the new ones. */
  constructor(current, save) {
    this.dialog = byId("settings");
    this.save = save;
    const grid = byId("sampling");
    for (const field of FIELDS) grid.append(labelled(field.label, field.hint, input(field), "set-" + field.name));
    const effort = document.createElement("select");
    for (const value of ["", ...EFFORTS]) effort.add(new Option(value || "As the model", value));
    grid.append(labelled("Reasoning effort", "where the model has it", effort, "set-reasoning_effort"));
    byId("settings-open").addEventListener("click", () => this.open(current()));
    this.dialog.addEventListener("close", () => {
      if (this.dialog.returnValue === "save") this.done();
    });
  }

  open(settings) {
    byId("set-system").value = settings.system || "";
    for (const { name } of FIELDS) byId("set-" + name).value = settings[name] ?? "";
    byId("set-reasoning_effort").value = settings.reasoning_effort || "";
    byId("set-theme").value = document.documentElement.dataset.theme || "";
    this.dialog.returnValue = "";
    this.dialog.showModal();
  }

  done() {
    const settings = {};
    const system = byId("set-system").value;
    if (system.trim()) settings.system = system;
    for (const { name } of FIELDS) {
      const { value, valueAsNumber } = byId("set-" + name);
      if (value !== "" && Number.isFinite(valueAsNumber)) settings[name] = valueAsNumber;
    }
    const effort = byId("set-reasoning_effort").value;
    if (effort) settings.reasoning_effort = effort;
    remember("settings", settings);
    setTheme(byId("set-theme").value);
    this.save(settings);
  }
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  try {
    localStorage.setItem("qmix.theme", theme);
  } catch { /* holds until the next reload */ }
  document.dispatchEvent(new Event("themechange"));
}

function input({ min, max, whole }) {
  const element = document.createElement("input");
  element.type = "number";
  element.inputMode = whole ? "numeric" : "decimal";
  element.step = whole ? "1" : "any";
  element.min = min;
  if (max !== undefined) element.max = max;
  element.placeholder = "server's";
  return element;
}

function labelled(text, hint, control, id) {
  const around = document.createElement("div");
  const label = document.createElement("label");
  control.id = id;
  label.htmlFor = id;
  label.textContent = text;
  around.append(label, control);
  if (hint) {
    const more = document.createElement("p");
    more.className = "quiet";
    more.id = id + "-hint";
    more.textContent = hint;
    control.setAttribute("aria-describedby", more.id);
    around.append(more);
  }
  return around;
}
