// The server: JSON documents, and answers as streams of server-sent events.

const KEY = "qmix.key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) || "";
} catch { /* storage is switched off: the key is asked for again after a reload */ }

export class ServerError extends Error {
  /** status: of HTTP, 0 where the server could not be reached. */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch { /* as above */ }
}

export function hasKey() {
  return key !== "";
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = "Bearer " + key;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is qmix serve still running?", 0);
  }
  if (!response.ok) throw new ServerError(await messageOf(response), response.status);
  return response;
}

async function messageOf(response) {
  try {
    const body = await response.json();
    return body.error.message || body.error;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

/** {ok, loading}: whether a model is loaded. */
export async function health() {
  try {
    const response = await fetch("/health", { cache: "no-store" });
    return { ok: response.ok, loading: response.status === 503 && (await response.json()).status === "loading model" };
  } catch {
    return { ok: false, loading: false };
  }
}

/** The chunks of a streamed chat completion. Aborting `signal` ends the computing too. */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", { method: "POST", signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }) });
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      ended = true; // the stream is read to its end, so that the connection can be used again
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, 200);
    yield chunk;
  }
  if (!ended) throw new ServerError("The connection broke before the answer was complete.", 0);
}

/** The data of server-sent events. Comments, such as pings, are left out. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let data = [];
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The connection broke before the answer was complete.", 0);
      }
      if (piece.done) return;
      text += piece.value;
      const lines = text.split("\n");
      text = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
