"""Programs tell Prometheus what they do under Dynamo's names, and never under a name that a client made up."""

import asyncio
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from common.errors import Cancelled, Internal, Overloaded, Unavailable
from common.http.metrics import FrontendMetrics, error_type
from common.messages import FindWorkerRequest, LoadStat, StoredBlocks
from common.metrics import exponential_buckets, log_buckets, registry, text
from common.openai_api import Routing
from common.routing.fleet import Fleet
from common.routing.metrics import RouterMetrics
from common.routing.policy import Candidate
from common.routing.prefix_index import sequence_hashes
from common.routing.worker import Prompt, Worker
from tests.unit.door import (
    CHAT,
    COMPLETIONS,
    HELLO,
    ONCE,
    Connection,
    Door,
    Play,
    chunk,
    first_chunk,
    raises,
    usage_chunk,
)
from tests.unit.stand_ins import BLOCK_SIZE, identity, worker_info

import pytest
from dynamo.runtime import Context
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families


class Told:
    """What a registry tells Prometheus, read as that does."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.text = text(registry)
        self._samples = [sample for family in text_string_to_metric_families(self.text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the series of this name that have these labels."""
        return sum(
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def values(self, name: str, label: str) -> set[str]:
        return {sample.labels[label] for sample in self._samples if sample.name == name}


class Frontend:
    """A frontend and its metrics."""

    def __init__(self, play: Play | None = None) -> None:
        self.registry = CollectorRegistry()
        self.metrics = FrontendMetrics(self.registry, {"m", "org/m"}.__contains__)
        options: Mapping[str, Any] = {"observers": [self.metrics], "routes": [self.metrics.routes()]}
        self.door = Door(play, **options) if play else Door(**options)

    @property
    def told(self) -> Told:
        return Told(self.registry)


def last_chunk(**fields: Any) -> Any:
    """The one with the usage (48 of 50 tokens were cached), and with who has answered."""
    made = usage_chunk()
    made.routing = Routing(worker_id="w1", overlap_blocks=3, **fields)
    return made


async def answer(request: Any, context: Context) -> Any:
    yield first_chunk()
    yield chunk(" two", "stop")
    yield last_chunk(overlap_tokens=48)


class TestFrontend:
    def test_a_request_counts_by_what_it_was_and_became(self) -> None:
        frontend = Frontend()
        frontend.door.post()
        frontend.door.post({**HELLO, "stream": True})
        frontend.door.post(ONCE, COMPLETIONS)
        told = frontend.told
        for endpoint, kind in (("chat_completions", "unary"), ("chat_completions", "stream"), ("completions", "unary")):
            labels = {"endpoint": endpoint, "request_type": kind, "status": "success", "error_type": ""}
            assert told("dynamo_frontend_requests_total", model="m", **labels) == 1
        assert told("dynamo_frontend_request_duration_seconds_count", model="m") == 3
        assert told("dynamo_frontend_time_to_first_token_seconds_count", model="m") == 3
        assert told("dynamo_frontend_input_sequence_tokens_sum", model="m") == 150
        assert told("dynamo_frontend_output_tokens_total", model="m") == 6
        assert told("dynamo_frontend_cached_tokens_sum", model="m") == 144
        assert told("dynamo_component_router_kv_worker_reused_tokens_total", model="m", phase="aggregated") == 144

    def test_the_time_between_tokens_is_the_mean_of_the_request(self) -> None:
        frontend = Frontend()
        frontend.door.post()
        assert frontend.told("dynamo_frontend_inter_token_latency_seconds_count", model="m") == 1

    def test_nothing_is_labelled_by_a_model_that_nobody_serves(self) -> None:
        """Or clients could make any number of series."""
        frontend = Frontend()
        for number in range(5):
            assert frontend.door.post({**HELLO, "model": f"made-up-{number}"}).status_code == 404
        told = frontend.told
        assert "made-up" not in told.text
        labels = {"status": "error", "error_type": "not_found"}
        assert told("dynamo_frontend_requests_total", model="unknown_model", **labels) == 5

    def test_a_body_that_is_refused_counts_too(self) -> None:
        frontend = Frontend()
        frontend.door.post({**HELLO, "temperature": 77})
        frontend.door.post(b"{", COMPLETIONS)
        told = frontend.told
        for endpoint in ("chat_completions", "completions"):
            assert told("dynamo_frontend_requests_total", error_type="validation", endpoint=endpoint) == 1

    def test_other_paths_do_not_count(self) -> None:
        frontend = Frontend()
        assert frontend.door.get("/v1/models/none").status_code == 404
        assert frontend.door.get("/nowhere").status_code == 404
        assert frontend.told("dynamo_frontend_requests_total") == 0

    @pytest.mark.parametrize(
        ("error", "kind"),
        [(Overloaded("full"), "overload"), (Unavailable("gone"), "unavailable"), (Internal("broken"), "internal")],
    )
    def test_errors_have_dynamos_types(self, error: Exception, kind: str) -> None:
        frontend = Frontend(raises(error))
        frontend.door.post()
        assert frontend.told("dynamo_frontend_requests_total", model="m", status="error", error_type=kind) == 1

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            *[(200, ""), (400, "validation"), (404, "not_found"), (413, "validation"), (417, "validation")],
            *[(499, "cancelled"), (500, "internal"), (503, "unavailable")],
        ],
    )
    def test_every_status_has_a_type(self, status: int, kind: str) -> None:
        assert error_type(status) == kind

    def test_a_request_in_progress_is_queued_before_its_first_chunk_and_active_until_its_end(self) -> None:
        begin, go_on = asyncio.Event(), asyncio.Event()

        async def slow(request: Any, context: Context) -> Any:
            await begin.wait()
            yield first_chunk()
            await go_on.wait()
            yield chunk("", "stop")

        frontend = Frontend(slow)

        def now() -> tuple[float, float]:
            told = frontend.told
            return told("dynamo_frontend_active_requests"), told("dynamo_frontend_queued_requests", model="m")

        async def scenario() -> None:
            async with Connection(frontend.door, {**HELLO, "stream": True}) as connection:
                while not frontend.door.processors.requests:
                    await asyncio.sleep(0)
                assert now() == (1, 1)
                begin.set()
                await connection.next()
                await connection.content()
                assert now() == (1, 0)
                go_on.set()
                await connection.end()
                assert now() == (0, 0)

        asyncio.run(scenario())

    def test_a_client_that_hangs_up_is_a_cancellation(self) -> None:
        async def endless(request: Any, context: Context) -> Any:
            yield first_chunk()
            await context.async_killed_or_stopped()
            raise Cancelled("the caller went away")

        frontend = Frontend(endless)

        async def scenario() -> None:
            async with Connection(frontend.door, {**HELLO, "stream": True}) as connection:
                await connection.next()
                await connection.content()
                connection.hang_up()
                await connection.end()

        asyncio.run(scenario())
        told = frontend.told
        assert told("dynamo_frontend_requests_total", model="m", status="error", error_type="cancelled") == 1
        assert told("dynamo_frontend_model_cancellation_total", model="m", request_type="stream") == 1
        assert told("dynamo_frontend_disconnected_clients") == 1
        assert told("dynamo_frontend_active_requests") == 0

    @pytest.mark.parametrize(
        ("expected", "over", "under"), [(48, 0, 0), (64, 16, 0), (0, 0, 48)], ids=["right", "too much", "too little"]
    )
    def test_what_the_router_expected_is_compared_with_what_was_cached(
        self, expected: int, over: int, under: int
    ) -> None:
        async def play(request: Any, context: Context) -> Any:
            yield first_chunk()
            yield chunk("", "stop")
            yield last_chunk(overlap_tokens=expected)

        frontend = Frontend(play)
        frontend.door.post()
        told = frontend.told
        assert told("pipeline_overlap_predicted_tokens_total", model="m") == expected
        assert told("pipeline_overlap_overestimated_tokens_total", model="m") == over
        assert told("pipeline_overlap_underestimated_tokens_total", model="m") == under

    def test_moves_count_and_say_nothing_of_the_overlap(self) -> None:
        async def play(request: Any, context: Context) -> Any:
            yield first_chunk()
            yield chunk("", "stop")
            yield last_chunk(overlap_tokens=160, migrations=2)

        frontend = Frontend(play)
        frontend.door.post()
        told = frontend.told
        assert told("dynamo_frontend_model_migration_total", model="m", migration_type="ongoing_request") == 2
        assert told("pipeline_overlap_predicted_tokens_total") == 0

    def test_they_are_at_metrics(self) -> None:
        frontend = Frontend(answer)
        frontend.door.post()
        response = frontend.door.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert response.text == frontend.told.text
        assert frontend.door.get("/openapi.json").json()["paths"]["/metrics"]


