// One message on the page. A view is made once and brought up to date while its message grows.

import { Rendering } from "./markdown.js";
import { copyButton, h, icon, plain } from "./nodes.js";
import { versions } from "./store.js";

const seconds = (ms) => (ms < 9950 ? (ms / 1000).toFixed(1) : Math.round(ms / 1000).toLocaleString("en")) + " s";
const FINISHED = {
  length: "The answer was cut: the longest answer or the end of the context was reached.",
  content_filter: "The server ended the answer.",
  stopped: "Stopped.",
};

function button(name, label, onclick, more = {}) {
  return h("button", { type: "button", className: "quiet", "aria-label": label, title: label, onclick, ...more }, icon(name));
}

/** ‹ 1/2 ›, where there are other versions of a message. */
function switcher(conversation, message, actions) {
  const all = versions(conversation, message), at = all.indexOf(message);
  if (all.length < 2) return null;
  const to = (i) => () => actions.show(all[i]);
  return h("span", { className: "versions", role: "group", "aria-label": "Versions" },
    button("left", "The version before", to(at - 1), { disabled: at === 0 }),
    h("span", { "aria-label": `version ${at + 1} of ${all.length}` }, `${at + 1}/${all.length}`),
    button("right", "The next version", to(at + 1), { disabled: at === all.length - 1 }));
}

/** Tokens a second, first token, and what of the prompt was new; "" where the server did not say. */
export function speed(message) {
  const { usage, times } = message;
  if (!times) return "";
  const parts = [], seen = (times.last - times.first) / 1000, span = seen > 0.02 ? seen : 0;  // a shorter one is the clock's
  if (usage?.completion) {
    parts.push(`${usage.completion.toLocaleString("en")} tokens`);
    if (usage.completion > 1 && span > 0) parts.push(`${((usage.completion - 1) / span).toFixed(1)} tok/s`);
  } else if (times.parts > 1 && span > 0) parts.push(`about ${((times.parts - 1) / span).toFixed(0)} tok/s`);
  parts.push(`first after ${seconds(times.first)}`);
  return parts.join(" · ");
}

function cached({ usage }) {
  if (!usage?.prompt) return "";
  return `The prompt had ${usage.prompt.toLocaleString("en")} tokens; ${usage.cached.toLocaleString("en")} of them were known from before`;
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;  // cut, or still growing
  }
}

class UserView {
  constructor(message, conversation, actions) {
    this.bubble = h("div", { className: "bubble" }, ...plain(message.content));
    this.foot = h("div", { className: "foot" }, switcher(conversation, message, actions), copyButton("Copy this message", () => message.content),
      button("edit", "Edit this message and ask again", () => this.edit(message, actions)));
    this.element = h("li", {}, h("article", { className: "user", "aria-label": "You" }, this.bubble, this.foot));
  }

  edit(message, actions) {
    const area = h("textarea", { value: message.content, rows: Math.min(12, message.content.split("\n").length + 1), "aria-label": "Your message" });
    const close = () => { form.replaceWith(this.bubble, this.foot); this.foot.querySelector("button:last-child").focus(); };
    const form = h("form", { className: "edit" }, area, h("div", { className: "edit-foot" },
      h("button", { type: "button", className: "quiet", onclick: close }, "Cancel"), h("button", { type: "submit", className: "primary" }, "Ask again")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim()) actions.edit(message, area.value);
    });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); close(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    });
    this.bubble.replaceWith(form);
    this.foot.remove();
    area.focus();
  }

  update() {}
}

class ToolView {
  constructor(message) {
    this.element = h("li", {}, h("article", { className: "tool", "aria-label": "Result of a tool" },
      h("details", {}, h("summary", {}, icon("tool"), "Result"), h("pre", { tabIndex: 0 }, ...plain(message.content)))));
  }

  update() {}
}

