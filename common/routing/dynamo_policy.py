"""Dynamo's own choice of a worker as a policy, to compare with."""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from common.errors import Unavailable
from common.routing.fleet import Fleet, describe_request
from common.routing.policy import Candidate, Weights
from common.routing.worker import Lease

from dynamo.llm import SelectionService
from dynamo.llm.exceptions import SelectionServiceError

# The service takes its weights from the environment when it is made. In 1.6.1 it reads a request's
# `router_config_override`, and does nothing with it.
_VARIABLES = {
    "overlap_score_credit": "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT",
    "prefill_load_scale": "DYN_ROUTER_PREFILL_LOAD_SCALE",
    "decode_active_request_weight": "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
    "router_temperature": "DYN_ROUTER_TEMPERATURE",
}
_PASS_TOKENS = 8192  # of prompts in a forward pass: the default of SGLang and of the mocker


class DynamoPolicy:
    """Dynamo's SelectionService in this process: the Rust scheduler of its KvRouter, with its own index and books.

    It reads the KV events of the workers itself, at the addresses that they announce: what was stored before it came,
    from their next event on. A request that is moved to another worker is chosen for among the others, as any is.

    With DYN_ROUTER_QUEUE_THRESHOLD in the environment, prompts wait in it while every worker has more to compute than
    this share of a forward pass, and go on in the order of DYN_ROUTER_QUEUE_POLICY: `fcfs`, or `wspt`, the shortest
    first.
    """

    def __init__(self, fleet: Fleet, weights: Weights) -> None:
        self._fleet = fleet
        for name, variable in _VARIABLES.items():
            os.environ[variable] = str(getattr(weights, name))
        self._service = SelectionService()
        self._known: set[int] = set()
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def lease(self, candidates: Sequence[Candidate], best: Candidate) -> AsyncIterator[Candidate]:
        """The worker that Dynamo chooses, and its load until the block ends, in Dynamo's books and in ours.

        Raises Unavailable if no candidate announces its KV events.
        """
        await self._meet(candidates)
        selection_id = uuid.uuid4().hex
        by_id = {one.worker.instance_id: one for one in candidates if one.worker.instance_id in self._known}
        if not by_id:
            raise Unavailable("policy dynamo needs workers that announce their KV events", code="no_worker")
        prefilled: asyncio.Task[None] | None = None
        try:
            selection = await self._select(selection_id, best, list(by_id))
            best = by_id[selection["worker_id"]]
            # What it calls longest_matched is in tokens.
            best.overlap_blocks = selection["overlap"]["longest_matched"] // best.request.model.block_size
            with best.worker.lease(best.prompt, best.overlap_blocks) as lease:
                prefilled = asyncio.create_task(self._on_prefilled(lease, selection_id))
                yield best
        finally:
            if prefilled:
                prefilled.cancel()
            with suppress(SelectionServiceError):  # a worker that has left took its reservations along
                await self._service.free_reservation(selection_id)

    async def _select(self, selection_id: str, candidate: Candidate, instance_ids: list[int]) -> dict[str, Any]:
        request = candidate.request
        try:
            selection: Any = await self._service.select_and_reserve(
                {
                    "model_name": describe_request(request.model),
                    "selection_id": selection_id,
                    "block_hashes": [_signed(local_hash) for local_hash in request.local_hashes],
                    "sequence_hashes": candidate.prompt.sequence_hashes,
                    "isl_tokens": request.tokens,
                    "allowed_worker_ids": instance_ids,
                }
            )
        except SelectionServiceError as error:  # they have just left
            raise Unavailable(f"Dynamo's scheduler: {error}; try again in a moment", code="no_worker") from error
        return dict(selection)

    async def _meet(self, candidates: Sequence[Candidate]) -> None:
        """Tell the service of workers that are new, and of those that have left."""
        async with self._changing:
            for instance_id in self._known - self._fleet.workers.keys():
                self._known.remove(instance_id)
                await self._service.delete_worker(instance_id)
            for candidate in candidates:
                info = candidate.worker.info
                if info and info.instance_id not in self._known:
                    await self._service.upsert_worker(
                        {
                            "worker_id": info.instance_id,
                            # The service takes one block size for each model.
                            "model_name": describe_request(info.model),
                            "endpoint": info.worker_id,
                            "kv_events_endpoint": info.kv_events,
                            "replay_endpoint": info.kv_replay,
                            "block_size": info.model.block_size,
                            "total_kv_blocks": info.total_blocks,
                            "max_num_batched_tokens": _PASS_TOKENS,  # with a queue, it takes no worker without it
                        }
                    )
                    self._known.add(info.instance_id)

    async def _on_prefilled(self, lease: Lease, selection_id: str) -> None:
        await lease.prefilled.wait()
        with suppress(SelectionServiceError):
            await self._service.prefill_complete(selection_id)


def _signed(number: int) -> int:
    """64 bits with a sign, as the service takes hashes."""
    return number - 2**64 if number >= 2**63 else number
