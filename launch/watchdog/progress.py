"""Progress files of the workers, and which worker the others wait for.

All workers go through the same stages in order: they make the data, build the model and
execute steps. When all have stalled, the others wait for the one that has entered the
fewest stages.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence

from launch import run_files

_WAITING = "waiting "
JOINING = _WAITING + "to join the others"
MAKING_DATA = "making the data"
BUILDING = "building the model"
BEFORE_STEPS = "before the first step"
IN_STEP = "in a step"
BETWEEN_STEPS = "between steps"
# Phases that every worker goes through.
STAGES = (MAKING_DATA, BUILDING, BEFORE_STEPS, IN_STEP)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a worker.

    Attributes:
        worker: its index.
        step: the current step, from 1; outside of steps, the last finished one.
        phase: what it is doing, such as "in a step" or "between steps".
        entered: how many stages it has entered; every execution of steps is one.
        time: when it began this phase, in seconds of `time.time()`.
        alive: when it last wrote this file, which it keeps doing while it is stalled.
        pid: its process id.
        host: the name of its host.
        reading: whether Python code of its input pipeline was running then.
    """

    worker: int
    step: int
    phase: str
    entered: int
    time: float
    alive: float
    pid: int
    host: str
    reading: bool = False

    @property
    def joins(self) -> bool:
        """Whether it waits for workers that have not joined."""
        return self.phase.startswith(_WAITING)

    def __str__(self) -> str:
        if self.phase == IN_STEP:
            return f"in step {self.step}"
        return f"{self.phase} after step {self.step}" if self.step else self.phase


def write(workdir: pathlib.Path, progress: Progress) -> None:
    """Writes `<workdir>/logs/worker-<i>.progress.json`.

    Raises:
        OSError: it cannot be written.
    """
    path = run_files.progress(workdir, progress.worker)
    run_files.write_json(path, dataclasses.asdict(progress), lasts=False)


def read(workdir: pathlib.Path, index: int) -> Progress | None:
    """Returns the progress of a worker; None if its file is missing or malformed."""
    content = run_files.read_json(run_files.progress(workdir, index))
    try:
        return None if content is None else Progress(**content)
    except TypeError:  # not its fields
        return None


def waiting_for(indices: Sequence[int]) -> str:
    """Returns a phase, such as "waiting for workers 1, 2 to join"."""
    return f"{_WAITING}for {_workers(indices)} to join"


def explain(found: Mapping[int, Progress], num_workers: int, silence: float) -> str:
    """Describes which workers hold up the others, once all have stalled.

    Args:
        found: the progress of each worker, as far as it is known.
        num_workers: how many workers there are.
        silence: seconds without a write after which a worker does not respond, counted
            from the latest write of any worker, as clocks of hosts may differ a little.

    Returns:
        A phrase, such as "worker 1 between steps after step 57, while workers 0, 2 wait
        in step 58".
    """
    missing = [i for i in range(num_workers) if i not in found]
    latest = max(each.alive for each in found.values())
    silent = [p for p in found.values() if latest - p.alive > silence]
    fewest = min(p.entered for p in found.values())
    behind = [p for p in found.values() if p.entered == fewest]
    if missing:
        # They may not be to blame: hosts without a shared folder look like this too.
        unknown = f"{_workers(missing)} without a progress file in the working folder"
        return f"{_places(list(found.values()))}, {unknown}"
    if silent:
        which = ", ".join(map(_silent, silent))
        return _with_others(which, [p for p in found.values() if p not in silent])
    if len(behind) < len(found):
        others = [p for p in found.values() if p not in behind]
        return _with_others(_places(behind), others)
    reading = [p for p in behind if p.reading]
    if reading and len(reading) < len(behind):  # Else none, or all, would be to blame.
        others = [p for p in behind if p not in reading]
        return _with_others(f"{_places(reading)}, making its data", others)
    return _places(behind) + (" at the same time" if len(behind) > 1 else "")


def _with_others(which: str, others: Sequence[Progress]) -> str:
    return f"{which}, while {_places(others, ' wait')}" if others else which


def _silent(progress: Progress) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(progress.alive))
    process = f"process {progress.pid} on {progress.host}"
    return f"worker {progress.worker} not responding since {since} ({process})"


def _places(found: Sequence[Progress], verb: str = "") -> str:
    """Lists workers by place: "worker 0 in step 3 and workers 1, 2 saving"."""
    places: dict[str, list[int]] = {}
    for each in sorted(found, key=lambda p: p.worker):
        place = str(each).removeprefix(_WAITING) if verb else str(each)
        places.setdefault(place, []).append(each.worker)
    return " and ".join(
        f"{_workers(who)}{_agreeing(verb, who)} {place}"
        for place, who in places.items()
    )


def _workers(indices: Sequence[int]) -> str:
    name = "worker" if len(indices) == 1 else "workers"
    return f"{name} {', '.join(map(str, indices))}"


def _agreeing(verb: str, who: Sequence[int]) -> str:
    return verb + "s" if verb and len(who) == 1 else verb
