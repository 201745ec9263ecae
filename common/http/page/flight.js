// The edges, and requests as dots that move along them, slower than they are so that eyes can follow.

const LEG = 330; // milliseconds on an edge
const DOTS = 120; // that fly at once; of more requests some are not drawn
const LINGER = 20_000; // milliseconds after which a dot that nothing is heard of goes
const PULSE = 420; // between parts of an answer that flow back

export class Flight {
  // Edges and dots are drawn apart: the edges are many, and seldom other ones.
  #layers = [...document.querySelectorAll("#picture canvas")].map((canvas) => canvas.getContext("2d"));
  #still = matchMedia("(prefers-reduced-motion: reduce)");
  #picture;
  #pipeline;
  #dots = new Map(); // by request id
  #places = new Map(); // of cards, by instance id
  #colors = {};
  #stale = true; // the places must be looked up
  #edges; // which one is drawn as the chosen one

  constructor(picture, pipeline) {
    this.#picture = picture;
    this.#pipeline = pipeline;
    new ResizeObserver(() => this.moved()).observe(this.#layers[0].canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.moved());
  }

  /** Cards have come, gone or moved. */
  moved() {
    this.#stale = true;
  }

  /** Something happened to a request. */
  follow(request, now) {
    const dot = this.#dots.get(request.id);
    if (dot) dot.heard = now;
    else if (!this.#still.matches && this.#dots.size < DOTS && !request.ended) {
      this.#dots.set(request.id, { request, leg: 0, began: now, heard: now, pulsed: now, pulses: [] });
    }
  }

  /** Draws. Returns whether something moves. */
  draw(now, shown) {
    if (this.#stale) this.#look();
    const [edges, dots] = this.#layers;
    const chosen = shown?.decision && this.#pipeline.engineOf(shown.decision.worker_id);
    const key = `${shown?.asked.at(-1)?.processor} ${chosen?.id}`;
    if (this.#edges !== key) {
      this.#edges = key;
      this.#clear(edges);
      this.#drawEdges(shown, chosen);
    }
    this.#clear(dots);
    for (const dot of this.#dots.values()) this.#fly(dot, now);
    return this.#dots.size > 0;
  }

  #clear(context) {
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
  }

  #look() {
    this.#stale = false;
    this.#edges = null; // to be drawn anew
    const origin = this.#layers[0].canvas.getBoundingClientRect();
    const scale = devicePixelRatio;
    for (const context of this.#layers) {
      const [width, height] = [Math.round(origin.width * scale), Math.round(origin.height * scale)];
      if (context.canvas.width !== width || context.canvas.height !== height) Object.assign(context.canvas, { width, height });
      context.setTransform(scale, 0, 0, scale, 0, 0);
    }
    this.#places.clear();
    for (const [id, { node }] of this.#picture.cards) {
      const { left, top, width, height } = node.getBoundingClientRect();
      const [x, y] = [left - origin.left, top - origin.top];
      this.#places.set(id, { x: x + width / 2, y: y + height / 2, left: x, top: y, width, height });
    }
    const style = getComputedStyle(this.#layers[0].canvas);
    for (const name of ["line", "ink", "cached", "compute", "lost"]) this.#colors[name] = style.getPropertyValue(`--${name}`);
  }

  #drawEdges(shown, chosen) {
    const { frontend, processor, router } = this.#pipeline.stages;
    const engine = this.#picture.dense ? new Map() : this.#pipeline.stages.engine; // too many edges say nothing
    this.#layers[0].setLineDash([2, 5]); // what engines publish, of their caches and their load
    for (const one of router.keys()) for (const other of engine.keys()) this.#drawEdge(other, one);
    this.#layers[0].setLineDash([]);
    for (const one of processor.keys()) {
      for (const other of [...frontend.keys(), ...router.keys()]) this.#drawEdge(other, one);
      for (const other of engine.values()) if (other !== chosen) this.#drawEdge(one, other.id);
    }
    const asked = shown?.asked.at(-1)?.processor ?? processor.keys().next().value;
    if (chosen) this.#drawEdge(asked, chosen.id, this.#colors.cached, 2.5);
  }

  #drawEdge(from, to, color = this.#colors.line, width = 1.25) {
    const curve = this.#curve(from, to);
    if (!curve) return;
    const [a, b, c, d] = curve;
    const [context] = this.#layers;
    context.strokeStyle = color;
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(a.x, a.y);
    context.bezierCurveTo(b.x, b.y, c.x, c.y, d.x, d.y);
    context.stroke();
  }

