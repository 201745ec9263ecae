// The chat box: a conversation with this very pipeline, and what each answer took.

import { ApiError, models, requestId, stream } from "./client.js";
import { count, duration, el, number, write } from "./dom.js";

const QUESTIONS = ["What does the router do?", "How does the router know what an engine has cached?", "What is a KV cache?"];

const SPEED_SECONDS = 0.02; // an answer that came all at once has no speed

const by = (id) => document.getElementById(id);

export class Chat {
  #pipeline;
  #onAsk;
  #onShow;
  #history = []; // what is sent
  #calls = []; // tool calls whose results are still to come
  #turns = new Map(); // answers, by request id
  #aborting = null;

  /** onAsk: called with the id and the text of what is sent; onShow: with the id of an answer that was clicked. */
  constructor(pipeline, { onAsk, onShow }) {
    this.#pipeline = pipeline;
    this.#onAsk = onAsk;
    this.#onShow = onShow;
    by("ask").onsubmit = (event) => {
      event.preventDefault();
      this.#submit();
    };
    by("prompt").onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      by("ask").requestSubmit();
    };
    by("stop").onclick = () => this.#aborting?.abort();
    by("new").onclick = () => this.#begin();
    this.#begin();
  }

  /** Offers the models that are served now. */
  async listModels() {
    const select = by("model");
    const served = await models().catch(() => []);
    const before = select.value;
    select.replaceChildren(...served.map(({ id }) => el("option", { value: id, textContent: id })));
    if (served.some(({ id }) => id === before)) select.value = before;
    select.parentElement.hidden = served.length < 2;
  }

  #begin() {
    this.#aborting?.abort();
    this.#history = [];
    this.#turns.clear();
    this.#expect([]);
    const examples = QUESTIONS.map((text) => el("button", { type: "button", textContent: text, onclick: () => this.send(text) }));
    by("turns").replaceChildren(el("li", { className: "empty" }, el("p", { textContent: "Send something, for instance:" }), ...examples));
    write(by("said"), "");
  }

  /** The body of a request for an answer to these messages. Raises ApiError if the tools are not JSON. */
  body(messages) {
    const system = by("system").value.trim();
    const body = {
      model: by("model").value,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
      temperature: by("temperature").valueAsNumber || 0,
    };
    if (by("max-tokens").valueAsNumber) body.max_tokens = by("max-tokens").valueAsNumber;
    try {
      if (by("tools").value.trim()) body.tools = JSON.parse(by("tools").value);
    } catch (error) {
      throw new ApiError(`The tools are not JSON: ${error.message}`);
    }
    return body;
  }

  /** What was said last, or is being written; else an example. */
  get prompt() {
    const last = this.#history.findLast(({ role }) => role === "user");
    return by("prompt").value.trim() || last?.content || QUESTIONS[0];
  }

  /** What has been said, without tool calls. */
  get conversation() {
    return this.#history.filter(({ role, tool_calls }) => role !== "tool" && !tool_calls);
  }

  #submit() {
    const text = by("prompt").value.trim();
    if (!text || this.#aborting) return;
    by("prompt").value = "";
    this.send(text);
  }

  async send(text) {
    if (this.#aborting) return;
    by("turns").querySelector(".empty")?.remove();
    const call = this.#calls.shift();
    this.#history.push(call ? { role: "tool", tool_call_id: call.id, content: text } : { role: "user", content: text });
    by("turns").append(el("li", { className: "turn user" }, el("p", { textContent: text })));
    this.#expect(this.#calls);
    if (this.#calls.length) return;
    const turn = new Turn(requestId(), (id) => this.#onShow(id));
    this.#turns.set(turn.id, turn);
    by("turns").append(turn.node);
    await this.#answer(turn, text);
  }

  async #answer(turn, text) {
    const history = this.#history;
    this.#aborting = new AbortController();
    this.#show();
    this.#onAsk(turn.id, text);
    try {
      if (!by("model").value) await this.listModels();
      for await (const chunk of stream(this.body(history), turn.id, this.#aborting.signal)) {
        turn.add(chunk, this.#pipeline.blockSize);
        by("turns").scrollTop = by("turns").scrollHeight;
      }
    } catch (error) {
      turn.fail(error.name === "AbortError" ? "Stopped." : error instanceof ApiError ? error.message : String(error));
    }
    this.#aborting = null;
    this.#show();
    if (history !== this.#history) return; // a new conversation has begun
    history.push(turn.message);
    this.#expect(turn.calls);
    write(by("said"), turn.summary);
    by("turns").scrollTop = by("turns").scrollHeight;
  }

  #show() {
    by("stop").hidden = !this.#aborting;
    by("send").hidden = Boolean(this.#aborting);
    if (!this.#aborting && document.activeElement === document.body) by("prompt").focus(); // the stop button is gone
  }

  /** After tool calls, what is typed next are their results. */
  #expect(calls) {
    this.#calls = [...calls];
    const name = this.#calls[0]?.function.name;
    by("prompt").placeholder = name ? `What ${name} returns` : "Send something to this pipeline";
    write(by("prompt-label"), name ? `Result of the tool ${name}` : "Your message");
  }

  /** Something happened to a request, perhaps to one of these. */
  follow(request) {
    this.#turns.get(request.id)?.follow(request);
  }
}

/** An answer, and beside it what it took. */
class Turn {
  #text = el("p");
  #calls = el("ul", { className: "calls" });
  #note = el("p", { className: "note" });
  #took = el("button", { type: "button", className: "took", hidden: true });
  #began = performance.now();
  #first = null;
  #said = {}; // what goes beside it
  #workers = [];
  calls = [];

  constructor(id, onShow) {
    this.id = id;
    this.#took.onclick = () => onShow(id);
    this.node = el("li", { className: "turn answer waiting" }, this.#text, this.#calls, this.#note, this.#took);
  }

  add({ headers, choices, usage }, blockSize) {
    if (headers) {
      this.#workers = [headers.get("x-worker-id")].filter(Boolean).map(decodeURIComponent);
      const overlap = headers.get("x-kv-overlap-blocks");
      if (overlap !== null) this.#said.cached = `${count(Number(overlap), "block")} cached`;
    }
    const delta = choices?.[0]?.delta ?? {};
    const text = delta.content ?? delta.refusal ?? "";
    if (this.#first === null && (text || delta.tool_calls || delta.reasoning_content)) this.#begin();
    this.#text.append(text);
    for (const part of delta.tool_calls ?? []) this.#addCall(part);
    if (usage) this.#count(usage, blockSize);
    this.#show();
  }

  #begin() {
    this.#first = performance.now();
    this.node.classList.remove("waiting");
    this.#said.ttft = `first token after ${duration((this.#first - this.#began) / 1000)}`;
  }

  /** A part of a tool call: the first names it, the others have its arguments. */
  #addCall({ index, id, function: { name, arguments: text = "" } = {} }) {
    const call = (this.calls[index] ??= { id, type: "function", function: { name, arguments: "" } });
    call.function.arguments += text;
    const item = this.#calls.children[index] ?? this.#calls.appendChild(el("li"));
    write(item, `${call.function.name}(${call.function.arguments})`);
  }

  #count({ completion_tokens: tokens, prompt_tokens_details: details, prompt_tokens: prompt }, blockSize) {
    const cached = details?.cached_tokens;
    if (typeof cached === "number") this.#said.cached = `${number(cached)} of ${count(prompt, "token")} cached`;
    else if (this.#said.cached) this.#said.cached += ` of ${number(Math.ceil(prompt / blockSize))}`;
    const seconds = (performance.now() - (this.#first ?? this.#began)) / 1000;
    this.#said.tokens = count(tokens, "token");
    if (seconds > SPEED_SECONDS) this.#said.speed = `${number((tokens - 1) / seconds)} tokens/s`;
  }

  fail(text) {
    this.node.classList.remove("waiting");
    this.node.classList.toggle("failed", text !== "Stopped.");
    write(this.#note, text);
  }

  /** What the pipeline tells of it: it may have moved. */
  follow({ moved, decided }) {
    if (!moved.length) return;
    this.#workers = decided.map(({ worker_id }) => worker_id);
    write(this.#note, moved.map(({ worker_id, tokens }) => `Worker ${worker_id} was lost after ${count(tokens, "token")}; another one goes on.`).join(" "));
    this.#show();
  }

  #show() {
    this.#took.hidden = !this.#workers.length;
    const { ttft, cached, tokens, speed } = this.#said;
    write(this.#took, [`worker ${this.#workers.join(" → ")}`, cached, ttft, tokens, speed].filter(Boolean).join(" · "));
  }

  /** Once, for those who hear it. */
  get summary() {
    return this.#note.textContent || `Answered by ${this.#took.textContent}: ${this.#text.textContent}`;
  }

  get message() {
    const message = { role: "assistant", content: this.#text.textContent };
    return this.calls.length ? { ...message, tool_calls: this.calls } : message;
  }
}
