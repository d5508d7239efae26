"""Records each step of a run: logs, gradients, weights, states, slots."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from distfit import _keras
from distfit.training import checks
from distfit.training.logs import as_numbers
from distfit.verification.batches import Batch

# Evaluating and predicting come first: they are compared at the initial weights.
ORDER = ("evaluate", "predict", "fit")

# Arrays by `(check, label)`; the checks are "gradient", "weight", "state" and "slot".
Values = dict[tuple[str, str], np.ndarray]


@dataclasses.dataclass
class Step:
    """The results of one step.

    Attributes:
        batch: The global batch.
        logs: The logs after the step.
        before: The values before a training step.
        values: The values after it, on the first replica, and its gradients.
        copies: By the same keys, the arrays of each replica.
    """

    batch: Batch
    logs: dict[str, np.ndarray]
    before: Values = dataclasses.field(default_factory=dict)
    values: Values = dataclasses.field(default_factory=dict)
    copies: dict[tuple[str, str], list[np.ndarray]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass
class Recording:
    """The results of a run.

    Attributes:
        fit, evaluate: A `Step` for each batch.
        predict: All outputs, flat; None if not run.
        errors: By mode, the exception that ended it.
    """

    fit: list[Step] = dataclasses.field(default_factory=list)
    evaluate: list[Step] = dataclasses.field(default_factory=list)
    predict: list[np.ndarray] | None = None
    errors: dict[str, Exception] = dataclasses.field(default_factory=dict)


class Variables:
    """Everything that steps change, under the names that a report uses.

    Args:
        model: A built model.
        labels: Names by check, taken from the first instance of the model and used for
            all instances; filled in by the first.
    """

    def __init__(self, model: keras.Model, labels: dict[str, list[str]]):
        self._strategy = model.distribute_strategy
        weights = {id(v) for v in model.variables}
        slots = [
            v
            for optimizer in checks.optimizers_of(model)
            for v in optimizer.variables
            if id(v) not in weights
        ]
        metrics = [v for m in checks.metrics_of(model) for v in m.variables]
        state = [*model.non_trainable_variables, *metrics]
        self._by_check = {
            "weight": _named(model.trainable_variables),
            "state": _named(state) + _raw_variables(model),
            "slot": _named(slots),
        }
        self.labels = labels
        for check, variables in self._by_check.items():
            known = labels.setdefault(check, [])
            for name, _ in variables[len(known) :]:
                known.append(_distinct(name, known))

    def __iter__(self) -> Iterator[tuple[str, str, Any]]:
        """`(check, label, tf.Variable)` of each."""
        for check, variables in self._by_check.items():
            labelled = zip(self.labels[check], variables, strict=False)
            for label, (_, variable) in labelled:
                yield check, label, variable

    def copies(self) -> dict[tuple[str, str], list[np.ndarray]]:
        """The value of each on every replica; only the sum if they have parts."""
        found = {}
        for check, label, variable in self:
            parts = self._strategy.experimental_local_results(variable)
            copies = [to_numpy(part) for part in parts]
            found[check, label] = [_sum(copies)] if _is_sum(variable) else copies
        return found

    def values(self) -> Values:
        """The value of each, on the first replica."""
        return {key: copies[0] for key, copies in self.copies().items()}

    def restore(self, values: Values) -> None:
        """Sets the variables in `values`, on all replicas.

        Raises:
            ValueError: if a variable has another shape here.
        """
        for check, label, variable in self:
            value = values.get((check, label))
            if value is None:
                continue
            if tuple(variable.shape) != value.shape:
                raise ValueError(
                    "The function that makes the model must make the same one each "
                    f"time. Received: {label!r} of shape {value.shape}, then of shape "
                    f"{tuple(variable.shape)}."
                )
            first, *others = self._strategy.experimental_local_results(variable)
            first.assign(tf.cast(value.copy(), first.dtype))
            for copy in others:
                other = np.zeros_like(value) if _is_sum(variable) else value.copy()
                copy.assign(tf.cast(other, copy.dtype))


class Gradients:
    """Records the gradients that the steps of a model pass to its optimizers.

    Create it before the steps are traced.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._strategy = model.distribute_strategy
        self._recorded: dict[tuple[int, int], Any] = {}
        optimizers = checks.optimizers_of(model)
        names = _distinct_names([optimizer.name for optimizer in optimizers])
        self._prefixes = [f"{n}: " if len(names) > 1 else "" for n in names]
        for index, optimizer in enumerate(optimizers):
            self._listen(index, optimizer)

    def _listen(self, index: int, optimizer: keras.optimizers.Optimizer) -> None:
        apply = optimizer.apply

        def listening(grads, trainable_variables=None):
            grads = list(grads)
            given = trainable_variables
            of = list(self._model.trainable_variables if given is None else given)
            for gradient, variable in zip(grads, of, strict=False):
                if gradient is not None:
                    recorder = self._recorder(index, variable)
                    recorder.assign_add(tf.convert_to_tensor(gradient))
            return apply(grads, None if given is None else of)

        object.__setattr__(optimizer, "apply", listening)

    def _recorder(self, index: int, variable: keras.Variable) -> tf.Variable:
        """A variable to which each replica adds its part of a gradient."""
        key = (index, id(variable))
        if key not in self._recorded:
            with tf.init_scope(), self._strategy.scope():
                self._recorded[key] = tf.Variable(
                    tf.zeros(variable.shape, variable.dtype),
                    trainable=False,
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.SUM,
                )
        return self._recorded[key]

    def clear(self) -> None:
        """Discards what was recorded."""
        for recorder in self._recorded.values():
            for copy in self._strategy.experimental_local_results(recorder):
                copy.assign(tf.zeros_like(copy))

    def move_to(self, step: Step, labels: dict[str, list[str]]) -> None:
        """Moves what was recorded since the last call to `step`."""
        trainable = zip(self._model.trainable_variables, labels["weight"], strict=False)
        label_of = {id(variable): label for variable, label in trainable}
        for (index, variable), recorder in self._recorded.items():
            copies = self._strategy.experimental_local_results(recorder)
            if variable in label_of:
                label = self._prefixes[index] + label_of[variable]
                parts = [to_numpy(copy).astype("float64") for copy in copies]
                step.values["gradient", label] = _sum(parts)
        self.clear()


