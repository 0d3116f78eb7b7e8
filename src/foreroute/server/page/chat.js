// The conversation: what is said goes to the server's own API, as any client would send it.

import { events, request } from "./feed.js";

const MOST_TOKENS = 512;
const EXAMPLES = ["Once upon a time", "What is 7 + 8?", "Tell me about the sea."];

export class Chat {
  constructor() {
    this.turns = [];
    this.isChat = true; // false: the model has no chat template, and continues a text
    this.model = null;
    this.going = null;
    this.talk = document.getElementById("talk");
    this.welcome = document.getElementById("welcome");
    this.text = document.getElementById("text");
    this.button = document.getElementById("send");
    document.getElementById("ask").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    document.getElementById("new-chat").addEventListener("click", () => this.clear());
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
      if (event.key === "Escape") this.going?.abort();
    });
    this.text.addEventListener("input", () => this.fit());
    this.examples(EXAMPLES);
  }

  /** Offer these as first words. */
  examples(texts) {
    document.getElementById("examples").replaceChildren(...texts.map((text) => {
      const button = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: text });
      button.addEventListener("click", () => { this.text.value = text; this.send(); });
      return button;
    }));
  }

  /** The model has no chat template: say so. */
  plain() {
    this.isChat = false;
    this.text.placeholder = "A text for the model to continue";
    this.welcome.querySelector(".lead").textContent = "Begin a text.";
  }

  fit() {
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight + 2}px`;
  }

  clear() {
    this.going?.abort();
    this.turns = [];
    this.talk.replaceChildren(this.welcome);
    this.text.focus();
  }

  add(role, text) {
    this.welcome.remove();
    const turn = document.createElement("div");
    turn.className = `turn ${role}`;
    turn.textContent = text;
    this.talk.append(turn);
    this.talk.scrollTop = this.talk.scrollHeight;
    return turn;
  }

  // What the model thinks before it answers, folded.
  think(turn, thought) {
    let folded = turn.querySelector("details");
    if (!folded) {
      folded = document.createElement("details");
      folded.append(Object.assign(document.createElement("summary"), { textContent: "Reasoning" }), "");
      turn.prepend(folded);
    }
    folded.lastChild.appendData(thought);
  }

  async send() {
    if (this.going) { this.going.abort(); return; }
    const text = this.text.value.trim();
    if (!text) return;
    this.text.value = "";
    this.fit();
    const turns = this.turns;
    turns.push({ role: "user", content: text });
    this.add("user", text);
    const turn = this.add("assistant going", "");
    const words = document.createElement("span");
    turn.append(words);
    this.going = new AbortController();
    this.button.textContent = "Stop";
    const began = performance.now();
    let first = 0, last = 0, usage = null, said = "", reason = "";
    try {
      for await (const chunk of this.answer(turns, this.going.signal)) {
        const choice = chunk.choices?.[0], delta = choice?.delta;
        const piece = delta?.content ?? choice?.text ?? "", thought = delta?.reasoning_content ?? "";
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        reason = choice?.finish_reason ?? reason;
        if (!piece && !thought) continue;
        last = performance.now();
        first ||= last;
        if (thought) this.think(turn, thought);
        said += piece;
        words.append(piece);
        this.follow();
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "stopped";
      else this.fail(error.message);
    } finally {
      turn.classList.remove("going");
      this.going = null;
      this.button.textContent = "Send";
      if (said) turns.push({ role: "assistant", content: said });
      else turns.pop();
      this.took(turn, { began, first, last, usage, reason, said });
    }
  }

  async *answer(turns, signal) {
    const body = { model: await this.name(), stream: true, stream_options: { include_usage: true }, max_tokens: MOST_TOKENS };
    if (this.isChat) body.messages = turns;
    else body.prompt = turns.map((turn) => turn.content + (turn.role === "user" ? "\n" : "")).join("");
    const answer = await request(this.isChat ? "/v1/chat/completions" : "/v1/completions", {
      method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    if (!answer.ok) {
      const told = await answer.json().catch(() => null);
      throw new Error(told?.error?.message ?? `The server answered ${answer.status}.`);
    }
    for await (const [, data] of events(answer)) {
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }

  async name() {
    if (this.model === null) {
      const answer = await request("/v1/models");
      this.model = (await answer.json()).data[0].id;
    }
    return this.model;
  }

  /** Scroll to the end, unless the reader has scrolled up. */
  follow() {
    const left = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight;
    if (left < 80) this.talk.scrollTop = this.talk.scrollHeight;
  }

  took(turn, { began, first, last, usage, reason, said }) {
    const parts = [], tokens = usage?.completion_tokens ?? 0;
    if (tokens) parts.push(`${tokens} tokens`);
    if (tokens > 1) parts.push(`${((last - first) / (tokens - 1)).toFixed(1)} ms each`);
    if (first) parts.push(`the first after ${((first - began) / 1000).toFixed(2)} s`);
    if (reason === "length") parts.push("cut off at the limit");
    if (reason === "stopped") parts.push("stopped");
    if (!said && reason === "stop") parts.push("the model said nothing");
    if (!parts.length) { turn.remove(); return; }
    const line = Object.assign(document.createElement("div"), { className: "took", textContent: parts.join(" · ") });
    turn.append(line);
    this.follow();
  }

  fail(message) {
    this.add("error", message).setAttribute("role", "alert");
  }
}
