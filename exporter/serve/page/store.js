// Conversations in this browser. A conversation is a tree: each message has the one before it as its parent, so that an edit or another
// answer is a branch beside the old one. `leaf` is the end of the branch that is shown.

const PREFIX = "kiln.conversation.";
const FORMAT = 1;
const ROLES = new Set(["user", "assistant", "tool"]);
const DEFAULTS = { model: "", system: "", think: false, temperature: null, top_p: null, top_k: null, min_p: null, max_tokens: null, seed: null, stop: "", tools: "" };
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const TEXTS = ["model", "system", "stop", "tools"];

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (b) => b.toString(36).padStart(2, "0")).join("");

export function newConversation(options = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, options: { ...DEFAULTS, ...options }, nodes: [], leaf: null };
}

// ---- the tree ----

/** The messages of the branch that ends at `leaf`, first to last. */
export function path(conversation, leaf = conversation.leaf) {
  const found = [], byId = new Map(conversation.nodes.map((n) => [n.id, n]));
  for (let n = byId.get(leaf); n; n = byId.get(n.parent)) found.push(n);
  return found.reverse();
}

/** Other versions of a message, itself among them, oldest first. */
export const versions = (conversation, message) => conversation.nodes.filter((n) => n.parent === message.parent);

export function add(conversation, parent, message) {
  const added = { id: newId(), parent, ...message };
  conversation.nodes.push(added);
  conversation.leaf = added.id;
  return added;
}

/** Shows the branch through a message, to its newest end. */
export function show(conversation, message) {
  let end = message.id;
  for (let child; (child = conversation.nodes.findLast((n) => n.parent === end)); ) end = child.id;
  conversation.leaf = end;
}

export function remove(conversation, message) {
  conversation.nodes = conversation.nodes.filter((n) => n.id !== message.id);
  if (conversation.leaf === message.id) conversation.leaf = message.parent;
}

export function title(conversation) {
  const first = conversation.nodes.find((n) => n.role === "user");
  return conversation.title || (first ? first.content.trim().replace(/\s+/g, " ").slice(0, 80) : "") || "New conversation";
}

// ---- what is kept ----

export function save(conversation) {
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export const discard = (conversation) => localStorage.removeItem(PREFIX + conversation.id);
export const concerns = (key) => key === null || key.startsWith(PREFIX);

export function load(id) {
  try {
    return checked(JSON.parse(localStorage.getItem(PREFIX + id)));
  } catch {
    return null;  // nothing under this name, or nothing that this page wrote
  }
}

/** All conversations, the newest first. */
export function all() {
  const ids = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => key.slice(PREFIX.length));
  return ids.map(load).filter(Boolean).sort((a, b) => b.updated - a.updated);
}

export function setting(name, value) {
  if (value !== undefined) localStorage.setItem(`kiln.${name}`, JSON.stringify(value));
  try {
    return JSON.parse(localStorage.getItem(`kiln.${name}`));
  } catch {
    return null;
  }
}

// ---- what comes from elsewhere ----

const text = (value, limit = Infinity) => (typeof value === "string" ? value.slice(0, limit) : "");
const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const object = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

export function options(given) {
  const found = { ...DEFAULTS };
  if (!object(given)) return found;
  for (const name of NUMBERS) found[name] = number(given[name]);
  for (const name of TEXTS) found[name] = text(given[name]);
  found.think = given.think === true;
  return found;
}

function call(given) {
  const f = object(given) && object(given.function) ? given.function : {};
  const told = typeof f.arguments === "string" ? f.arguments : JSON.stringify(f.arguments ?? {});
  return { id: text(given?.id, 200) || `call_${newId()}`, type: "function", function: { name: text(f.name, 200), arguments: told } };
}