  /** The edge between two cards: from side to side if they are beside each other, else from top to bottom. */
  #curve(from, to) {
    const [a, b] = [this.#places.get(from), this.#places.get(to)];
    if (!a || !b) return null;
    const beside = Math.max(a.left, b.left) >= Math.min(a.left + a.width, b.left + b.width);
    if (beside) {
      const sign = Math.sign(b.x - a.x);
      const [start, end] = [{ x: a.x + (sign * a.width) / 2, y: a.y }, { x: b.x - (sign * b.width) / 2, y: b.y }];
      const middle = (start.x + end.x) / 2;
      return [start, { x: middle, y: start.y }, { x: middle, y: end.y }, end];
    }
    const sign = Math.sign(b.y - a.y);
    const [start, end] = [{ x: a.x, y: a.y + (sign * a.height) / 2 }, { x: b.x, y: b.y - (sign * b.height) / 2 }];
    const middle = (start.y + end.y) / 2;
    return [start, { x: start.x, y: middle }, { x: end.x, y: middle }, end];
  }

  /** The stops of a request, as far as they are known. Each event adds some, so a dot waits where nothing is known. */
  #stops(request) {
    const { stages } = this.#pipeline;
    const any = (stage) => stages[stage].keys().next().value;
    const front = request.started?.frontend ?? any("frontend");
    const stops = [front];
    let processor = any("processor");
    for (const [turn, decided] of request.decided.entries()) {
      processor = request.asked[turn]?.processor ?? processor;
      stops.push(processor, decided.router, processor, this.#pipeline.engineOf(decided.worker_id)?.id);
      if (request.moved[turn]) stops.push(processor);
    }
    if (request.ended) stops.push(processor, front);
    return stops.filter((stop, place) => stop && stop !== stops[place - 1]);
  }

  #fly(dot, now) {
    const { request } = dot;
    const stops = (dot.stops = this.#stops(request));
    const progress = Math.min(1, (now - dot.began) / LEG);
    const flying = dot.leg + 1 < stops.length;
    if (flying) {
      const color = this.#colorOf(request, dot.leg, stops);
      this.#drawDot(this.#curve(stops[dot.leg], stops[dot.leg + 1]), progress, color, 5);
      if (progress === 1) Object.assign(dot, { leg: dot.leg + 1, began: now });
      return;
    }
    if (request.ended || now - dot.heard > LINGER) this.#dots.delete(request.id);
    else if (request.answering) this.#flowBack(dot, now, stops);
    dot.began = now; // it waits, and flies on from here
  }

  /** Parts of the answer, on their way from the engine to the frontend. */
  #flowBack(dot, now, stops) {
    dot.heard = now;
    const legs = [[stops.at(-1), stops.at(-2)], [stops.at(-2), stops[0]]];
    if (now - dot.pulsed > PULSE) {
      dot.pulsed = now;
      dot.pulses.push(now);
    }
    dot.pulses = dot.pulses.filter((began) => now - began < 2 * LEG);
    for (const began of dot.pulses) {
      const way = (now - began) / LEG;
      const [from, to] = legs[Math.floor(way)];
      if (from && to) this.#drawDot(this.#curve(from, to), way % 1, this.#colors.cached, 2.5);
    }
  }

  /** Before the decision it is ink; then the colour says whether any of it is cached. */
  #colorOf(request, leg, stops) {
    if (request.moved.length && leg < stops.length - 2 && leg >= 4) return this.#colors.lost;
    if (leg < 2 || !request.decision) return this.#colors.ink;
    return request.decision.overlap_blocks ? this.#colors.cached : this.#colors.compute;
  }

  #drawDot(curve, progress, color, radius) {
    if (!curve) return;
    const t = progress * progress * (3 - 2 * progress);
    const [a, b, c, d] = curve;
    const mix = (axis) =>
      (1 - t) ** 3 * a[axis] + 3 * (1 - t) ** 2 * t * b[axis] + 3 * (1 - t) * t ** 2 * c[axis] + t ** 3 * d[axis];
    const context = this.#layers[1];
    context.fillStyle = color;
    context.beginPath();
    context.arc(mix("x"), mix("y"), radius, 0, 2 * Math.PI);
    context.fill();
  }
}
