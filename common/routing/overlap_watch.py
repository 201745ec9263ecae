"""Notices when prompts come again and again and are never found in any cache.

That is how a pipeline looks whose parts do not agree about blocks, or whose events do not arrive: it answers, it is
only slow, and no other sign tells.
"""

import logging
from collections import OrderedDict
from collections.abc import Collection

from common.routing.worker import Prompt, Worker

log = logging.getLogger(__name__)

REPEATS = 20  # in a row without any overlap are no accident; said again at twice as many
REMEMBERED = 256  # prompts; a longer memory would count those that were evicted meanwhile


class OverlapWatch:
    """Compares what should be cached with what the index finds."""

    def __init__(self) -> None:
        self._finished: OrderedDict[int, None] = OrderedDict()  # by first block, the prompts computed last
        self._misses = 0
        self._said_at = REPEATS

    def on_finished(self, prompt: Prompt) -> None:
        """A prompt has been computed, and so should be in a cache now."""
        if prompt.sequence_hashes:
            self._finished[prompt.sequence_hashes[0]] = None
            self._finished.move_to_end(prompt.sequence_hashes[0])
            if len(self._finished) > REMEMBERED:
                self._finished.popitem(last=False)

    def on_asked(self, prompt: Prompt, found: bool, workers: Collection[Worker]) -> None:
        """A prompt was looked up, and somebody had its beginning or not."""
        if found:
            self._misses, self._said_at = 0, REPEATS
        elif prompt.sequence_hashes and prompt.sequence_hashes[0] in self._finished:
            self._misses += 1
            if self._misses >= self._said_at:
                self._said_at *= 2
                log.warning("%d repeated prompts in a row found no cached prefix: %s", self._misses, cause(workers))


def cause(workers: Collection[Worker]) -> str:
    """The likeliest reason, from what is known of the workers."""
    announced = [worker for worker in workers if worker.info]
    if not announced:
        return "no worker announces its KV events, so there is nothing to route by but load"
    for worker in announced:
        if worker.info and not worker.events:
            return (
                f"no KV event has come from worker {worker.name}: is {worker.info.kv_events} reachable from here "
                "(--host of the engine), and are its KV events on?"
            )
    return (
        "the blocks that the workers store are not those that the processor asks for (a different tokenizer, chat "
        "template or block size), or their caches are too small to keep them"
    )
