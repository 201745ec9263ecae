// The last decisions as a list, newest first. Whoever reads in it is not disturbed: it waits while it has the focus or
// the pointer.

import { count, duration, el, number, write } from "./dom.js";
import { life } from "./life.js";
import { isCost } from "./picture.js";
import { strip } from "./strip.js";
import { why } from "./why.js";

const ROWS = 30;
const NEW_ROWS = 6; // that come at once
const CELLS = 12; // squares for the blocks of a prompt
const WORKERS = 6; // whose costs are drawn: the chosen one's and the cheapest

export class Decisions {
  #root = document.getElementById("decisions");
  #list = this.#root.querySelector("ol");
  #nothing = document.getElementById("nothing");
  #held = document.getElementById("held");
  #rows = new Map(); // by request id, the oldest first
  #waiting = new Map(); // requests with news that are not drawn yet
  #onSelect;
  selected = null; // the request that is open

  /** onSelect: called with the request that was clicked, or null. */
  constructor(onSelect) {
    this.#onSelect = onSelect;
  }

  add(request) {
    if (!request.decision) return;
    this.#waiting.set(request.id, request);
    if (this.#waiting.size > ROWS) this.#waiting.delete(this.#waiting.keys().next().value);
  }

  get #busy() {
    return this.#list.matches(":hover") || this.#list.contains(document.activeElement);
  }

  draw() {
    const hold = this.#rows.size > 0 && this.#busy;
    let room = hold ? 0 : NEW_ROWS;
    for (const [id, request] of this.#waiting) {
      if (!this.#rows.has(id) && room-- <= 0) continue;
      this.#waiting.delete(id);
      this.#row(request).draw(this.selected === request);
    }
    const news = hold ? this.#waiting.size : 0;
    write(this.#held, news ? `${news === ROWS ? "Many" : news} more while you read; they come when you leave the list.` : "");
    if (this.selected && !this.selected.ended) this.#rows.get(this.selected.id)?.draw(true);
  }

  #row(request) {
    let row = this.#rows.get(request.id);
    if (row) return row;
    this.#nothing.hidden = true;
    row = new Row(request, () => this.select(this.selected === request ? null : request));
    this.#rows.set(request.id, row);
    this.#list.prepend(row.node);
    for (const [id, old] of this.#rows) {
      if (this.#rows.size <= ROWS) break;
      if (id === this.selected?.id) continue;
      old.node.remove();
      this.#rows.delete(id);
    }
    return row;
  }

  /** Opens a request, or closes the one that is open. */
  select(request) {
    const before = this.selected;
    this.selected = request;
    if (before) this.#rows.get(before.id)?.draw(false);
    if (request) this.#row(request).draw(true);
    this.#onSelect(request);
  }

  /** Opens a request and goes there. */
  show(request) {
    this.select(request);
    const { button } = this.#row(request);
    button.focus({ preventScroll: true });
    button.scrollIntoView({ block: "nearest" });
  }
}

class Row {
  #decision;

  constructor(request, onClick) {
    this.request = request;
    this.title = el("span", { className: "title" });
    this.outcome = el("span", { className: "outcome" });
    this.why = el("p", { className: "why" });
    this.costs = el("ul", { className: "costs", "aria-label": "What it would have cost" });
    this.more = el("div", { className: "more", hidden: true });
    this.button = el("button", { type: "button", onclick: onClick }, this.title, this.outcome);
    this.node = el("li", { className: "decision arriving" }, this.button, this.why, this.costs, this.more);
  }

  draw(open) {
    const { request } = this;
    const { decision, moved, ended } = request;
    write(this.title, request.title);
    write(this.outcome, outcomeOf(request));
    this.button.setAttribute("aria-expanded", open);
    this.node.classList.toggle("open", open);
    this.node.classList.toggle("failed", Boolean(ended?.error));
    const loss = moved.at(-1); // told by another program than the decision, so perhaps later
    const before = loss ? `Moved from worker ${loss.worker_id} after ${count(loss.tokens, "token")}; then ` : "";
    write(this.why, sentence(before + why(decision)));
    if (decision !== this.#decision) {
      this.#decision = decision;
      this.costs.replaceChildren(...costsOf(decision));
    }
    this.more.hidden = !open;
    this.more.replaceChildren(...(open ? life(request) : []));
  }
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

function outcomeOf({ decision, ended }) {
  const worker = `worker ${decision.worker_id}`;
  if (!ended) return `${worker} …`;
  if (ended.error) return `${worker}, error ${ended.status}`;
  if (ended.status === 499) return `${worker}, stopped by the client`;
  return ended.ttft_seconds ? `${worker}, first token after ${duration(ended.ttft_seconds)}` : worker;
}

/** A bar for each of the cheapest: how much it costs, and how much of the prompt it has. */
function costsOf(decision) {
  const won = decision.costs.find((cost) => cost.worker_id === decision.worker_id);
  const sorted = [...decision.costs].sort((a, b) => (b === won) - (a === won) || a.cost - b.cost);
  const shown = sorted.slice(0, WORKERS);
  const most = Math.max(...sorted.map((cost) => cost.cost), 1e-9);
  const items = shown.map((cost) => bar(decision, cost, cost === won, most));
  const rest = sorted.length - shown.length;
  if (rest > 0) items.push(el("li", { className: "rest", textContent: `and ${rest} more, up to ${number(most)}` }));
  return items;
}

function bar(decision, cost, won, most) {
  const blocks = Math.ceil(decision.prompt_blocks);
  const fill = el("i");
  fill.style.width = isCost(decision) ? `${Math.max(0, (100 * cost.cost) / most)}%` : "0";
  const says = isCost(decision) ? `cost ${number(cost.cost)}` : "";
  return el(
    "li",
    { className: won ? "won" : "" },
    el("span", { className: "name", textContent: cost.worker_id }),
    strip(blocks, cost, CELLS),
    el("span", { className: "gauge", "aria-hidden": "true" }, fill),
    el("span", { className: "number", textContent: says }),
    el("span", { className: "hidden", textContent: `, ${cost.overlap_blocks} of ${count(blocks, "block")} cached${won ? ", chosen" : ""}` }),
  );
}
