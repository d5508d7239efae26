"""Checks of a run's settings, all without importing TensorFlow."""

import math
import pathlib
import re
from collections.abc import Collection

import ml_collections

from launch.cluster.discovery import Cluster
from launch.errors import UsageError
from launch.settings import targets

POLICIES = (
    "float32",
    "float64",
    "bfloat16",
    "float16",
    "mixed_bfloat16",
    "mixed_float16",
)
_NEVER = "never"
# In which file of distfit the values of a setting are, and their name there.
_CHOICES = {
    "mode": ("callbacks/checkpoint.py", "MODES"),
    "on_save_error": ("callbacks/checkpoint.py", "ON_ERROR"),
    "on_non_finite": ("callbacks/non_finite.py", "ACTIONS"),
}
_LARGEST_SEED = 2**32 - 1  # limit of NumPy's legacy generator, which Keras seeds too


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a `UsageError` for the first invalid setting."""
    _check_names(config)
    for name in ("batch_size", "epochs"):
        _check_at_least(config, name, 1)
    for name in ("steps_per_epoch", "steps_per_execution"):
        if config[name] is not None:
            _check_at_least(config, name, 1)
    _check_at_least(config, "virtual_devices", 0)
    _check_at_least(config, "seed", 0, most=_LARGEST_SEED)
    _check_learning_rate(config)
    _check_verbose(config)
    _check_saving(config)
    _check_paths(config)


def moments(config: ml_collections.ConfigDict) -> list[str]:
    """When to save, each as a `Checkpoint` takes it; nothing for "never"."""
    if config.checkpoint_every == _NEVER:
        return []
    return [each.strip() for each in str(config.checkpoint_every).split(",")]


def check_keys(config: ml_collections.ConfigDict, known: Collection[str]) -> None:
    """Raises a `UsageError` if the configuration has keys that nothing would read."""
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise UsageError(
            f"The model {config.model} has no such setting. "
            f"Received: {', '.join(f'{key}={config[key]!r}' for key in unknown)}. "
            f"Its settings are {', '.join(sorted(known))}."
        )


def check_cluster(
    config: ml_collections.ConfigDict, cluster: Cluster | None, num_workers: int | None
) -> None:
    """Raises a `UsageError` for settings that these workers cannot train with.

    Args:
        config: the settings.
        cluster: the cluster that this process is a worker of, if any.
        num_workers: the flag `--num_workers`, which starts a cluster if there is none.
    """
    several = num_workers is not None
    if cluster is not None and cluster.num_workers > 1:
        several = True
    if config.strategy == "multi_worker" and cluster is None and num_workers is None:
        raise UsageError(
            "There is no cluster. Received: --strategy=multi_worker, and no TF_CONFIG. "
            "Give --num_workers=N for workers on this host; on several hosts set "
            "TF_CONFIG, give --workers and --worker_index, or start with srun."
        )
    if config.strategy in ("one_device", "mirrored") and several:
        workers = f"--num_workers={num_workers}" if cluster is None else cluster
        raise UsageError(
            "With this strategy every worker would train alone. "
            f"Received: --strategy={config.strategy}, {workers}. "
            "Give --strategy=multi_worker."
        )
    if config.virtual_devices and (several or config.strategy == "multi_worker"):
        raise UsageError(
            "TensorFlow gives a worker on CPUs exactly one replica. "
            f"Received: --virtual_devices={config.virtual_devices} for workers. "
            "Give --num_workers=N instead, for N replicas."
        )


def _check_names(config: ml_collections.ConfigDict) -> None:
    names = targets.declared
    targets.check("model", config.model, names("models/__init__.py"))
    targets.check_name("strategy", config.strategy, names("strategy.py"))
    if config.mixed_precision is not None:
        targets.check_name("mixed_precision", config.mixed_precision, POLICIES)
    if config.callbacks is not None:
        targets.check_path("callbacks", config.callbacks)
    if config.dataset is not None:
        targets.check("dataset", config.dataset, names("datasets/__init__.py"))
    elif targets.is_path(config.model):
        raise UsageError(
            "A custom model needs a dataset. Received: no --dataset. "
            "Give --dataset=package.module:function, or one of "
            f"{', '.join(names('datasets/__init__.py'))}."
        )


def _check_at_least(
    config: ml_collections.ConfigDict, name: str, least: int, most: int | None = None
) -> None:
    value = config[name]
    if value is None or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(
            f"{name} must be {bounds}. Received: {name}={value}. "
            f"Give --{name} a value in that range."
        )


def _check_learning_rate(config: ml_collections.ConfigDict) -> None:
    rate = config.learning_rate
    if rate is None or not (math.isfinite(rate) and rate > 0):
        raise UsageError(
            "The learning rate must be a positive number. "
            f"Received: learning_rate={rate}. Try 0.001."
        )


def _check_verbose(config: ml_collections.ConfigDict) -> None:
    if config.verbose not in (None, 0, 1, 2):
        raise UsageError(
            f"Unknown verbosity. Received: verbose={config.verbose}. "
            "Give 0 (silent), 1 (a progress bar) or 2 (a line per epoch)."
        )


def _check_saving(config: ml_collections.ConfigDict) -> None:
    every = targets.declared("callbacks/checkpoint.py", "EVERY")
    if not all(re.fullmatch(every, each) for each in moments(config)):
        raise UsageError(
            "--checkpoint_every takes numbers with a unit, separated by commas, or "
            f"{_NEVER} alone. Received: --checkpoint_every={config.checkpoint_every}. "
            f"Give e.g. 100steps, 1epoch, 10min, 30s or {_NEVER}."
        )
    least = targets.declared("training/checkpoint.py", "LEAST_KEPT")
    _check_at_least(config, "keep", least)
    for name, (file, choices) in _CHOICES.items():
        targets.check_name(name, config[name], targets.declared(file, choices))


def _check_paths(config: ml_collections.ConfigDict) -> None:
    data = config.data_dir
    if data not in (None, "download") and not pathlib.Path(data).exists():
        raise UsageError(
            f"No such file or folder. Received: --data_dir={data}. "
            "Give mnist.npz, its folder, or 'download'."
        )
    workdir = pathlib.Path(config.workdir)
    if any(p.exists() and not p.is_dir() for p in (workdir, *workdir.parents)):
        raise UsageError(
            "The working folder is an existing file, or inside one. "
            f"Received: --workdir={workdir}. Give a folder; it is created if needed."
        )
