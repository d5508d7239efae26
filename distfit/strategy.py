"""The strategy: how many replicas, on which devices of which workers."""

import json
import os
import signal
import threading
from collections.abc import Sequence

import tensorflow as tf

from distfit import _keras
from distfit.cluster import workers

NAMES = ("auto", "one_device", "mirrored", "multi_worker")


def create_strategy(
    name: str = "auto",
    *,
    devices: Sequence[str] | None = None,
    virtual_devices: int = 0,
) -> tf.distribute.Strategy:
    """Creates the strategy under whose `scope()` a model is built.

    Args:
        name: `"one_device"`; `"mirrored"`: one replica on each device of this host;
            `"multi_worker"`: the devices of all workers that the environment variable
            TF_CONFIG lists; or `"auto"`: multi_worker if TF_CONFIG lists several
            workers, else mirrored if there is more than one device. A worker has a
            replica on each of its GPUs, or one on its CPU.
        devices: The devices to use, e.g. `["GPU:0", "GPU:2"]`. Defaults to every GPU,
            or to the CPU's virtual devices if there is no GPU. Not for multi_worker,
            which uses CUDA_VISIBLE_DEVICES.
        virtual_devices: If positive, splits the CPU into this many virtual devices and
            uses them, to try a job with many replicas on a machine without GPUs.

    Returns:
        A `tf.distribute.Strategy`.

    Raises:
        ValueError: for an unknown name, a negative number of virtual devices,
            `devices` together with `virtual_devices`, or either with multi_worker.
        RuntimeError: if TensorFlow is already initialised, with fewer virtual devices
            or before a multi_worker strategy.
    """
    if name not in NAMES:
        raise ValueError(
            f"Unknown strategy. Received: name={name!r}. "
            f"Use one of {', '.join(map(repr, NAMES))}."
        )
    if name == "auto" and _listed_workers() > 1:
        name = "multi_worker"
    if name == "multi_worker":
        return _multi_worker(devices, virtual_devices)
    if devices and virtual_devices:
        raise ValueError(
            "Name the devices or ask for virtual ones, not both. Received: "
            f"devices={devices}, virtual_devices={virtual_devices}."
        )
    if virtual_devices:
        devices = make_virtual_devices(virtual_devices)
    devices = list(devices) if devices else _default_devices()
    if name == "one_device" or (name == "auto" and len(devices) == 1):
        return tf.distribute.OneDeviceStrategy(devices[0])
    return tf.distribute.MirroredStrategy(devices, _cross_device_ops(devices))


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the worker that reports and writes, or the only one."""
    return workers.of(strategy).is_chief


def wait_for_all(strategy: tf.distribute.Strategy) -> None:
    """Blocks until every worker has called it.

    Call it at the end of a program: workers that still train fail when one exits.
    """
    workers.of(strategy).tell("wait_for_all()")


def make_virtual_devices(count: int) -> list[str]:
    """Splits the CPU into `count` virtual devices and returns their names.

    TensorFlow fixes its devices when it runs its first operation, so call this before;
    later calls may ask for as many or fewer.

    Raises:
        ValueError: for a count below 1.
        RuntimeError: if TensorFlow is already initialised with fewer.
    """
    if count < 1:
        raise ValueError(
            "The number of virtual devices must be at least 1. "
            f"Received: virtual_devices={count}."
        )
    cpu = tf.config.list_physical_devices("CPU")[0]
    existing = tf.config.get_logical_device_configuration(cpu) or []
    if len(existing) < count:
        configuration = [tf.config.LogicalDeviceConfiguration()] * count
        try:
            tf.config.set_logical_device_configuration(cpu, configuration)
        except RuntimeError as error:
            raise RuntimeError(
                f"TensorFlow is already initialised with {max(len(existing), 1)} CPU "
                f"device(s). Received: virtual_devices={count}. Create the strategy "
                "before any other use of TensorFlow in the process."
            ) from error
    return [f"CPU:{i}" for i in range(count)]


def _multi_worker(devices, virtual_devices) -> tf.distribute.Strategy:
    if devices or virtual_devices:
        raise ValueError(
            "A multi_worker strategy takes no devices: a worker has a replica on each "
            "GPU in CUDA_VISIBLE_DEVICES, or one on its CPU. Received: "
            f"devices={devices}, virtual_devices={virtual_devices}. Start more workers."
        )
    if _listed_workers() == 0:
        raise ValueError(
            "The environment variable TF_CONFIG lists no workers. Received: "
            f"TF_CONFIG={os.environ.get('TF_CONFIG')!r}. Set it on each worker to "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", '
            '"index": i}}, or start the program with `python -m launch`.'
        )
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise RuntimeError(
            "A multi_worker strategy must precede any other TensorFlow operation. "
            "Received: a multi_worker strategy in a process that has used TensorFlow "
            f"({error}). Create the strategy first."
        ) from error
    _restore_sigterm()
    _keras.keep_initial_values_local(strategy)
    workers.agree_on_randomness(workers.of(strategy), "create_strategy()")
    return strategy


def _restore_sigterm() -> None:
    """Restores the SIGTERM handler, which TensorFlow has just replaced by its own.

    Otherwise SIGTERM would not stop the worker.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _listed_workers() -> int:
    """The number of workers in TF_CONFIG, 0 if it lists none."""
    cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
    return sum(len(cluster.get(job, ())) for job in ("chief", "worker"))


def _cross_device_ops(devices: Sequence[str]) -> tf.distribute.CrossDeviceOps | None:
    """How replicas exchange tensors: TensorFlow's default, except for virtual devices.

    There the default is ring collectives, whose groups clash as soon as a process has
    strategies of different sizes. Summing on one device is also faster.
    """
    if all("CPU" in device.upper() for device in devices):
        return tf.distribute.ReductionToOneDevice()
    return None


def _default_devices() -> list[str]:
    for kind in ("GPU", "CPU"):
        devices = tf.config.list_logical_devices(kind)
        if devices:
            return [f"{kind}:{i}" for i in range(len(devices))]
    raise RuntimeError("TensorFlow sees neither a GPU nor a CPU.")
