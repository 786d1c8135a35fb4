// The page: conversations at the side, the open one in the middle, and its answers as they come.

import { view } from "./messages.js";
import { h, icon } from "./nodes.js";
import * as store from "./store.js";
import { ServerError, complete, models } from "./stream.js";

const $ = (id) => document.getElementById(id);
const log = $("log"), question = $("question"), settings = $("settings"), fields = $("settings-form").elements;
const narrow = matchMedia("(max-width: 760px)");

let open = store.newConversation();  // the conversation that is shown
let views = new Map();               // message id -> its view, of the branch that is shown
let served = [];                     // models of the server
const running = new Map();           // conversation id -> {abort, conversation, answer}
const drafts = new Map();            // conversation id -> what was typed and not sent

// ---- telling ----

function toast(text, action = null, act = null) {
  const element = h("div", { className: "toast" }, h("span", {}, text));
  const close = () => element.remove();
  if (action) element.append(h("button", { type: "button", onclick: () => { close(); act(); } }, action));
  element.append(h("button", { type: "button", className: "quiet", "aria-label": "Close this notice", onclick: close }, icon("close")));
  $("toasts").append(element);
  while ($("toasts").children.length > 3) $("toasts").firstChild.remove();
  setTimeout(close, action ? 10_000 : 6_000);
}

function announce(text) {
  $("announce").textContent = text;
}

function keep(conversation) {
  try {
    store.save(conversation);
    return true;
  } catch (error) {
    toast(error.name === "QuotaExceededError" ? "The browser's storage is full: this conversation is not kept. Export conversations and delete some."
      : `The browser does not keep this conversation: ${error.message}`);
    return false;
  }
}

function download(name, record) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(record, null, 1)], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// ---- the list ----

function item(conversation) {
  const name = store.title(conversation), current = conversation.id === open.id;
  const enter = h("button", { type: "button", className: "enter", "aria-current": current ? "page" : null, title: name, onclick: () => { choose(conversation.id); showSide(false); } },
    h("span", { dir: "auto" }, name), running.has(conversation.id) && h("span", { className: "busy", role: "img", "aria-label": "is being answered" }));
  const rename = h("button", { type: "button", className: "quiet", "aria-label": `Rename ${name}`, title: "Rename", onclick: () => renaming(row, conversation) }, icon("edit"));
  const away = h("button", { type: "button", className: "quiet", "aria-label": `Delete ${name}`, title: "Delete", onclick: () => remove(conversation) }, icon("delete"));
  const row = h("li", { className: current ? "current" : "" }, enter, rename, away);
  return row;
}

function renaming(row, conversation) {
  const field = h("input", { value: store.title(conversation), maxLength: 200, "aria-label": "Name of the conversation" });
  let over = false;
  const end = (kept) => {
    if (over) return;
    over = true;
    const fresh = current(conversation.id);
    if (kept && fresh) {
      fresh.title = field.value.trim();
      keep(fresh);
    }
    list();
    if (fresh?.id === open.id) head();
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" || event.key === "Escape") { event.preventDefault(); event.stopPropagation(); end(event.key === "Enter"); }
  });
  field.addEventListener("blur", () => end(true));
  row.replaceChildren(field);
  field.focus();
  field.select();
}

/** The one object of a conversation that is at work, or what is stored of it. */
const current = (id) => (id === open.id ? open : running.get(id)?.conversation ?? store.load(id));

function list() {
  const wanted = $("search").value.trim().toLowerCase();
  const found = store.all().filter((c) => !wanted || store.title(c).toLowerCase().includes(wanted) || c.nodes.some((n) => n.content.toLowerCase().includes(wanted)));
  $("conversations").replaceChildren(...found.map((c) => item(c)));
  if (!found.length) $("conversations").append(h("li", { className: "none" }, wanted ? "Nothing found" : "No conversations yet"));
}

