"""Workers under a real Slurm, of two nodes that slurm_cluster.py starts."""

import time

import job
import namespaces
import pytest
import slurm_cluster
from breadth import only_exhaustive

pytestmark = pytest.mark.integration

BATCH = str(job.ROOT / "configs" / "cluster" / "slurm.sbatch")
NODES = namespaces.ADDRESSES


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster.running(folder, **job.variables()) as cluster:
        yield cluster


@pytest.fixture
def folder(tmp_path):
    return job.write_module(tmp_path)


@only_exhaustive  # Those of two nodes train by the same steps.
def test_tasks_of_a_node_train_to_the_numbers_of_one_device(slurm, folder):
    command = ("srun", "-n2", *job.command())
    result = slurm.run(*command, cwd=folder, timeout=job.SECONDS)
    assert result.returncode == 0, result.stderr
    assert "cluster: 2 workers, from Slurm; this is worker 0 at" in result.stdout
    job.check_as_on_one_device(folder)


def test_the_batch_script_is_accepted(slurm, folder):
    command = ("sbatch", "--test-only", "--gpus-per-node=0", BATCH)
    result = slurm.run(*command, cwd=folder, timeout=20)
    assert result.returncode == 0, result.stderr
    assert "64 processors" in result.stderr


def test_the_batch_script_trains_on_two_nodes_to_the_same_numbers(slurm, folder):
    # As on nodes without GPUs, with a task and a CPU each.
    options = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
    flags = (*job.FLAGS, "--dataset=mine:rows", "--epochs=3")
    submit = ("sbatch", "--wait", "--parsable", *options, BATCH, *flags)
    result = slurm.run(*submit, cwd=folder, timeout=job.SECONDS)
    number = result.stdout.strip()
    log = (folder / f"distfit-{number}.log").read_text()
    assert result.returncode == 0, log
    assert f"2 workers, from Slurm; this is worker 0 at {NODES[0]}:" in log
    job.check_as_on_one_device(folder, f"runs/slurm-{number}")


def test_a_worker_that_fails_ends_the_step_and_tells_why(slurm, folder):
    options = ("-N2", "-n2", "--kill-on-bad-exit=1", "--label")
    command = ("srun", *options, *job.command(dataset="broken"))
    result = slurm.run(*command, cwd=folder, timeout=job.SECONDS)
    seconds = time.time() - (folder / "failed").stat().st_mtime
    assert result.returncode != 0 and seconds < 30  # measured: 3.5 s
    error = "ValueError: a mistake in the data of worker 1"
    (line,) = [x for x in result.stderr.splitlines() if "launch: failed with" in x]
    assert line.startswith("1: ") and error in line, result.stderr
