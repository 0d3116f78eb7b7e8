// What the numbers say: the figures over the last seconds, and one sentence about what happens now.

const WINDOW_S = 4, HOLD_MS = 1400;

/** Three digits. */
export function number(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  return value.toFixed(value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2);
}

/** Counts of the last seconds in which tokens came; they stay when none come. */
export class Figures {
  constructor() {
    this.seen = [];
  }

  show(picture) {
    const counts = { ...picture.counts.decode, timed_steps: picture.counts.timed_steps, timed_s: picture.counts.timed_s };
    const last = this.seen[this.seen.length - 1], now = performance.now() / 1000;
    if (last && counts.tokens < last.counts.tokens) this.seen = [];
    if (!last || counts.tokens !== last.counts.tokens) {
      // A new answer begins where nothing came for a while: what was before it is another story.
      if (last && now - last.at > 1.5) this.seen = [last];
      this.seen.push({ at: now, counts });
      while (this.seen.length > 2 && now - this.seen[0].at > WINDOW_S) this.seen.shift();
    }
    if (this.seen.length < 2) return;
    const first = this.seen[0].counts, newest = this.seen[this.seen.length - 1].counts;
    const grown = (name) => newest[name] - first[name], tokens = grown("tokens");
    const demanded = grown("hits") + grown("late_hits") + grown("misses") + grown("substituted");
    put("hit-rate", demanded ? number((100 * grown("hits")) / demanded) : "–", "%");
    put("read-mb", tokens ? number((grown("demand_bytes") + grown("prefetch_bytes") + grown("deferred_bytes")) / tokens / 1e6) : "–", "MB/token");
    put("stall-ms", tokens ? number((1e3 * grown("stall_s")) / tokens) : "–", "ms/token");
    if (grown("timed_steps") > 0) put("tpot-ms", number((1e3 * grown("timed_s")) / grown("timed_steps")), "ms");
    const settled = grown("prefetch_used") + grown("prefetch_wasted");
    if (picture.prefetch_share === 0 && !settled) put("prefetch-rate", "off", "");
    else put("prefetch-rate", settled ? number((100 * grown("prefetch_used")) / settled) : "–", settled ? "%" : "");
  }
}

function put(name, value, unit) {
  const place = document.getElementById(name);
  const small = document.createElement("small");
  small.textContent = ` ${unit}`;
  place.replaceChildren(value, ...(unit && value !== "–" ? [small] : []));
}

/** One sentence at a time, each long enough to be read. */
export class Caption {
  constructor() {
    this.place = document.getElementById("caption");
    this.changed = 0;
    this.topic = "";
  }

  show(topic, parts) {
    const now = performance.now();
    if (topic === this.topic && now - this.changed < HOLD_MS) return;
    if (topic === "idle" && this.topic === "idle") return;
    this.topic = topic;
    this.changed = now;
    this.place.replaceChildren(...parts.map((part) => {
      if (typeof part === "string") return part;
      return Object.assign(document.createElement("b"), { textContent: String(part) });
    }));
  }

  idle(hello, resident) {
    this.show("idle", resident ? ["Nothing is computed now. ", resident, " of ", hello.total_slots, " experts are in memory, those that were of use last. Say something, and watch which ones it takes."]
      : ["Nothing is computed now, and memory is still empty. Say something, and watch the experts come."]);
  }

  step(picture) {
    const step = picture.step, sum = counts(step);
    const asked = sum.hits + sum.in_time + sum.late_hits + sum.misses + sum.substituted;
    if (step.phase === "prefill") {
      this.show("prefill", ["Reading the prompt: ", step.positions, step.positions === 1 ? " token asks" : " tokens at once ask", " for many of the experts, so they pass by one after the other."]);
      return;
    }
    const first = [step.rows > 1 ? `${step.rows} answers asked for ` : "This token asked for ", asked, " experts: ", sum.hits, " were in memory"];
    const inTime = sum.in_time ? [", ", sum.in_time, " had been prefetched in time"] : [];
    const late = sum.late_hits ? [", ", sum.late_hits, " were late hits"] : [];
    const substituted = sum.substituted ? [", ", sum.substituted, " were substituted by default vectors"] : [];
    const misses = sum.misses ? [sum.late_hits || sum.in_time ? ", and for " : ", for ", sum.misses, " it waited."] : [". It waited for nothing else."];
    const off = picture.prefetch_share === 0 ? " Prefetch is off now: decoding without it was measured to be faster on this machine." : "";
    this.show(picture.prefetch_share === 0 ? "off" : "decode", [...first, ...inTime, ...late, ...substituted, ...misses, off]);
  }
}

/** How many experts of each kind a step asked for. */
export function counts(step) {
  const kinds = ["hits", "in_time", "late_hits", "misses", "substituted"];
  const sum = Object.fromEntries(kinds.map((kind) => [kind, step.layers.reduce((all, layer) => all + layer[kind].length, 0)]));
  return { ...sum, wasted: step.wasted.length };
}
