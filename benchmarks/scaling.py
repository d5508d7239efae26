"""Results on workers beside those of a worker alone, as a table and a plot.

Each worker has as many rows as one has alone: with perfect scaling a step takes the
same time. Efficiency is the time alone divided by the time together.
"""

from benchmarks.rows import (
    COLORS,
    LABELS,
    SLOW,
    contenders,
    markdown,
    median,
    ratio,
    ratio_cell,
    rounds,
    slow_share,
    time_cell,
)

PLOT = "workers.png"
WORKLOADS = {
    "mlp": "MLP 32-16-1, 32 rows per worker",
    "cnn": "MNIST CNN, 64 rows per worker",
}
HEAD = ["work", "contender", "workers", "fused steps", "alone", "together"]
HEAD += ["efficiency", "/ distfit", "worst epoch", "slow epochs"]
_MS = 1e-3  # seconds

Case = tuple[str, int, int]
Pair = dict[bool, dict]


def table(rows: list[dict]) -> str:
    """A Markdown table with a line for each contender in each case."""
    lines, notes = [HEAD], []
    for (workload, cluster, fused), found in by_case(rows).items():
        for name in contenders(rows):
            if name in found:
                start = [WORKLOADS[workload], LABELS[name], str(cluster), str(fused)]
                lines.append(start + _cells(found[name], found.get("distfit"), notes))
    caption = (
        "Time per step in ms of one worker alone on one core, and of workers together "
        f"with a core each: median of {rounds(rows)} epochs, quartiles in brackets. "
        "Efficiency: alone / together. Worst and slow epochs are those together; slow "
        f"ones took more than {SLOW} times the median."
    )
    return f"{caption}\n\n{markdown(lines, 2, notes)}"


def by_case(rows: list[dict]) -> dict[Case, dict[str, Pair]]:
    """The rows by (workload, cluster, fused), by contender, and by whether together."""
    cases: dict[Case, dict[str, Pair]] = {}
    for row in rows:
        case = (row["workload"], row["cluster"], row["fused"])
        pair = cases.setdefault(case, {}).setdefault(row["contender"], {})
        pair[row["workers"] > 1] = row
    return cases


def efficiency(pair: Pair) -> float | None:
    """The time of a step alone as a fraction of that together."""
    return ratio(pair.get(False), pair.get(True))


def _cells(pair: Pair, distfit: Pair | None, notes: list[str]) -> list[str]:
    together = pair.get(True)
    cells = [time_cell(pair.get(each), notes, _MS, 2) for each in (False, True)]
    cells.append(_percent(efficiency(pair)))
    cells.append(ratio_cell(ratio(together, (distfit or {}).get(True))))
    if median(together) is None:
        return [*cells, "–", "–"]
    worst = max(together["seconds_per_step"]) / _MS
    return [*cells, f"{worst:.2f}", _percent(slow_share(together))]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def panel(axes, rows: list[dict]) -> None:
    """The time of every epoch together, and the median alone."""
    from matplotlib import ticker

    cases, names = by_case(rows), contenders(rows)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        axes.plot([], "o", color=COLORS[name], label=LABELS[name])
        for place, found in enumerate(cases.values()):
            center = place + (index - (len(names) - 1) / 2) * width
            _points(axes, center, width, found.get(name, {}), COLORS[name])
    axes.plot([], "D", color="black", fillstyle="none", label="one worker alone")
    axes.set_yscale("log", subs=())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.15)
    axes.set_xticks(
        range(len(cases)), [f"{cluster} × {fused}" for _, cluster, fused in cases]
    )
    axes.set_xlabel("workers × fused steps")
    axes.set_ylabel("time per step, ms; efficiency")


def _points(axes, center: float, width: float, pair: Pair, color: str) -> None:
    """A dot for each epoch together, from left to right, and a line at their median."""
    alone, together = (median(pair.get(each)) for each in (False, True))
    if alone is not None:
        axes.plot(center, alone / _MS, "D", color=color, fillstyle="none")
    if together is None:
        failed = pair.get(True, {}).get("failure", "").startswith("fails")
        _annotate(axes, center, alone, "fails" if failed else "")
        return
    times = [time / _MS for time in pair[True]["seconds_per_step"]]
    left, step = center - 0.35 * width, 0.7 * width / max(len(times) - 1, 1)
    places = [left + step * index for index in range(len(times))]
    axes.plot(places, times, ".", color=color, markersize=4)
    ends = (left, center + 0.35 * width)
    axes.plot(ends, [together / _MS] * 2, color=color, linewidth=2)
    _annotate(axes, center, max(times) * _MS, _percent(efficiency(pair)))


def _annotate(axes, place: float, height: float | None, label: str) -> None:
    if height is not None:
        axes.annotate(
            label,
            (place, height / _MS),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