class Router:
    """Two workers, of which one has cached what another test says, and the metrics of a router."""

    def __init__(self, **cached: int) -> None:
        """cached: by worker, how many blocks of the prompt 1, 2, 3, 4 it has."""
        self.registry = CollectorRegistry()
        self.fleet = Fleet()
        for number in (1, 2):
            self.fleet.add(Worker(number, worker_info(number)))
            hashes = [101, 102, 103, 104][: cached.get(f"w{number}", 0)]
            if hashes:
                stored = StoredBlocks(parent_id=None, block_ids=[*range(1, len(hashes) + 1)], local_hashes=hashes)
                self.fleet.index.apply(number, stored)
        self.metrics = RouterMetrics(self.registry, self.fleet, "9", [range(1), range(2)])

    def decide(self, name: str) -> Candidate:
        """Let a prompt of four blocks and a half go to a worker."""
        hashes = [101, 102, 103, 104]
        request = FindWorkerRequest(model=identity(), local_hashes=hashes, tokens=4 * BLOCK_SIZE + 8)
        candidates = self.fleet.candidates(request, Prompt(sequence_hashes(hashes), 4.5))
        chosen = next(one for one in candidates if one.worker.name == name)
        self.metrics.on_decided(candidates, chosen, self.metrics.on_asked())
        return chosen

    @property
    def told(self) -> Told:
        return Told(self.registry)


