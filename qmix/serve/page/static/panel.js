// The live panel: what the server does now. It asks once a second, only while it is open and the tab is seen.

import { getJson } from "./api.js";
import { HeatMap, fillTable, summary } from "./heatmap.js";
import { remember, remembered } from "./store.js";

const EVERY = 1000; // ms
const AFTER_TROUBLE = 5000;
const LEGEND = [["v", "--vram", "in VRAM"], ["r", "--ram", "in RAM"], [".", "--disk", "on the disk"],
  ["+", "--coming", "on its way"], ["", "--hot", "chosen lately"]];
const byId = (id) => document.getElementById(id);

export class Panel {
  /** denied: called where the server wants another key. */
  constructor(denied) {
    this.denied = denied;
    this.heatMap = new HeatMap(byId("map"), byId("map-cell"), byId("map-mode"));
    this.last = null; // the figures before
    this.rates = { decode: null, prefill: null, hits: null };
    this.timer = 0;
    this.asking = null;
    byId("panel-toggle").addEventListener("click", () => this.open(byId("panel").hidden));
    document.addEventListener("visibilitychange", () => this.resume());
    if (remembered("panel") && matchMedia("(min-width: 900px)").matches) this.open(true);
  }

  open(shown) {
    byId("panel").hidden = !shown;
    byId("panel-toggle").setAttribute("aria-expanded", String(shown));
    document.body.classList.toggle("with-panel", shown);
    remember("panel", shown);
    this.resume();
  }

  /** Ask again where there is anything to show, else be quiet. */
  resume() {
    clearTimeout(this.timer);
    if (this.asking) this.asking.abort();
    this.asking = null;
    if (!byId("panel").hidden && !document.hidden) this.ask();
    else this.last = null;
  }

  async ask() {
    const asking = this.asking = new AbortController();
    let wait = EVERY;
    try {
      const [stats, map] = await Promise.all([getJson("/v1/stats", asking.signal),
        getJson("/v1/stats/experts", asking.signal)]);
      if (this.asking !== asking) return;
      this.show(stats, map);
    } catch (error) {
      if (this.asking !== asking) return;
      byId("map-text").textContent = error.message;
      wait = AFTER_TROUBLE;
      if (error.status === 401) {
        this.denied();
        return; // resume() is called with the key
      }
    }
    this.timer = setTimeout(() => this.ask(), wait);
  }

  show(stats, map) {
    const rows = [["Server", stats.state === "ready"
      ? stats.running ? `answering, ${stats.waiting} waiting` : "ready" : stats.state]];
    if (stats.offload) {
      const { decode, prefill, prefetcher } = stats.offload;
      this.measure(stats.offload);
      rows.push(["Answers", rate(this.rates.decode)], ["Prompts", rate(this.rates.prefill)],
        ["Hit rate, lately", share(this.rates.hits)],
        ["Hit rate, in all", share(ratio(decode.hits, decode.chosen))],
        ["Read from disk", bytes(decode.bytes_read + prefill.bytes_read)],
        ["Prefetch", prefetch(stats.offload.prefetch, prefetcher)]);
    }
    const list = byId("figures");
    list.replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
    if (stats.memory && map.tiers) this.memory(stats.memory, map.tiers);
    if (map.layers) {
      byId("map-text").textContent = summary(map);
      this.heatMap.show(map);
      this.legend(map);
      if (byId("map-table").closest("details").open) fillTable(byId("map-table").tBodies[0], map);
    }
  }

  /** What has come since the figures before: speeds of the last moments in which anything was computed. */
  measure({ decode, prefill }) {
    const last = this.last;
    this.last = { decode, prefill };
    if (!last || decode.tokens < last.decode.tokens) return;
    for (const [name, now] of [["decode", decode], ["prefill", prefill]]) {
      const found = ratio(now.tokens - last[name].tokens, now.seconds - last[name].seconds);
      if (found) this.rates[name] = found;
    }
    const hits = ratio(decode.hits - last.decode.hits, decode.chosen - last.decode.chosen);
    if (hits !== null) this.rates.hits = hits;
  }

  memory(memory, tiers) {
    const found = tiers.map((tier) => {
      const gpu = "vram_budget" in memory && tier.letter === "v";
      const [used, budget] = gpu ? [memory.vram_taken, memory.vram_budget] : [memory.peak, memory.budget];
      const around = document.createElement("div");
      const bar = document.createElement("progress");
      const label = element("label", `${tier.name}: ${gpu ? "" : "peak "}${bytes(used)} of ${bytes(budget)}`);
      const id = `memory-${tier.letter}`;
      label.htmlFor = bar.id = id;
      bar.max = budget;
      bar.value = Math.min(used, budget);
      around.append(label, bar, element("p", `${tier.held} experts in ${tier.slots} slots`, "quiet"));
      return around;
    });
    byId("memory").replaceChildren(...found);
  }

  legend(map) {
    const letters = ["", ".", ...map.tiers.map((tier) => tier.letter)];
    if (map.held.some((row) => row.includes("+"))) letters.push("+");
    byId("legend").replaceChildren(...LEGEND.filter(([letter]) => letters.includes(letter)).map(([, name, text]) => {
      const around = element("span", text);
      const patch = element("span", "", "patch");
      patch.style.background = `var(${name})`;
      around.prepend(patch);
      return around;
    }));
  }
}

function element(tag, text, kind) {
  const found = document.createElement(tag);
  found.textContent = text;
  if (kind) found.className = kind;
  return found;
}

function ratio(part, whole) {
  return whole > 0 ? part / whole : null;
}

function rate(value) {
  return value === null ? "none yet" : `${value < 10 ? value.toFixed(1) : Math.round(value)} tokens/s`;
}

function share(value) {
  return value === null ? "none yet" : `${(100 * value).toFixed(value < 0.995 ? 1 : 0)} %`;
}

function prefetch(mode, { issued, used, late, wasted_bytes: wasted }) {
  if (mode === "off") return "off";
  return issued ? `${share(used / issued)} of ${issued} used, ${late} late, ${bytes(wasted)} wasted` : "nothing yet";
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let left = value;
  while (left >= 1024 && unit < units.length - 1) {
    left /= 1024;
    unit += 1;
  }
  return `${unit && left < 100 ? left.toFixed(1) : Math.round(left)} ${units[unit]}`;
}
