"""The picture of a benchmark."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measure import Run, median_run

try:
    import matplotlib
except ImportError as missing:
    raise SystemExit("the picture needs matplotlib: scripts/install --dev") from missing

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {
    "kv": "tab:blue",
    "dynamo": "tab:orange",
    "dynamo-tuned": "tab:brown",
    "bound": "lightgrey",
    "least-loaded": "tab:green",
    "random": "tab:grey",
    "round-robin": "tab:red",
}
PAIR = ("tab:blue", "tab:orange")  # ours, Dynamo's


def draw(loads: Mapping[str, Mapping[str, Sequence[Run]]], file: Path) -> None:
    """Draw the distribution of the time to the first token in the median turn of each policy, and what the caches saved
    in all turns, from least to most.

    loads: by title, and then by policy, the turns.
    """
    figure, axes = pyplot.subplots(
        len(loads), 2, figsize=(11, 4.2 * len(loads)), width_ratios=(2, 1), layout="constrained", squeeze=False
    )
    for (title, policies), (left, right) in zip(loads.items(), axes, strict=True):
        left.set_title(title, fontsize=10, loc="left")
        for number, (policy, runs) in enumerate(policies.items()):
            run, colour = median_run(runs), COLOURS.get(policy, "black")
            shares = [count / len(run.ttfts) for count in range(1, len(run.ttfts) + 1)]
            left.step(run.ttfts, shares, where="post", label=f"{policy}: mean {run.ttft_mean:.3g} s", color=colour)
            cached = [100 * run.cached_share for run in runs]
            middle = statistics.median(cached)
            bar = right.barh(number, middle, xerr=[[middle - min(cached)], [max(cached) - middle]], color=colour)
            right.bar_label(bar, fmt="%.1f %%", padding=3)
        left.set(xscale="log", ylim=(0, 1), ylabel="share of requests that had it")
        left.grid(which="both", alpha=0.25)
        left.legend(loc="lower right", frameon=False)
        right.set_yticks(range(len(policies)), list(policies))
        right.margins(x=0.25)
        right.invert_yaxis()
        right.spines[["top", "right"]].set_visible(False)
    axes[-1][0].set_xlabel("time to the first token (s), in the median turn")
    axes[-1][1].set_xlabel("prompt tokens from caches (%)")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_pairs(
    points: Sequence[str], figures: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], title: str, file: Path
) -> None:
    """Draw figures side by side, each with bars for the medians of what was measured, and lines from least to most.

    figures: by what they show, then by whose it is, in the order of `points`, the values that were measured.
    """
    picture, axes = pyplot.subplots(1, len(figures), figsize=(11, 4.5), sharey=True, layout="constrained")
    picture.suptitle(title, fontsize=11)
    for axis, (what, owners) in zip(axes, figures.items(), strict=True):
        for number, (owner, values) in enumerate(owners.items()):
            places = [place + 0.4 * number for place in range(len(points))]
            middles = [statistics.median(one) for one in values]
            spread = [
                [middle - min(one) for middle, one in zip(middles, values, strict=True)],
                [max(one) - middle for middle, one in zip(middles, values, strict=True)],
            ]
            bars = axis.barh(places, middles, 0.4, xerr=spread, label=owner, color=PAIR[number])
            axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axis.set(xscale="log", xlabel=what, yticks=[place + 0.2 for place in range(len(points))], yticklabels=points)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False)
    picture.savefig(file, dpi=120)
    pyplot.close(picture)


def draw_bars(points: Sequence[str], owners: Mapping[str, Sequence[float]], title: str, file: Path) -> None:
    """Draw a bar for each owner at each point. Less is better."""
    picture, axis = pyplot.subplots(figsize=(11, 4), layout="constrained")
    picture.suptitle(title, fontsize=11)
    width = 0.8 / len(owners)
    for number, (owner, values) in enumerate(owners.items()):
        places = [place + width * number for place in range(len(points))]
        bars = axis.bar(places, values, width, label=owner, color=COLOURS.get(owner, "black"))
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axis.set(xticks=[place + 0.4 - width / 2 for place in range(len(points))], xticklabels=points)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(owners), loc="lower center", bbox_to_anchor=(0.5, 1))
    picture.savefig(file, dpi=120)
    pyplot.close(picture)


def draw_chaos(ends: Mapping[str, Sequence[float]], faults: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draw for each fault how many requests were answered over time, with a line where it happened.

    ends: by fault, when each answer ended, in seconds; faults: by fault, when it happened.
    """
    figure, axes = pyplot.subplots(len(ends), 1, figsize=(9, 1.1 * len(ends) + 0.8), sharex=True, layout="constrained")
    for axis, (name, times) in zip(axes, ends.items(), strict=True):
        axis.hist(times, bins=range(int(max(times, default=1)) + 2), color=PAIR[0], alpha=0.8)
        for at in faults[name]:
            axis.axvline(at, color="tab:red")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds; answers that ended in each, and when the fault happened")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
