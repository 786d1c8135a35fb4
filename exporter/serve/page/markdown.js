// A model's Markdown -> DOM nodes. Text becomes text nodes; what is not understood is shown as it was written. Every step is linear in the
// length of the text, and nesting is bounded, so that no answer can hang the page.

import { coloured } from "./highlight.js";
import { copyButton, h, plain } from "./nodes.js";

const DEEPEST = 8;        // quotes and lists within each other; what is deeper is text
const OPEN_MARKS = 32;    // emphasis and brackets that are open at a time
const LONGEST_INLINE = 50_000;  // characters of a paragraph in which marks are looked for
const SAFE = new Set(["http:", "https:", "mailto:"]);
const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", mdash: "—", ndash: "–", hellip: "…", times: "×", rarr: "→", larr: "←" };

function codeBlock(text, language = "") {
  const title = language ? `Code, ${language}` : "Code";
  return h("div", { className: "code" },
    h("div", { className: "code-head" }, h("span", {}, ...plain(language || "text")), copyButton("Copy this code", () => text)),
    h("pre", { tabIndex: 0, role: "region", "aria-label": title }, h("code", {}, ...coloured(text, language))));
}

// ---- inline ----

const punctuation = (c) => /[\p{P}\p{S}]/u.test(c);
const space = (c) => c === "" || /\s/.test(c);

/** An absolute link that may be followed, or null. */
function safe(target) {
  try {
    const url = new URL(target);
    return SAFE.has(url.protocol) && !url.username && !url.password ? url : null;
  } catch {
    return null;
  }
}

function link(url, children, shown) {
  const named = safe(shown.trim());
  const lies = url.host && /^(https?:\/\/|www\.)/i.test(shown.trim()) && (!named || named.host !== url.host);
  const a = h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href }, ...children);
  return lies ? [a, h("span", { className: "host" }, ` (${url.host || url.pathname})`)] : [a];
}

