"""A Slurm cluster of two nodes on this machine, each in a network namespace of its own.

Its programs are Debian's. Where they are not installed, apt fetches the packages, of
3.5 MB, and they are unpacked into a temporary folder: nothing is installed, no service
starts. Keys, state, logs and ports are the cluster's own. Nodes are named by their
addresses, as their names are not resolved.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import marked
import namespaces
import pytest

PACKAGES = ("munge", "slurm-client", "slurmctld", "slurmd")
_SECONDS = 60  # for apt, and for the daemons to start

# More CPUs than this machine has, for configs/cluster/slurm.sbatch to fit on. No GPUs:
# Slurm 22.05 would not take made-up ones here (`Gres=(null)`, whatever gres.conf said).
_CONFIGURATION = """
ClusterName=distfit-test
SlurmctldHost={host}({addresses[0]})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
PluginDir={plugins}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=2
SlurmctldPort=6817
SlurmdPort=6818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName={addresses[0]} NodeHostname={host} NodeAddr={addresses[0]} CPUs=32
NodeName={addresses[1]} NodeHostname={host} NodeAddr={addresses[1]} CPUs=32
PartitionName=all Nodes=ALL Default=YES
"""


@dataclasses.dataclass(frozen=True)
class Programs:
    """The paths of Slurm's programs and libraries, below `root`."""

    root: pathlib.Path

    @property
    def libraries(self) -> pathlib.Path:
        (plugins,) = self.root.glob("usr/lib/*/slurm-wlm")
        return plugins.parent

    @property
    def plugins(self) -> pathlib.Path:
        return self.libraries / "slurm-wlm"

    def daemon(self, name: str) -> str:
        return str(self.root / "usr" / "sbin" / name)

    def environment(self) -> dict[str, str]:
        folders = [str(self.root / "usr" / name) for name in ("bin", "sbin")]
        # The tests' own Python first: the batch script starts `python`.
        path = [str(pathlib.Path(sys.executable).parent), *folders, os.environ["PATH"]]
        libraries = f"{self.libraries}:{self.plugins}"
        return {"PATH": ":".join(path), "LD_LIBRARY_PATH": libraries}


class Slurm:
    """A running cluster; `run` starts one of Slurm's commands on its first node."""

    def __init__(self, hosts: namespaces.Hosts, environ: dict[str, str]) -> None:
        self._hosts = hosts
        self.environ = environ

    def run(
        self, *command: str, timeout: float, cwd: pathlib.Path | None = None
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            self._hosts.command(0, *command),
            cwd=cwd,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@contextlib.contextmanager
def running(folder: pathlib.Path, **variables: str) -> Iterator[Slurm]:
    """Starts a cluster whose jobs have these variables; skips the test if it cannot."""
    with namespaces.hosts() as hosts:
        programs = _programs(folder)
        own = {**programs.environment(), "SLURM_CONF": str(folder / "slurm.conf")}
        with marked.environment(**own, **variables) as environ:
            cluster = Slurm(hosts, _outside_slurm(environ))
            _write_files(folder, programs)
            with _daemons(cluster, hosts, folder, programs):
                yield cluster
            assert not marked.left(environ, within=10)


def _outside_slurm(environ: dict[str, str]) -> dict[str, str]:
    """Removes the variables of a job that the tests may run in, and TF_CONFIG."""
    kept = ("SLURM_CONF",)
    return {
        name: value
        for name, value in environ.items()
        if name in kept or not name.startswith(("SLURM", "TF_CONFIG"))
    }


def _programs(folder: pathlib.Path) -> Programs:
    if pathlib.Path("/usr/sbin/slurmctld-wlm").exists() and shutil.which("munged"):
        return Programs(pathlib.Path("/"))
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("Slurm is not installed, and there is no apt to fetch it with")
    (folder / "packages").mkdir()
    fetch = (
        "apt-get",
        "install",
        "--download-only",
        "--yes",
        "--no-install-recommends",
    )
    where = ("-o", f"Dir::Cache::archives={folder / 'packages'}")
    # A later minor release may have replaced the one in apt's package lists.
    for command in ([*fetch, *where, *PACKAGES], ["apt-get", "update"]) * 2:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode == 0 and command[1] == "install":
            break
    else:
        pytest.skip(f"apt does not fetch Slurm: {done.stderr.strip()}")
    for package in (folder / "packages").glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)
    return Programs(folder / "root")


def _write_files(folder: pathlib.Path, programs: Programs) -> None:
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    # Nothing above uses cgroups, but Slurm needs a plugin for them that can start.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for name in ("state", *(f"spool-{address}" for address in namespaces.ADDRESSES)):
        (folder / name).mkdir()
    text = _CONFIGURATION.format(
        host=socket.gethostname().partition(".")[0],
        addresses=namespaces.ADDRESSES,
        folder=folder,
        plugins=programs.plugins,
    )
    (folder / "slurm.conf").write_text(text)


@contextlib.contextmanager
def _daemons(
    cluster: Slurm, hosts: namespaces.Hosts, folder: pathlib.Path, programs: Programs
) -> Iterator[None]:
    """Runs the daemons; `marked.environment` kills those that do not end."""
    started: list[subprocess.Popen] = []

    def start(index: int, name: str, *arguments: str) -> None:
        with open(folder / f"{len(started)}-{name}.log", "w") as log:
            command = hosts.command(index, programs.daemon(name), *arguments)
            process = subprocess.Popen(
                command,
                env=cluster.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            started.append(process)

    try:
        # --force: it is in a folder of pytest's, which other users cannot enter.
        start(0, "munged", "--foreground", "--force", *_munge_files(folder))
        _wait(folder, started, (folder / "munge.socket").exists)
        start(0, "slurmctld-wlm", "-D")
        for index, address in enumerate(namespaces.ADDRESSES):
            step_daemon = ("-d", programs.daemon("slurmstepd-wlm"))
            start(index, "slurmd-wlm", "-D", "-N", address, *step_daemon)
        _wait(folder, started, lambda: _idle_nodes(cluster) == 2)
        yield
        cluster.run("scancel", "--user=root", timeout=10)
    finally:
        _end(started)


def _munge_files(folder: pathlib.Path) -> list[str]:
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid"}
    names |= {"seed-file": "seed", "log-file": "log"}
    return [f"--{flag}={folder}/munge.{name}" for flag, name in names.items()]


def _idle_nodes(cluster: Slurm) -> int:
    shown = cluster.run("sinfo", "--noheader", "--Node", "--format=%T", timeout=10)
    return shown.stdout.split().count("idle")


def _wait(folder, started, condition) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        ended = any(process.poll() is not None for process in started)
        if ended or time.monotonic() > deadline:
            logs = [f"{path}:\n{path.read_text()}" for path in folder.glob("*.log")]
            raise RuntimeError("Slurm does not start.\n" + "\n".join(logs))
        time.sleep(0.1)


def _end(started: list[subprocess.Popen]) -> None:
    for process in reversed(started):
        process.terminate()
    for process in started:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
