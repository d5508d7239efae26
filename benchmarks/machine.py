"""The machine and the versions that a result belongs to."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform


def facts() -> dict:
    """What the numbers depend on besides the code."""
    packages = ("tensorflow", "keras", "tf_keras", "tf-models-official", "torch")
    return {
        "cpus": os.cpu_count(),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
