import dataclasses

from benchmarks import report
from benchmarks.measure import CpuShares, Run, summarize
from benchmarks.replay import Outcome
from benchmarks.work import Work


def run(policy: str, speedup: float, ttft: float, cached: int = 0, **changes: object) -> Run:
    outcomes = [Outcome(ttft=ttft, total=2 * ttft, prompt_tokens=100, worker=str(number % 2)) for number in range(10)]
    made = summarize(
        policy,
        speedup,
        outcomes,
        {"a": Work(600 - cached, busy_seconds=2.0), "b": Work(400, busy_seconds=4.0)},
        engines=2,
        idle_ttft=0.01,
        rate=speedup,
        seconds=10.0,
        cpu=CpuShares(0.3, 0.01, 0.1),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_a_run_is_summarized() -> None:
    made = run("kv", 1, 0.5, cached=300)
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
    options = {"engines": 1, "idle_ttft": 0.0, "rate": 1.0, "seconds": 1.0}
    made = summarize("kv", 1, outcomes, {}, cpu=CpuShares(0, 0, 0), **options)  # type: ignore[arg-type]
    assert (made.requests, made.rejected, made.failed, made.ttft_mean) == (3, 1, 1, 1.0)
    assert [warning.partition("speedup 1: ")[2] for warning in report.warnings([made])] == ["HTTP 503", "x"]


def test_ratios_are_those_to_what_was_run() -> None:
    table = report.ratio_table([run("round-robin", 1, 1.0, 100), run("kv", 1, 0.25, 300)])
    assert "dynamo" not in table
    assert table.splitlines()[-1] == "| `kv` | 0.25 | 0.25 | 3.00 |"
    assert report.ratio_table([run("kv", 1, 1.0)]) == ""


def test_the_load_at_which_the_difference_vanishes() -> None:
    runs = [run(policy, speedup, ttft) for policy, speedup, ttft in (("round-robin", 2, 1.0), ("kv", 2, 0.9))]
    runs += [run(policy, speedup, ttft) for policy, speedup, ttft in (("round-robin", 4, 2.0), ("kv", 4, 1.0))]
    assert report.load_table(runs).splitlines()[-1] == "| 4 | 4.0 | 30% | 2.00 | 1.00 | 0.50 |"
    assert report.vanishing_load(runs).endswith("at speedup 2.")
    assert "every load" in report.vanishing_load(runs[2:])


def test_what_cannot_be_trusted_is_said() -> None:
    bad = run("kv", 1, 0.015, cpu=CpuShares(0.7, 0.1, 0.15), lag_p99=0.2, lost_passes=3)
    assert len(report.warnings([bad])) == 4
