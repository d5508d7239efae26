"""What all workers have in common before and while they train: agreed, or an error.

With a single worker there is nobody to agree with, and nothing here does anything.
"""

import inspect
import pathlib
from collections.abc import Iterable
from typing import Any

import keras

from distfit import _keras, build, workers
from distfit.data import GlobalBatches
from distfit.driver import StepDriver

STOP_FLAGS = {
    "train": "stop_training",
    "test": "stop_evaluating",
    "predict": "stop_predicting",
}
_SETTINGS = ("run_eagerly", "jit_compile", "steps_per_execution", "batch_statistics")


def check_alike(
    model: keras.Model,
    place: str,
    facts: dict[str, Any],
    batches: GlobalBatches,
    validation: GlobalBatches | None = None,
) -> None:
    """Checks that the workers run the same program.

    Args:
        model: The model, with its steps built.
        place: The method that is called.
        facts: Its arguments that must be the same.
        batches, validation: Its data.

    Raises:
        ValueError: on every worker, naming what differs.
    """
    team = workers.of(model.distribute_strategy)
    if team.count == 1:
        return
    data = {f"{name} of the data": fact for name, fact in batches.facts().items()}
    if validation is not None:
        facts_of = validation.facts().items()
        data |= {f"{name} of the validation data": fact for name, fact in facts_of}
    facts = {**facts, **data, **_facts_of_model(model), "code": _code(model)}
    team.check_alike(place, facts)


def agree_on_state(
    model: keras.Model, place: str, drivers: Iterable[StepDriver]
) -> None:
    """Gives all workers the state of the chief, where theirs differs.

    It is made of the model's variables, and of what its steps hold beside them.
    """
    team = workers.of(model.distribute_strategy)
    if team.count == 1:
        return
    variables = [*model.variables, *(v for d in drivers for v in d.own_variables)]
    once = {id(v): v for v in variables}.values()
    workers.agree_on_values(team, f"{place}, with its state", once)


def first_epoch(model: keras.Model, initial_epoch: int) -> int:
    """The epoch to begin with, which a callback of the chief may have restored."""
    own = _keras.initial_epoch(model) or initial_epoch
    return workers.of(model.distribute_strategy).from_chief("fit(), its epoch", own)


def settle(model: keras.Model, kind: str, place: str) -> None:
    """Makes a stop that one worker asks for, and the chief's learning rates, all's."""
    team = workers.of(model.distribute_strategy)
    if team.count == 1:
        return
    flag = STOP_FLAGS[kind]
    rates = _learning_rates(model)
    values = [float(rate) for rate in rates]
    told = team.tell(f"{place} in {kind}", (bool(getattr(model, flag)), values))
    setattr(model, flag, any(stop for stop, _ in told))
    for rate, value, chiefs in zip(rates, values, told[0][1], strict=True):
        if value != chiefs:
            rate.assign(chiefs)


def _learning_rates(model: keras.Model) -> list[keras.Variable]:
    """Those that can be set: a schedule is the same everywhere."""
    optimizers = build.optimizers_of(model)
    parts = [part for optimizer in optimizers for part in _keras.with_inner(optimizer)]
    rates = (getattr(part, "learning_rate", None) for part in parts)
    return list({id(r): r for r in rates if isinstance(r, keras.Variable)}.values())


def _facts_of_model(model: keras.Model) -> dict[str, Any]:
    layers = [type(layer).__name__ for layer in _keras.layers_of(model)]
    variables = [f"{v.name} {tuple(v.shape)} {v.dtype}" for v in model.variables]
    optimizers = [_settings_of(o) for o in build.optimizers_of(model)]
    return {
        "class of the model": type(model).__qualname__,
        **{name: getattr(model, name) for name in _SETTINGS},
        **_numbered("layer", layers),
        **_numbered("variable", variables),
        **_numbered("optimizer", optimizers),
    }


def _numbered(name: str, facts: list) -> dict[str, Any]:
    """Facts one by one, so that only the first that differs is shown."""
    numbered = {f"{name} {i}": fact for i, fact in enumerate(facts)}
    return {f"number of {name}s": len(facts), **numbered}


def _settings_of(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """What it was made with, but for the learning rate, which is the chief's."""
    config = {"class": type(optimizer).__name__, **optimizer.get_config()}
    plain = bool | int | float | str | None
    return {
        name: value
        for name, value in sorted(config.items())
        if isinstance(value, plain) and name != "learning_rate"
    }


def _code(model: keras.Model) -> str:
    """What tells the versions that the workers have of distfit and of the model."""
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    for cls in type(model).__mro__:
        if cls.__module__.partition(".")[0] not in ("builtins", "distfit", "keras"):
            files += _source_file(cls)
    sources = b"".join(file.read_bytes() for file in files)
    return f"keras {keras.__version__}, files {workers.checksum(sources):08x}"


def _source_file(cls: type) -> list[pathlib.Path]:
    try:
        path = pathlib.Path(inspect.getsourcefile(cls) or "")
    except TypeError:  # A class of an interactive session.
        return []
    return [path] if path.is_file() else []
