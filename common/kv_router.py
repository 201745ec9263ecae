"""Dynamo's own KvRouter as a routing policy, to compare with."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace

from common.errors import InvalidRequest, Unavailable
from common.messages import FindWorkerRequest
from common.policy import Candidate, Weights
from common.worker import Lease

from dynamo.llm import KvRouter, KvRouterConfig
from dynamo.runtime import DistributedRuntime


class DynamoPolicy:
    """The Rust router, in this process. It follows the workers and their KV events by itself, over Dynamo's event
    plane, so workers must be registered with Dynamo: simulated ones are, SGLang's are with --register-model."""

    def __init__(self, runtime: DistributedRuntime, block_size: int, weights: Weights) -> None:
        theirs = asdict(weights)
        del theirs["decode_load_scale"]
        config = KvRouterConfig(**theirs)
        self._router = KvRouter(runtime.endpoint("inference.engine.generate"), block_size, config)

    @asynccontextmanager
    async def lease(self, request: FindWorkerRequest, candidates: Sequence[Candidate]) -> AsyncIterator[Candidate]:
        """The worker that KvRouter chooses, and its load until the block ends, in KvRouter's books and in ours."""
        if request.token_ids is None:
            raise InvalidRequest("policy dynamo hashes the tokens itself: start the processor with --send-tokens")
        request_id = uuid.uuid4().hex
        instance_id, _rank, overlap = await self._router.best_worker(request.token_ids, request_id=request_id)
        prefilled: asyncio.Task[None] | None = None
        try:
            best = next((one for one in candidates if one.worker.instance_id == instance_id), None)
            if best is None:
                raise Unavailable("KvRouter chose a worker that has left; try again in a moment", code="no_worker")
            best = replace(best, cached=overlap)
            with best.worker.lease(best.prompt, overlap) as lease:
                prefilled = asyncio.create_task(self._prefilled(lease, request_id))
                yield best
        finally:
            if prefilled:
                prefilled.cancel()
            await self._router.free(request_id)

    async def _prefilled(self, lease: Lease, request_id: str) -> None:
        await lease.prefilled.wait()
        await self._router.mark_prefill_complete(request_id)
