"""Dynamo's own scheduler as a policy: it chooses among the workers that it is given, by their caches and their load."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from common.engines.ports import free_ports
from common.engines.publisher import KvEventPublisher
from common.errors import Unavailable
from common.messages import FindWorkerRequest, ModelIdentity
from common.routing.dynamo_policy import DynamoPolicy
from common.routing.fleet import Fleet
from common.routing.policy import Candidate, Weights
from common.routing.prefix_index import sequence_hashes
from common.routing.worker import Prompt, Worker
from tests.unit.stand_ins import BLOCK_SIZE, identity, worker_info

import pytest
from dynamo.llm import compute_block_hash_for_seq

TOKENS = list(range(4 * BLOCK_SIZE))
OTHERS = list(range(1000, 1000 + 4 * BLOCK_SIZE))


class Scene:
    """A fleet of made-up workers, and the policy that chooses among them."""

    def __init__(self, weights: Weights) -> None:
        self.fleet = Fleet()
        self.policy = DynamoPolicy(self.fleet, weights)
        self.publishers: dict[int, KvEventPublisher] = {}
        self._answering: list[asyncio.Task[None]] = []

    def join(self, instance_id: int, model: ModelIdentity | None = None) -> None:
        events, replay = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
        info = worker_info(instance_id, model=model, kv_events=events, kv_replay=replay)
        publisher = self.publishers[instance_id] = KvEventPublisher(info)
        self._answering.append(asyncio.create_task(publisher.answer_replays()))
        self.fleet.add(Worker(instance_id, info))

    def candidates(
        self, tokens: Sequence[int] = TOKENS, *, excluded: Sequence[int] = (), model: ModelIdentity | None = None
    ) -> list[Candidate]:
        model = model or identity()
        request = FindWorkerRequest(
            model=model,
            local_hashes=compute_block_hash_for_seq(list(tokens), model.block_size),
            tokens=len(tokens),
            excluded=list(excluded),
        )
        prompt = Prompt(sequence_hashes(request.local_hashes), request.tokens / model.block_size)
        return self.fleet.candidates(request, prompt)

    def lease(self, *tokens: Sequence[int], **asked: Any) -> AbstractAsyncContextManager[Candidate]:
        candidates = self.candidates(*tokens, **asked)
        return self.policy.lease(candidates, candidates[0])

    async def chosen(self, **asked: Any) -> int:
        async with self.lease(**asked) as best:
            return best.worker.instance_id

    async def store(self, instance_id: int, tokens: Sequence[int] = TOKENS) -> None:
        """Return once Dynamo knows that a worker has these blocks, whose ids say what is in them, as SGLang's do."""
        block_ids = [hash(tuple(tokens[:end])) for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)]
        await self.chosen(tokens=tokens)
        async with asyncio.timeout(30):
            while True:
                await self.publishers[instance_id].publish_stored(tokens, block_ids)
                async with self.lease(tokens) as best:
                    if best.overlap_blocks == len(block_ids):
                        return
                await asyncio.sleep(0.02)

    def loads(self) -> dict[int, tuple[int, int]]:
        """By worker, the requests in Dynamo's books and the tokens that they have to compute."""
        models: Any = self.policy._service.loads()
        return {
            load["worker_id"]: (load["active_requests"], load["potential_prefill_tokens"])
            for model in models
            for load in model["loads"]
        }

    async def until_pending(self, count: int) -> None:
        """Return once so many requests wait in Dynamo's queue."""
        async with asyncio.timeout(30):
            while True:
                models: Any = self.policy._service.loads()
                if sum(model["pending_count"] for model in models) == count:
                    return
                await asyncio.sleep(0.01)

    def close(self) -> None:
        self.policy._service.shutdown()
        for task in self._answering:
            task.cancel()
        for publisher in self.publishers.values():
            publisher._live.close(0)
            publisher._replay.close(0)


@asynccontextmanager
async def scene_of(*instance_ids: int, weights: Weights) -> AsyncIterator[Scene]:
    scene = Scene(weights)
    for instance_id in instance_ids:
        scene.join(instance_id)
    try:
        yield scene
    finally:
        scene.close()


def play(scenario: Callable[[Scene], Awaitable[None]], *workers: int, weights: Weights | None = None) -> None:
    async def run() -> None:
        async with scene_of(*workers, weights=weights or Weights()) as scene:
            await scenario(scene)

    asyncio.run(run())


def test_it_chooses_among_those_that_have_not_failed_the_request() -> None:
    async def scenario(scene: Scene) -> None:
        assert {await scene.chosen(excluded=[1]) for _ in range(10)} == {2}
        assert {await scene.chosen(excluded=[2]) for _ in range(10)} == {1}

    play(scenario, 1, 2)


def test_it_is_not_asked_for_one_that_has_failed_the_request_even_if_that_has_it_cached() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.store(1)
        assert {await scene.chosen(excluded=[1]) for _ in range(10)} == {2}

    play(scenario, 1, 2)


def test_the_cache_decides_between_idle_workers() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.store(1)
        await scene.store(2, OTHERS)
        for _ in range(10):
            async with scene.lease(TOKENS) as best:
                assert (best.worker.instance_id, best.overlap_blocks) == (1, 4)
        assert {await scene.chosen(tokens=OTHERS) for _ in range(10)} == {2}
        async with scene.lease([*TOKENS[: 2 * BLOCK_SIZE], *OTHERS]) as best:
            assert (best.worker.instance_id, best.overlap_blocks) == (1, 2)

    play(scenario, 1, 2)