function remove(conversation) {
  running.get(conversation.id)?.abort.abort();
  const kept = current(conversation.id) ?? conversation;
  store.discard(conversation);
  if (conversation.id === open.id) begin();
  else list();
  toast(`Deleted: ${store.title(kept).slice(0, 40)}`, "Undo", () => { keep(kept); choose(kept.id); });
}

function showSide(shown) {
  document.body.classList.toggle("side-open", shown);
  $("open-side").setAttribute("aria-expanded", String(shown));
  $("side").inert = narrow.matches && !shown;
  if (narrow.matches) document.querySelector("main").inert = shown;
  if (shown) $("new").focus();
}

// ---- the open conversation ----

function choose(id) {
  const found = running.get(id)?.conversation ?? store.load(id);
  if (!found) return begin();
  swap(found);
}

function begin() {
  const { system, seed, tools, ...rest } = open.options;  // how to sample stays; what to talk about does not
  swap(store.newConversation(rest));
  question.focus();
}

function swap(conversation) {
  drafts.set(open.id, question.value);
  open = conversation;
  question.value = drafts.get(open.id) ?? "";
  views = new Map();
  $("messages").replaceChildren();
  draw();
  list();
  grow();
  toEnd();
}

/** Brings the branch that is shown onto the page: views that are there already stay. */
function draw() {
  const shown = store.path(open), fresh = new Map();
  for (const message of shown) fresh.set(message.id, views.get(message.id) ?? view(message, open, actions));
  views = fresh;
  $("messages").replaceChildren(...[...views.values()].map((v) => v.element));
  const answer = running.get(open.id)?.answer;
  for (const message of shown) views.get(message.id).update(message === answer);
  $("empty").hidden = shown.length > 0;
  head();
}

function redraw() {  // versions and forms of views may have changed
  views = new Map();
  draw();
}

function head() {
  const name = store.title(open), busy = running.has(open.id), model = chosen();
  $("title").textContent = name;
  document.title = open.nodes.length ? `${name} · Kiln` : "Kiln";
  $("model").textContent = model?.id ?? "";
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("think").setAttribute("aria-pressed", String(open.options.think));
  const usage = store.path(open).findLast((n) => n.usage)?.usage, used = usage ? usage.prompt + usage.completion : 0;
  $("context").hidden = !used;
  const meter = $("context-meter");
  meter.hidden = !model?.context;
  if (model?.context) Object.assign(meter, { max: model.context, high: model.context * 0.8, optimum: 0, value: used });
  const of = model?.context ? ` of ${model.context.toLocaleString("en")}` : "";
  $("context-text").replaceChildren(`${used.toLocaleString("en")}${of}`, h("span", {}, " tokens"));
  meter.title = $("context-text").textContent;
}

const chosen = () => served.find((m) => m.id === open.options.model) ?? served[0];

// ---- following the end ----

let follows = true;
const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 40;
function toEnd() {
  follows = true;
  log.scrollTop = log.scrollHeight;
  $("latest").hidden = true;
}
log.addEventListener("scroll", () => {
  follows = atEnd();
  $("latest").hidden = follows;
}, { passive: true });

// ---- answers ----

function request(conversation, history) {
  const o = conversation.options;
  const found = { model: (served.find((m) => m.id === o.model) ?? served[0])?.id ?? o.model, messages: history.map(store.wire) };
  if (o.system.trim()) found.messages.unshift({ role: "system", content: o.system });
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"]) if (o[name] !== null) found[name] = o[name];
  const stop = o.stop.split("\n").filter(Boolean);
  if (stop.length) found.stop = stop;
  if (o.tools.trim()) found.tools = JSON.parse(o.tools);
  found.chat_template_kwargs = { enable_thinking: o.think };
  return found;
}

