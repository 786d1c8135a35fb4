// The server: its models, and an answer as it comes.

/** What went wrong, as the server said it. `retry`: seconds after which it may be asked again. */
export class ServerError extends Error {
  constructor(message, status = 0, retry = null) {
    super(message);
    this.status = status;
    this.retry = retry;
  }
}

const address = (name) => new URL(name, document.baseURI);
const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function ask(name, request, key) {
  let response;
  try {
    response = await fetch(address(name), { ...request, headers: { ...request.headers, ...headers(key) } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  const body = await response.text().catch(() => "");
  let said = "";
  try {
    const { error, message, detail } = JSON.parse(body);
    said = [error?.message, error, message, detail].find((s) => typeof s === "string") ?? "";
  } catch {
    said = body.startsWith("<") ? "" : body.slice(0, 500);
  }
  const retry = Number(response.headers.get("Retry-After"));
  throw new ServerError(said || `The server answered ${response.status} ${response.statusText}`, response.status, retry > 0 ? retry : null);
}

/** [{id, context: tokens or null}] */
export async function models(key) {
  const list = (await (await ask("v1/models", {}, key)).json()).data;
  if (!Array.isArray(list)) throw new ServerError("The server's list of models cannot be read");
  return list.map((m) => ({ id: String(m.id), context: [m.max_model_len, m.meta?.n_ctx, m.meta?.n_ctx_train].find((n) => n > 0) ?? null }));
}

/** The data of each event of a stream, as it comes: lines end in \n, \r\n or \r, comments are skipped. */
export async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "", data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? `${decoder.decode()}\n\n` : decoder.decode(value, { stream: true });  // an event that nothing ends is one
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const usage = (told) => ({
  prompt: told.prompt_tokens ?? 0, completion: told.completion_tokens ?? 0, cached: told.prompt_tokens_details?.cached_tokens ?? 0,
});

/** Adds a call's part to the calls of an answer, by its index. */
function addCalls(calls, parts) {
  for (const part of parts) {
    const at = Number.isInteger(part.index) && part.index >= 0 && part.index < 1000 ? part.index : calls.length;
    while (calls.length <= at) calls.push({ id: "", type: "function", function: { name: "", arguments: "" } });
    if (part.id) calls[at].id = part.id;
    if (part.function?.name) calls[at].function.name += part.function.name;
    if (part.function?.arguments) calls[at].function.arguments += part.function.arguments;
  }
}

/**
 * Asks for an answer and fills `answer` {content, reasoning, calls, finish, usage, times: {first, last, parts}} as it comes; `changed` is
 * called after each part. Times are milliseconds after the request. Throws ServerError, or the AbortError of `signal`.
 */
export async function complete(request, key, signal, answer, changed) {
  const begin = performance.now();
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await ask("v1/chat/completions", { method: "POST", body, signal, headers: { "Content-Type": "application/json" } }, key);
  let ended = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      let chunk;
      try {
        chunk = JSON.parse(data);
      } catch (error) {
        throw new ServerError(`The server sent what is no JSON: ${data.slice(0, 100)} (${error.message})`);
      }
      if (chunk.error) throw new ServerError(chunk.error.message ?? String(chunk.error), chunk.error.code);
      if (chunk.usage) answer.usage = usage(chunk.usage);
      const choice = chunk.choices?.[0], delta = choice?.delta ?? {};
      const thought = delta.reasoning_content ?? delta.reasoning;
      if (thought) answer.reasoning += thought;
      if (delta.content) answer.content += delta.content;
      if (delta.tool_calls) addCalls(answer.calls, delta.tool_calls);
      if (choice?.finish_reason) answer.finish = choice.finish_reason;
      if (thought || delta.content || delta.tool_calls) {
        const now = performance.now() - begin;
        answer.times ??= { first: now, last: now, parts: 0 };
        answer.times.last = now;
        answer.times.parts += 1;
        if (thought) answer.times.thought = now;
      }
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection broke before the answer was complete");
  }
  if (!ended && !answer.finish) throw new ServerError("The connection ended before the answer was complete");
}