def test_what_was_stored_before_it_came_is_read_with_the_next_event() -> None:
    async def scenario(scene: Scene) -> None:
        publisher = scene.publishers[1]
        await publisher.publish_stored(TOKENS[:BLOCK_SIZE], [11])
        await asyncio.sleep(0.1)
        await scene.chosen()
        async with asyncio.timeout(30):
            overlap = 0
            while overlap < 1:
                await publisher.publish_removed([99])
                async with scene.lease() as best:
                    overlap = best.overlap_blocks

    play(scenario, 1)


def test_a_lease_is_load_in_its_books_and_in_ours_until_it_ends() -> None:
    async def scenario(scene: Scene) -> None:
        async with scene.lease() as one:
            worker = one.worker
            assert scene.loads()[worker.instance_id] == (1, len(TOKENS))
            assert (worker.requests, worker.prefill_blocks) == (1, 4)
            async with scene.lease(OTHERS) as other:
                assert other.worker is not worker
            worker.on_stored(one.prompt.sequence_hashes)
            async with asyncio.timeout(30):
                while scene.loads()[worker.instance_id] != (1, 0):
                    await asyncio.sleep(0.01)
        assert scene.loads() == {1: (0, 0), 2: (0, 0)}
        assert worker.requests == 0

    play(scenario, 1, 2)


def test_a_lease_that_fails_is_freed() -> None:
    async def scenario(scene: Scene) -> None:
        with pytest.raises(ZeroDivisionError):
            async with scene.lease():
                raise ZeroDivisionError
        assert scene.loads() == {1: (0, 0)}

    play(scenario, 1)


def test_one_that_left_is_forgotten_and_so_are_the_requests_that_it_had() -> None:
    async def scenario(scene: Scene) -> None:
        async with AsyncExitStack() as leases:
            gone = await leases.enter_async_context(scene.lease(excluded=[2]))
            assert gone.worker.instance_id == 1
            scene.fleet.forget(1)
            assert await scene.chosen() == 2
            assert scene.loads() == {2: (0, 0)}
            gone.worker.on_stored(gone.prompt.sequence_hashes)
            await asyncio.sleep(0.05)
        assert gone.worker.requests == 0

    play(scenario, 1, 2)


def test_those_that_leave_while_it_chooses_are_unavailable() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.chosen()
        await scene.policy._service.delete_worker(1)
        with pytest.raises(Unavailable, match="try again") as refusal:
            await scene.chosen()
        assert refusal.value.code == "no_worker"

    play(scenario, 1)


def test_workers_that_announce_nothing_are_not_for_it() -> None:
    async def scenario(scene: Scene) -> None:
        scene.fleet.add(Worker(7, None))
        with pytest.raises(Unavailable, match="announce") as refusal:
            await scene.chosen()
        assert refusal.value.code == "no_worker"
        scene.join(1)
        assert {await scene.chosen() for _ in range(10)} == {1}

    play(scenario)


def test_models_and_block_sizes_are_told_apart() -> None:
    """One service takes a single block size for each name of a model."""

    async def scenario(scene: Scene) -> None:
        large, other = identity(block_size=32), identity("n")
        scene.join(3, large)
        scene.join(4, other)
        assert {await scene.chosen() for _ in range(5)} <= {1, 2}
        assert await scene.chosen(model=large) == 3
        assert await scene.chosen(model=other) == 4

    play(scenario, 1, 2)


def test_with_a_queue_the_shortest_prompt_goes_on_when_a_worker_has_nothing_to_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DYN_ROUTER_QUEUE_THRESHOLD", "0")
    monkeypatch.setenv("DYN_ROUTER_QUEUE_POLICY", "wspt")
    taken: list[str] = []

    async def scenario(scene: Scene) -> None:
        async def ask(name: str, tokens: Sequence[int]) -> None:
            async with scene.lease(tokens):
                taken.append(name)

        async with scene.lease():
            asked = {"long": OTHERS, "gone": OTHERS, "short": OTHERS[:BLOCK_SIZE]}
            tasks = {name: asyncio.create_task(ask(name, tokens)) for name, tokens in asked.items()}
            await scene.until_pending(3)
            tasks.pop("gone").cancel()
            await scene.until_pending(2)
            assert taken == []
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks.values())
        assert taken == ["short", "long"]
        assert scene.loads() == {1: (0, 0)}

    play(scenario, 1)


class TestWeights:
    """The service takes names that it does not know without a word, so what the weights do is looked at."""

    def test_overlap_score_credit(self) -> None:
        async def scenario(scene: Scene) -> None:
            await scene.store(1)
            assert {await scene.chosen() for _ in range(40)} == {1, 2}

        play(scenario, 1, 2, weights=Weights(overlap_score_credit=0.0))

    def test_router_temperature(self) -> None:
        async def scenario(scene: Scene) -> None:
            await scene.store(1)
            assert {await scene.chosen() for _ in range(60)} == {1, 2}

        play(scenario, 1, 2, weights=Weights(router_temperature=2.0))

    def test_prefill_load_scale(self) -> None:
        async def scenario(scene: Scene) -> None:
            await scene.store(1)
            assert {await scene.chosen() for _ in range(40)} == {1, 2}

        play(scenario, 1, 2, weights=Weights(prefill_load_scale=0.0))

    @pytest.mark.parametrize(("weight", "chosen"), [(0.0, 1), (1000.0, 2)])
    def test_decode_active_request_weight(self, weight: float, chosen: int) -> None:
        async def scenario(scene: Scene) -> None:
            await scene.store(1)
            async with scene.lease() as best:
                assert best.worker.instance_id == 1
                assert await scene.chosen() == chosen

        play(scenario, 1, 2, weights=Weights(decode_active_request_weight=weight))
