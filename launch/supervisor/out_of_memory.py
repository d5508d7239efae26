"""How many processes the kernel has killed here because memory ran out.

Linux counts this for each control group (cgroup). The counts before and after a run
show whether a worker that was killed by SIGKILL had run out of memory.
"""

import pathlib
from collections.abc import Iterator


def kills(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Returns the kills in this process's control group so far; None if unknown.

    Args:
        root: where /proc and /sys are.
    """
    for path in _counters(root):
        try:
            lines = path.read_text().splitlines()
        except OSError:  # other cgroup version, or a host path seen in a container
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdigit():
                return int(value)
    return None


def _counters(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the files that may hold the count, the most specific first."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:  # "4:memory:/path" in version 1, "0::/path" in version 2
        _, controllers, path = line.split(":", 2)
        own = path.strip("/")
        if "memory" in controllers.split(","):
            yield mounted / "memory" / own / "memory.oom_control"
        elif not controllers:
            yield mounted / own / "memory.events"
    yield mounted / "memory.events"
    yield mounted / "memory/memory.oom_control"
