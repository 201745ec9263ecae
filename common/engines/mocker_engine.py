"""Dynamo's simulated engine, embedded: a worker with a real scheduler and KV cache and no model.

It takes the time that a GPU would take (or less: `speedup`) and answers with made-up tokens. It serves the requests
itself, in Rust; what is here starts it and turns its metrics into the load that our workers publish.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from common.engines.ports import reserved
from common.engines.publisher import publish_load
from common.messages import GENERATE, LoadStat, ModelIdentity, WorkerInfo

import msgspec
from dynamo._core import _normalize_mocker_config
from dynamo.llm import EngineType, EntrypointArgs, FpmEventSubscriber, make_engine, run_input
from dynamo.runtime import DistributedRuntime, Endpoint

MAX_CONTEXT = 2**20  # tokens; a simulation can be as long as one likes
# On the card that the engine registers, which only Dynamo's own frontend reads. It takes one name for an endpoint, so
# engines of several models in one pipeline must agree on it.
CARD_NAME = "simulated"
POLL_SECONDS = 0.1
STALE_POLLS = 3  # without a new step; the last one's report is then no longer true


class _Requests(msgspec.Struct):
    num_prefill_requests: int
    num_decode_requests: int
    sum_prefill_tokens: int
    sum_prefill_kv_tokens: int = 0  # tokens of the prompts that were in the cache
    sum_decode_kv_tokens: int = 0

    @property
    def requests(self) -> int:
        return self.num_prefill_requests + self.num_decode_requests

    @property
    def tokens(self) -> int:
        return self.sum_prefill_tokens + self.sum_prefill_kv_tokens + self.sum_decode_kv_tokens


class _ForwardPass(msgspec.Struct):
    """What the simulated scheduler did in a step (Dynamo's ForwardPassMetrics)."""

    counter_id: int
    scheduled_requests: _Requests
    queued_requests: _Requests


class MockerEngine:
    """One simulated engine: what it announces, and its run."""

    def __init__(self, info: WorkerInfo, engine: Any, metrics: FpmEventSubscriber, ports: ExitStack) -> None:
        self.info = info
        self._engine = engine
        self._metrics = metrics
        self._ports = ports

    @classmethod
    async def start(
        cls,
        runtime: DistributedRuntime,
        endpoint: Endpoint,
        *,
        model_path: str,
        identity: ModelIdentity,
        worker_id: str | None,
        host: str,
        total_blocks: int,
        speedup: float,
    ) -> "MockerEngine":
        """Make an engine for `endpoint`. It is registered once `run` runs.

        model_path: what `resolve_model` found, for its context and tokenizer; host: where routers reach this machine;
        total_blocks: KV blocks that fit; speedup: times faster than the simulated GPU.
        """
        os.environ.setdefault("DYN_SELF_HOST_METADATA", "0")
        ports = ExitStack()
        events, replay, load = ports.enter_context(reserved(3))
        config = _normalize_mocker_config(
            {
                "engine": {
                    "backend": "sglang",
                    "block_size": identity.block_size,
                    "num_gpu_blocks": total_blocks,
                    "speedup_ratio": speedup,
                },
                "dynamo": {"zmq_kv_events_port": events, "zmq_replay_port": replay},
            }
        )
        engine = await make_engine(
            runtime,
            EntrypointArgs(
                engine_type=EngineType.Mocker,
                model_path=model_path,
                model_name=CARD_NAME,
                endpoint_id=GENERATE.path,
                mocker_engine_args=config,
                kv_cache_block_size=identity.block_size,
            ),
        )
        instance_id = endpoint.connection_id()
        info = WorkerInfo(
            instance_id=instance_id,
            worker_id=worker_id or str(instance_id),
            model=identity,
            total_blocks=total_blocks,
            context_length=min(MAX_CONTEXT, total_blocks * identity.block_size),
            simulated=True,
            kv_events=f"tcp://{host}:{events}",
            kv_replay=f"tcp://{host}:{replay}",
            load=f"tcp://{host}:{load}",
        )
        return cls(info, engine, FpmEventSubscriber(endpoint), ports)

    async def run(self, runtime: DistributedRuntime) -> None:
        """Serve requests until the runtime shuts down."""
        await run_input(runtime, f"dyn://{GENERATE.path}", self._engine)

    async def publish(self) -> None:
        """Publish the load. Runs until cancelled."""
        await publish_load(self.info, self._stats())

    async def _stats(self) -> AsyncIterator[LoadStat]:
        self._metrics.start_tracking()
        capacity = self.info.total_blocks * self.info.model.block_size
        seen, polls = -1, 0
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if latest := self._metrics.get_recent_stats().get((str(self.info.instance_id), 0)):
                step = msgspec.msgpack.decode(latest, type=_ForwardPass)
                polls = polls + 1 if step.counter_id == seen else 0
                seen = step.counter_id
                busy = polls < STALE_POLLS
                running, queued = step.scheduled_requests, step.queued_requests
                yield LoadStat(
                    running_requests=running.requests * busy,
                    waiting_requests=queued.requests * busy,
                    used_tokens=running.tokens * busy,
                    total_tokens=capacity,
                    waiting_prefill_tokens=queued.sum_prefill_tokens * busy,
                )
