"""Results as tables and plots.

    python -m benchmarks.report [FOLDER]

recreates them from the results.json of a folder, `runs/benchmark` by default.
"""

import json
import pathlib
import sys
import types

from benchmarks import replicas, scaling


def write(folder: pathlib.Path, results: dict) -> None:
    """Writes results.json, results.md and, if matplotlib is installed, the plots."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(text(results))
    try:
        plot(results["rows"], folder)
    except ModuleNotFoundError as error:
        print(f"No plot: {error}.", file=sys.stderr)


def text(results: dict) -> str:
    """The tables below a line about the machine."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return f"Measured on: {machine}.\n\n{tables(results['rows'])}"


def tables(rows: list[dict]) -> str:
    """A table of replicas, one of workers, or both."""
    parts = _parts(rows)
    return "\n".join(part.table(own) for part, own in parts if own)


def plot(rows: list[dict], folder: pathlib.Path) -> None:
    """Plots replicas to results.png, workers to workers.png."""
    for part, own in _parts(rows):
        if own:
            _plot(part, own, folder / part.PLOT)


def _plot(part: types.ModuleType, rows: list[dict], path: pathlib.Path) -> None:
    """A panel for each workload, and a legend below them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure, panels = pyplot.subplots(
        len(workloads), figsize=(11, 4 * len(workloads)), squeeze=False
    )
    for axes, workload in zip(panels[:, 0], workloads, strict=True):
        part.panel(axes, [row for row in rows if row["workload"] == workload])
        axes.set_title(part.WORKLOADS[workload])
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _parts(rows: list[dict]) -> list[tuple]:
    return [
        (replicas, [row for row in rows if "workers" not in row]),
        (scaling, [row for row in rows if "workers" in row]),
    ]


def main(folder: str = "runs/benchmark") -> None:
    path = pathlib.Path(folder)
    write(path, json.loads((path / "results.json").read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
