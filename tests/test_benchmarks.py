"""The report of the benchmarks, from numbers made up by hand."""

import json

import pytest

from benchmarks import report
from benchmarks.run import _run_round


def row(contender, times=(), fused=1, replicas=1, **more):
    return {
        "workload": "mlp",
        "replicas": replicas,
        "fused": fused,
        "contender": contender,
        "seconds_per_step": list(times),
        **more,
    }


ROWS = [
    row("distfit", [1e-4, 3e-4, 2e-4]),
    row("hand_written", [1e-4, 1e-4, 9e-4]),
    row("stock_keras", [4e-4, 4e-4, 4e-4]),
    row("tf_keras", failure="not installed"),
    row("distfit", [2e-4] * 3, fused=10, replicas=2),
    row("hand_written", [2e-4] * 3, fused=10, replicas=2),
    row("stock_keras", fused=10, replicas=2, failure="fails: ValueError: node_7"),
    row("stock_keras", fused=50, replicas=2, failure="fails: ValueError: node_12"),
    row("tf_keras", fused=10, replicas=2, failure="not installed"),
]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def lines():
    return report.table(ROWS).splitlines()


def test_table_shows_medians_quartiles_and_ratios(lines):
    assert cells(lines[4])[3:] == [
        "200 (150–250)",
        "100 (100–500)",
        "400 (400–400)",
        "not installed",
        "2.00",
        "0.50",
    ]


def test_table_names_failures_in_notes_that_are_listed_once(lines):
    assert cells(lines[5])[5] == "fails (1)"
    assert cells(lines[6])[5] == "fails (1)"
    assert [line for line in lines if "ValueError" in line] == ["1. ValueError: node_7"]


def test_table_leaves_out_ratios_that_do_not_exist(lines):
    assert cells(lines[5])[-2:] == ["1.00", "–"]


def test_write_makes_the_files_and_the_json_holds_everything(tmp_path):
    results = {"machine": {"cpus": 2}, "rows": ROWS}
    report.write(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.md").read_text().startswith("Measured on: cpus 2.")


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(ROWS, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_a_round_asks_each_contender_once_beginning_with_another_one():
    asked = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def ask(self, fused):
            asked.append(self.name)
            return {"seconds_per_step": 1.0, "logs": {}}

    rows = [row("distfit"), row("hand_written"), row("orbit", failure="not installed")]
    processes = {name: Fake(name) for name in ("distfit", "hand_written")}
    _run_round(processes, rows, 0)
    _run_round(processes, rows, 1)
    assert asked == ["distfit", "hand_written", "hand_written", "distfit"]
    assert [len(row["seconds_per_step"]) for row in rows] == [2, 2, 0]