/** `(target "title")` at `at` -> [target, where it ends], or null. */
function destination(text, at) {
  let begin = at + 1, end, target;
  while (/\s/.test(text[begin] ?? "") && begin < at + 10) begin += 1;
  if (text[begin] === "<") {
    end = text.slice(begin, begin + 2000).search(/[>\n]/) + begin;
    if (text[end] !== ">") return null;
    target = text.slice(begin + 1, end++);
  } else {
    let depth = 0;
    for (end = begin; end < text.length && end < begin + 2000 && !/[\s<>]/.test(text[end]); end += 1) {
      depth += text[end] === "(" ? 1 : text[end] === ")" ? -1 : 0;
      if (depth < 0) break;
    }
    target = text.slice(begin, end);
  }
  const rest = /(?:\s{1,9}(?:"[^"\n]{0,500}"|'[^'\n]{0,500}'))?\s{0,9}\)/y;
  rest.lastIndex = end;
  return rest.test(text) ? [target, rest.lastIndex] : null;
}

/** Where each run of backticks begins, by the length of the run. */
function backticks(text) {
  const runs = new Map();
  for (const match of text.matchAll(/`+/g)) {
    if (!runs.has(match[0].length)) runs.set(match[0].length, []);
    runs.get(match[0].length).push(match.index);
  }
  for (const places of runs.values()) places.reverse();  // the next is taken from the end
  return runs;
}

/** The formula that begins at `at`, with its marks; it is shown as it was written. */
function math(text, at) {
  const close = { "\\(": "\\)", "\\[": "\\]", $$: "$$" }[text.slice(at, at + 2)];
  const end = close ? text.slice(at + 2, at + 2000).indexOf(close) : -1;
  return end < 0 ? "" : text.slice(at, at + 4 + end);
}

/** The nodes of a paragraph's text. */
export function inline(text) {
  if (text.length > LONGEST_INLINE) return plain(text);
  const runs = backticks(text);
  const frames = [{ mark: "", count: 0, nodes: [] }];
  const top = () => frames[frames.length - 1];
  let pending = "";
  const flush = () => {
    if (pending) top().nodes.push(...plain(pending));
    pending = "";
  };
  /** Frames above `depth` were never closed: their marks are text. */
  const unwind = (depth) => {
    flush();
    while (frames.length > depth + 1) {
      const frame = frames.pop();
      const mark = frame.mark === "[" ? frame.opening : frame.mark.repeat(frame.count);
      top().nodes.push(mark, ...frame.nodes);
    }
  };
  const find = (test) => frames.findLastIndex((frame, i) => i > 0 && test(frame));

  for (let at = 0; at < text.length;) {
    const c = text[at];
    const formula = c === "$" || c === "\\" ? math(text, at) : "";
    if (formula) {
      flush();
      top().nodes.push(h("span", { className: "math" }, ...plain(formula)));
      at += formula.length;
    } else if (c === "\\" && at + 1 < text.length) {
      if (text[at + 1] === "\n") {
        flush();
        top().nodes.push(h("br"));
      } else pending += /[!-/:-@[-`{-~]/.test(text[at + 1]) ? text[at + 1] : c + text[at + 1];
      at += 2;
    } else if (c === "`") {
      let length = 1;
      while (text[at + length] === "`") length += 1;
      const places = runs.get(length) ?? [];  // none: an escaped one was the first of the run
      while (places.length && places[places.length - 1] <= at) places.pop();
      const end = places.pop();
      if (end === undefined) {
        pending += "`".repeat(length);
        at += length;
      } else {
        flush();
        let code = text.slice(at + length, end).replaceAll("\n", " ");
        if (/^ .*[^ ].* $/.test(code)) code = code.slice(1, -1);
        top().nodes.push(h("code", {}, ...plain(code)));
        at = end + length;
      }
    } else if (c === "*" || c === "_" || c === "~") {
      let length = 1;
      while (text[at + length] === c) length += 1;
      const before = at ? text[at - 1] : "", after = text[at + length] ?? "";
      const left = !space(after) && (!punctuation(after) || space(before) || punctuation(before));
      const right = !space(before) && (!punctuation(before) || space(after) || punctuation(after));
      const opens = left && (c !== "_" || !right || punctuation(before)), closes = right && (c !== "_" || !left || punctuation(after));
      at += length;
      if (length > 3 || (c === "~" && length !== 2)) {  // no emphasis is deeper than three marks
        pending += c.repeat(length);
        continue;
      }
      while (closes && length) {
        const depth = find((frame) => frame.mark === c && frame.count > 0);
        if (depth < 0) break;
        unwind(depth);
        const frame = top(), used = Math.min(frame.count, length, 2);
        const wrapped = h(c === "~" ? "del" : used === 2 ? "strong" : "em", {}, ...frame.nodes);
        frame.count -= used;
        length -= used;
        if (frame.count) frame.nodes = [wrapped];
        else {
          frames.pop();
          top().nodes.push(wrapped);
        }
      }
      if (length && opens && frames.length < OPEN_MARKS) {
        flush();
        frames.push({ mark: c, count: length, nodes: [] });
      } else pending += c.repeat(length);
    } else if (c === "[" || (c === "!" && text[at + 1] === "[")) {
      const opening = c === "!" ? "![" : "[";
      if (frames.length < OPEN_MARKS) {
        flush();
        frames.push({ mark: "[", opening, from: at + opening.length, nodes: [] });
      } else pending += opening;
      at += opening.length;
    } else if (c === "]") {
      const depth = find((frame) => frame.mark === "[");
      const target = depth > 0 && text[at + 1] === "(" ? destination(text, at + 1) : null;
      const url = target && safe(target[0]);
      if (url) {
        unwind(depth);
        const frame = frames.pop(), shown = text.slice(frame.from, at);
        const label = frame.opening === "![" ? ["image: ", ...(frame.nodes.length ? frame.nodes : [url.href])] : frame.nodes;
        top().nodes.push(...link(url, label.length ? label : [url.href], shown));  // an image is never fetched
        at = target[1];
      } else {
        if (depth > 0) unwind(depth - 1);
        pending += target ? text.slice(at, target[1]) : "]";
        at = target ? target[1] : at + 1;
      }
    } else if (c === "<" && /^<br ?\/?>/i.test(text.slice(at, at + 6))) {  // the one tag that models write into tables
      flush();
      top().nodes.push(h("br"));
      at = text.indexOf(">", at) + 1;
    } else if (c === "<" || (c === "h" && text.startsWith("http", at) && !/\w/.test(text[at - 1] ?? ""))) {
      const found = c === "<" ? /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y : /https?:\/\/[^\s<>"'`\\\]]{1,2000}/y;
      found.lastIndex = at;
      const match = found.exec(text);
      let shown = match ? (match[1] ?? match[0]) : "";
      if (match && c !== "<") {
        shown = shown.replace(/[.,;:!?*_~]{1,20}$/, "");
        while (shown.endsWith(")") && shown.split(")").length > shown.split("(").length) shown = shown.slice(0, -1);
      }
      const url = shown && safe(shown);
      if (url) {
        flush();
        top().nodes.push(...link(url, plain(shown), shown));
        at += c === "<" ? match[0].length : shown.length;
      } else {
        pending += c;
        at += 1;
      }
    } else if (c === "&") {
      const found = /&(?:#x([0-9a-f]{1,6})|#(\d{1,7})|([a-z]{2,6}));/iy;
      found.lastIndex = at;
      const match = found.exec(text);
      const code = match && (match[1] ? parseInt(match[1], 16) : match[2] ? Number(match[2]) : 0);
      const meant = !match ? undefined : match[3] ? (Object.hasOwn(NAMED, match[3]) ? NAMED[match[3]] : undefined)
        : code > 0 && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? String.fromCodePoint(code) : "\ufffd";
      pending += meant ?? "&";
      at += meant === undefined ? 1 : match[0].length;
    } else if (c === "\n") {
      const spaces = pending.length - pending.trimEnd().length;
      pending = pending.trimEnd();
      flush();
      top().nodes.push(spaces >= 2 ? h("br") : "\n");
      at += 1;
    } else {
      const next = text.slice(at + 1, at + 4097).search(/[\\`*_~[\]!<h&$\n]/);
      const end = next < 0 ? Math.min(text.length, at + 4097) : at + 1 + next;
      pending += text.slice(at, end);
      at = end;
    }
  }
  unwind(0);
  return frames[0].nodes;
}

// ---- blocks ----

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)|$)/;
const QUOTE = /^ {0,3}> ?/;
const HEADING = /^ {0,3}(#{1,6})(?=[ ]|$)/;

const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;
const rule = (line) => line.length < 1000 && /^ {0,3}([-*_])(?: *\1){2,} *$/.test(line);
const begins = (line) => FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || rule(line);

function cells(line) {
  let row = line.trim();
  if (row.startsWith("|")) row = row.slice(1);
  if (row.endsWith("|") && !row.endsWith("\\|")) row = row.slice(0, -1);
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function alignments(line) {
  if (line === undefined || line.length > 5000 || !line.includes("-") || !/^[ |:-]+$/.test(line)) return null;
  const found = cells(line);
  return found.every((cell) => /^:?-+:?$/.test(cell)) && (found.length > 1 || line.includes("|"))
    ? found.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "")) : null;
}

function table(lines, at) {
  const align = alignments(lines[at + 1]);
  const row = (name, line) => {
    const found = cells(line);
    return h("tr", {}, align.map((side, i) => h(name, { className: side, scope: name === "th" ? "col" : null }, ...inline(found[i] ?? ""))));
  };
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !blank(lines[end])) end += 1;
  const body = lines.slice(at + 2, end).map((line) => row("td", line));
  const node = h("table", {}, h("thead", {}, row("th", lines[at])), body.length ? h("tbody", {}, body) : null);
  return [h("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" }, node), end];
}

function fence(lines, at) {
  const [, inset, marks, word] = FENCE.exec(lines[at]);
  const closes = (line) => { const t = line.trim(); return indent(line) < 4 && t.length >= marks.length && t === marks[0].repeat(t.length); };
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(inset.length, indent(line))));
  return [codeBlock(code.join("\n"), word.trim().split(/\s/)[0].slice(0, 40)), Math.min(end + 1, lines.length)];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && (QUOTE.test(lines[end]) || (!blank(lines[end]) && !begins(lines[end]) && !ITEM.test(lines[end])))) end += 1;
  return [h("blockquote", {}, blocks(lines.slice(at, end).map((line) => line.replace(QUOTE, "")), depth + 1)), end];
}

function list(lines, at, depth) {
  const [, inset, first] = ITEM.exec(lines[at]);
  const kind = first[first.length - 1], ordered = /\d/.test(first);
  const node = h(ordered ? "ol" : "ul", { start: ordered && parseInt(first) !== 1 ? parseInt(first) : null });
  let loose = false;
  while (at < lines.length) {
    const marker = ITEM.exec(lines[at]);
    if (!marker || marker[1].length > inset.length + 1 || marker[2][marker[2].length - 1] !== kind || rule(lines[at])) break;
    const width = marker[1].length + marker[2].length + (marker[3]?.length < 5 ? marker[3].length : 1);
    const inside = [lines[at].slice(Math.min(width, lines[at].length))];
    const least = Math.min(width, inset.length + 2);  // models indent by two where the marker is wider
    let empty = false;
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at];
      if (blank(line)) empty = true;
      else if (indent(line) >= least) {
        if (empty && indent(line) < width + 2 && !ITEM.test(line)) loose = true;
        empty = false;
      } else if (empty || begins(line) || ITEM.test(line)) break;
      inside.push(line.slice(Math.min(width, indent(line))));
    }
    if (empty && ITEM.exec(lines[at] ?? "")?.[2].endsWith(kind)) loose = true;
    const task = /^\[([ xX])\] /.exec(inside[0]);
    if (task) inside[0] = inside[0].slice(4);
    const box = task && h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "not done" : "done" });
    node.append(h("li", { className: task ? "task" : "" }, box, blocks(inside, depth + 1)));
  }
  if (!loose) node.classList.add("tight");
  return [node, at];
}

function paragraph(lines, at) {
  let end = at + 1;
  const interrupts = (i) => blank(lines[i]) || begins(lines[i]) || (ITEM.test(lines[i]) && /^ *(?:[-*+]|1[.)]) /.test(lines[i]))
    || (lines[i].includes("|") && alignments(lines[i + 1]));
  const under = (i) => i < lines.length && /^ {0,3}(?:=+|-+) *$/.test(lines[i].slice(0, 1000)) && lines[i].length < 1000;
  while (end < lines.length && !under(end) && !interrupts(end)) end += 1;
  const content = inline(lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd());
  if (under(end)) return [h(lines[end].includes("=") ? "h1" : "h2", {}, ...content), end + 1];
  return [h("p", {}, ...content), end];
}

function heading(lines, at) {
  const [found, marks] = HEADING.exec(lines[at]);
  const words = lines[at].slice(found.length).trim(), cut = words.length - (/ (#{1,100})$/.exec(` ${words.slice(-200)}`)?.[1].length ?? 0);
  return [h(`h${marks.length}`, {}, ...inline(words.slice(0, cut).trim())), at + 1];
}

/** The block that begins at a line -> [node, the line after it]. */
function block(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return fence(lines, at);
  if (HEADING.test(line)) return heading(lines, at);
  if (rule(line)) return [h("hr"), at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && alignments(lines[at + 1])) return table(lines, at);
  return paragraph(lines, at);
}

function blocks(lines, depth) {
  const nodes = [];
  for (let at = 0; at < lines.length;) {
    if (blank(lines[at])) at += 1;
    else {
      const [node, end] = block(lines, at, depth);
      nodes.push(node);
      at = end;
    }
  }
  return nodes;
}

/** The rendering of a text that grows at its end. Blocks before the last one stay as they are: what follows cannot change them. */
export class Rendering {
  constructor(element) {
    this.element = element;
    this.settled = 0;  // characters of the text whose blocks are final
    this.text = "";
    this.tail = [];
  }

  /** What the last line may still become is open, and a table begins a line before it is seen: nothing is settled by either. */
  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) {
      this.element.replaceChildren();
      this.settled = 0;
      this.tail = [];
    }
    this.text = text;
    const raw = text.slice(this.settled).split("\n");
    const lines = raw.map((line) => line.replace(/\r$/, "").replace(/^[ \t]{1,200}/, (s) => s.replaceAll("\t", "    ")));
    for (const node of this.tail) node.remove();
    const found = [];
    for (let at = 0; at < lines.length;) {
      if (blank(lines[at])) at += 1;
      else {
        const [node, end] = block(lines, at, 0);
        found.push([node, at]);
        at = end;
      }
    }
    const open = Math.max(found.findLastIndex(([, at]) => at < lines.length - 2), 0);
    this.tail = found.slice(open).map(([node]) => node);
    this.element.append(...found.map(([node]) => node));
    if (found.length) this.settled += raw.slice(0, found[open][1]).reduce((sum, line) => sum + line.length + 1, 0);
  }
}
