"""The strategy: how many replicas, on which devices."""

from collections.abc import Sequence

import tensorflow as tf

NAMES = ("auto", "one_device", "mirrored")


def create_strategy(
    name: str = "auto",
    *,
    devices: Sequence[str] | None = None,
    virtual_devices: int = 0,
) -> tf.distribute.Strategy:
    """Creates the strategy under whose `scope()` a model is built.

    Args:
        name: `"one_device"`; `"mirrored"`: one replica on each device of this host; or
            `"auto"`: mirrored where there is more than one device to use.
        devices: The devices to use, e.g. `["GPU:0", "GPU:2"]`. Defaults to every GPU,
            or to the CPU's virtual devices where there is no GPU.
        virtual_devices: If positive, splits the CPU into this many virtual devices and
            uses them, to try a job of many replicas on a machine without GPUs.

    Returns:
        A `tf.distribute.Strategy`.

    Raises:
        ValueError: for an unknown name, a negative number of virtual devices, or
            `devices` together with `virtual_devices`.
        RuntimeError: if TensorFlow is initialised already with fewer virtual devices.
    """
    if name not in NAMES:
        raise ValueError(
            f"Unknown strategy. Received: name={name!r}. "
            f"Use one of {', '.join(map(repr, NAMES))}."
        )
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


def make_virtual_devices(count: int) -> list[str]:
    """Splits the CPU into `count` virtual devices and returns their names.

    TensorFlow fixes its devices when it runs its first operation, so this must come
    before it; asking again for as many or fewer is fine.

    Raises:
        ValueError: for a count below 1.
        RuntimeError: if TensorFlow is initialised already with fewer.
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
                f"TensorFlow is initialised already with {max(len(existing), 1)} CPU "
                f"device(s). Received: virtual_devices={count}. Create the strategy "
                "before any other use of TensorFlow in the process."
            ) from error
    return [f"CPU:{i}" for i in range(count)]


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that reports and writes."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.cluster_spec().jobs:
        return True
    return resolver.task_type == "chief" or (
        resolver.task_id == 0 and "chief" not in resolver.cluster_spec().jobs
    )


def check_created_in_scope(strategy: tf.distribute.Strategy, what: str, variables):
    """Raises a `ValueError` if one of the variables belongs to another strategy."""
    for variable in variables:
        value = getattr(variable, "value", variable)
        if not strategy.extended.variable_created_in_scope(value):
            raise ValueError(
                f"{what} was built outside the scope of the model's strategy. "
                f"Received: variable {variable.path!r} and strategy "
                f"{type(strategy).__name__} with {strategy.num_replicas_in_sync} "
                "replica(s). Create it inside `with strategy.scope():`."
            )


def _cross_device_ops(devices: Sequence[str]) -> tf.distribute.CrossDeviceOps | None:
    """How replicas exchange tensors: TensorFlow's choice, but for virtual devices.

    For those it takes ring collectives, whose groups clash as soon as a process has
    strategies of different sizes. A sum on one device is faster there, too.
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
