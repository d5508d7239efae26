"""Makes all workers agree before and while they train, or raises an error.

With a single worker there is nothing to agree on, and nothing here does anything.
"""

import inspect
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import keras

from distfit import _keras
from distfit.cluster import workers
from distfit.training import checks, state
from distfit.training.driver import StepDriver
from distfit.training.global_batches import GlobalBatches

STOP_FLAGS = {
    "train": "stop_training",
    "test": "stop_evaluating",
    "predict": "stop_predicting",
}
_SETTINGS = ("run_eagerly", "jit_compile", "steps_per_execution")


def check_same_program(
    model: keras.Model, place: str, facts: Callable[[], dict[str, Any]]
) -> None:
    """Checks that the workers run the same program.

    Args:
        model: The model, with its steps built.
        place: The method that is called.
        facts: Returns those of its arguments and data that must be the same. It is
            not called with a single worker.

    Raises:
        ValueError: on every worker, naming what differs.
    """
    team = workers.of(model.distribute_strategy)
    if team.count == 1:
        return
    alike = {**facts(), **facts_of_model(model), "code": _code(model)}
    team.check_alike(place, alike)


def check_same_batches(model: keras.Model, kind: str, batches: GlobalBatches) -> None:
    """Checks, after an epoch, that all workers have read the same global batches.

    Raises:
        ValueError: on every worker, where the first batch of the epoch differs.
    """
    if batches.first_batch is not None and not batches.others_may_have_rows:
        workers.of(model.distribute_strategy).check_alike(
            f"the data of {kind}",
            {"first batch of the epoch": batches.first_batch},
            "Shuffle with a seed, as in `dataset.shuffle(1000, seed=1)`, do not shard, "
            "or give a function `fit(dataset_fn)` that returns each worker's shard.",
        )


def agree_on_state(
    model: keras.Model, place: str, drivers: Iterable[StepDriver]
) -> None:
    """Gives all workers the state of the chief, where theirs differs.

    The state is the variables of the model, of its optimizers and of its steps.
    """
    team = workers.of(model.distribute_strategy)
    if team.count == 1:
        return
    variables = state.variables_of(model, drivers).values()
    workers.agree_on_values(team, f"{place}, with its state", variables)


def first_epoch(model: keras.Model, initial_epoch: int) -> int:
    """The epoch to begin with, which a callback of the chief may have restored."""
    own = _keras.initial_epoch(model) or initial_epoch
    return workers.of(model.distribute_strategy).from_chief("fit(), its epoch", own)


def settle(model: keras.Model, kind: str, place: str) -> None:
    """Applies one worker's stop, and the chief's learning rates, to all workers."""
    team = workers.of(model.distribute_strategy)
    if team.count == 1:
        return
    flag = STOP_FLAGS[kind]
    rates = checks.learning_rates(model)
    values = [float(rate) for rate in rates]
    told = team.tell(f"{place} in {kind}", (bool(getattr(model, flag)), values))
    setattr(model, flag, any(stop for stop, _ in told))
    for rate, value, chiefs in zip(rates, values, told[0][1], strict=True):
        if value != chiefs:
            rate.assign(chiefs)


def facts_of_model(model: keras.Model) -> dict[str, Any]:
    """The layers, variables, losses, metrics and optimizers of a model."""
    layers = [_layer(layer) for layer in _keras.layers_of(model)]
    variables = [f"{v.name} {tuple(v.shape)} {v.dtype}" for v in model.variables]
    losses = [_described(loss) for loss in keras.tree.flatten(model.loss)]
    watched = [part for m in checks.metrics_of(model) for part in _keras.parts_of(m)]
    kinds = [
        f"{type(m).__name__} {[tuple(v.shape) for v in m.variables]}" for m in watched
    ]
    optimizers = [_settings_of(o) for o in checks.optimizers_of(model, inner=True)]
    return {
        "class of the model": type(model).__qualname__,
        **{name: getattr(model, name) for name in _SETTINGS},
        **_numbered("layer", layers),
        **_numbered("variable", variables),
        **_numbered("loss", losses),
        **_numbered("metric", kinds),
        **_numbered("optimizer", optimizers),
    }


def _layer(layer: keras.layers.Layer) -> Any:
    """The class of a layer and, of those of Keras, settings such as the activation.

    Not what callbacks may change: whether it is trained.
    """
    name = type(layer).__name__
    of_keras = type(layer).__module__.partition(".")[0] == "keras"
    if isinstance(layer, keras.Model) or not of_keras:
        return name
    settings = _plain(_config_of(layer))
    changing = {"name", "trainable"}
    return {k: v for k, v in settings.items() if k not in changing and v is not None}


def _numbered(name: str, facts: list) -> dict[str, Any]:
    """Facts one by one, so that only the first that differs is shown."""
    return {f"{name} {i}": fact for i, fact in enumerate(facts)}


def _settings_of(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """The settings that must be the same.

    Not its learning rate, if that is a variable: it has the chief's, or a checkpoint's.
    """
    config = _config_of(optimizer)
    settings = _plain(config)
    settings.pop("name", None)  # Keras counts the optimizers that a process has made.
    settings.pop("learning_rate", None)
    if isinstance(schedule := config.get("learning_rate"), dict):
        inner = schedule["config"]  # A function has its name there.
        inner = _plain(inner) if isinstance(inner, dict) else inner
        settings["schedule"] = [schedule["class_name"], inner]
    return settings


def _described(loss: Any) -> Any:
    """A loss as a value that is the same in every process."""
    if isinstance(loss, keras.losses.Loss):
        settings = _plain(_config_of(loss))
        settings.pop("name", None)  # Counted, too.
        return settings
    return getattr(loss, "__qualname__", loss if isinstance(loss, str) else type(loss))


def _config_of(thing: Any) -> dict[str, Any]:
    """The class of an object and its settings, if it tells them."""
    try:
        config = thing.get_config()
    except NotImplementedError:  # Such as that of a schedule of the user's own.
        config = {}
    return {"class": thing.__class__.__name__, **config}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Those of some settings that are plain values."""
    plain = bool | int | float | str | None
    return {k: v for k, v in sorted(config.items()) if isinstance(v, plain)}


def _code(model: keras.Model) -> str:
    """Checksum of the source of distfit and of the model's classes."""
    files = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
    for cls in type(model).__mro__:
        if cls.__module__.partition(".")[0] not in ("builtins", "distfit", "keras"):
            files += _source_file(cls)
    sources = b"".join(file.read_bytes() for file in files)
    return f"keras {keras.__version__}, files {workers.checksum(sources):08x}"


def _source_file(cls: type) -> list[pathlib.Path]:
    try:
        path = pathlib.Path(inspect.getsourcefile(cls) or "")
    except (TypeError, OSError):  # A class of an interactive session.
        return []
    return [path] if path.is_file() else []
