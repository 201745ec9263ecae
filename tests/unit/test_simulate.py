"""The simulation of routing: that its engines are the mocker's, and that `kv` keeps its lead."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks import cluster, reference, simulate
from benchmarks.bounds import bounds, mean_wait, own_seconds
from benchmarks.cluster import Cluster, Conditions, Figures, blocks_of, requests_of
from benchmarks.trace import TraceRequest, read, shareable, window
from benchmarks.traces.generated import GENERATED, REQUESTS, generated
from benchmarks.virtual import PASS_TOKENS, Engine, Timeline, prefill_seconds
from common.routing.queue import QueueOptions

import pytest

ONE = Conditions(speedups=(0.4,))
EIGHT = Conditions()
# Mean times to the first token over those of Dynamo's default router, both simulated: as they are, and 3 % more.
LEAD = {"conversation": 0.90, "tool-agents": 0.91, "coding-agents": 0.55, "readers": 0.60}


@cache
def short(name: str) -> Sequence[TraceRequest]:
    """A few hundred requests of a trace."""
    part = simulate.PARTS[name][0]
    return window(simulate.trace_of(name, 0.1), part.first, 600, part.speedup)


@cache
def figures(policy: str, name: str) -> Figures:
    return cluster.simulate(policy, short(name), EIGHT)


def request(arrival: float, tokens: int, piece: int = 0, output_tokens: int = 1) -> TraceRequest:
    return TraceRequest(arrival, ((piece, tokens),), output_tokens)


class TestEngine:
    @pytest.mark.parametrize("blocks", [12288, 3000])
    def test_with_one_engine_it_is_dynamo_s_own_replay(self, blocks: int) -> None:
        """Nobody has a choice then, so all times are those of the engine; also with a cache that has to evict."""
        conditions = replace(ONE, blocks=blocks)
        trace = [one for one in window(short("readers"), 0, 120, 0.1) if one.input_tokens < 20_000]
        ours, theirs = (
            cluster.simulate("kv", trace, conditions, queue=QueueOptions(0)),
            reference.replay(trace, conditions),
        )
        precision = 0.001 if blocks > 10_000 else 0.03  # of evictions, only what goes first is alike
        for name in ("ttft_mean", "ttft_p99", "total_mean", "total_p99"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=precision)
        assert ours.cached == pytest.approx(theirs.cached, abs=precision)

    def test_what_does_not_fit_into_a_pass_is_left_to_the_next(self) -> None:
        trace = [request(0, 1000, 1), request(0.01, 6000, 2), request(0.02, 6000, 3)]
        made = Cluster("kv", Conditions(speedups=(1.0,)))
        first, second = prefill_seconds(1000), prefill_seconds(6000 + 2176)  # to the end of a block
        third = prefill_seconds(6000 - 2176)
        wanted = [first, first + second - 0.01, first + second + third - 0.02]
        assert made.replay(trace).ttft_mean == pytest.approx(sum(wanted) / 3)

    def test_a_block_is_stored_once_and_goes_when_it_was_not_used_for_longest(self) -> None:
        timeline, stored, removed = Timeline(), list[int](), list[int]()

        def note(changes: Sequence[object]) -> None:
            for change in changes:
                stored.append(len(getattr(change, "local_hashes", ())))
                removed.extend(getattr(change, "block_ids", ()) if not hasattr(change, "local_hashes") else ())

        engine = Engine(timeline, blocks=4, block_size=10, speedup=1, on_changes=note, on_done=lambda _: None)
        for one in requests_of([request(0, 35, 1), request(0, 35, 1), request(0, 20, 2)], 10):
            engine.submit(one)
            timeline.run()
        assert stored == [3, 2, 0]
        assert len(removed) == 1
        assert engine.computed_tokens == 35 + 5 + 20


class TestBlocks:
    def test_blocks_are_equal_as_far_as_the_pieces_are(self) -> None:
        one = TraceRequest(0, ((1, 100), (2, 100), (3, 30)), 1)
        other = TraceRequest(0, ((1, 100), (2, 100), (4, 30)), 1)
        mine, theirs = blocks_of(one, 32), blocks_of(other, 32)
        assert len(mine) == len(theirs) == 230 // 32
        assert [a == b for a, b in zip(mine, theirs, strict=True)] == [True] * 6 + [False]

    def test_the_same_piece_further_on_is_another_block(self) -> None:
        assert len(set(blocks_of(request(0, 96, 1), 32))) == 3


class TestRouting:
    @pytest.mark.parametrize("name", LEAD)
    def test_kv_keeps_its_lead(self, name: str) -> None:
        ours, theirs = figures("kv", name), figures("dynamo", name)
        assert ours.ttft_mean / theirs.ttft_mean < LEAD[name]
        assert ours.ttft_p99 <= 1.02 * theirs.ttft_p99
        assert ours.total_mean < theirs.total_mean

    @pytest.mark.parametrize("name", LEAD)
    def test_the_simulation_is_right_about_dynamo(self, name: str) -> None:
        ours, theirs = figures("dynamo", name), reference.replay(short(name), EIGHT)
        assert ours.ttft_mean == pytest.approx(theirs.ttft_mean, rel=0.15)  # Dynamo's own runs differ by some of it
        assert ours.cached == pytest.approx(theirs.cached, abs=0.04)

    def test_it_gives_the_same_figures_every_time(self) -> None:
        assert cluster.simulate("kv", short("readers"), EIGHT) == figures("kv", "readers")

    @pytest.mark.parametrize(
        "trouble", [{"routers": 2}, {"death": 0.3}, {"event_lag": 0.1}, {"routers": 2, "death": 0.5, "event_lag": 0.02}]
    )
    @pytest.mark.parametrize("policy", ["kv", "dynamo", "least-loaded"])
    def test_all_requests_are_answered_and_nothing_is_left_of_them(
        self, policy: str, trouble: dict[str, float]
    ) -> None:
        made = Cluster(policy, replace(EIGHT, **trouble))  # type: ignore[arg-type]
        trace = window(short("tool-agents"), 0, 200, 1.0)
        assert made.replay(trace).ttft_mean > 0
        assert not made._router_of
        for router in made._routers:
            assert not router._waiting
            for worker in router.fleet.workers.values():
                assert (worker.requests, len(worker._held), len(worker._uncomputed)) == (0, 0, 0)


class TestBounds:
    @pytest.mark.parametrize("name", LEAD)
    def test_nobody_is_better(self, name: str) -> None:
        best = bounds(short(name), EIGHT)
        for policy in ("kv", "dynamo"):
            assert figures(policy, name).ttft_mean > best.ttft_mean
            assert figures(policy, name).cached < best.cached

    def test_they_are_exact_for_prompts_that_meet_nobody(self) -> None:
        trace = [request(0, 5000, 1), request(10, 20_000, 2), request(20, 5000, 1)]
        best, came = bounds(trace, ONE), cluster.simulate("kv", trace, ONE)
        assert came.ttft_mean == pytest.approx(best.ttft_mean)
        assert came.cached == pytest.approx(best.cached)
        assert best.own_p99 == pytest.approx(own_seconds(20_000) / 0.4)
        assert own_seconds(20_000) == 2 * prefill_seconds(PASS_TOKENS) + prefill_seconds(20_000 - 2 * PASS_TOKENS)

    def test_jobs_on_one_machine_wait_for_shorter_ones(self) -> None:
        assert mean_wait([(0.0, 1.0), (0.0, 2.0)], 1) == pytest.approx((1 + 3) / 2)
        assert mean_wait([(0.0, 2.0), (5.0, 1.0)], 1) == pytest.approx((2 + 1) / 2)
        assert mean_wait([(0.0, 1.0)] * 2, 2) == pytest.approx(1.0)


class TestTraces:
    @pytest.mark.parametrize(
        ("name", "tokens", "answer", "share"),
        [("tool-agents", 8_250, 155, 0.58), ("coding-agents", 51_500, 477, 0.94), ("readers", 14_700, 148, 0.66)],
    )
    def test_they_are_as_their_readme_says(self, name: str, tokens: int, answer: int, share: float) -> None:
        trace = generated(name)
        assert len(trace) == REQUESTS
        assert sum(one.input_tokens for one in trace) / REQUESTS == pytest.approx(tokens, rel=0.01)
        assert sum(one.output_tokens for one in trace) / REQUESTS == pytest.approx(answer, rel=0.01)
        assert shareable(trace) == pytest.approx(share, abs=0.01)
        assert [one.arrival for one in trace] == sorted(one.arrival for one in trace)

    def test_what_is_written_is_what_is_simulated(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.traces.generated", "readers"]
        file = tmp_path / "trace"
        file.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
        assert len(json.loads(file.read_text().splitlines()[0])["hash_ids"]) > 0
        again, made = read(file), generated("readers")
        assert [(one.input_tokens, one.output_tokens) for one in again] == [
            (one.input_tokens, one.output_tokens) for one in made
        ]
        assert shareable(again) == pytest.approx(shareable(made))

    def test_others_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.traces import generated as module

        monkeypatch.setattr(sys, "argv", ["generated", "poets"])
        with pytest.raises(SystemExit, match=", ".join(GENERATED)):
            module.main()

    def test_a_window_begins_at_once(self) -> None:
        trace = [request(float(second), 10) for second in range(10)]
        assert [one.arrival for one in window(trace, 4, 3, 2.0)] == [0.0, 0.5, 1.0]


class TestReport:
    def comparison(self, name: str, ours: float, simulated: float = 1.0) -> simulate.Comparison:
        def made(ttft: float) -> Figures:
            return Figures(ttft, ttft, ttft, ttft, 0.5, 0.8)

        return simulate.Comparison(
            name,
            simulate.Part(0, 100, 2.0),
            {"dynamo": made(1.0), "dynamo-tuned": made(0.8), "kv": made(ours)},
            made(simulated),
            bounds([request(0, 1000)], ONE),
        )

    def test_ratios_are_means_of_parts_and_then_of_traces(self) -> None:
        some = [self.comparison("one", 0.4), self.comparison("one", 0.6), self.comparison("other", 0.8)]
        lines = simulate.ratio_table(some).splitlines()
        assert lines[2].startswith("| one | 0.62 | 0.50 |")
        assert lines[4].startswith("| mean | 0.81 | 0.65 |")
        assert simulate.main_table(some).splitlines()[2].startswith("| one, 0 | 2 | 80% | 1.000 | 0.800 | 0.400 |")

    def test_it_says_where_the_simulation_is_wrong(self) -> None:
        assert simulate.agreement([self.comparison("one", 1, 1.04)]).endswith("within 4% of that in its own replay.")
        assert simulate.agreement([self.comparison("one", 1, 0.8)]).endswith("; beyond 10%: one, 0 (-20%).")

    def test_a_picture_is_drawn(self, tmp_path: Path) -> None:
        simulate.draw([self.comparison("one", 0.4), self.comparison("other", 0.8)], tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000
