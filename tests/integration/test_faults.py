"""A run that something goes wrong with ends with the bits of one that was left alone.

Each fault is a real one, at a chosen step of a real run of two workers. Some the
supervisor mends itself (--max_restarts), after others the same command is given again.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fault_programs
import namespaces
import pytest
import results
from breadth import pick

from launch.cluster import hardware

pytestmark = pytest.mark.integration

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 240  # a hard limit for a command; each takes some 20 on an idle machine
SECRET = b"of-nobody-elses-concern"
STEPS = fault_programs.STEPS
SEEDS = (1, 2)
PROGRAMS_AND_SEEDS = list(itertools.product(fault_programs.PROGRAMS, SEEDS))
# After a step in the middle of an epoch, in the validation of an epoch, at the end of
# one, after the last step.
MOMENTS = {
    "mid-epoch": STEPS + 2,
    "validation": "validation",
    "boundary": -1,
    "last": 3 * STEPS,
}

# By name: kind, worker, the exit code of the first command (0: mended by itself).
MENDED = {
    "exception on the chief": ("exception", 0),
    "exception on a worker": ("exception", 1),
    "SIGKILL of the chief": ("kill", 0),
    "SIGKILL of a worker": ("kill", 1),
    "SIGSEGV of a worker": ("segfault", 1),
    "SIGTERM to one worker": ("terminate", 1),
    "SIGSTOP of a worker": ("stop", 1),
    "SIGKILL during a save": ("kill in save", 0),
}
BY_HAND = {
    "SIGKILL of the supervisor": ("kill supervisor", 0, -signal.SIGKILL),
    "SIGTERM to the supervisor": ("terminate supervisor", 1, 143),
    "Ctrl-C": ("interrupt supervisor", 0, 130),
    "full disk": ("full disk", 0, 1),
}
DAMAGES = {
    "newest checkpoint truncated": lambda path: _resize(next(path.glob("*.data*"))),
    "one byte flipped": lambda path: _flip(next(path.glob("*.data*"))),
    "manifest missing": lambda path: (path / "manifest.json").unlink(),
    "manifest cut": lambda path: _resize(path / "manifest.json"),
}


def _resize(file):
    os.truncate(file, file.stat().st_size // 2)


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


class Run:
    """The same command, again and again, in a folder of its own."""

    def __init__(self, folder, program, seed, fault="none:0:0"):
        build, data = fault_programs.PROGRAMS[program]
        self.folder = folder
        self.workdir = folder / "out"
        self.command = [
            *(sys.executable, "-m", "launch", "--num_workers=2", "--max_restarts=2"),
            f"--model=fault_programs:{build}",
            f"--dataset=fault_programs:{data}",
            "--callbacks=fault_programs:callbacks",
            f"--batch_size={fault_programs.BATCH}",
            f"--epochs={fault_programs.EPOCHS}",
            *(f"--seed={seed}", "--workdir=out", "--stall_timeout=20"),
            "--checkpoint_every=3steps,1epoch",
        ]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
            "FAULT": fault,
            "FAULT_DONE": str(folder / "done"),
            "FAULT_CHECKPOINTS": str(self.workdir / "checkpoints"),
            "CUDA_VISIBLE_DEVICES": "-1",
            "A_TOKEN_OF_THE_USER": SECRET.decode(),
        }

    def start(self):
        """Runs the command to its end, and returns its exit code."""
        with subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # If the tests run in the background, children would ignore the signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            try:
                self.out, _ = process.communicate(timeout=SECONDS)
            finally:
                process.kill()
        return process.returncode

    def wait_for_workers(self):
        """Waits until all processes of the command have ended, not only its first."""
        own = f"FAULT_DONE={self.environment['FAULT_DONE']}".encode()
        deadline = time.monotonic() + SECONDS
        while any(own in _environment(p) for p in pathlib.Path("/proc").glob("[0-9]*")):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    @property
    def was_disturbed(self):
        return (self.folder / "done").exists()

    def checkpoints(self):
        found = (self.workdir / "checkpoints").glob("step-*")
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def ledger(self):
        last = (self.workdir / "metrics.jsonl").read_text().splitlines()[-1]
        return json.loads(last)["ledger"]

    def what_others_may_not_have(self):
        """Files that anyone may write, and files with a secret of the environment."""
        files = [p for p in self.workdir.rglob("*") if p.is_file()]
        return [
            p for p in files if p.stat().st_mode & 0o002 or SECRET in p.read_bytes()
        ]

    def results(self):
        return results.of(self.workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """`undisturbed(program, seed)`: the results of a run that was left alone."""
    found = {}

    def of(program, seed):
        if (program, seed) not in found:
            run = Run(tmp_path_factory.mktemp("undisturbed"), program, seed)
            assert run.start() == 0, run.out
            found[program, seed] = run.results()
        return found[program, seed]

    return of


def _environment(process):
    try:
        return (process / "environ").read_bytes()
    except OSError:  # It has ended.
        return b""


def matrix(faults, few):
    """Every fault with every program, moment and seed, or a few of these."""
    every = [
        (fault, program, moment, seed)
        for fault, program, moment, seed in itertools.product(
            faults, fault_programs.PROGRAMS, MOMENTS, SEEDS
        )
        if moment != "validation" or program in fault_programs.VALIDATED
    ]
    assert set(few) <= set(every)
    return pick(few, every)


@pytest.mark.parametrize(
    "name, program, moment, seed",
    matrix(
        MENDED,
        [("SIGKILL of the chief", "cnn", "mid-epoch", 1)],
    ),
)
def test_the_supervisor_mends_it(tmp_path, undisturbed, name, program, moment, seed):
    kind, worker = MENDED[name]
    run = Run(tmp_path, program, seed, fault=f"{kind}:{worker}:{MOMENTS[moment]}")
    assert run.start() == 0, run.out
    assert run.was_disturbed
    again = "launch: starting again in 1 s: 1 of 2" in run.out
    # After the last step, the last save may have been written before it can be killed.
    assert again or (kind == "kill in save" and moment == "last"), run.out
    assert run.results() == undisturbed(program, seed), run.out
    assert run.ledger()["restarts"] == again
    assert run.what_others_may_not_have() == []


@pytest.mark.parametrize(
    "name, program, moment, seed",
    # That of the supervisor is also what precedes a damage below.
    matrix(BY_HAND, []),
)
def test_the_same_command_goes_on(tmp_path, undisturbed, name, program, moment, seed):
    kind, worker, code = BY_HAND[name]
    run = Run(tmp_path, program, seed, fault=f"{kind}:{worker}:{MOMENTS[moment]}")
    run.command.remove("--max_restarts=2")
    assert run.start() == code, run.out
    assert run.was_disturbed
    assert run.start() == 0, run.out
    assert run.results() == undisturbed(program, seed), run.out


@pytest.mark.parametrize(
    "name, program, moment, seed",
    matrix(DAMAGES, []),
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path, undisturbed, name, program, moment, seed
):
    place = {**MOMENTS, "boundary": -2}[moment]  # There is one to go back to.
    run = Run(tmp_path, program, seed, fault=f"kill supervisor:0:{place}")
    assert run.start() == -signal.SIGKILL, run.out
    run.wait_for_workers()  # Which may still save.
    newest = run.checkpoints()[-1]
    DAMAGES[name](newest)
    assert run.start() == 0, run.out
    assert f"A checkpoint is passed over: {newest.relative_to(run.folder)}" in run.out
    assert run.results() == undisturbed(program, seed), run.out


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A file system of its own, in memory."""
    folder.mkdir(parents=True)
    size = f"size={kilobytes}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield lambda options: subprocess.run(
            ["mount", "-o", f"remount,{options}", str(folder)], check=True
        )
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("program, seed", pick([], PROGRAMS_AND_SEEDS))
@pytest.mark.parametrize("full", [True, False], ids=["full", "read-only"])
def test_a_disk_that_was_full_or_read_only_can_be_mended(
    tmp_path, undisturbed, program, seed, full
):
    run = Run(tmp_path, program, seed, fault="kill supervisor:0:8")
    run.command.remove("--max_restarts=2")
    with small_disk(run.workdir / "checkpoints", 150 if full else 10_000) as remount:
        if full:
            (tmp_path / "done").touch()
        assert run.start() == (1 if full else -signal.SIGKILL), run.out
        if full:
            assert "No space left on device" in run.out
            assert run.checkpoints(), "The first ones fit."
        else:
            remount("ro")
            assert run.start() in (1, 2)
            assert "Read-only file system" in run.out and "Traceback" not in run.out
        remount("rw,size=10m")
        assert run.start() == 0, run.out
        assert run.results() == undisturbed(program, seed), run.out


