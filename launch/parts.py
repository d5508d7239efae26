"""Makes what a run consists of: settings, strategy, data, model, callbacks."""

import dataclasses
import pathlib
import types
from typing import Any

import keras
import tensorflow as tf
from ml_collections import ConfigDict

import distfit
from distfit import datasets, models
from launch import configuration, targets
from launch.errors import UsageError
from launch.flags import CommandLine


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
        train, validation: what `fit()` takes; validation may be None.
        callbacks: those that the model brings along.
    """

    config: ConfigDict
    strategy: tf.distribute.Strategy
    model: distfit.Model
    train: Any
    validation: Any
    callbacks: list[keras.callbacks.Callback]

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.config.workdir)


def prepare(command_line: CommandLine, model: str) -> Run:
    """Makes the parts of a run of `model`, a name or a path.

    Raises:
        UsageError: no run can start with what was given.
    """
    reference = None if targets.is_path(model) else models.get(model)
    model_defaults = reference.get_config() if reference else None
    config = configuration.resolve(command_line, model_defaults)
    # The strategy comes first: virtual devices are made before TensorFlow's first use.
    strategy = distfit.create_strategy(
        config.strategy, virtual_devices=config.virtual_devices
    )
    if config.mixed_precision is not None:
        keras.config.set_dtype_policy(config.mixed_precision)
    train, validation = _load_data(config, reference)
    built = _build(config, reference, strategy)
    make_callbacks = getattr(reference, "callbacks", None)
    callbacks = make_callbacks(config, config.workdir) if make_callbacks else []
    return Run(config, strategy, built, train, validation, callbacks)


def _load_data(
    config: ConfigDict, reference: types.ModuleType | None
) -> tuple[Any, Any]:
    adapted = getattr(reference, "data", None)  # the dataset in the model's own form
    if targets.is_path(config.dataset):
        data = targets.load_function("dataset", config.dataset)(config)
    elif adapted:
        data = adapted(config)
    else:
        data = datasets.load(config.dataset, config)
    if not isinstance(data, tuple) or len(data) != 2:
        raise UsageError(
            "The dataset is no pair (train, validation). "
            f"Received: {type(data).__name__} from --dataset={config.dataset}. "
            "Return the two, each as fit() takes it; validation may be None."
        )
    return data


def _build(
    config: ConfigDict,
    reference: types.ModuleType | None,
    strategy: tf.distribute.Strategy,
) -> distfit.Model:
    if reference:
        build = reference.build
    else:
        build = targets.load_function("model", config.model)
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        model = build(config)
    _check_model(config, model)
    for name in ("steps_per_execution", "jit_compile"):
        if config[name] is not None:
            setattr(model, name, config[name])
    return model


def _check_model(config: ConfigDict, model: Any) -> None:
    if not isinstance(model, distfit.Model) or not model.compiled:
        raise UsageError(
            "The function of --model returns no compiled distfit.Model. "
            f"Received: {type(model).__name__} from --model={config.model}. "
            "Derive your class from distfit.Model, and call compile() on the model."
        )
