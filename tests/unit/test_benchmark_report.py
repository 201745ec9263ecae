import dataclasses
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.agreement import agreement_table, cached_seconds, disagreements, simulated
from benchmarks.cluster import Figures
from benchmarks.measure import CpuShares, Load, Run, median_run, summarize
from benchmarks.picture import draw
from benchmarks.pipeline import Setting
from benchmarks.replay import Outcome
from benchmarks.routing import arguments, in_turns, loads, quietest
from benchmarks.trace import TraceRequest
from benchmarks.virtual import prefill_seconds
from benchmarks.work import Work

import pytest

LOAD = Load("conversation", 2.0)


def run(policy: str, ttft: float, cached: int = 0, turn: int = 1, **changes: object) -> Run:
    outcomes = [Outcome(ttft=ttft, total=2 * ttft, prompt_tokens=100, worker=str(number % 2)) for number in range(10)]
    made = summarize(
        policy,
        LOAD,
        turn,
        outcomes,
        {"a": Work(600 - cached, busy_seconds=2.0), "b": Work(400, busy_seconds=4.0)},
        engines=2,
        idle_ttft=0.01,
        own_ttft=0.002,
        seconds=10.0,
        cpu=CpuShares(0.3, 0.01, 0.1),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def turns(policy: str, *ttfts: float, cached: int = 200) -> list[Run]:
    return [run(policy, ttft, cached, turn) for turn, ttft in enumerate(ttfts, 1)]


def figures(ttft: float, cached: float) -> Figures:
    return Figures(ttft, ttft, ttft, ttft, cached, 0.8)


def test_a_run_is_summarized() -> None:
    made = run("kv", 0.5, cached=300)
    assert (made.requests, made.failed, made.ttft_mean, made.total_p99) == (10, 0, 0.5, 1.0)
    shares = (made.cached_share, made.spread_requests, made.spread_computed)
    assert [round(share, 3) for share in shares] == [0.3, 1.0, 1.143]
    assert report.warnings([made]) == []


def test_failures_are_told_from_rejections() -> None:
    outcomes = [
        Outcome(ttft=1.0, total=1.0, prompt_tokens=1),
        Outcome(error="HTTP 503", rejected=True),
        Outcome(error="x"),
    ]
    options = {"engines": 1, "idle_ttft": 0.0, "own_ttft": 0.0, "seconds": 1.0}
    made = summarize("kv", LOAD, 1, outcomes, {}, cpu=CpuShares(0, 0, 0), **options)  # type: ignore[arg-type]
    assert (made.requests, made.rejected, made.failed, made.ttft_mean) == (3, 1, 1, 1.0)
    assert [warning.partition("speed: ")[2] for warning in report.warnings([made])] == ["HTTP 503", "x"]


class TestLoads:
    def loads(self, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[tuple[str, float, int, float]]:
        """Trace, speed, requests, and when the last of them comes."""
        monkeypatch.setattr(sys, "argv", ["routing", *options])
        made = loads(arguments())
        return [(load.trace, load.speedup, len(trace), trace[-1].arrival) for load, trace in made]

    def test_each_trace_has_its_own_speed_and_takes_as_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.loads(monkeypatch)
        assert [(trace, speedup) for trace, speedup, _, _ in made] == [("conversation", 4.8), ("tool-agents", 5.0)]
        assert all(68 < last < 70 for *_, last in made)

    def test_what_is_said_holds_for_all(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        line = '{"timestamp": %d, "input_length": 5, "output_length": 50, "hash_ids": [1]}\n'
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(line % (1000 * number) for number in range(20)))
        assert self.loads(monkeypatch, "--trace", str(file)) == [("mine.jsonl", 1.0, 20, 19.0)]
        made = self.loads(monkeypatch, "--trace", str(file), "readers", "--speedup", "2", "3", "--requests", "10")
        assert [one[:3] for one in made] == [
            (name, speed, 10) for name in ("mine.jsonl", "readers") for speed in (2, 3)
        ]
        assert made[0][3] == 4.5


class TestTurns:
    def test_a_run_is_repeated_while_others_are_busy_and_the_quietest_counts(self) -> None:
        def tried(*others: float) -> tuple[float, int]:
            runs = iter([run("kv", 1.0, cpu=CpuShares(0.3, 0.01, share)) for share in others])
            made = quietest(lambda: next(runs), repeats=2)
            return made.cpu.others, made.tries

        assert tried(0.05) == (0.05, 1)
        assert tried(0.5, 0.05) == (0.05, 2)
        assert tried(0.5, 0.2, 0.3) == (0.2, 3)

    def test_nobody_always_comes_first(self) -> None:
        assert list(in_turns("ab", 3)) == [(1, "a"), (1, "b"), (2, "b"), (2, "a"), (3, "a"), (3, "b")]

    def test_figures_are_medians_with_their_least_and_most(self) -> None:
        both = [*turns("kv", 0.3, 0.1, 0.2), *turns("dynamo", 1.0, 1.0, 1.0)]
        assert report.latency_table(both).splitlines()[2].startswith("| `kv` | 0.2 (0.1 to 0.3) | 0.2 (0.1 to 0.3) |")
        assert report.latency_table(turns("kv", 0.3)).splitlines()[2].startswith("| `kv` | 0.3 | 0.3 | 0.3 | 0.6 |")

    def test_rejections_of_all_turns_are_counted(self) -> None:
        both = [dataclasses.replace(one, rejected=2, failed=1) for one in turns("kv", 0.3, 0.3)]
        assert report.latency_table(both).endswith(" | 4 | 2 |")

    def test_ratios_are_those_of_the_same_turn(self) -> None:
        ours, theirs = turns("kv", 0.1, 0.9, 0.4, cached=400), turns("dynamo", 0.2, 1.0, 1.0)
        mixed = [run for pair in zip(ours, theirs, strict=True) for run in pair]
        rows = report.ratio_table(mixed).splitlines()
        assert rows[2] == "| `kv` |" + " 0.50 (0.40 to 0.90) |" * 4 + " 2.00 (2.00 to 2.00) |"
        assert rows[3] == "| `dynamo` | 1 | 1 | 1 | 1 | 1 |"

    def test_ratios_are_those_to_what_was_run(self) -> None:
        table = report.ratio_table([*turns("round-robin", 1.0), *turns("kv", 0.25)])
        assert table.splitlines()[0] == "| policy | TTFT mean / `round-robin` |"
        assert table.splitlines()[-1] == "| `kv` | 0.25 |"
        assert report.ratio_table(turns("kv", 1.0)) == ""

    def test_the_median_run_is_one_of_them(self) -> None:
        assert [median_run(turns("kv", *ttfts)).turn for ttfts in ((0.3, 0.1, 0.2), (0.3, 0.1), (0.3,))] == [3, 2, 1]

    def test_the_picture_has_a_row_for_each_load(self, tmp_path: Path) -> None:
        policies = report.by_policy([*turns("kv", 0.3, 0.1), *turns("dynamo", 0.5, 0.6)])
        draw({"one": policies, "other": policies}, tmp_path / "two.png")
        draw({"one": policies}, tmp_path / "one.png")
        assert (tmp_path / "two.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 10_000


def test_what_cannot_be_trusted_is_said() -> None:
    bad = run("kv", 0.015, own_ttft=0.006, cpu=CpuShares(0.7, 0.1, 0.15), lag_p99=0.2, lost_passes=3)
    said = report.warnings([bad])
    assert len(said) == 5
    start = "turn 1 of `kv` on `conversation` at 2 times its speed: "
    assert said[0] == f"{start}others used 15% of the machine, in the quietest of 1 tries"


class TestAgreement:
    def test_the_pipeline_without_its_own_part_is_compared_with_the_simulation(self) -> None:
        both = [*turns("kv", 0.102, 0.202), *turns("dynamo", 0.202, 0.402), *turns("random", 1.0, 1.0)]
        expected = {"kv": figures(0.12, 0.3), "dynamo": figures(0.29, 0.2)}
        rows = agreement_table(both, expected).splitlines()[2:]
        assert rows == [
            "| `kv` | 0.152 (0.102 to 0.202) | 0.15 (0.1 to 0.2) | 0.12 | +25% | 20.0% (20.0% to 20.0%) | 30.0% |",
            "| `dynamo` | 0.302 (0.202 to 0.402) | 0.3 (0.2 to 0.4) | 0.29 | +3% | 20.0% (20.0% to 20.0%) | 20.0% |",
            "| `kv` / `dynamo` | 0.50 (0.50 to 0.50) | 0.50 (0.50 to 0.50) | 0.41 |  | 1.00 (1.00 to 1.00) | 1.50 |",
        ]
        (said,) = disagreements(both, expected)
        assert said.endswith("the mean TTFT is +25% off the simulated one")
        assert agreement_table(turns("random", 1.0), expected) == ""

    def test_what_an_idle_engine_takes_is_no_part_of_the_pipeline_s(self) -> None:
        setting = Setting(engines=1, block_size=64, blocks=1000, engine_speedup=0.5)
        assert cached_seconds(640, setting) == pytest.approx(2 * prefill_seconds(1))  # the last token gives the first
        assert cached_seconds(650, setting) == pytest.approx(2 * prefill_seconds(10))
        twice = [TraceRequest(arrival, ((1, 650),), 1) for arrival in (0.0, 9.0)]
        mean = (prefill_seconds(650) + prefill_seconds(10)) / 2 / 0.5
        assert simulated(twice, setting)["kv"].ttft_mean == pytest.approx(mean)

    def test_a_router_that_refuses_requests_is_not_compared(self) -> None:
        setting = Setting(engines=1, block_size=64, blocks=12288, engine_speedup=0.5)
        burst = [TraceRequest(number / 10, ((number, 20_000),), 1) for number in range(200)]
        assert list(simulated(burst, setting)) == ["dynamo"]
