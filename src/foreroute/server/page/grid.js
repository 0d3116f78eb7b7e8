// The experts as squares: a row for each layer. What the last tokens asked for fades over the next pictures.

import { context, onTheme, palette } from "./colours.js";

const ABSENT = 0, RESIDENT = 2;
const KINDS = ["hits", "in_time", "late_hits", "misses", "substituted", "wasted"];
// How strongly a mark is shown, by its age in pictures.
const FADE = [1, 0.5, 0.26, 0.13];
const GUTTER = 26, TALLEST = 430, LARGEST = 22, SMALLEST = 3;
const WORDS = {
  hits: "the last token used it: a hit",
  in_time: "the last token used it: a hit, prefetched in time",
  late_hits: "the last token used it: a late hit, which waited for the rest of the prefetch",
  misses: "the last token used it: a miss, which waited for the whole read",
  substituted: "the last token did not wait for it: a default vector was its substitute",
  wasted: "it had been prefetched, and was evicted before any token used it",
};
const STATES = ["on disk", "being read", "in memory", "in memory, prefetched and not used yet"];
const still = matchMedia("(prefers-reduced-motion: reduce)");

/** One square of kind `mark` at (x, y), `size` wide. */
export function square(pen, mark, x, y, size, colours) {
  const round = size > 7 ? Math.min(3, size / 5) : 0;
  const box = () => { pen.beginPath(); pen.roundRect(x, y, size, size, round); };
  const fill = (name) => { box(); pen.fillStyle = colours[name]; pen.fill(); };
  const isLarge = size >= 7;
  pen.lineWidth = Math.max(1, size / 9);
  if (mark === "pending" || mark === "coming") {
    fill(mark === "pending" ? "resident" : "absent");
    pen.strokeStyle = colours.pending;
    pen.beginPath();
    pen.roundRect(x + pen.lineWidth / 2, y + pen.lineWidth / 2, size - pen.lineWidth, size - pen.lineWidth, round);
    pen.stroke();
    return;
  }
  if (mark === "wasted") {
    fill("absent");
    pen.fillStyle = colours.wasted;
    pen.beginPath();
    pen.arc(x + size / 2, y + size / 2, Math.max(1, size / 5), 0, 7);
    pen.fill();
    return;
  }
  fill(mark);
  if (!isLarge) return;
  // A shape each, so that they can be told apart without colours.
  const middle = size / 2, reach = size / 5;
  pen.strokeStyle = pen.fillStyle = colours.panel;
  pen.lineWidth = Math.max(1.4, size / 9);
  pen.beginPath();
  if (mark === "in_time") {
    pen.moveTo(x + middle - reach, y + middle + reach * 0.1);
    pen.lineTo(x + middle - reach * 0.25, y + middle + reach * 0.8);
    pen.lineTo(x + middle + reach, y + middle - reach * 0.75);
    pen.stroke();
  } else if (mark === "late_hits") {
    pen.moveTo(x + middle, y + middle - reach);
    pen.lineTo(x + middle, y + middle);
    pen.lineTo(x + middle + reach * 0.9, y + middle);
    pen.stroke();
  } else if (mark === "misses") {
    pen.moveTo(x + middle - reach, y + middle - reach);
    pen.lineTo(x + middle + reach, y + middle + reach);
    pen.moveTo(x + middle + reach, y + middle - reach);
    pen.lineTo(x + middle - reach, y + middle + reach);
    pen.stroke();
  } else if (mark === "substituted") {
    pen.fillRect(x + middle - reach, y + middle - 1, reach * 2, 2);
  }
}

export class Grid {
  constructor() {
    this.canvas = document.getElementById("grid");
    this.told = document.getElementById("cell");
    this.hint = this.told.textContent;
    this.widths = [];
    this.cursor = null;
    this.reset([]);
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
    onTheme(() => { this.draw(); this.legend(); });
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("blur", () => this.leave());
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.legend();
  }

  legend() {
    for (const canvas of document.querySelectorAll("canvas.key")) {
      square(context(canvas, 16, 16), canvas.dataset.mark, 1, 1, 14, palette());
    }
  }

  /** A pool of these widths, of which nothing is known yet. */
  reset(widths, keysPerLayer = Math.max(0, ...widths)) {
    this.widths = widths;
    this.perLayer = keysPerLayer;
    this.states = new Uint8Array(widths.length * keysPerLayer);
    this.marks = new Int8Array(this.states.length).fill(-1);
    this.ages = new Uint8Array(this.states.length);
    this.number = -1;
    this.draw();
  }

  /** Two bits an expert, as the feed has them. */
  pool(text) {
    const packed = atob(text);
    for (let key = 0; key < this.states.length; key++) this.states[key] = (packed.charCodeAt(key >> 2) >> ((key & 3) * 2)) & 3;
  }