/** A message of an unknown file as one of ours; throws what is wrong with it. */
function message(given, where) {
  if (!object(given) || !ROLES.has(given.role)) throw new Error(`${where}: a message with the role user, assistant or tool was expected`);
  const parts = Array.isArray(given.content) ? given.content.map((part) => text(part?.text)).join("") : text(given.content);
  const found = { role: given.role, content: parts };
  if (given.role === "tool") found.tool_call_id = text(given.tool_call_id, 200);
  if (given.role === "assistant") {
    found.reasoning = text(given.reasoning) || text(given.reasoning_content);
    found.calls = (Array.isArray(given.calls) ? given.calls : Array.isArray(given.tool_calls) ? given.tool_calls : []).map(call);
    found.finish = text(given.finish, 40);
    found.error = text(given.error);
    for (const key of ["usage", "times"]) {
      if (object(given[key])) found[key] = Object.fromEntries(Object.entries(given[key]).filter(([, v]) => number(v) !== null));
    }
  }
  return found;
}

/** A conversation as this page keeps it, from one that may be damaged. Ids are texts of it and nothing more. */
function checked(given) {
  if (!object(given) || !Array.isArray(given.nodes)) throw new Error("no conversation");
  const nodes = [], ids = new Set();
  for (const [i, n] of given.nodes.entries()) {
    const id = text(n?.id, 40), parent = n?.parent ?? null;
    if (!id || ids.has(id) || (parent !== null && !ids.has(parent))) throw new Error(`message ${i}: its place in the conversation is unclear`);
    ids.add(id);
    nodes.push({ id, parent, ...message(n, `message ${i}`) });
  }
  const now = Date.now();
  return {
    id: text(given.id, 40) || newId(), title: text(given.title, 200), created: number(given.created) ?? now, updated: number(given.updated) ?? now,
    options: options(given.options), nodes, leaf: ids.has(given.leaf) ? given.leaf : (nodes.at(-1)?.id ?? null),
  };
}

/** A saved conversation of `kiln chat`, or a list of messages. */
function fromMessages(given) {
  const list = [...(Array.isArray(given) ? given : given.messages)], found = newConversation();
  if (!Array.isArray(given)) Object.assign(found.options, { system: text(given.system), think: given.think === true });
  if (["system", "developer"].includes(list[0]?.role)) found.options.system = message({ ...list.shift(), role: "user" }, "message 0").content;
  list.forEach((m, i) => add(found, found.leaf, message(m, `message ${i}`)));
  return found;
}

export const exported = (conversations) => ({ kiln_page: FORMAT, conversations });

/** What `kiln chat --messages` and `/load` take: the branch that is shown. */
export const exportedChat = (conversation) => ({
  kiln_chat: FORMAT, system: conversation.options.system || null, think: conversation.options.think,
  messages: path(conversation).filter((n) => !n.error || n.content).map(wire),
});

/** A file's text -> its conversations, under new names where a name is taken. Throws an error that says what is wrong. */
export function imported(source) {
  let given;
  try {
    given = JSON.parse(source);
  } catch (error) {
    throw new Error(`the file is not valid JSON (${error.message})`, { cause: error });
  }
  if (object(given) && given.kiln_page !== undefined) {
    if (given.kiln_page !== FORMAT) throw new Error(`the file has format ${String(given.kiln_page).slice(0, 20)}, this page reads ${FORMAT}`);
    if (!Array.isArray(given.conversations)) throw new Error("the file has no list of conversations");
    return given.conversations.map((c, i) => {
      try {
        const found = checked(c);
        return localStorage.getItem(PREFIX + found.id) === null ? found : { ...found, id: newId() };
      } catch (error) {
        throw new Error(`conversation ${i}: ${error.message}`, { cause: error });
      }
    });
  }
  if (Array.isArray(given) || (object(given) && Array.isArray(given.messages))) return [fromMessages(given)];
  throw new Error("the file holds no conversations: an export of this page, of kiln chat, or a list of messages was expected");
}

/** A message as the server takes it. */
export function wire(n) {
  if (n.role === "tool") return { role: "tool", tool_call_id: n.tool_call_id, content: n.content };
  if (n.role === "user") return { role: "user", content: n.content };
  const found = { role: "assistant", content: n.content };
  if (n.reasoning) found.reasoning_content = n.reasoning;
  if (n.calls?.length) found.tool_calls = n.calls;
  return found;
}
