// Twenty requests at once, to see caching at work: with the same beginning, or with nothing in common.

import { ask, requestId } from "./client.js";
import { count, number, percent, write } from "./dom.js";

const REQUESTS = 20;
const AT_ONCE = 4; // browsers open six connections to a server: this leaves one to the events, and one to the chat
const TOKENS = 32; // of each answer, at most
// What prompts begin with where no conversation has begun: long enough for some blocks.
const PREAMBLE = `You are an assistant that knows about inference pipelines. A frontend takes the requests, a processor
makes tokens of them, a router chooses the engine that has most of a prompt in its KV cache and least to do, and that
engine computes the rest and answers. Keep your answers short and correct, and do not make things up.`;

export class Burst {
  #chat;
  #pipeline;
  #says = document.getElementById("burst");
  #buttons = [...document.querySelectorAll("button.burst")];

  constructor(chat, pipeline) {
    this.#chat = chat;
    this.#pipeline = pipeline;
    for (const button of this.#buttons) button.onclick = () => this.#send(button.dataset.kind);
  }

  async #send(kind) {
    for (const button of this.#buttons) button.disabled = true;
    const tally = { answered: 0, blocks: 0, cached: 0, workers: new Map(), error: null };
    const numbers = Array.from({ length: REQUESTS }, (_, place) => place + 1);
    const send = async () => {
      for (let number = numbers.shift(); number && !tally.error; number = numbers.shift()) {
        await this.#one(kind, number, tally).catch((error) => (tally.error = error));
        write(this.#says, `${tally.answered} of ${REQUESTS} answered`);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, send));
    const said = tally.error ? tally.error.message : summary(tally);
    write(this.#says, said);
    write(document.getElementById("said"), said); // once, for those who hear it
    for (const button of this.#buttons) button.disabled = false;
  }

  async #one(kind, place, tally) {
    const { conversation, prompt } = this.#chat;
    const [id, content] = [requestId(), `${prompt} (${place})`];
    const body = this.#chat.body([...conversation, { role: "user", content }]);
    if (body.messages.length === 1) body.messages.unshift({ role: "system", content: PREAMBLE });
    if (kind === "different") body.messages[0] = { ...body.messages[0], content: `${tag()} ${body.messages[0].content}` };
    this.#pipeline.own(id, content);
    const { headers, body: answer } = await ask({ ...body, max_tokens: Math.min(TOKENS, body.max_tokens ?? TOKENS) }, id);
    const worker = headers.get("x-worker-id");
    tally.answered += 1;
    tally.cached += Number(headers.get("x-kv-overlap-blocks"));
    tally.blocks += answer.usage.prompt_tokens / this.#pipeline.blockSize;
    tally.workers.set(worker, (tally.workers.get(worker) ?? 0) + 1);
  }
}

const tag = () => `[${Math.random().toString(36).slice(2, 8)}]`;

function summary({ answered, blocks, cached, workers }) {
  const shares = [...workers].sort().map(([name, answers]) => `worker ${decodeURIComponent(name)}: ${number(answers)}`);
  return `${count(answered, "answer")} (${shares.join(", ")}); ${percent(cached, blocks)} of their blocks were cached.`;
}
