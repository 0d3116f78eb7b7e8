// The page: the chat on one side, the machine on the other.

import { Chat } from "./chat.js";
import { watch } from "./feed.js";
import { Grid } from "./grid.js";
import { Timeline } from "./timeline.js";
import { Caption, counts, Figures } from "./words.js";

const chat = new Chat(), grid = new Grid(), timeline = new Timeline(), figures = new Figures(), caption = new Caption();
let about = null;

watch({
  hello(hello) {
    about = hello;
    document.title = `foreroute · ${hello.model}`;
    document.getElementById("model").textContent = `${hello.model} · ${hello.num_slots} of ${hello.total_slots} experts fit the memory (${megabytes(hello.memory_bytes)})`;
    if (!hello.has_chat) chat.plain();
    if (hello.examples.length) chat.examples(hello.examples);
    grid.reset(hello.experts_per_layer, hello.keys_per_layer);
    explain(hello);
  },
  step(picture) {
    grid.show(picture);
    figures.show(picture);
    if (picture.step) {
      timeline.show(picture.step);
      const sum = counts(picture.step);
      for (const [kind, count] of Object.entries(sum)) document.getElementById(`n-${kind}`).textContent = count;
      if (sum.substituted) document.getElementById("li-substituted").hidden = false;
    }
    if (picture.is_busy && picture.step) caption.step(picture);
    else caption.idle(about, grid.states.reduce((sum, state) => sum + (state >= 2), 0));
  },
  lost() {
    caption.show("lost", ["The engine does not answer; trying again."]);
  },
});

function explain(hello) {
  const k = Math.max(...hello.top_k), layers = hello.experts_per_layer.length;
  document.getElementById("why-1").textContent =
    `The model is made of ${hello.total_slots} experts in ${layers} layers. A token, a piece of a word, needs only ${k} in each; memory holds ${hello.num_slots}, the others lie on disk.`;
  if (hello.policy !== "exact") {
    document.getElementById("why-3").textContent =
      `A right guess saves a wait. Under the policy "${hello.policy}" a token does not wait for every missing expert: default vectors are substituted, so answers may differ.`;
  }
  if (hello.predictor === "none") document.getElementById("prefetch-what").textContent = "are switched off";
}

function megabytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (bytes >= 1024 && at < 4) { bytes /= 1024; at += 1; }
  return `${bytes.toFixed(1)} ${units[at]}`;
}
