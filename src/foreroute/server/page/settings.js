// What the user chose, and what was said: kept in this tab, so that a reload loses nothing. The key is never kept.

const CHAT = "foreroute-chat", NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

function stored() {
  try {
    const found = JSON.parse(sessionStorage.getItem(CHAT) ?? "{}");
    return found && typeof found === "object" ? found : {};
  } catch {
    return {}; // storage is switched off, or holds something else
  }
}

function store(part) {
  try {
    sessionStorage.setItem(CHAT, JSON.stringify({ ...stored(), ...part }));
  } catch {
    // Switched off, or full: the chat goes on without it.
  }
}

/** The turns that were kept. */
export function keptTurns() {
  const found = stored().turns;
  const isTurn = (turn) => ["user", "assistant"].includes(turn?.role) && typeof turn?.content === "string";
  return Array.isArray(found) ? found.filter(isTurn) : [];
}

/** Keep these turns for a reload. */
export function keepTurns(turns) {
  store({ turns });
}

/** The panel of settings; an empty field leaves the choice to the server. */
export class Settings {
  constructor() {
    this.panel = document.getElementById("settings");
    const kept = stored().settings ?? {};
    for (const field of this.fields()) {
      if (typeof kept[field.name] === "string") field.value = kept[field.name];
      field.addEventListener("input", () => this.keep());
    }
    document.getElementById("show-settings").addEventListener("click", (event) => {
      this.panel.hidden = !this.panel.hidden;
      event.currentTarget.setAttribute("aria-expanded", String(!this.panel.hidden));
      if (!this.panel.hidden) this.fields()[0].focus();
    });
  }

  fields() {
    return [...this.panel.querySelectorAll("[name]")];
  }

  keep() {
    store({ settings: Object.fromEntries(this.fields().map((field) => [field.name, field.value])) });
  }

  /** The system prompt, or "". */
  get system() {
    return this.panel.querySelector("[name=system]").value.trim();
  }

  /** Fields of a request. */
  get request() {
    const found = {};
    for (const name of NUMBERS) {
      const field = this.panel.querySelector(`[name=${name}]`);
      if (field.value !== "" && Number.isFinite(field.valueAsNumber)) found[name] = field.valueAsNumber;
    }
    return found;
  }
}
