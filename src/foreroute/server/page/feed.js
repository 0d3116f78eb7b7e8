// Requests of this page: with the key where one is asked for, and streams of server-sent events.

let key = ""; // in memory alone: it is gone with the page
let asking = null;

/** fetch, with the key; asks for one when the server does, and tries again. */
export async function request(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const used = key;
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) return answer;
    if (used === key) await askForKey(used !== "");
  }
}

function askForKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog"), input = document.getElementById("key");
    if (wasWrong) document.getElementById("key-why").textContent = "That key was not the right one.";
    dialog.addEventListener("close", () => {
      key = input.value.trim();
      input.value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** The events of a stream as [kind, data as text], until it ends. */
export async function* events(answer) {
  const reader = answer.body.getReader(), decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += decoder.decode(value, { stream: true }).replaceAll("\r", "");
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        let kind = "message";
        const data = [];
        for (const line of part.split("\n")) {
          if (line.startsWith("event:")) kind = line.slice(6).trim();
          else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        }
        if (data.length) yield [kind, data.join("\n")];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Watch the engine while the page is visible: `on` has hello(data), step(data) and lost(). */
export function watch(on) {
  let stop = null, pause = 500;
  async function run(signal) {
    while (!signal.aborted) {
      try {
        const answer = await request("/live", { signal });
        if (!answer.ok) throw new Error(`/live answered ${answer.status}`);
        for await (const [kind, data] of events(answer)) {
          pause = 500;
          on[kind]?.(JSON.parse(data));
        }
      } catch (error) {
        if (signal.aborted) return;
      }
      on.lost();
      await new Promise((resolve) => setTimeout(resolve, pause));
      pause = Math.min(pause * 2, 10000);
    }
  }
  function start() {
    if (document.hidden) {
      stop?.abort();
      stop = null;
    } else if (!stop) {
      stop = new AbortController();
      run(stop.signal);
    }
  }
  document.addEventListener("visibilitychange", start);
  addEventListener("pagehide", () => { stop?.abort(); stop = null; });
  addEventListener("pageshow", start);
  start();
}
