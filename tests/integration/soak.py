"""Kills a training of two workers at random, again and again; `make soak` runs it.

    python tests/integration/soak.py --kills=50 --seed=0

Each kill is SIGKILL to the chief, to the other worker or to the supervisor, after a
random time: while the workers start, compile, train or save. After a kill of the
supervisor the same command is given again. The weights and metrics at the end must be
those of a run that was left alone, bit for bit.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import results

HERE = pathlib.Path(__file__).resolve().parent
COMMAND = [
    *(sys.executable, "-m", "launch", "--num_workers=2", "--max_restarts=1000"),
    *("--model=fault_programs:build_gan", "--dataset=fault_programs:digits"),
    *("--batch_size=8", "--workdir=out", "--checkpoint_every=50steps", "--verbose=0"),
]
PATIENCE = 1800  # seconds, after which something hangs


class Training:
    """The command, given again until the training has ended."""

    def __init__(self, folder: pathlib.Path, epochs: int):
        self.folder = folder
        self._command = [*COMMAND, f"--epochs={epochs}"]
        self.start()

    def start(self) -> None:
        path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
        self._process = subprocess.Popen(
            self._command,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "screen").open("ab"),
            stderr=subprocess.STDOUT,
        )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self, victim: str) -> bool:
        """Whether there was such a process to kill."""
        if victim == "supervisor":
            self._process.kill()
            self._process.wait()
            time.sleep(1.0)  # Its guard needs a moment for the workers.
            self.start()
            return True
        index = 0 if victim == "chief" else 1
        for pid in _children(self._process.pid):
            if json.loads(_environment(pid)["TF_CONFIG"])["task"]["index"] == index:
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def wait(self) -> int:
        return self._process.wait(timeout=PATIENCE)

    def results(self) -> tuple[bytes, list[dict]]:
        return results.of(self.folder / "out")


def _children(pid: int) -> list[int]:
    """The worker processes of a supervisor, without its guard."""
    text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(p) for p in text.split() if "TF_CONFIG" in _environment(int(p))]


def _environment(pid: int) -> dict[str, str]:
    try:
        data = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode()
    except OSError:  # It has ended.
        return {}
    return dict(e.partition("=")[::2] for e in data.split("\0") if e)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, disturbed = pathlib.Path(folder, "alone"), pathlib.Path(folder, "killed")
        alone.mkdir()
        disturbed.mkdir()
        began = time.monotonic()
        left_alone = Training(alone, given.epochs)
        assert left_alone.wait() == 0, (alone / "screen").read_text()
        undisturbed = time.monotonic() - began
        began = time.monotonic()
        training = Training(disturbed, given.epochs)
        kills = dict.fromkeys(("chief", "worker", "supervisor"), 0)
        while sum(kills.values()) < given.kills:
            time.sleep(chance.uniform(0.5, 25.0))
            if training.has_ended:
                break
            victim = chance.choice(list(kills))
            kills[victim] += training.kill(victim)
        assert training.wait() == 0, (disturbed / "screen").read_text()
        seconds = time.monotonic() - began
        same = training.results() == left_alone.results()
    count = sum(kills.values())
    print(f"kills: {count}, of them {kills}")
    print(f"same weights and metrics, bit for bit: {same}")
    print(
        f"{seconds:.0f} s, left alone {undisturbed:.0f} s: "
        f"{(seconds - undisturbed) / max(count, 1):.1f} s lost a kill"
    )
    return 0 if same and count == given.kills else 1


if __name__ == "__main__":
    sys.exit(main())