/** Answers the branch that ends in `parent`. */
async function answer(conversation, parent) {
  if (running.has(conversation.id)) return;
  const abort = new AbortController(), history = store.path(conversation, parent);
  const message = store.add(conversation, parent, { role: "assistant", content: "", reasoning: "", calls: [], finish: "", error: "" });
  running.set(conversation.id, { abort, conversation, answer: message });
  conversation.updated = Date.now();
  keep(conversation);
  if (conversation === open) {
    redraw();
    toEnd();
  }
  list();
  announce("The answer begins");

  let due = 0, timer = 0, kept = performance.now();
  const paint = () => {
    timer = 0;
    if (running.get(conversation.id)?.answer !== message) return;  // it ended while this waited for its frame
    const began = performance.now();
    if (conversation === open) {
      views.get(message.id)?.update(true);
      if (follows) toEnd();
    }
    due = performance.now() + Math.max(40, 4 * (performance.now() - began));  // most of the time is the reader's
    if (performance.now() - kept > 2000) {
      kept = performance.now();
      try { store.save(conversation); } catch { /* said at the end */ }
    }
  };
  const changed = () => { timer ||= setTimeout(() => requestAnimationFrame(paint), Math.max(0, due - performance.now())); };
  try {
    await complete(request(conversation, history), sessionStorage.getItem("kiln.key"), abort.signal, message, changed);
    message.calls = message.calls.filter((call) => call.function.name);
  } catch (error) {
    if (abort.signal.aborted) message.finish = "stopped";
    else {
      message.error = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
      if (error.retry) message.error += ` It may be asked again in ${error.retry} s.`;
      if (error.status === 401) message.error += " Give the key of the server in the settings.";
    }
  }
  clearTimeout(timer);
  running.delete(conversation.id);
  conversation.updated = Date.now();
  if (conversation === open || store.load(conversation.id)) keep(conversation);  // not one that was deleted meanwhile
  if (conversation === open) {
    redraw();
    if (follows) toEnd();
  }
  list();
  if (!message.error) announce(message.finish === "stopped" ? "Stopped" : `Answered: ${message.content.slice(0, 300)}`);
}

const actions = {
  show(message) {
    if (running.has(open.id)) return;
    store.show(open, message);
    keep(open);
    redraw();
  },
  edit(message, content) {
    if (running.has(open.id)) return;
    const edited = store.add(open, message.parent, { role: "user", content });
    answer(open, edited.id);
  },
  again(message) {
    if (running.has(open.id)) return;
    if (message.error && !message.content && !message.reasoning) store.remove(open, message);  // nothing of it is worth a version
    answer(open, message.parent);
  },
  results(message, texts) {
    if (running.has(open.id)) return;
    let parent = message.id;
    message.calls.forEach((call, i) => { parent = store.add(open, parent, { role: "tool", tool_call_id: call.id, content: texts[i] }).id; });
    answer(open, parent);
  },
};

function send() {
  const content = question.value;
  if (!content.trim() || running.has(open.id)) return;
  const last = store.path(open).at(-1);
  if (last?.error && !last.content && !last.reasoning) store.remove(open, last);
  const asked = store.add(open, open.leaf, { role: "user", content });
  question.value = "";
  grow();
  answer(open, asked.id);
}

const stop = () => running.get(open.id)?.abort.abort();