def log_arrays(logs: Any) -> dict[str, np.ndarray]:
    """Logs as arrays by name."""
    flat = as_numbers(logs or {})
    return {name: np.asarray(value, "float64") for name, value in flat.items()}


def flat_arrays(outputs: Any) -> list[np.ndarray]:
    """The arrays of a structure of predictions, composite ones taken apart."""
    arrays: list[np.ndarray] = []
    for part in tree.flatten(outputs):
        if isinstance(part, tf.RaggedTensor):
            arrays += [
                part.flat_values.numpy(),
                *(splits.numpy() for splits in part.nested_row_splits),
            ]
        elif isinstance(part, tf.SparseTensor):
            arrays += [part.indices.numpy(), part.values.numpy()]
        else:
            arrays.append(np.asarray(part))
    small = "bfloat16"  # NumPy does not treat it as a number.
    return [a.astype("float32") if a.dtype.name == small else a for a in arrays]


def to_numpy(variable: tf.Variable) -> np.ndarray:
    """The value, in a type native to NumPy.

    A copy: TensorFlow shares memory with arrays, and updates variables in place.
    """
    value = variable.numpy()
    return value.astype("float32" if variable.dtype == tf.bfloat16 else value.dtype)


def _is_sum(variable: tf.Variable) -> bool:
    """Whether the value of a variable is the sum of its parts on the replicas."""
    on_read = variable.synchronization == tf.VariableSynchronization.ON_READ
    return on_read and variable.aggregation == tf.VariableAggregation.SUM


def _sum(parts: list[np.ndarray]) -> np.ndarray:
    return np.sum(parts, axis=0, dtype=parts[0].dtype)


def _named(variables) -> list[tuple[str, tf.Variable]]:
    distinct = {id(v): v for v in variables}.values()
    return [(v.path, _keras.underlying(v)) for v in distinct]


def _raw_variables(model: keras.Model) -> list[tuple[str, tf.Variable]]:
    """Attributes of layers that are variables of TensorFlow, unknown to Keras."""
    return [
        (f"{layer.name}/{name}", value)
        for layer in _keras.layers_of(model)
        for name, value in vars(layer).items()
        if isinstance(value, tf.Variable)
    ]


def _distinct_names(names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        found.append(_distinct(name, found))
    return found


def _distinct(name: str, known: list[str]) -> str:
    """The name, with a number if it is taken already."""
    candidates = (f"{name} ({n})" if n > 1 else name for n in itertools.count(1))
    return next(candidate for candidate in candidates if candidate not in known)
