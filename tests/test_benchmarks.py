"""The report of the benchmarks, from numbers made up by hand; and their processes."""

import json
import os
import sys
import time

import keras
import pytest

from benchmarks import contenders, first_step, replicas, report, rows, scaling
from benchmarks.first_step_worker import first_step as run_first_step
from benchmarks.process import Group, agree, places
from benchmarks.run import _cells, _parse, _run_round
from benchmarks.workloads import WORKLOADS


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


def on_workers(contender, workers, times=(), **more):
    return row(contender, times, replicas=workers, workers=workers, cluster=2, **more)


WORKER_ROWS = [
    on_workers("distfit", 1, [3e-3, 1e-3, 2e-3]),
    on_workers("distfit", 2, [4e-3] * 4 + [44e-3]),
    on_workers("hand_written", 1, [2e-3] * 3),
    on_workers("hand_written", 2, [5e-3] * 5),
    on_workers("stock_keras", 1, [2e-3] * 3),
    on_workers("stock_keras", 2, failure="fails: ValueError: a PerReplica"),
    on_workers("torch_ddp", 1, failure="not installed"),
    on_workers("torch_ddp", 2, failure="not installed"),
]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def lines():
    return replicas.table(ROWS).splitlines()


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
    report.plot(ROWS + WORKER_ROWS, tmp_path)
    for name in ("results.png", "workers.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_a_round_asks_each_contender_once_beginning_with_another_one():
    asked = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def ask(self, fused):
            asked.append(self.name)
            return {"seconds_per_step": 1.0, "logs": {}}

    found = [row("distfit"), row("hand_written"), row("orbit", failure="not installed")]
    groups = {(name, 0): Fake(name) for name in ("distfit", "hand_written")}
    _run_round(groups, found, 0)
    _run_round(groups, found, 1)
    assert asked == ["distfit", "hand_written", "hand_written", "distfit"]
    assert [len(row["seconds_per_step"]) for row in found] == [2, 2, 0]


@pytest.fixture
def worker_lines():
    return scaling.table(WORKER_ROWS).splitlines()[4:]


def test_workers_are_shown_with_efficiency_ratio_and_slow_epochs(worker_lines):
    assert cells(worker_lines[0])[1:] == [
        "distfit",
        "2",
        "1",
        "2.00 (1.50–2.50)",
        "4.00 (4.00–4.00)",
        "50 %",
        "1.00",
        "44.00",
        "20 %",
    ]
    assert cells(worker_lines[1])[6:] == ["40 %", "1.25", "5.00", "0 %"]


def test_workers_that_fail_are_shown_with_what_one_of_them_does_alone(worker_lines):
    alone = "2.00 (2.00–2.00)"
    assert cells(worker_lines[2])[4:] == [alone, "fails (1)", *"––––"]
    assert cells(worker_lines[3])[4:] == ["not installed"] * 2 + [*"––––"]
    assert worker_lines[-1] == "1. ValueError: a PerReplica"


def test_workers_have_a_table_of_their_own():
    both = report.tables(ROWS + WORKER_ROWS)
    assert both == f"{replicas.table(ROWS)}\n{scaling.table(WORKER_ROWS)}"
    assert report.tables(WORKER_ROWS) == scaling.table(WORKER_ROWS)


def test_a_row_without_slow_epochs_has_a_share_of_none():
    assert rows.slow_share({"seconds_per_step": [1.0, 1.5, 1.0]}) == 0


def test_cells_of_workers_alternate_between_alone_and_together():
    options = _parse(["--workers=2", "--workloads=cnn", "--fused", "1", "10"])
    [found] = _cells(options).values()
    assert [row["workers"] for row in found[:4]] == [1, 2, 1, 2]
    assert {row["fused"] for row in found if row["contender"] == "torch_ddp"} == {1}
    assert {row["contender"] for row in found} == set(contenders.ON_WORKERS)


def test_keras_sums_gradients_where_the_flat_loop_does():
    assert hasattr(keras.optimizers.Adam, "_all_reduce_sum_gradients")


def test_workers_agree_but_for_rounding():
    assert agree({"loss": 1.0}, {"loss": 1.0 + 1e-7})
    assert not agree({"loss": 1.0}, {"loss": 1.001})
    assert not agree({"loss": 1.0}, {"mae": 1.0})


def test_workers_have_a_core_and_an_address_each():
    first, second = found = places(2)
    told = [json.loads(place.environment["TF_CONFIG"]) for place in found]
    assert [each["task"]["index"] for each in told] == [0, 1]
    assert told[0]["cluster"] == told[1]["cluster"]
    assert len(set(told[0]["cluster"]["worker"])) == 2
    assert len(first.cores) == len(second.cores) == 1
    if len(os.sched_getaffinity(0)) > 1:
        assert first.cores != second.cores


def test_a_worker_alone_has_a_core_and_no_cluster(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{}")
    [place] = places(1)
    assert len(place.cores) == 1
    assert "TF_CONFIG" not in place.environment


def first(contender, replicas, seconds=(), **more):
    row = {"workload": "resnet50", "replicas": replicas, "contender": contender}
    return {**row, "seconds": list(seconds), **more}


def test_first_steps_are_shown_as_medians_beside_those_of_stock_keras():
    found = [
        first("distfit", 1, [9.0, 6.0, 7.0]),
        first("stock_keras", 1, [14.0, 14.0, 14.0]),
        first("distfit", 2, [9.0]),
        first("stock_keras", 2, failure="ValueError: node_7"),
        first("distfit", 4),
    ]
    lines = first_step.table(found).splitlines()
    assert cells(lines[4])[1:] == ["1", "7.0", "14.0", "0.50"]
    assert cells(lines[5])[1:] == ["2", "9.0", "fails (1)", "–"]
    assert cells(lines[6])[1:] == ["4", "–", "–", "–"]
    assert lines[-1] == "1. ValueError: node_7"


def test_first_steps_have_a_row_for_each_contender_and_number_of_replicas():
    options = first_step._parse(["--workload", "transformer", "--replicas", "1", "8"])
    found = first_step._rows(options)
    assert [(row["replicas"], row["contender"]) for row in found] == [
        (1, "distfit"),
        (1, "stock_keras"),
        (8, "distfit"),
        (8, "stock_keras"),
    ]


def test_every_workload_of_the_first_step_exists():
    assert set(first_step.WORKLOADS) == set(WORKLOADS)


def test_the_first_step_of_all_contenders_has_the_same_loss():
    work = WORKLOADS["mlp"]
    found = [run_first_step(name, work, 1) for name in first_step.CONTENDERS]
    assert all(answer["seconds"] > 0 for answer in found)
    assert agree(*(answer["logs"] for answer in found))


WORKER = """
import json, os, sys, time
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
for line in sys.stdin:
    {}
    answer = {{"seconds_per_step": index, "logs": {{"loss": loss}}}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def two_workers():
    """Makes two workers that run a line of Python for each order."""
    groups = []

    def make(line):
        group = Group(workers=2, timeout=20)
        group._command = [sys.executable, "-c", WORKER.format(line)]
        groups.append(group)
        return group

    yield make
    for group in groups:
        group.__exit__()


@pytest.mark.integration
def test_the_chief_answers_and_the_answers_of_all_are_kept(two_workers):
    answer = two_workers("loss = 1.0").ask(fused=1)
    assert answer["seconds_per_step"] == 0
    assert [each["seconds_per_step"] for each in answer["all"]] == [0, 1]


@pytest.mark.integration
def test_workers_that_disagree_are_an_error_and_end(two_workers):
    group = two_workers("loss = float(index)")
    assert "workers disagree" in group.ask(fused=1)["error"]
    assert group._children == []


@pytest.mark.integration
def test_a_worker_that_dies_ends_its_peer_and_is_named(two_workers):
    group = two_workers("sys.exit('no luck') if index else time.sleep(60)")
    start = time.monotonic()
    error = group.ask(fused=1)["error"]
    assert error == "the process ended with exit code 1: no luck"
    assert group._children == []
    assert time.monotonic() - start < 15


@pytest.mark.integration
def test_an_answer_that_does_not_come_is_an_error(two_workers):
    group = two_workers("loss = 1.0 if index else time.sleep(60)")
    group._timeout = 1
    assert group.ask(fused=1)["error"] == "no answer within 1 seconds"
    assert group._children == []
