"""What it costs to run a prompt on a worker, and which worker that makes the best.

    cost = prefill blocks waiting there + prompt blocks not cached there + blocks being decoded there

in KV blocks. It is the cost of Dynamo's KvRouter with its default weights (lib/kv-router/src/scheduling/selector.rs:
`prefill_load_scale * max(0, raw_prefill_blocks - overlap_credit * overlap_blocks) + decode_blocks`, both weights 1).
The first two terms are the time until the first token, for prefills run one after the other; the last stands for the
time of each token after it, since a decoding step reads every block of every running request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.worker import Worker


@dataclass(slots=True, frozen=True)
class Candidate:
    """A worker that could take a prompt."""

    worker: Worker
    overlap_blocks: int  # leading blocks of the prompt that it has

    def cost(self, prompt_blocks: float) -> float:
        """In blocks; lower is better."""
        prefill = self.worker.prefill_blocks + prompt_blocks - self.overlap_blocks
        return max(prefill, 0.0) + self.worker.decode_blocks


def choose(candidates: Sequence[Candidate], prompt_blocks: float) -> tuple[Candidate, float]:
    """The candidate of lowest cost, and its cost. Among equals the one that was not chosen for longest, so that new
    prefixes spread evenly."""
    costs = [(candidate.cost(prompt_blocks), candidate.worker.chosen_at) for candidate in candidates]
    best = min(range(len(candidates)), key=costs.__getitem__)
    return candidates[best], costs[best][0]