class TestRouter:
    def test_the_best_overlap_and_the_chosen_one_stand_side_by_side(self) -> None:
        router = Router(w1=4, w2=1)
        router.decide("w2")
        told = router.told
        labels = {"model": "m", "phase": "aggregated", "router_id": "9", "dynamo_component": "router"}
        assert told("dynamo_component_router_kv_best_eligible_cached_prefix_tokens_total", **labels) == 64
        assert told("dynamo_component_router_kv_selected_cached_prefix_tokens_total", **labels) == 16
        assert told("dynamo_component_router_input_sequence_tokens_sum", **labels) == 72
        assert told("dynamo_component_router_kv_hit_rate_sum") == pytest.approx(1 / 4.5)
        assert told("dynamo_component_router_requests_total") == 1
        assert told("dynamo_component_router_non_max_overlap_selections_total", worker_type="decode") == 1
        assert told("dynamo_component_router_overlap_blocks_lost_sum") == 3
        assert told("dynamo_router_overhead_total_ms_count", router_id="9") == 1

    def test_nothing_is_lost_with_the_best_one(self) -> None:
        router = Router(w1=4, w2=1)
        router.decide("w1")
        told = router.told
        assert told("dynamo_component_router_overlap_blocks_lost_count") == 0
        assert told("dynamo_component_router_non_max_overlap_selections_total") == 0

    def test_leases_and_reports_stand_side_by_side(self) -> None:
        router = Router()
        worker = router.fleet.workers[1]
        with worker.lease(Prompt([1, 2], 2.5), overlap_blocks=1):
            report = LoadStat(
                running_requests=2,
                waiting_requests=1,
                used_tokens=6 * BLOCK_SIZE,
                total_tokens=100 * BLOCK_SIZE,
                waiting_prefill_tokens=3 * BLOCK_SIZE,
            )
            worker.on_report(report)
            told = router.told
            blocks = {
                source: tuple(
                    told("pipeline_worker_load_blocks", worker="w1", source=source, phase=phase)
                    for phase in ("prefill", "decode")
                )
                for source in ("leases", "reports", "used")
            }
            assert blocks == {
                "leases": (1.5, 2.5),
                "reports": (3, 6),
                "used": (worker.prefill_blocks, worker.decode_blocks),
            }
            assert told("pipeline_worker_requests", worker="w1", source="leases") == 1
            assert told("pipeline_worker_requests", worker="w1", source="reports") == 3
            assert told("dynamo_frontend_worker_active_decode_blocks", worker_id="1") == worker.decode_blocks
            assert told("dynamo_frontend_worker_active_prefill_tokens", worker_id="1") == worker.prefill_blocks * 16
            assert told.values("pipeline_worker_report_age_seconds", "worker") == {"w1"}
        assert router.told("pipeline_worker_load_blocks", worker="w1", source="leases") == 0

    def test_a_worker_that_announces_nothing_has_leases_alone(self) -> None:
        router = Router()
        router.fleet.add(Worker(3, None))
        told = router.told
        assert told.values("pipeline_worker_load_blocks", "worker") == {"w1", "w2", "3"}
        assert told.values("pipeline_worker_total_blocks", "worker") == {"w1", "w2"}

    def test_a_restarted_worker_and_its_predecessor_are_two(self) -> None:
        """Until etcd forgets the dead one; Prometheus would refuse the same series twice."""
        router = Router()
        router.fleet.add(Worker(3, worker_info(3, worker_id="w1")))
        assert router.told.values("pipeline_worker_cached_blocks", "worker_id") == {"1", "2", "3"}

    def test_kv_events_count_by_what_became_of_them(self) -> None:
        router = Router(w1=2)
        router.fleet.index.apply(1, StoredBlocks(parent_id=77, block_ids=[9], local_hashes=[109]))
        told = router.told
        name = "dynamo_component_kv_cache_events_applied"
        assert told(name, event_type="stored", status="ok") == 1
        assert told(name, event_type="stored", status="parent_block_not_found") == 1
        assert told("pipeline_worker_cached_blocks", worker="w1") == 3  # the one that cannot be placed too


