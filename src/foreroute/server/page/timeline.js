// The last token's time: what was computed and waited for in each layer, and the reads that ran meanwhile.

import { context, onTheme, palette } from "./colours.js";

const LANE = 22, READ = 11, GAP = 7, AXIS = 20, LABEL = 68;
const [DEMAND, PREFETCH] = [0, 1];
const READS = ["demand load", "prefetch", "deferred load"];

export class Timeline {
  constructor() {
    this.canvas = document.getElementById("timeline");
    this.words = document.getElementById("token-words");
    this.about = this.words.textContent;
    this.step = null;
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
    onTheme(() => this.draw());
    this.draw();
  }

  show(step) {
    if (!step || !step.layers.length) return;
    this.step = step;
    this.draw();
  }

  /** What the picture says, in a sentence. */
  say() {
    const step = this.step, end = endOf(step);
    const waited = step.layers.reduce((sum, layer) => sum + layer.waits.reduce((all, [from, to]) => all + to - from, 0), 0);
    const prefetches = step.reads.filter((read) => read[2] === PREFETCH).length;
    const what = step.phase === "prefill" ? `The prompt, ${step.positions} tokens at once: ` : step.rows > 1 ? `A token for each of ${step.rows} answers: ` : "";
    this.words.textContent = `${what}${number(end)} ms, of which ${number(waited)} ms waiting; ${step.reads.length} reads, ${prefetches} of them prefetches.`;
  }

  draw() {
    const width = this.canvas.clientWidth;
    if (!width) return;
    const narrow = width < 480, left = narrow ? 0 : LABEL, step = this.step;
    const lanes = step ? stacked(step.reads.filter((read) => read[4] > 0 && read[3] < endOf(step))) : [];
    const rows = [PREFETCH, DEMAND].map((why) => Math.max(1, ...lanes.filter((read) => isOf(read, why)).map((read) => read.lane + 1)));
    const head = narrow ? 15 : 0;
    const tops = [head, head + LANE + GAP + head, 0];
    tops[2] = tops[1] + rows[0] * READ + GAP + head;
    const bottom = tops[2] + rows[1] * READ + 4, height = bottom + AXIS;
    const pen = context(this.canvas, width, height), colours = palette();
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    pen.fillStyle = colours.soft;
    const names = ["compute", "prefetches", narrow ? "demand loads" : "demand"];
    const heights = [LANE, rows[0] * READ, rows[1] * READ];
    names.forEach((name, at) => pen.fillText(name, 0, narrow ? tops[at] - 7 : tops[at] + heights[at] / 2));
    heights.forEach((tall, at) => { pen.fillStyle = colours.absent; pen.globalAlpha = 0.6; pen.fillRect(left, tops[at], width - left, tall); pen.globalAlpha = 1; });
    if (!step) { this.words.textContent = this.about; return; }
    const end = endOf(step), x = (ms) => left + (Math.min(Math.max(ms, 0), end) / end) * (width - left - 1);
    this.axis(pen, colours, x, end, bottom, height);
    this.compute(pen, colours, x, end, tops[0], bottom);
    for (const read of lanes) {
      const [, , why, from, to] = read, top = why === PREFETCH ? tops[1] : tops[2];
      pen.fillStyle = why === PREFETCH ? colours.in_time : colours.misses;
      pen.fillRect(x(from), top + read.lane * READ + 1, Math.max(1.5, x(to) - x(from) - 0.5), READ - 2);
    }
    this.say();
    this.canvas.setAttribute("aria-label", `Timeline of the last token. ${this.words.textContent}`);
  }

  compute(pen, colours, x, end, top, bottom) {
    pen.fillStyle = colours.other;
    pen.fillRect(x(0), top, x(end) - x(0), LANE);
    const layers = this.step.layers, every = Math.ceil((layers.length * 20) / (x(end) - x(0)));
    for (const layer of layers) {
      pen.fillStyle = colours.hits;
      pen.fillRect(x(layer.t), top, Math.max(1, x(layer.end) - x(layer.t)), LANE);
      for (const [from, to] of layer.waits) hatch(pen, colours, x(from), top, x(to) - x(from), LANE);
      // Where a layer begins, down through the reads: what ran under it is seen.
      pen.fillStyle = colours.line;
      pen.fillRect(Math.round(x(layer.t)), top + LANE, 1, bottom - top - LANE);
      if (layer.layer % every === 0 && x(layer.end) - x(layer.t) > 11) {
        pen.fillStyle = colours.panel;
        pen.textAlign = "center";
        pen.font = "600 11px system-ui, sans-serif";
        const free = freeSpan(layer);
        if (x(free[1]) - x(free[0]) > 9) pen.fillText(String(layer.layer), (x(free[0]) + x(free[1])) / 2, top + LANE / 2 + 0.5);
      }
    }
  }

  axis(pen, colours, x, end, bottom, height) {
    const stride = tick(end / (x(end) - x(0) < 400 ? 4 : 7));
    pen.textAlign = "center";
    pen.font = "11px system-ui, sans-serif";
    for (let at = 0; at <= end * 0.985; at += stride) {
      pen.fillStyle = colours.soft;
      pen.textAlign = at === 0 ? "left" : "center";
      pen.fillText(at === 0 ? "0 ms" : `${+at.toFixed(3)}`, x(at), height - AXIS / 2 + 1);
      pen.fillRect(Math.round(x(at)), bottom, 1, 3);
    }
  }
}

function isOf(read, why) {
  return why === PREFETCH ? read[2] === PREFETCH : read[2] !== PREFETCH;
}

/** Reads that run at the same time lie under each other: their `lane`. */
function stacked(reads) {
  const ends = { true: [], false: [] };
  return [...reads].sort((one, two) => one[3] - two[3]).map((read) => {
    const busy = ends[read[2] === PREFETCH];
    let lane = busy.findIndex((end) => end <= read[3] + 1e-6);
    if (lane < 0) lane = Math.min(busy.length, 2);
    busy[lane] = read[4];
    return Object.assign([...read], { lane, name: READS[read[2]] });
  });
}

function endOf(step) {
  const last = step.layers[step.layers.length - 1];
  return Math.max(step.end ?? last?.end ?? 0, 0.001);
}

/** The longest part of a layer in which it did not wait. */
function freeSpan(layer) {
  const edges = [layer.t, ...layer.waits.flat(), layer.end];
  let best = [layer.t, layer.t];
  for (let at = 0; at < edges.length; at += 2) if (edges[at + 1] - edges[at] > best[1] - best[0]) best = [edges[at], edges[at + 1]];
  return best;
}

function hatch(pen, colours, x, y, width, height) {
  if (width < 0.5) return;
  pen.save();
  pen.beginPath();
  pen.rect(x, y, width, height);
  pen.clip();
  pen.fillStyle = colours.panel;
  pen.fillRect(x, y, width, height);
  pen.strokeStyle = colours.misses;
  pen.lineWidth = 2;
  pen.beginPath();
  for (let at = x - height; at < x + width; at += 6) {
    pen.moveTo(at, y + height);
    pen.lineTo(at + height, y);
  }
  pen.stroke();
  pen.lineWidth = 1;
  pen.strokeRect(x + 0.5, y + 0.5, Math.max(0, width - 1), height - 1);
  pen.restore();
}

function tick(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least);
}

function number(value) {
  return value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);
}