function grow() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, innerHeight * 0.4)}px`;
}

// ---- settings ----

function fillSettings() {
  const o = open.options;
  fields.model.replaceChildren(...served.map((m) => h("option", { value: m.id, selected: m === chosen() }, m.id)));
  fields.model.disabled = served.length < 2;
  for (const name of ["system", "stop", "tools"]) fields[name].value = o[name];
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"]) fields[name].value = o[name] ?? "";
  fields.key.value = sessionStorage.getItem("kiln.key") ?? "";
  $("tools-error").hidden = true;
}

/** What is wrong with the tools that were typed; "" where nothing is. */
function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    const tools = JSON.parse(text);
    return Array.isArray(tools) && tools.every((t) => t?.type === "function" && t.function?.name) ? "" : "A list of {\"type\": \"function\", \"function\": {\"name\": …}} was expected";
  } catch (error) {
    return `The tools are not valid JSON: ${error.message}`;
  }
}

$("settings-form").addEventListener("submit", (event) => {
  const problem = toolsProblem(fields.tools.value);
  $("tools-error").textContent = problem;
  $("tools-error").hidden = !problem;
  if (problem) event.preventDefault();
});
settings.addEventListener("close", async () => {
  const o = open.options, key = fields.key.value.trim();
  for (const name of ["system", "stop", "tools"]) if (name !== "tools" || !toolsProblem(fields.tools.value)) o[name] = fields[name].value;
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"]) {
    if (fields[name].validity.valid) o[name] = fields[name].value === "" ? null : fields[name].valueAsNumber;
  }
  if (fields.model.value) o.model = fields.model.value;
  if (key !== (sessionStorage.getItem("kiln.key") ?? "")) {
    sessionStorage.setItem("kiln.key", key);
    await askModels();
  }
  store.setting("options", { ...o, system: "", tools: "", seed: null });
  if (open.nodes.length) keep(open);
  head();
});

async function askModels() {
  try {
    served = await models(sessionStorage.getItem("kiln.key"));
  } catch (error) {
    served = [];
    toast(error.status === 401 ? `${error.message}. Give the key of the server in the settings.` : error.message);
  }
  head();
}

// ---- light and dark ----

const THEMES = { "": "as the system has it", light: "light", dark: "dark" };
function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  const label = `Colours: ${THEMES[name]}. Change`;
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
  store.setting("theme", name);
}
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES), at = names.indexOf(document.documentElement.dataset.theme ?? "");
  theme(names[(at + 1) % names.length]);
});

// ---- wiring ----

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !(narrow.matches && matchMedia("(pointer: coarse)").matches)) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || settings.open || event.defaultPrevented) return;
  if (document.body.classList.contains("side-open")) showSide(false);
  else stop();
});
$("stop").addEventListener("click", () => { stop(); question.focus(); });
$("latest").addEventListener("click", toEnd);
$("new").addEventListener("click", () => { showSide(false); begin(); });
$("search").addEventListener("input", list);
$("think").addEventListener("click", () => {
  open.options.think = !open.options.think;
  store.setting("options", { ...open.options, system: "", tools: "", seed: null });
  if (open.nodes.length) keep(open);
  head();
});
$("open-side").addEventListener("click", () => showSide(true));
for (const id of ["close-side", "shade"]) $(id).addEventListener("click", () => { showSide(false); $("open-side").focus(); });
narrow.addEventListener("change", () => { document.querySelector("main").inert = false; showSide(false); });
$("open-settings").addEventListener("click", () => { fillSettings(); settings.showModal(); });
$("export").addEventListener("click", () => download("kiln-conversations.json", store.exported(store.all())));
$("export-one").addEventListener("click", () => download("conversation.json", store.exportedChat(open)));
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const file = $("file").files[0];
  $("file").value = "";
  if (!file) return;
  try {
    const found = store.imported(await file.text());
    if (!found.every(keep)) return;
    if (found.length) choose(found[0].id);
    toast(`${found.length} ${found.length === 1 ? "conversation" : "conversations"} added`);
  } catch (error) {
    toast(`${file.name}: ${error.message}`);
  }
});
addEventListener("storage", (event) => {  // another tab has written
  if (!store.concerns(event.key)) return;
  const stored = store.load(open.id);
  if (stored && !running.has(open.id) && stored.updated > open.updated) swap(stored);
  else list();
});
addEventListener("pagehide", () => {
  for (const { abort, conversation, answer: message } of running.values()) {
    message.finish = "stopped";
    abort.abort();
    try { store.save(conversation); } catch { /* nobody is left to tell */ }
  }
});

theme(Object.hasOwn(THEMES, store.setting("theme") ?? "") ? store.setting("theme") ?? "" : "");
open.options = store.options(store.setting("options"));
$("side").inert = narrow.matches;
list();
draw();
askModels();
