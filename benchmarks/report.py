"""Results as a table and a plot.

    python -m benchmarks.report [FOLDER]

makes both anew from the results.json of a folder, `runs/benchmark` by default.

A row of results is a dict: workload, replicas, fused, contender, seconds_per_step (a
list, one for each round), and failure, a line, where there is one.
"""

import json
import pathlib
import re
import statistics
import sys

LABELS = {
    "distfit": "distfit",
    "hand_written": "hand-written loop",
    "stock_keras": "stock Keras",
    "stock_keras_default": "stock Keras, default reduction",
    "tf_keras": "tf_keras",
    "orbit": "Orbit",
}
WORKLOADS = {"mlp": "MLP 32-16-1, batch 32", "cnn": "MNIST CNN, batch 64"}
RATIOS = {"hand_written": "distfit / hand-written", "stock_keras": "distfit / stock"}
COLORS = {
    "distfit": "#0072b2",
    "stock_keras": "#d55e00",
    "stock_keras_default": "#f0b48c",
    "tf_keras": "#999999",
    "orbit": "#009e73",
}

Case = tuple[str, int, int]


def write(folder: pathlib.Path, results: dict) -> None:
    """Writes results.json, results.md and, where matplotlib is installed, the plot."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(text(results))
    try:
        plot(results["rows"], folder / "results.png")
    except ModuleNotFoundError as error:
        print(f"No plot: {error}.", file=sys.stderr)


def text(results: dict) -> str:
    """The table under a line on the machine."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return f"Measured on: {machine}.\n\n{table(results['rows'])}"


def table(rows: list[dict]) -> str:
    """A Markdown table with a line for each case and a column for each contender."""
    names = _contenders(rows)
    ratios = [name for name in RATIOS if {name, "distfit"} <= set(names)]
    head = ["workload", "replicas", "fused steps", *(LABELS[n] for n in names)]
    head += [RATIOS[name] for name in ratios]
    lines = [head, ["---", "--:", "--:"] + ["--:"] * (len(head) - 3)]
    notes: list[str] = []
    for case, found in by_case(rows).items():
        cells = [_cell(found.get(name), notes) for name in names]
        cells += [_ratio_cell(found, name) for name in ratios]
        lines.append([WORKLOADS[case[0]], *map(str, case[1:]), *cells])
    rounds = sorted({len(r["seconds_per_step"]) for r in rows if "failure" not in r})
    caption = (
        "Median time per step in µs, quartiles in brackets, of "
        f"{' to '.join(map(str, rounds[:1] + rounds[1:][-1:])) or 'no'} rounds."
    )
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    footer = "".join(f"\n{i}. {note}" for i, note in enumerate(notes, 1))
    return f"{caption}\n\n{body}\n" + (f"{footer}\n" if footer else "")


def by_case(rows: list[dict]) -> dict[Case, dict[str, dict]]:
    """The rows by (workload, replicas, fused) and then by contender."""
    cases: dict[Case, dict[str, dict]] = {}
    for row in rows:
        case = (row["workload"], row["replicas"], row["fused"])
        cases.setdefault(case, {})[row["contender"]] = row
    return cases


def median(row: dict | None) -> float | None:
    """The median time of a step in seconds; None if there is none."""
    if row is None or "failure" in row or not row["seconds_per_step"]:
        return None
    return statistics.median(row["seconds_per_step"])


def quartiles(row: dict) -> tuple[float, float]:
    """The first and the third quartile of the time of a step in seconds."""
    times = row["seconds_per_step"]
    if len(times) == 1:
        return times[0], times[0]
    first, _, third = statistics.quantiles(times, method="inclusive")
    return first, third


def ratio(found: dict[str, dict], name: str, of: str) -> float | None:
    """How long a step of contender `name` takes, as a multiple of one of `of`."""
    over, under = median(found.get(name)), median(found.get(of))
    return None if over is None or under is None else over / under


def _contenders(rows: list[dict]) -> list[str]:
    present = {row["contender"] for row in rows}
    return [name for name in LABELS if name in present]


def _cell(row: dict | None, notes: list[str]) -> str:
    if row is None:
        return "–"
    if "failure" in row:
        kind, _, reason = row["failure"].partition(": ")
        if not reason:
            return kind
        return f"{kind} ({_note(reason, notes)})"
    middle = median(row)
    if middle is None:
        return "–"
    first, third = (f"{1e6 * time:.0f}" for time in quartiles(row))
    return f"{1e6 * middle:.0f} ({first}–{third})"


def _note(reason: str, notes: list[str]) -> int:
    """The number of a footnote. Reasons may differ in numbers of nodes and devices."""
    keys = [re.sub(r"_?\d+", "", note) for note in [*notes, reason]]
    number = keys.index(keys[-1]) + 1
    if number > len(notes):
        notes.append(reason)
    return number


def _ratio_cell(found: dict[str, dict], of: str) -> str:
    value = ratio(found, "distfit", of)
    return "–" if value is None else f"{value:.2f}"


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Plots the time of each contender as a multiple of the hand-written loop's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure, panels = pyplot.subplots(
        len(workloads), figsize=(11, 4 * len(workloads)), squeeze=False
    )
    for axes, workload in zip(panels[:, 0], workloads, strict=True):
        _panel(axes, [row for row in rows if row["workload"] == workload])
        axes.set_title(WORKLOADS[workload])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axes, rows: list[dict]) -> None:
    cases = by_case(rows)
    names = [name for name in _contenders(rows) if name in COLORS]
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * width
        places = [place + offset for place in range(len(cases))]
        ratios = [ratio(found, name, "hand_written") for found in cases.values()]
        axes.bar(
            places,
            [value or 0 for value in ratios],
            width,
            color=COLORS[name],
            label=LABELS[name],
        )
        for place, value, found in zip(places, ratios, cases.values(), strict=True):
            _annotate(axes, place, value, found.get(name))
    axes.axhline(1, color="black", linewidth=1, label=LABELS["hand_written"])
    axes.margins(y=0.12)
    axes.set_xticks(
        range(len(cases)), [f"{replicas} × {fused}" for _, replicas, fused in cases]
    )
    axes.set_xlabel("replicas × fused steps")
    axes.set_ylabel("time per step / hand-written loop")
    axes.spines[["top", "right"]].set_visible(False)


def _annotate(axes, place: float, value: float | None, row: dict | None) -> None:
    if value is None:
        label = "fails" if row and row.get("failure", "").startswith("fails") else ""
    else:
        label = f"{value:.2f}"
    axes.annotate(
        label,
        (place, value or 0),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        rotation=90,
        fontsize=7,
        bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.8},
    )


def main(folder: str = "runs/benchmark") -> None:
    path = pathlib.Path(folder)
    write(path, json.loads((path / "results.json").read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
