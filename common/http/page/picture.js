// The pipeline as a picture: a card for everybody who is there, and on each engine's the blocks of the prompt shown.

import { count, duration, el, number, percent, write } from "./dom.js";
import { nameOf } from "./pipeline.js";
import { strip } from "./strip.js";

const CELLS = 32; // squares for the blocks of a prompt
const DENSE = 12; // more engines than this are drawn small
const SAYS = {
  frontend: "HTTP in, events out",
  processor: "text to tokens, and back",
  router: "finds the cheapest engine",
};

export class Picture {
  #root = document.getElementById("picture");
  #shown = document.getElementById("shown");
  #cards = new Map(); // by instance id
  #onKill;
  dense = false;

  /** onKill: called with an engine that is to be killed. */
  constructor(onKill) {
    this.#onKill = onKill;
  }

  get cards() {
    return this.#cards;
  }

  /** Returns whether cards came or went. */
  draw(pipeline, request) {
    const engines = pipeline.engines;
    const there = new Set();
    const before = [...this.#cards.keys()].join();
    this.dense = engines.length > DENSE;
    this.#root.classList.toggle("dense", this.dense);
    for (const [stage, instances] of Object.entries(pipeline.stages)) {
      const list = this.#root.querySelector(`.stage.${stage} ul`);
      const ones = stage === "engine" ? engines : [...instances.values()];
      ones.forEach((one, place) => {
        there.add(one.id);
        let card = this.#cards.get(one.id);
        if (!card) {
          card = stage === "engine" ? new EngineCard(one, this.#onKill) : new StageCard(stage);
          this.#cards.set(one.id, card);
        }
        if (list.children[place] !== card.node) list.insertBefore(card.node, list.children[place] ?? null);
        card.draw(one, pipeline, request?.decision, ones.length);
      });
    }
    for (const [id, card] of this.#cards) {
      if (there.has(id)) continue;
      card.node.remove();
      this.#cards.delete(id);
    }
    this.#sayShown(request);
    return before !== [...this.#cards.keys()].join();
  }

  #sayShown(request) {
    const decision = request?.decision;
    this.#root.classList.toggle("idle", !decision);
    if (!decision) return write(this.#shown, "Send something, and its way through the pipeline is drawn here.");
    const blocks = Math.ceil(decision.prompt_blocks);
    write(this.#shown, `${count(blocks, "block")}, decided in ${duration(routed(request))}: “${request.title}”`);
  }
}

/** A frontend, processor or router. */
class StageCard {
  constructor(stage) {
    this.stage = stage;
    this.title = el("strong", { textContent: stage });
    this.says = el("small", { textContent: SAYS[stage] });
    this.node = el("li", { className: "card arriving" }, this.title, this.says);
  }

  draw(one, pipeline, decision, ones) {
    const which = ones > 1 ? ` ${[...pipeline.stages[this.stage].keys()].indexOf(one.id)}` : "";
    write(this.title, this.stage + which);
    if (this.stage === "router" && pipeline.policy) write(this.says, `finds the cheapest engine: ${pipeline.policy}`);
  }
}

class EngineCard {
  constructor(engine, onKill) {
    this.name = el("span");
    this.title = el("strong", {}, el("span", { className: "kind", textContent: "engine " }), this.name);
    this.state = el("span", { className: "state" });
    this.cost = el("span", { className: "cost" });
    this.strip = el("div", { className: "strip", role: "img" });
    this.fill = el("i");
    this.cache = el("small");
    this.load = el("small");
    this.kill = el("button", { type: "button", className: "kill", textContent: "Kill", hidden: true });
    this.kill.onclick = () => onKill(engine);
    const gauge = el("div", { className: "gauge", "aria-hidden": "true" }, this.fill);
    this.node = el(
      "li",
      { className: "card arriving" },
      el("div", { className: "line" }, this.title, this.state, this.cost, this.kill),
      this.strip,
      el("div", { className: "line" }, gauge, this.cache),
      this.load,
    );
  }

  draw(engine, pipeline, decision) {
    const { worker, rate, lost } = engine;
    const name = nameOf(engine);
    const cost = lost ? null : decision?.costs.find((each) => each.worker_id === name);
    write(this.name, name);
    write(this.state, stateOf(engine));
    write(this.cost, cost && isCost(decision) ? `cost ${number(cost.cost)}` : "");
    this.node.classList.toggle("lost", lost);
    this.node.classList.toggle("chosen", !lost && decision?.worker_id === name);
    this.kill.hidden = !pipeline.hello.demo || lost;
    this.kill.setAttribute("aria-label", `Kill engine ${name}`);
    this.#drawStrip(decision, cost);
    if (!worker) return;
    const share = worker.total_blocks ? worker.cached_blocks / worker.total_blocks : 0;
    this.fill.style.width = `${worker.cached_blocks ? Math.max(1, 100 * share) : 0}%`;
    const of = worker.total_blocks ? ` of ${number(worker.total_blocks)}` : "";
    write(this.cache, `KV cache ${number(worker.cached_blocks)}${of} blocks, ${percent(share, 1)}`);
    const load = `${number(worker.prefill_blocks)} to compute, ${number(worker.decode_blocks)} being decoded`;
    write(this.load, `${load} · ${number(rate < 0.05 ? 0 : rate)} answers/s`);
  }

  #drawStrip(decision, cost) {
    const blocks = cost ? Math.ceil(decision.prompt_blocks) : 0;
    const key = cost ? `${blocks} ${cost.overlap_blocks} ${cost.expected_blocks}` : "";
    if (this.drawn === key) return;
    this.drawn = key;
    this.strip.replaceChildren(...(cost ? [strip(blocks, cost, CELLS)] : []));
    const says = cost ? `${cost.overlap_blocks} of ${count(blocks, "block")} of this prompt in its cache` : "";
    this.strip.setAttribute("aria-label", says || "no prompt is shown");
    this.strip.title = says;
  }
}

/** Whether a policy's cost means something to people. */
export const isCost = ({ policy }) => ["kv", "dynamo", "least-loaded", "session-affinity"].includes(policy);

function stateOf({ worker, lost }) {
  if (lost) return "lost";
  if (!worker) return "joining";
  if (worker.status === "refused") return worker.reason ?? "refused";
  return worker.requests ? `${number(worker.requests)} running` : "idle";
}

function routed(request) {
  const asked = request.asked[request.decided.length - 1] ?? request.asked.at(-1);
  return asked ? Math.max(0, request.decision.at - asked.at) : 0;
}