class AnswerView {
  constructor(message, conversation, actions) {
    Object.assign(this, { message, conversation, actions, finished: false, shownCalls: "" });
    this.state = h("span", {});
    this.thoughtBody = h("div", { className: "prose" });
    this.thought = h("details", { className: "thought", hidden: true }, h("summary", {}, icon("think"), this.state), this.thoughtBody);
    this.thought.addEventListener("toggle", () => this.update(!this.finished));
    this.body = h("div", { className: "prose" });
    this.calls = h("div", { className: "calls" });
    this.error = h("div", { className: "error", role: "alert", hidden: true });
    this.dots = h("p", { className: "dots", hidden: true, "aria-hidden": "true" }, h("i"), h("i"), h("i"));
    this.note = h("p", { className: "note", hidden: true });
    this.foot = h("div", { className: "foot" });
    this.rendering = new Rendering(this.body);
    this.thinking = new Rendering(this.thoughtBody);
    this.article = h("article", { className: "answer", "aria-label": "Answer" }, this.thought, this.body, this.calls, this.dots, this.note, this.error, this.foot);
    this.element = h("li", {}, this.article);
  }

  /** running: the message still grows. */
  update(running) {
    const m = this.message;
    this.article.setAttribute("aria-busy", String(running));
    this.thought.hidden = !m.reasoning;
    if (m.reasoning) {
      const done = !running || m.content || m.calls.length;
      this.state.textContent = !done ? "Thinking …" : m.times?.thought - m.times?.first >= 50 ? `Thought for ${seconds(m.times.thought - m.times.first)}` : "Thought";
      this.thought.classList.toggle("running", !done);
      if (this.thought.open) this.thinking.update(m.reasoning);
    }
    this.rendering.update(m.content);
    const calls = JSON.stringify(m.calls);
    if (calls !== this.shownCalls) this.showCalls();
    this.shownCalls = calls;
    this.dots.hidden = !running || Boolean(m.content || m.reasoning || m.calls.length);
    this.error.hidden = !m.error;
    if (m.error && !running) this.error.replaceChildren(h("span", {}, ...plain(m.error)), h("button", { type: "button", onclick: () => this.actions.again(m) }, "Try again"));
    this.note.hidden = running || !FINISHED[m.finish];
    this.note.textContent = FINISHED[m.finish] ?? "";
    if (running) this.foot.replaceChildren(h("span", { className: "info" }, speed({ times: m.times })));
    else if (!this.finished) {
      this.foot.replaceChildren(...[switcher(this.conversation, m, this.actions), m.content && copyButton("Copy this answer", () => m.content),
        button("again", "Another answer", () => this.actions.again(m)), h("span", { className: "info", title: cached(m) }, speed(m))].filter(Boolean));
      this.showCalls();
    }
    this.finished = !running;
  }

  showCalls() {
    const { calls, id } = this.message, open = !this.conversation.nodes.some((n) => n.parent === id) && this.message.finish && !this.message.error;
    const fields = [];
    const shown = calls.map((call, i) => {
      const field = open && h("textarea", { rows: 2, placeholder: "What the tool gave", "aria-label": `Result of ${call.function.name}`, id: `result-${id}-${i}` });
      if (field) fields.push(field);
      return h("div", { className: "call" }, h("div", { className: "call-head" }, icon("tool"), h("strong", {}, ...plain(call.function.name || "…"))),
        h("pre", { tabIndex: 0, role: "region", "aria-label": "Arguments" }, ...plain(pretty(call.function.arguments))), field || null);
    });
    if (!open || !calls.length) return this.calls.replaceChildren(...shown);
    const form = h("form", {}, shown, h("button", { type: "submit", className: "primary" }, calls.length > 1 ? "Send the results" : "Send the result"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.results(this.message, fields.map((field) => field.value));
    });
    this.calls.replaceChildren(form);
  }
}

const VIEWS = { user: UserView, tool: ToolView, assistant: AnswerView };
export const view = (message, conversation, actions) => new VIEWS[message.role](message, conversation, actions);
