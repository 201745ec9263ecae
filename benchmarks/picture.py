"""The picture of a benchmark."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Run

try:
    import matplotlib
except ImportError as missing:
    raise SystemExit("the picture needs matplotlib: scripts/install --dev") from missing

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {
    "kv": "tab:blue",
    "dynamo": "tab:orange",
    "least-loaded": "tab:green",
    "random": "tab:grey",
    "round-robin": "tab:red",
}


def draw(runs: Sequence[Run], title: str, file: Path) -> None:
    """Draw the distribution of the time to the first token, and what the caches saved, for runs at one speed."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), width_ratios=(2, 1), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for run in runs:
        shares = [number / len(run.ttfts) for number in range(1, len(run.ttfts) + 1)]
        left.step(
            run.ttfts, shares, where="post", label=f"{run.policy}: mean {run.ttft_mean:.2f} s", color=_colour(run)
        )
    left.set(xscale="log", ylim=(0, 1), xlabel="time to the first token (s)", ylabel="share of requests that had it")
    left.grid(which="both", alpha=0.25)
    left.legend(loc="lower right", frameon=False)
    bars = right.barh(
        [run.policy for run in runs], [run.cached_share * 100 for run in runs], color=list(map(_colour, runs))
    )
    right.bar_label(bars, fmt="%.1f %%", padding=3)
    right.margins(x=0.2)
    right.invert_yaxis()
    right.set(xlabel="prompt tokens served from cache (%)")
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _colour(run: Run) -> str:
    return COLOURS.get(run.policy, "black")
