// The conversation: what is said goes to the server's own API, as any client would send it.

import { events, request } from "./feed.js";
import { copyButton, elements, parse } from "./markdown.js";
import { keepTurns, keptTurns, Settings } from "./settings.js";

const EXAMPLES = ["Once upon a time", "What is 7 + 8?", "Tell me about the sea."];

export class Chat {
  constructor() {
    this.turns = []; // {role, content, node}
    this.isChat = true; // false: the model has no chat template, and continues a text
    this.model = null;
    this.going = null;
    this.talk = document.getElementById("talk");
    this.welcome = document.getElementById("welcome");
    this.text = document.getElementById("text");
    this.button = document.getElementById("send");
    this.settings = new Settings();
    document.getElementById("ask").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    document.getElementById("new-chat").addEventListener("click", () => this.clear());
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
      if (event.key === "Escape") this.going?.abort();
    });
    this.text.addEventListener("input", () => this.fit());
    this.examples(EXAMPLES);
    this.restore(keptTurns());
  }

  /** Show what was said before a reload; a message that had no answer yet goes back into the box. */
  restore(turns) {
    const asked = turns.at(-1)?.role === "user" ? turns.pop() : null;
    for (const { role, content } of turns) this.add(role, content);
    if (asked) this.put(asked.content);
  }

  /** Offer these as first words. */
  examples(texts) {
    document.getElementById("examples").replaceChildren(...texts.map((text) => {
      return button(text, "quiet", () => { this.text.value = text; this.send(); });
    }));
  }

  /** The model has no chat template: say so. */
  plain() {
    this.isChat = false;
    this.text.placeholder = "A text for the model to continue";
    this.welcome.querySelector(".lead").textContent = "Begin a text.";
    document.getElementById("system-row").hidden = true;
  }

  fit() {
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight + 2}px`;
  }

  put(text) {
    this.text.value = text;
    this.fit();
    this.text.focus();
  }

  clear() {
    this.going?.abort();
    this.turns = [];
    keepTurns([]);
    this.talk.replaceChildren(this.welcome);
    this.text.focus();
  }

  show(kind, text) {
    this.welcome.remove();
    const node = document.createElement("div"), words = document.createElement("div");
    node.className = `turn ${kind}`;
    words.className = "words";
    words.textContent = text;
    node.append(words);
    this.talk.append(node);
    this.talk.scrollTop = this.talk.scrollHeight;
    return node;
  }

  /** Show a turn that is complete, and take it into the conversation. */
  add(role, content) {
    const turn = { role, content, node: this.show(role, content) };
    if (role === "assistant") turn.node.querySelector(".words").replaceChildren(...elements(parse(content)));
    this.turns.push(turn);
    this.offer(turn);
    return turn;
  }

  /** What can be done with a turn. */
  offer(turn) {
    const row = document.createElement("div");
    row.className = "actions";
    row.append(copyButton(() => turn.content));
    if (turn.role === "user") row.append(button("Edit", "small", () => this.edit(turn)));
    else row.append(button("Regenerate", "small", () => this.again(turn)));
    turn.node.append(row);
  }

  keep() {
    keepTurns(this.turns.map(({ role, content }) => ({ role, content })));
  }

  /** Take a turn and all behind it out of the conversation. */
  cut(turn) {
    const at = this.turns.indexOf(turn);
    if (at < 0) return false;
    this.going?.abort();
    for (let node = turn.node; node;) {
      const next = node.nextSibling;
      node.remove();
      node = next;
    }
    this.turns.length = at;
    this.keep();
    return true;
  }

  edit(turn) {
    if (this.cut(turn)) this.put(turn.content);
  }

  again(turn) {
    const asked = this.turns[this.turns.indexOf(turn) - 1];
    if (asked?.role === "user" && !this.going && this.cut(turn)) this.answerTo(asked);
  }

  send() {
    if (this.going) { this.going.abort(); return; }
    const text = this.text.value.trim();
    if (!text) return;
    this.text.value = "";
    this.fit();
    const asked = this.add("user", text);
    this.keep();
    this.answerTo(asked);
  }

  /** Ask for the answer to the last turn, and show it as it comes. */
  async answerTo(asked) {
    const node = this.show("assistant going", ""), words = node.querySelector(".words");
    const going = this.going = new AbortController();
    this.button.textContent = "Stop";
    const began = performance.now();
    const said = { text: "", thought: "", tools: [] };
    let first = 0, last = 0, usage = null, reason = "", failure = "";
    try {
      for await (const chunk of this.answer(going.signal)) {
        if (chunk.error) throw new Error(chunk.error.message);
        const choice = chunk.choices?.[0];
        usage = chunk.usage ?? usage;
        reason = choice?.finish_reason ?? reason;
        if (!take(said, choice)) continue;
        last = performance.now();
        first ||= last;
        this.draw(words, said);
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "stopped";
      else failure = error.message;
    }
    node.classList.remove("going");
    if (this.going === going) {
      this.going = null;
      this.button.textContent = "Send";
    }
    if (!this.turns.includes(asked)) { node.remove(); return; } // the conversation was cleared or edited meanwhile
    this.finish(asked, node, said, failure);
    this.took(node, { began, first, last, usage, reason, said: said.text || said.thought || said.tools.length });
  }

  finish(asked, node, said, failure) {
    if (said.text) {
      const turn = { role: "assistant", content: said.text, node };
      this.turns.push(turn);
      this.drawNow(node.querySelector(".words"), said);
      this.offer(turn);
    }
    if (failure) this.fail(failure);
    // A turn without an answer is no part of the conversation: templates want them by turns.
    if (!said.text) this.turns.pop();
    if (!said.text && failure) {
      // What was refused can be changed, and sent again.
      asked.node.remove();
      if (!this.text.value) this.put(asked.content);
    }
    this.keep();
  }

  draw(words, said) {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.drawNow(words, said); this.follow(); });
  }

  drawNow(words, said) {
    const parts = elements(parse(said.text));
    for (const tool of said.tools.filter(Boolean)) parts.unshift(folded(`Calls ${tool.name || "a tool"}`, tool.arguments, false));
    if (said.thought) parts.unshift(folded("Reasoning", said.thought, words.querySelector("details")?.open ?? false));
    words.replaceChildren(...parts);
  }

  async *answer(signal) {
    const body = { model: await this.name(), stream: true, stream_options: { include_usage: true }, ...this.settings.request };
    if (this.isChat) {
      const system = this.settings.system;
      body.messages = this.turns.map(({ role, content }) => ({ role, content }));
      if (system) body.messages.unshift({ role: "system", content: system });
    } else {
      body.prompt = this.turns.map((turn) => turn.content + (turn.role === "user" ? "\n" : "")).join("");
      body.max_tokens ??= 512; // a text without turns has no end of its own
    }
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

  took(node, { began, first, last, usage, reason, said }) {
    const parts = [], tokens = usage?.completion_tokens ?? 0;
    if (tokens) parts.push(`${tokens} tokens`);
    if (tokens > 1) parts.push(`${((last - first) / (tokens - 1)).toFixed(1)} ms each`);
    if (first) parts.push(`the first after ${((first - began) / 1000).toFixed(2)} s`);
    if (reason === "length") parts.push("cut off at the limit");
    if (reason === "stopped") parts.push("stopped");
    if (!said && reason === "stop") parts.push("the model said nothing");
    if (!parts.length) { node.remove(); return; }
    const line = Object.assign(document.createElement("div"), { className: "took", textContent: parts.join(" · ") });
    node.append(line);
    this.follow();
  }

  fail(message) {
    this.show("error", message).setAttribute("role", "alert");
  }
}

/** Take a chunk's choice into what was said; false where it has nothing to show. */
function take(said, choice) {
  const delta = choice?.delta ?? {}, piece = delta.content ?? choice?.text ?? "", thought = delta.reasoning_content ?? "";
  said.text += piece;
  said.thought += thought;
  for (const call of delta.tool_calls ?? []) {
    const known = said.tools[call.index ?? 0] ??= { name: "", arguments: "" };
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
  return Boolean(piece || thought || delta.tool_calls?.length);
}

function folded(title, text, isOpen) {
  const made = document.createElement("details");
  made.open = isOpen;
  made.append(
    Object.assign(document.createElement("summary"), { textContent: title }),
    Object.assign(document.createElement("pre"), { textContent: text }),
  );
  return made;
}

function button(text, className, onClick) {
  const made = Object.assign(document.createElement("button"), { type: "button", className, textContent: text });
  made.addEventListener("click", onClick);
  return made;
}
