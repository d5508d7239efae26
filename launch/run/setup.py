"""Creates the parts of a run: settings, strategy, data, model, callbacks."""

import dataclasses
import pathlib
import types
from typing import Any

import keras
import tensorflow as tf
from ml_collections import ConfigDict

import distfit
from distfit import datasets, models
from launch.cluster.discovery import Cluster
from launch.errors import UsageError
from launch.run import rendezvous
from launch.settings import configuration, targets
from launch.settings.flags import CommandLine
from launch.watchdog import progress
from launch.watchdog.stall import Watchdog


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
        train, validation: data as `fit()` takes it; validation may be None.
        callbacks: those of the reference model and of `--callbacks`.
        writes: whether this worker writes the results.
    """

    config: ConfigDict
    strategy: tf.distribute.Strategy
    model: keras.Model
    train: Any
    validation: Any
    callbacks: list[keras.callbacks.Callback]
    writes: bool

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.config.workdir)


def prepare(
    command_line: CommandLine,
    model: str,
    cluster: Cluster | None,
    watchdog: Watchdog,
) -> Run:
    """Creates the parts of a run.

    Args:
        command_line: the parsed command line.
        model: the resolved model, a name or a path.
        cluster: the cluster that this process is a worker of, if any.
        watchdog: notes the stages of the preparation.

    Raises:
        UsageError: the input is invalid.
    """
    config, reference = resolve(command_line, model)
    # The strategy first: virtual devices must be created before TensorFlow is used.
    strategy = _create_strategy(config, cluster, watchdog)
    watchdog.note(0, progress.MAKING_DATA)
    set_dtype_policy(config)
    keras.utils.set_random_seed(config.seed)  # Data are the same on all workers.
    train, validation = load_data(config, reference)
    watchdog.note(0, progress.BUILDING)
    with strategy.scope():
        built = build_model(config, reference)
    callbacks = make_callbacks(config, reference)
    writes = distfit.is_chief(strategy)
    return Run(config, strategy, built, train, validation, callbacks, writes)


def resolve(
    command_line: CommandLine, model: str
) -> tuple[ConfigDict, types.ModuleType | None]:
    """Returns the settings, and the module of the reference model, if it is one."""
    reference = None if targets.is_path(model) else models.get(model)
    model_defaults = reference.get_config() if reference else None
    return configuration.resolve(command_line, model_defaults), reference


def _create_strategy(
    config: ConfigDict, cluster: Cluster | None, watchdog: Watchdog
) -> tf.distribute.Strategy:
    if cluster is not None:
        rendezvous.wait_for_others(cluster, lambda phase: watchdog.note(0, phase))
        watchdog.note(0, progress.JOINING)
    with watchdog.in_native_call():
        return distfit.create_strategy(
            config.strategy, virtual_devices=config.virtual_devices
        )


def set_dtype_policy(config: ConfigDict) -> None:
    """Sets the dtype policy of `--mixed_precision`, for models built afterwards."""
    if config.mixed_precision is not None:
        keras.config.set_dtype_policy(config.mixed_precision)


def load_data(
    config: ConfigDict, reference: types.ModuleType | None
) -> tuple[Any, Any]:
    """Returns `(train, validation)`.

    Raises:
        UsageError: the function of --dataset does not return a pair.
    """
    adapted = getattr(reference, "data", None)  # the dataset in the model's own form
    if targets.is_path(config.dataset):
        data = targets.load_function("dataset", config.dataset)(config)
    elif adapted:
        data = adapted(config)
    else:
        data = datasets.load(config.dataset, config)
    if not isinstance(data, tuple) or len(data) != 2:
        raise UsageError(
            "The dataset is not a pair (train, validation). "
            f"Received: {type(data).__name__} from --dataset={config.dataset}. "
            "Return the two, each as fit() takes it; validation may be None."
        )
    return data


def make_callbacks(
    config: ConfigDict, reference: types.ModuleType | None
) -> list[keras.callbacks.Callback]:
    """Returns the callbacks of the reference model and those of `--callbacks`.

    Raises:
        UsageError: the function of --callbacks does not return callbacks.
    """
    made = getattr(reference, "callbacks", None)
    callbacks = list(made(config, config.workdir)) if made else []
    if config.callbacks is None:
        return callbacks
    given = targets.load_function("callbacks", config.callbacks)(config)
    if not isinstance(given, list | tuple) or not all(
        isinstance(each, keras.callbacks.Callback) for each in given
    ):
        raise UsageError(
            "The function of --callbacks does not return a list of Keras callbacks. "
            f"Received: {given!r} from --callbacks={config.callbacks}. Return such a "
            "list, which may be empty."
        )
    return [*callbacks, *given]


def build_model(config: ConfigDict, reference: types.ModuleType | None) -> keras.Model:
    """Returns the compiled model. Call it in the scope of a strategy.

    Raises:
        UsageError: the function of --model does not return a compiled model.
    """
    if reference:
        build = reference.build
    else:
        build = targets.load_function("model", config.model)
    keras.utils.set_random_seed(config.seed)
    model = build(config)
    if not isinstance(model, keras.Model) or not model.compiled:
        raise _no_model(config, model)
    for name in ("steps_per_execution", "jit_compile"):
        if config[name] is not None:
            setattr(model, name, config[name])
    return model


def _no_model(config: ConfigDict, model: Any) -> UsageError:
    return UsageError(
        "The function of --model does not return a compiled keras.Model. "
        f"Received: {type(model).__name__} from --model={config.model}. "
        "Call compile() on the model before you return it."
    )