def test_the_buckets_are_those_of_dynamo() -> None:
    """Which a running one showed."""
    assert log_buckets(50, 128_000, 12) == [0, 100, 210, 430, 870, 1800, 3600, 7400, 15_000, 31_000, 63_000, 130_000]
    assert log_buckets(0.001, 480, 18)[:5] == [0, 0.0022, 0.0047, 0.01, 0.022]
    assert log_buckets(0.001, 80, 20)[-3:] == [24, 44, 80]
    assert exponential_buckets(0.25, 2, 16)[-1] == 8192


def test_a_program_tells_of_its_process_and_of_no_times_of_birth() -> None:
    made = registry()
    frontend = FrontendMetrics(made, {"m"}.__contains__)
    Door(observers=[frontend]).post()
    told = Told(made)
    assert told("process_resident_memory_bytes") > 0
    assert "_created" not in told.text


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt install prometheus")
def test_promtool_finds_no_fault() -> None:
    """But that Dynamo abbreviates a unit."""
    frontend, router = Frontend(answer), Router(w1=2)
    frontend.door.post(path=CHAT)
    router.decide("w2")
    for told in (frontend.told, router.told):
        done = subprocess.run(["promtool", "check", "metrics"], input=told.text, capture_output=True, text=True)
        assert {line.split()[0] for line in done.stderr.splitlines()} <= {"dynamo_router_overhead_total_ms"}
