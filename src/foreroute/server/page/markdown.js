// Markdown of an answer as elements: made of text nodes alone, so that nothing a model writes is markup.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/, HEAD = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/, RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/, QUOTE = /^ {0,3}>\s?(.*)$/, CELLS = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MOST_DEEP = 8;

/** Blocks of a text: {tag, children} or {tag: "pre", language, text}; children are blocks or inline parts. */
export function parse(text, depth = 0) {
  const lines = text.split("\n"), found = [];
  let at = 0, told = [];
  const close = () => {
    if (told.length) found.push({ tag: "p", children: inline(told.join("\n")) });
    told = [];
  };
  while (at < lines.length) {
    const line = lines[at], fence = FENCE.exec(line);
    let match;
    if (fence) {
      close();
      const code = [];
      for (at += 1; at < lines.length && !closes(lines[at], fence[1]); at += 1) code.push(lines[at]);
      found.push({ tag: "pre", language: fence[2], text: code.join("\n") });
      at += 1;
    } else if ((match = HEAD.exec(line))) {
      close();
      found.push({ tag: `h${Math.min(match[1].length + 2, 6)}`, children: inline(match[2]) });
      at += 1;
    } else if (RULE.test(line)) {
      close();
      found.push({ tag: "hr", children: [] });
      at += 1;
    } else if (depth < MOST_DEEP && QUOTE.test(line)) {
      close();
      const inner = [];
      for (; at < lines.length && (match = QUOTE.exec(lines[at])); at += 1) inner.push(match[1]);
      found.push({ tag: "blockquote", children: parse(inner.join("\n"), depth + 1) });
    } else if (depth < MOST_DEEP && ITEM.test(line)) {
      close();
      const [list, next] = listAt(lines, at, depth);
      found.push(list);
      at = next;
    } else if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && CELLS.test(lines[at + 1])) {
      close();
      const rows = [cells(line)];
      for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) rows.push(cells(lines[at]));
      found.push({ tag: "table", children: rows.map((row, number) => ({
        tag: "tr", children: row.map((cell) => ({ tag: number ? "td" : "th", children: inline(cell) })),
      })) });
    } else {
      if (line.trim()) told.push(line);
      else close();
      at += 1;
    }
  }
  close();
  return found;
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
}

/** The list that begins at a line, and the line behind it. */
function listAt(lines, at, depth) {
  const first = ITEM.exec(lines[at]), isOrdered = /\d/.test(first[2]), items = [];
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > first[1].length + 1 || /\d/.test(item[2]) !== isOrdered) break;
    const indent = item[1].length + item[2].length + 1, inner = [item[3]];
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at], space = line.length - line.trimStart().length;
      if (line.trim() && space <= item[1].length) break;
      if (!line.trim() && !(at + 1 < lines.length && /^\s+\S/.test(lines[at + 1]))) { at += 1; break; }
      inner.push(line.slice(Math.min(space, indent)));
    }
    items.push({ tag: "li", children: parse(inner.join("\n"), depth + 1) });
  }
  return [{ tag: isOrdered ? "ol" : "ul", start: isOrdered ? parseInt(first[2], 10) : 1, children: items }, at];
}

/** Parts of a line: texts, and {tag, children}. */
export function inline(text) {
  const found = [], missing = new Set(); // marks that are not closed any more
  let plain = "", at = 0;
  const push = (part) => { if (plain) found.push(plain); plain = ""; found.push(part); };
  const until = (mark, from) => {
    if (missing.has(mark)) return -1;
    const end = text.indexOf(mark, from);
    if (end < 0) missing.add(mark);
    return end;
  };
  while (at < text.length) {
    const char = text[at], two = text.slice(at, at + 2);
    if (char === "\\" && /[\\`*_[\]()#+.!~|>{}-]/.test(text[at + 1] ?? "")) { plain += text[at + 1]; at += 2; continue; }
    if (char === "`") {
      let length = 1;
      while (text[at + length] === "`") length += 1;
      const mark = "`".repeat(length), end = until(mark, at + length);
      if (end > 0) { push({ tag: "code", children: [text.slice(at + length, end).trim()] }); at = end + length; continue; }
      plain += mark;
      at += length;
      continue;
    }
    const mark = two === "**" || two === "__" || two === "~~" ? two : char === "*" || char === "_" ? char : "";
    if (mark) {
      const inWord = mark[0] === "_" && /\w/.test(text[at - 1] ?? ""), start = at + mark.length;
      const end = inWord || /\s/.test(text[start] ?? " ") ? -1 : until(mark, start + 1);
      if (end > 0 && !/\s/.test(text[end - 1])) {
        push({ tag: { "**": "strong", "__": "strong", "~~": "s" }[mark] ?? "em", children: inline(text.slice(start, end)) });
        at = end + mark.length;
        continue;
      }
      plain += mark;
      at = start;
      continue;
    }
    if (char === "[") {
      const middle = until("](", at), end = middle < 0 ? -1 : text.indexOf(")", middle);
      if (end > 0 && middle - at < 500 && safe(text.slice(middle + 2, end))) {
        push({ tag: "a", href: text.slice(middle + 2, end), children: inline(text.slice(at + 1, middle)) });
        at = end + 1;
        continue;
      }
    }
    plain += char;
    at += 1;
  }
  if (plain) found.push(plain);
  return found;
}

/** Whether an address may be followed: to a site, and to nothing that runs. */
function safe(address) {
  return /^https?:\/\/[^\s]+$/i.test(address);
}

/** The elements of what `parse` found. */
export function elements(parts) {
  return parts.map((part) => {
    if (typeof part === "string") return document.createTextNode(part);
    if (part.tag === "pre") return codeBlock(part);
    const made = document.createElement(part.tag);
    if (part.tag === "a") Object.assign(made, { href: part.href, target: "_blank", rel: "noopener noreferrer nofollow" });
    if (part.tag === "ol" && part.start !== 1) made.start = part.start;
    made.append(...elements(part.children));
    return made;
  });
}

function codeBlock({ language, text }) {
  const made = document.createElement("div"), head = document.createElement("div"), pre = document.createElement("pre");
  made.className = "code";
  head.className = "code-head";
  const name = Object.assign(document.createElement("span"), { textContent: language || "text" });
  head.append(name, copyButton(() => text));
  pre.append(Object.assign(document.createElement("code"), { textContent: text }));
  pre.tabIndex = 0;
  made.append(head, pre);
  return made;
}

/** A button that copies what `text` returns. */
export function copyButton(text) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "small", textContent: "Copy" });
  button.addEventListener("click", async () => {
    button.textContent = (await copied(text())) ? "Copied" : "Not allowed here";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over http from another machine there is no clipboard: select and copy, the old way.
    const area = Object.assign(document.createElement("textarea"), { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
