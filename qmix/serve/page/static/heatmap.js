// The experts of all layers as a picture: a row a layer, a cell an expert. The colour of a cell says where the expert is,
// the mark in it how many of the last tokens chose it. A table beside the picture says the same in words.

const NARROWEST = 2; // CSS pixels of a cell
const HIGHEST = 14;

export class HeatMap {
  /** mode: a select of what is drawn: "both", "places" or "heat". */
  constructor(canvas, cell, mode) {
    this.canvas = canvas;
    this.mode = mode;
    this.cell = cell;
    this.map = null;
    mode.addEventListener("change", () => this.draw());
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => { cell.textContent = ""; });
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    document.addEventListener("themechange", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(map) {
    this.map = map;
    this.draw();
  }

  draw() {
    const { canvas, map } = this;
    const room = canvas.parentElement.clientWidth - 32;
    if (!map || !map.layers.length || room <= 0) return;
    const width = Math.max(NARROWEST, Math.min(28, room / map.experts));
    const height = Math.max(4, Math.min(HIGHEST, width, 480 / map.layers.length));
    const ratio = window.devicePixelRatio || 1;
    this.size = { width, height };
    canvas.style.width = `${width * map.experts}px`;
    canvas.style.height = `${height * map.layers.length}px`;
    canvas.width = Math.round(width * map.experts * ratio);
    canvas.height = Math.round(height * map.layers.length * ratio);
    const context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const colour = { ".": "", "+": "" };
    for (const [letter, name] of [["v", "--vram"], ["r", "--ram"], [".", "--disk"], ["+", "--coming"]]) {
      colour[letter] = style.getPropertyValue(name).trim();
    }
    const [hot, ground] = ["--hot", "--ground"].map((name) => style.getPropertyValue(name).trim());
    const strongest = Math.max(1, ...map.heat.map((row) => (row ? Math.max(...row) : 0)));
    context.scale(ratio, ratio);
    const mode = this.mode.value;
    const gap = width >= 5 ? 1 : 0;
    const edge = width >= 7 && height >= 7 ? 2 : gap; // how much of its place a hot expert shows
    map.held.forEach((row, layer) => {
      for (let expert = 0; expert < row.length; expert += 1) {
        const [x, y] = [expert * width, layer * height];
        context.globalAlpha = 1;
        context.fillStyle = mode === "heat" ? colour["."] : colour[row[expert]] || colour["."];
        context.fillRect(x, y, width - gap, height - gap);
        const heat = map.heat[layer] && mode !== "places" ? map.heat[layer][expert] : 0;
        if (heat) {
          const inner = [x + edge, y + edge, width - gap - 2 * edge, height - gap - 2 * edge];
          if (edge > gap) { // where the cell is large the two colours do not mix
            context.fillStyle = ground;
            context.fillRect(...inner);
          }
          context.globalAlpha = 0.15 + 0.85 * Math.sqrt(heat / strongest);
          context.fillStyle = hot;
          context.fillRect(...inner);
        }
      }
    });
    canvas.setAttribute("aria-label", "Heat map of layers by experts. " + summary(map));
  }

  point(event) {
    const { map, size } = this;
    if (!map || !size) return;
    const layer = Math.floor(event.offsetY / size.height);
    const expert = Math.floor(event.offsetX / size.width);
    const place = map.held[layer]?.[expert];
    if (place === undefined) return;
    const heat = map.heat[layer] ? `, chosen by ${map.heat[layer][expert]} % of the last tokens` : "";
    this.cell.textContent = `Layer ${map.layers[layer]}, expert ${expert}: ${placeName(map, place)}${heat}`;
  }
}

export function placeName(map, letter) {
  if (letter === "+") return "on its way";
  const tier = map.tiers.find((one) => one.letter === letter);
  return tier ? `in ${tier.name}` : "on the disk";
}

/** "64 experts in 8 layers: 40 in RAM, 24 on the disk." */
export function summary(map) {
  const counts = new Map();
  let all = 0;
  for (const row of map.held) {
    for (const letter of row) {
      counts.set(letter, (counts.get(letter) || 0) + 1);
      all += 1;
    }
  }
  const parts = Array.from(counts, ([letter, count]) => `${count} ${placeName(map, letter)}`);
  return `${all} experts in ${map.layers.length} layers: ${parts.join(", ")}.`;
}

/** The same as rows of a table. */
export function fillTable(body, map) {
  const rows = map.held.map((row, layer) => {
    const line = document.createElement("tr");
    const held = row.replace(/[.+]/g, "").length;
    const heat = map.heat[layer];
    const best = heat ? heat.map((share, expert) => [share, expert]).filter(([share]) => share > 0)
      .sort((a, b) => b[0] - a[0]).slice(0, 3) : null;
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = map.layers[layer];
    line.append(head);
    for (const text of [`${held} of ${row.length}`,
      best ? best.map(([share, expert]) => `${expert} (${share} %)`).join(", ") || "none yet" : "not counted"]) {
      line.insertCell().textContent = text;
    }
    return line;
  });
  body.replaceChildren(...rows);
}
