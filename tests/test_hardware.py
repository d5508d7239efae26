"""How cores and GPUs are divided among workers of one host."""

import pytest

from launch.cluster import hardware
from launch.errors import UsageError


@pytest.mark.parametrize(
    "cores, workers, expected",
    [
        ([0, 1, 2, 3], 2, [(0, 1), (2, 3)]),
        ([4, 6, 7, 9, 11], 2, [(4, 6), (7, 9, 11)]),
        ([0, 1], 2, [(0,), (1,)]),
        ([3, 5], 5, [(3,), (5,), (3,), (5,), (3,)]),
        ([], 2, [(), ()]),
    ],
)
def test_cores_are_shared_in_neighbouring_parts(cores, workers, expected):
    assert hardware.divide_cores(cores, workers) == expected


@pytest.mark.parametrize(
    "gpus, workers, expected",
    [
        ("0123", 2, ["0,1", "2,3"]),
        ("012", 2, ["0", "1"]),  # each as many as the others
        ("", 3, [None, None, None]),
    ],
)
def test_gpus_are_shared_in_equal_parts(gpus, workers, expected):
    assert hardware.divide_gpus(list(gpus), workers) == expected


def test_fewer_gpus_than_workers_are_refused():
    with pytest.raises(UsageError, match=r"Received: --num_workers=3, GPUs 4, 7\."):
        hardware.divide_gpus(["4", "7"], 3)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("2,5", ["2", "5"]),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        ("0, 1,-1,2", ["0", "1"]),
        ("GPU-8932f937,MIG-a/1/0", ["GPU-8932f937", "MIG-a/1/0"]),
    ],
)
def test_gpus_are_those_that_the_variable_lists(monkeypatch, value, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert hardware.own_gpus() == expected


def test_gpus_are_counted_by_their_files(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert hardware.own_gpus(tmp_path) == []
    cards = tmp_path / "proc/driver/nvidia/gpus"
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (cards / name).mkdir(parents=True)
    assert hardware.own_gpus(tmp_path) == ["0", "1", "2"]
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert hardware.own_gpus(tmp_path) == ["0", "1"]