  /** A picture of the feed. */
  show(picture) {
    this.pool(picture.pool);
    const step = picture.step;
    if (step && step.number !== this.number) {
      for (let key = 0; key < this.ages.length; key++) if (this.marks[key] >= 0 && ++this.ages[key] >= FADE.length) this.marks[key] = -1;
      this.number = step.number;
    }
    if (step) {
      for (const layer of step.layers) for (const kind of KINDS.slice(0, 5)) for (const expert of layer[kind]) this.mark(layer.layer, expert, kind);
      for (const [layer, expert] of step.wasted) if (this.states[layer * this.perLayer + expert] === ABSENT) this.mark(layer, expert, "wasted");
    }
    this.draw();
    const resident = this.states.reduce((sum, state) => sum + (state >= RESIDENT), 0);
    this.canvas.setAttribute("aria-label", `${resident} of ${this.widths.reduce((sum, width) => sum + width, 0)} experts are in memory`);
    if (this.cursor) this.tell();
  }

  mark(layer, expert, kind) {
    const key = layer * this.perLayer + expert;
    this.marks[key] = KINDS.indexOf(kind);
    this.ages[key] = 0;
  }

  draw() {
    const width = this.canvas.clientWidth, rows = this.widths.length;
    if (!width || !rows) return;
    const columns = this.perLayer;
    const step = Math.max(SMALLEST, Math.min(LARGEST, (width - GUTTER) / columns, Math.max(TALLEST / rows, 9)));
    const pitch = step > 6 ? Math.floor(step * 2) / 2 : step;
    // A few large squares grow wider than high, so that the rows fill the panel.
    const across = Math.max(pitch, (width - GUTTER) / columns), gap = pitch > 6 ? 2 : pitch > 4 ? 1 : 0.5;
    const rowPitch = Math.max(pitch, Math.min(across, TALLEST / rows, LARGEST * 1.3));
    const height = Math.ceil(rows * rowPitch);
    this.pitch = [across, rowPitch];
    const pen = context(this.canvas, width, height), colours = palette();
    const size = Math.max(2, Math.min(across, rowPitch) - gap), inset = (across - size) / 2;
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(13 / rowPitch));
    for (let layer = 0; layer < rows; layer++) {
      const y = layer * rowPitch + (rowPitch - size) / 2;
      if (layer % every === 0) {
        pen.fillStyle = colours.soft;
        pen.fillText(String(layer), GUTTER - 8, y + size / 2);
      }
      for (let expert = 0; expert < this.widths[layer]; expert++) {
        const key = layer * this.perLayer + expert, x = GUTTER + expert * across + inset;
        const base = ["absent", "coming", "resident", "pending"][this.states[key]];
        square(pen, base, x, y, size, colours);
        const age = this.ages[key];
        if (this.marks[key] >= 0 && (age === 0 || !still.matches)) {
          pen.globalAlpha = FADE[age];
          square(pen, KINDS[this.marks[key]], x, y, size, colours);
          pen.globalAlpha = 1;
        }
      }
    }
    if (this.cursor) {
      const [layer, expert] = this.cursor;
      pen.strokeStyle = colours.ink;
      pen.lineWidth = 2;
      pen.strokeRect(GUTTER + expert * across + inset - 1, layer * rowPitch + (rowPitch - size) / 2 - 1, size + 2, size + 2);
    }
  }

  // One square, by pointer or keys.

  point(event) {
    if (!this.pitch) return;
    const at = this.canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - at.left - GUTTER) / this.pitch[0]), layer = Math.floor((event.clientY - at.top) / this.pitch[1]);
    if (layer < 0 || layer >= this.widths.length || expert < 0 || expert >= this.widths[layer]) this.leave();
    else this.choose(layer, expert);
  }

  key(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move || !this.widths.length) return;
    event.preventDefault();
    const [layer, expert] = this.cursor ?? [0, -move[1]];
    const row = Math.min(Math.max(layer + move[0], 0), this.widths.length - 1);
    this.choose(row, Math.min(Math.max(expert + move[1], 0), this.widths[row] - 1));
  }

  choose(layer, expert) {
    this.cursor = [layer, expert];
    this.tell();
    this.draw();
  }

  leave() {
    if (!this.cursor) return;
    this.cursor = null;
    this.told.textContent = this.hint;
    this.draw();
  }

  tell() {
    const [layer, expert] = this.cursor, key = layer * this.perLayer + expert;
    const asked = this.marks[key] >= 0 && this.ages[key] === 0 ? `; ${WORDS[KINDS[this.marks[key]]]}` : "";
    this.told.textContent = `Layer ${layer}, expert ${expert}: ${STATES[this.states[key]]}${asked}.`;
  }
}