@pytest.mark.parametrize("program, seed", pick([], PROGRAMS_AND_SEEDS))
def test_two_hosts_that_were_cut_off_meet_again(tmp_path, undisturbed, program, seed):
    """Each `launch` starts its worker again, which waits for the other.

    Threads that share a sum round it otherwise: each has the cores that it has on one
    host.
    """
    run = Run(tmp_path, program, seed, fault=f"pause:0:{MOMENTS['mid-epoch']}")
    run.command.remove("--num_workers=2")
    workers = [f"{address}:2222" for address in namespaces.ADDRESSES]
    with namespaces.hosts() as hosts, contextlib.ExitStack() as stack:
        processes = []
        for index, share in enumerate(hardware.divide(2)):
            task = {"type": "worker", "index": index}
            config = json.dumps({"cluster": {"worker": workers}, "task": task})
            screen = stack.enter_context((tmp_path / f"screen-{index}").open("wb"))
            process = subprocess.Popen(
                hosts.command(index, *run.command),
                cwd=tmp_path,
                env={**run.environment, "TF_CONFIG": config},
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                preexec_fn=functools.partial(os.sched_setaffinity, 0, share.cores),
            )
            stack.callback(process.kill)
            processes.append(process)
        deadline = time.monotonic() + SECONDS
        while not run.was_disturbed:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        hosts.cut()
        time.sleep(30)  # TensorFlow notices after some 20.
        hosts.mend()
        codes = [process.wait(timeout=SECONDS) for process in processes]
    shown = "\n".join((tmp_path / f"screen-{i}").read_text() for i in range(2))
    assert codes == [0, 0], shown
    assert shown.count("starting again") >= 2
    assert run.results() == undisturbed(program, seed), shown
