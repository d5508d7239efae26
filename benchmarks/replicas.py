"""Results on the replicas of one process, as a table and a plot."""

from benchmarks.rows import (
    COLORS,
    LABELS,
    contenders,
    markdown,
    ratio,
    ratio_cell,
    rounds,
    time_cell,
)

PLOT = "results.png"
WORKLOADS = {"mlp": "MLP 32-16-1, batch 32", "cnn": "MNIST CNN, batch 64"}
RATIOS = {"hand_written": "distfit / hand-written", "stock_keras": "distfit / stock"}
BARS = ("distfit", "stock_keras", "stock_keras_default", "tf_keras", "orbit")

Case = tuple[str, int, int]


def table(rows: list[dict]) -> str:
    """A Markdown table with a line for each case and a column for each contender."""
    names = contenders(rows)
    ratios = [name for name in RATIOS if {name, "distfit"} <= set(names)]
    head = ["workload", "replicas", "fused steps", *(LABELS[n] for n in names)]
    lines = [head + [RATIOS[name] for name in ratios]]
    notes: list[str] = []
    for case, found in by_case(rows).items():
        cells = [time_cell(found.get(name), notes, 1e-6, 0) for name in names]
        cells += [ratio_cell(_against(found, "distfit", name)) for name in ratios]
        lines.append([WORKLOADS[case[0]], *map(str, case[1:]), *cells])
    caption = (
        f"Median time per step in µs, quartiles in brackets, of {rounds(rows)} rounds."
    )
    return f"{caption}\n\n{markdown(lines, 1, notes)}"


def by_case(rows: list[dict]) -> dict[Case, dict[str, dict]]:
    """The rows by (workload, replicas, fused) and then by contender."""
    cases: dict[Case, dict[str, dict]] = {}
    for row in rows:
        case = (row["workload"], row["replicas"], row["fused"])
        cases.setdefault(case, {})[row["contender"]] = row
    return cases


def _against(found: dict[str, dict], name: str, other: str) -> float | None:
    return ratio(found.get(name), found.get(other))


def panel(axes, rows: list[dict]) -> None:
    """The time of each contender as a multiple of the hand-written loop's."""
    cases = by_case(rows)
    names = [name for name in contenders(rows) if name in BARS]
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * width
        places = [place + offset for place in range(len(cases))]
        ratios = [_against(found, name, "hand_written") for found in cases.values()]
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
