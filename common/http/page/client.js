// The pipeline's API, as the chat uses it.

/** What went wrong, in words. */
export class ApiError extends Error {}

export function requestId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export async function models() {
  return (await read(await reach("/v1/models"))).data;
}

export async function kill(instanceId) {
  return read(await reach(`/demo/kill/${encodeURIComponent(instanceId)}`, { method: "POST" }));
}

/** One whole answer: its headers and its body. */
export async function ask(body, id) {
  const response = await post(body, id);
  return { headers: response.headers, body: await read(response) };
}

/** A streamed answer: first {headers}, then its chunks. Raises ApiError also in the middle. */
export async function* stream(body, id, signal) {
  const response = await post({ ...body, stream: true, stream_options: { include_usage: true } }, id, signal);
  if (!response.ok) await read(response);
  yield { headers: response.headers };
  for await (const { data } of eventsOf(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(said(chunk.error));
    yield chunk;
  }
  throw new ApiError("The connection was lost in the middle of the answer.");
}

const post = (body, id, signal) =>
  reach("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", "x-request-id": id },
    body: JSON.stringify(body),
    signal,
  });

let key = sessionStorage.getItem("key"); // of the API, where one is needed; forgotten with the tab
let asking = null;

async function reach(path, options = {}) {
  const sent = key;
  const headers = sent ? { ...options.headers, authorization: `Bearer ${sent}` } : options.headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The pipeline does not answer. Is it still running?");
  }
  if (response.status !== 401) return response;
  if (key === sent) await (asking ??= askForKey().finally(() => (asking = null)));
  return key && key !== sent ? reach(path, options) : response;
}

/** Once for all who wait; a wrong key is asked for again. */
async function askForKey() {
  const dialog = document.getElementById("key");
  dialog.showModal();
  await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
  const input = dialog.querySelector("input");
  key = input.value;
  input.value = "";
  sessionStorage.setItem("key", key);
}

async function read(response) {
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new ApiError(said(body.error ?? {}, response.status));
  return body;
}

function said({ message = "it did not say why", code }, status) {
  const what = [status, code].filter(Boolean).join(", ");
  return `Error${what && ` (${what})`}: ${message}`;
}

/** What happens in the pipeline: {name, data}, until the connection ends. Raises ApiError. */
export async function* events() {
  const response = await reach("/events");
  if (!response.ok) await read(response);
  for await (const { name, data } of eventsOf(response.body)) yield { name, data: JSON.parse(data) };
}

async function* eventsOf(body) {
  let rest = "";
  for await (const text of textOf(body)) {
    const events = (rest + text).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const [, name, data] = event.match(/^(?:event: (.*)\n)?data: (.*)$/) ?? []; // else it is a comment
      if (data) yield { name, data };
    }
  }
}

async function* textOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.cancel().catch(() => {}); // who leaves the loop early has no use for the rest
  }
}
