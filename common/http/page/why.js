// Why a worker got a prompt, in one sentence, from what it would have cost each.

import { count, number } from "./dom.js";

const NEAR = 1e-6; // costs that differ by less are equal

export function why({ policy, worker_id, prompt_blocks, costs }) {
  const won = costs.find((cost) => cost.worker_id === worker_id);
  const others = costs.filter((cost) => cost !== won).sort((a, b) => a.cost - b.cost);
  if (!won) return `worker ${worker_id} was chosen.`;
  if (!others.length) return `worker ${worker_id} is the only one that could have it.`;
  if (policy === "random") return `drawn by lot among ${costs.length}: the policy random looks at nothing.`;
  if (policy === "round-robin") return `worker ${worker_id} was not chosen for longest: it was its turn.`;
  if (policy === "least-loaded") return `worker ${worker_id} has least to do: ${load(won)}, against ${load(others[0])}.`;
  if (policy === "session-affinity" && won.cost < 0) return `worker ${worker_id} had this session's last request.`;
  return byCost(won, others, Math.ceil(prompt_blocks));
}

/** As the policies `kv` and `dynamo` see it. */
function byCost(won, others, blocks) {
  const next = others[0];
  const tied = others.filter((other) => Math.abs(other.cost - won.cost) < NEAR).length;
  if (next.cost < won.cost - NEAR) {
    return `drawn, the cheaper the likelier: ${name(won)} at ${number(won.cost)}, though ${name(next)} cost ${number(next.cost)}.`;
  }
  if (tied) {
    const same = won.expected_blocks ? `have ${has(won, blocks)}` : `have none of its ${count(blocks, "block")}`;
    return `${tied + 1} workers ${same} and are equally busy: drawn by lot.`;
  }
  const most = others.reduce((a, b) => (b.expected_blocks > a.expected_blocks ? b : a));
  if (won.expected_blocks > most.expected_blocks) {
    const left = number(blocks - won.expected_blocks);
    const other = number(blocks - next.expected_blocks);
    return `${name(won)}: ${has(won, blocks)}, so ${left} to compute; ${name(next)} would have had to compute ${other}.`;
  }
  if (most.expected_blocks > won.expected_blocks) {
    return `${name(most)} has ${has(most, blocks)} but is busier (${load(most)}): ${name(won)} costs ${number(won.cost)} instead of ${number(most.cost)}.`;
  }
  const same = won.expected_blocks ? `as much of it cached as ${name(next)}` : "nothing of it cached, like the others,";
  return `${name(won)} has ${same} but less to do: ${load(won)}, against ${load(next)}.`;
}

const name = (cost) => `worker ${cost.worker_id}`;

function has(cost, blocks) {
  const soon = cost.expected_blocks > cost.overlap_blocks ? "cached or about to be" : "cached";
  return `${cost.expected_blocks} of ${count(blocks, "block")} ${soon}`;
}

function load({ prefill_blocks, decode_blocks }) {
  const parts = [];
  if (prefill_blocks) parts.push(`${count(prefill_blocks, "block")} to compute`);
  if (decode_blocks) parts.push(`${prefill_blocks ? number(decode_blocks) : count(decode_blocks, "block")} being decoded`);
  return parts.join(" and ") || "nothing";
}
