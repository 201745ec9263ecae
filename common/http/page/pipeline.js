// What is known of the pipeline: who is there, what the routers say of the engines, and the last requests.

const REQUESTS = 300; // that are remembered

/** A request's life so far. Its parts come from several programs, so in any order, and under load not all of them. */
class Request {
  started = null;
  answering = null;
  ended = null;
  asked = [];
  decided = [];
  moved = [];

  constructor(id, prompt) {
    this.id = id;
    this.prompt = prompt;
  }

  /** The last choice of a worker. */
  get decision() {
    return this.decided.at(-1);
  }

  /** What a person calls it. */
  get title() {
    return this.prompt ?? this.started?.prompt ?? `request ${this.id.slice(0, 12)}`;
  }

  add(name, event) {
    if (Array.isArray(this[name])) this[name].push(event);
    else this[name] = event;
  }
}

export class Pipeline {
  hello = { demo: false, prompts: false };
  share = 1; // of the requests that are told of
  stages = { frontend: new Map(), processor: new Map(), router: new Map(), engine: new Map() };
  policy = "";
  blockSize = 16;
  requests = new Map();
  #own = new Map(); // prompts of this page, by request id

  /** Takes in an event. Returns the request that it is about, if any. */
  add(name, event) {
    switch (name) {
      case "hello":
        this.hello = event;
      // falls through: after either, everybody who is there is told anew
      case "skipped":
        for (const stage of Object.values(this.stages)) stage.clear();
        return null;
      case "sampled":
        this.share = event.share;
        return null;
      case "joined":
        this.stages[event.stage]?.set(event.instance_id, { id: event.instance_id, worker: null, rate: 0, lost: false });
        return null;
      case "left":
        this.stages[event.stage]?.delete(event.instance_id);
        return null;
      case "fleet":
        this.#addFleet(event.routers);
        return null;
      default:
        return this.#addToRequest(name, event);
    }
  }

  #addFleet(routers) {
    this.policy = routers[0]?.policy ?? "";
    const workers = new Map();
    for (const router of routers) {
      for (const worker of router.workers) workers.set(worker.instance_id, merged(workers.get(worker.instance_id), worker));
    }
    const now = performance.now() / 1000;
    for (const [id, worker] of workers) {
      const engine = this.stages.engine.get(id);
      if (!engine) continue;
      const answered = worker.routed_requests - worker.requests;
      const rate = engine.worker ? Math.max(0, answered - engine.answered) / Math.max(now - engine.at, 0.1) : 0;
      engine.rate = engine.rate * 0.6 + rate * 0.4; // smoothed, or it would flicker
      if (engine.lost) {
        engine.events ??= worker.events; // that came before it was lost
        engine.lost = worker.events === engine.events; // or it still lives, and lost a request only
      }
      Object.assign(engine, { worker, answered, at: now });
      this.blockSize = worker.model?.block_size ?? this.blockSize;
    }
  }

  #addToRequest(name, event) {
    let request = this.requests.get(event.request_id);
    if (!request) {
      request = new Request(event.request_id, this.#own.get(event.request_id));
      bounded(this.requests, REQUESTS).set(request.id, request);
    }
    request.add(name, event);
    if (name === "moved") lose(this.engineOf(event.worker_id));
    return request;
  }

  /** Remembers a prompt of this page, which may always be shown here. */
  own(id, prompt) {
    bounded(this.#own, REQUESTS).set(id, prompt);
    const request = this.requests.get(id);
    if (request) request.prompt = prompt;
  }

  /** The engine of this name: of two, the one that lives. */
  engineOf(workerId) {
    const named = [...this.stages.engine.values()].filter((engine) => nameOf(engine) === workerId);
    return named.findLast((engine) => !engine.lost) ?? named.at(-1);
  }

  /** All that are to be seen: of a lost one, until another one has its place. */
  get engines() {
    const all = [...this.stages.engine.values()].filter((one) => !one.lost || this.engineOf(nameOf(one)) === one);
    return all.sort((a, b) => collator.compare(nameOf(a), nameOf(b)));
  }
}

const collator = new Intl.Collator("en", { numeric: true });

/** An engine that loses a request is dead, as far as one knows; etcd finds out some seconds later. */
export function lose(engine) {
  if (engine) Object.assign(engine, { lost: true, events: null });
}

export const nameOf = (engine) => engine.worker?.worker_id ?? engine.id;

/** What two routers know of one worker: each has its own requests, and both see the same cache. */
function merged(one, other) {
  if (!one) return other;
  return {
    ...other,
    requests: one.requests + other.requests,
    routed_requests: one.routed_requests + other.routed_requests,
    routed_blocks: one.routed_blocks + other.routed_blocks,
    overlap_blocks: one.overlap_blocks + other.overlap_blocks,
    prefill_blocks: Math.max(one.prefill_blocks, other.prefill_blocks),
    decode_blocks: Math.max(one.decode_blocks, other.decode_blocks),
    cached_blocks: Math.max(one.cached_blocks, other.cached_blocks),
  };
}

/** A map with room for one more: its oldest entry goes. */
function bounded(map, room) {
  if (map.size >= room) map.delete(map.keys().next().value);
  return map;
}
