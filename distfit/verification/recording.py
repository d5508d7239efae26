"""Runs a model on one device or on replicas, and records what every step did."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf
from keras import tree

from distfit import _keras, build, data, loop, metrics, probe
from distfit.collectives import current_share
from distfit.model import Model
from distfit.verification.batches import Batch, Source
from distfit.verification.models import as_distfit_model
from distfit.verification.streams import ReplicaStreams, inlined_functions

MODES = ("fit", "evaluate", "predict")
# Of a weight, to see how a model responds: it stands for all sums of a step, the terms
# of which N replicas add up in another order.
_ROUNDINGS = 8
# Evaluating and predicting come first: they are compared at the initial weights.
_ORDER = ("evaluate", "predict", "fit")


@dataclasses.dataclass
class Step:
    """What one step left behind.

    Attributes:
        batch: The global batch.
        logs: The logs after the step, over all steps so far.
        values: Arrays by `(check, label)`; the checks are "gradient", "weight", "state"
            and "slot".
        local: By the same keys, the arrays of each replica.
    """

    batch: Batch
    logs: dict[str, np.ndarray]
    values: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)
    local: dict[tuple[str, str], list[np.ndarray]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass
class Recording:
    """What a run left behind.

    Attributes:
        initial: The values before the first step, like `Step.values`.
        fit, evaluate: A `Step` for each batch.
        predict: All outputs, flat; None if not run.
        errors: By mode, what it ended with.
    """

    initial: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)
    fit: list[Step] = dataclasses.field(default_factory=list)
    evaluate: list[Step] = dataclasses.field(default_factory=list)
    predict: list[np.ndarray] | None = None
    errors: dict[str, Exception] = dataclasses.field(default_factory=dict)


class Variables:
    """Everything that steps change, under the names that a report uses.

    Args:
        model: A built model.
        optimizers: Its optimizers; their slots count once they are built.
        labels: The names of the same model's first instance: Keras numbers the layers
            of later ones differently, in the same order.
    """

    def __init__(self, model: keras.Model, optimizers: list, labels: dict | None):
        self._strategy = model.distribute_strategy
        weights = {id(v) for v in model.variables}
        counted = {id(v) for m in metrics.all_of(model) for v in m.variables}
        state = [v for v in model.non_trainable_variables if id(v) not in counted]
        slots = [v for o in optimizers for v in o.variables if id(v) not in weights]
        self._by_check = {
            "weight": [(v.path, v.value) for v in model.trainable_variables],
            "state": [(v.path, v.value) for v in state] + _raw_variables(model),
            "slot": [(v.path, v.value) for v in slots],
        }
        self.labels = labels if labels is not None else {}
        for check, variables in self._by_check.items():
            known = self.labels.setdefault(check, [])
            for name, _ in variables[len(known) :]:
                known.append(_distinct(name, known))

    def __iter__(self) -> Iterator[tuple[str, str, Any]]:
        """`(check, label, tf.Variable)` of each."""
        for check, variables in self._by_check.items():
            for label, (_, variable) in zip(
                self.labels[check], variables, strict=False
            ):
                yield check, label, variable

    def copies(self) -> dict[tuple[str, str], list[np.ndarray]]:
        """The value of each, on every replica; one value for a sum of parts."""
        found = {}
        for check, label, variable in self:
            parts = self._strategy.experimental_local_results(variable)
            copies = [_to_numpy(part) for part in parts]
            if variable.aggregation == tf.VariableAggregation.SUM:
                copies = [np.sum(copies, axis=0)]
            found[check, label] = copies
        return found

    def values(self) -> dict[tuple[str, str], np.ndarray]:
        """The value of each, on the first replica."""
        return {key: copies[0] for key, copies in self.copies().items()}

    def restore(self, values: dict[tuple[str, str], np.ndarray]) -> None:
        """Sets those that `values` has, on all replicas.

        Raises:
            ValueError: if one has another shape here.
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
            for copy in self._strategy.experimental_local_results(variable):
                copy.assign(tf.cast(value.copy(), copy.dtype))


class Gradients:
    """Records the gradients that the steps of a model hand to its optimizers.

    The copies of a recording variable belong to one replica each; their sum is what the
    optimizer is to apply.
    """

    def __init__(self, model: keras.Model, optimizers: list, labels: dict):
        self._strategy = model.distribute_strategy
        self._recorded: dict[str, tf.Variable] = {}
        self._seen: set[str] = set()
        names_of_first = labels.setdefault("optimizer", _distinct_names(optimizers))
        for name, optimizer in zip(names_of_first, optimizers, strict=True):
            prefix = f"{name}: " if len(optimizers) > 1 else ""
            names = [prefix + label for label in labels["weight"]]
            self._listen(optimizer, names, model.trainable_variables)

    def _listen(self, optimizer, names, variables) -> None:
        name_of = {id(v): name for v, name in zip(variables, names, strict=True)}
        with self._strategy.scope():
            for name, variable in zip(names, variables, strict=True):
                self._recorded[name] = tf.Variable(
                    tf.zeros(variable.shape, variable.dtype),
                    trainable=False,
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.SUM,
                )
        apply = optimizer.apply

        def listening(grads, trainable_variables=None):
            grads, share = list(grads), current_share()
            of = variables if trainable_variables is None else trainable_variables
            of = list(of)
            for gradient, variable in zip(grads, of, strict=False):
                name = name_of.get(id(variable))
                if gradient is not None and name is not None:
                    self._seen.add(name)
                    gradient = tf.convert_to_tensor(gradient)
                    if share is not None:
                        gradient = share.counted(gradient)
                    self._recorded[name].assign_add(gradient)
            return apply(grads, None if trainable_variables is None else of)

        object.__setattr__(optimizer, "apply", listening)

    def move_to(self, step: Step) -> None:
        """Hands what was recorded since the last time to `step`."""
        for name in sorted(self._seen):
            copies = self._strategy.experimental_local_results(self._recorded[name])
            local = [_to_numpy(copy).astype("float64") for copy in copies]
            step.local["gradient", name] = local
            step.values["gradient", name] = np.sum(local, axis=0)
            for copy in copies:
                copy.assign(tf.zeros_like(copy))


class OneDevice:
    """The reference: the steps of a model, called as one would call them by hand.

    Args:
        make_model: Returns the compiled model.
        source: The data.
    """

    def __init__(self, make_model: Callable, source: Source):
        self.strategy = tf.distribute.get_strategy()
        self.source = source
        model = make_model()
        _check_compiled(model)
        self.derives_from_distfit = isinstance(model, Model)
        self.model = as_distfit_model(model)
        self._unseeded = keras.random.SeedGenerator(0)
        self._functions: dict[Any, dict[str, Callable]] = {}

    def prepare(self) -> Exception | None:
        """Builds what a step needs, or returns what that failed with."""
        try:
            plan = train_driver(self.model, self.source).plan
        except Exception as error:  # It is reported.
            return error
        self.plans = {"fit": plan}
        self.optimizers = build.optimizers_of(self.model)
        self.variables = Variables(self.model, self.optimizers, None)
        self.labels = self.variables.labels
        self.gradients = Gradients(self.model, self.optimizers, self.labels)
        self.initial = self.variables.values()
        return None

    def record(
        self,
        batches: list[Batch],
        streams: tuple[int, bool] | None = None,
        perturbation: int | None = None,
    ) -> Recording:
        """Runs the batches from the initial weights.

        Args:
            batches: The global batches.
            streams: `(num_replicas, grouped)`: draw what so many replicas draw.
            perturbation: If given, the seed of small errors of the initial weights.
        """
        initial = self.initial
        if perturbation is not None:
            initial = self._perturbed(perturbation)
        recording = Recording(initial=initial)
        run = {"fit": self._fit, "evaluate": self._evaluate, "predict": self._predict}
        for mode in _ORDER:
            self.variables.restore(initial)
            self._unseeded.state.assign([0, 0])
            self.model.reset_metrics()
            try:
                run[mode](recording, self._compiled(mode, streams), batches)
            except Exception as error:  # It is reported, or the mode is left out.
                recording.errors[mode] = error
        return recording

    def _perturbed(self, seed: int) -> dict[tuple[str, str], np.ndarray]:
        generator = np.random.default_rng(seed)
        error = _ROUNDINGS * _precision(self.model)

        def off(value):
            sign = generator.choice([-1.0, 1.0], value.shape)
            return (value * (1 + error * sign)).astype(value.dtype)

        return {
            (check, label): off(value) if check == "weight" else value
            for (check, label), value in self.initial.items()
        }

    def _compiled(self, mode: str, streams) -> Callable:
        functions = self._functions.setdefault(streams, {})
        if mode not in functions:
            step = {"fit": "train", "evaluate": "test", "predict": "predict"}[mode]
            step_function = getattr(self.model, f"{step}_step")
            functions[mode] = self._compile(step_function, streams)
        return functions[mode]

    def _compile(self, step: Callable, streams) -> Callable:
        def run(batch):
            with contextlib.ExitStack() as stack:
                stack.enter_context(_keras.global_seed_generator(self._unseeded))
                if streams is not None:
                    number, grouped = streams
                    composed = ReplicaStreams(number, data.num_rows(batch), grouped)
                    stack.enter_context(inlined_functions())
                    stack.enter_context(composed.drawing())
                return step(batch)

        return tf.function(run, autograph=False, input_signature=[self.source.spec])

    def _fit(self, recording, train, batches) -> None:
        logs = _RunningLogs(self.plans["fit"])
        for batch in batches:
            step = Step(batch, logs.after(train(batch.tensors), batch.rows))
            self.gradients.move_to(step)
            step.values |= self.variables.values()
            recording.fit.append(step)

    def _evaluate(self, recording, test, batches) -> None:
        if "evaluate" not in self.plans:
            self.plans["evaluate"] = probe.probe(
                self.model, self.model.test_step, self.source.spec, self.strategy
            )
        logs = _RunningLogs(self.plans["evaluate"])
        for batch in batches:
            step = Step(batch, logs.after(test(batch.tensors), batch.rows))
            recording.evaluate.append(step)

    def _predict(self, recording, predict, batches) -> None:
        outputs = [predict(batch.tensors) for batch in batches]
        joined = tree.map_structure(
            lambda *parts: _keras.to_numpy(_keras.join_batches(list(parts))), *outputs
        )
        recording.predict = _flat_arrays(joined)


class Replicas:
    """The same model on N replicas, run by `fit`, `evaluate` and `predict`.

    Args:
        make_model: Returns the compiled model; called in the scope of the strategy.
        reference: The same model on one device.
        strategy: The strategy.
        stock: Whether to leave a `keras.Model` to Keras's own `fit`.
    """

    def __init__(
        self,
        make_model: Callable,
        reference: OneDevice,
        strategy: tf.distribute.Strategy,
        stock: bool = False,
    ):
        self._reference = reference
        self._strategy = strategy
        self._stock = stock
        with strategy.scope():
            model = make_model()
            self.model = model if stock else as_distfit_model(model)
        self.model.steps_per_execution = 1
        self.model.jit_compile = False  # XLA draws other random numbers.

    def record(self, batches: list[Batch]) -> Recording:
        """Runs the batches from the initial weights of the reference."""
        recording = Recording(initial=self._reference.initial)
        try:
            self._build()
        except Exception as error:
            recording.errors["fit"] = error
            return recording
        dataset = self._reference.source.dataset(batches)
        run = {"fit": self._fit, "evaluate": self._evaluate, "predict": self._predict}
        for mode in _ORDER:
            self._variables().restore(self._reference.initial)
            try:
                run[mode](recording, dataset, batches)
            except Exception as error:
                recording.errors[mode] = error
        return recording

    def _build(self) -> None:
        source, labels = self._reference.source, self._reference.labels
        build.build_layers(self.model, source.spec)
        if not self._stock:
            driver = train_driver(self.model, source)
            if driver.plan.seeds is not None:
                driver.plan.seeds.state.assign([0, 0])
        self._optimizers = build.optimizers_of(self.model)
        self._gradients = Gradients(self.model, self._optimizers, labels)

    def _variables(self) -> Variables:
        return Variables(self.model, self._optimizers, self._reference.labels)

    def _fit(self, recording, dataset, batches) -> None:
        def keep(step: Step) -> None:
            self._gradients.move_to(step)
            step.local |= self._variables().copies()
            step.values |= {
                k: v[0] for k, v in step.local.items() if k[0] != "gradient"
            }
            recording.fit.append(step)

        kept = _Keeper(batches, keep)
        self.model.fit(dataset, verbose=0, callbacks=[kept])

    def _evaluate(self, recording, dataset, batches) -> None:
        kept = _Keeper(batches, recording.evaluate.append)
        self.model.evaluate(dataset, verbose=0, callbacks=[kept])

    def _predict(self, recording, dataset, batches) -> None:
        recording.predict = _flat_arrays(self.model.predict(dataset, verbose=0))


class _Keeper(keras.callbacks.Callback):
    """Hands a `Step` with the logs of each batch to `keep`."""

    def __init__(self, batches: list[Batch], keep: Callable[[Step], None]):
        super().__init__()
        self._batches = batches
        self._keep = keep

    def _end(self, index: int, logs) -> None:
        arrays = {name: np.asarray(v, "float64") for name, v in (logs or {}).items()}
        self._keep(Step(self._batches[index], arrays))

    def on_train_batch_end(self, batch, logs=None):
        self._end(batch, logs)

    def on_test_batch_end(self, batch, logs=None):
        self._end(batch, logs)


class _RunningLogs:
    """Logs over all steps so far, from what each step returned.

    The result of a metric is that already; of anything else it is the mean over rows.
    """

    def __init__(self, plan: probe.Plan):
        self._of_metrics = {*plan.tracked, *plan.derived}
        self._sums: dict[str, Any] = {}
        self._rows = 0

    def after(self, logs: dict, rows: int) -> dict[str, np.ndarray]:
        self._rows += rows
        running = {}
        for name, value in metrics.flat_logs(logs).items():
            value = np.asarray(value, "float64")
            if name not in self._of_metrics:
                self._sums[name] = self._sums.get(name, 0.0) + rows * value
                value = self._sums[name] / self._rows
            running[name] = value
        return running


def train_driver(model: keras.Model, source: Source):
    """Builds everything that training needs, and returns the driver of its steps."""
    spec = source.spec
    dataset = tf.data.Dataset.from_generator(lambda: iter(()), output_signature=spec)
    return loop.step_driver(model, "train", data.GlobalBatches(dataset))


def _check_compiled(model: Any) -> None:
    if not isinstance(model, keras.Model) or not model.compiled:
        raise ValueError(
            "The function that makes the model must return a compiled `keras.Model`. "
            f"Received: {type(model).__name__}. Call `compile()` on the model, and "
            "return it."
        )


def _distinct_names(optimizers: list) -> list[str]:
    names: list[str] = []
    for optimizer in optimizers:
        names.append(_distinct(optimizer.name, names))
    return names


def _distinct(name: str, known: list[str]) -> str:
    """The name, with a number if it is known already."""
    candidates = (f"{name} ({n})" if n > 1 else name for n in itertools.count(1))
    return next(candidate for candidate in candidates if candidate not in known)


def _raw_variables(model: keras.Model) -> list[tuple[str, tf.Variable]]:
    """Attributes of layers that are variables of TensorFlow, unknown to Keras."""
    return [
        (f"{layer.name}/{name}", value)
        for layer in _keras.layers_of(model)
        for name, value in vars(layer).items()
        if isinstance(value, tf.Variable)
    ]


def _precision(model: keras.Model) -> float:
    """The largest relative rounding error of what the model computes with."""
    used = {layer.compute_dtype for layer in _keras.layers_of(model)}
    used |= {variable.dtype for variable in model.trainable_variables}
    floats = [dtype for dtype in map(tf.as_dtype, used) if dtype.is_floating]
    return max(float(ml_dtypes.finfo(d.as_numpy_dtype).eps) for d in floats)


def _to_numpy(variable: tf.Variable) -> np.ndarray:
    """The value, in a type that NumPy knows itself.

    A copy: TensorFlow shares memory with arrays, and updates variables in place.
    """
    value = variable.numpy()
    return value.astype("float32" if variable.dtype == tf.bfloat16 else value.dtype)


def _flat_arrays(outputs: Any) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    for part in tree.flatten(outputs):
        if isinstance(part, tf.RaggedTensor):
            arrays += [
                part.flat_values.numpy(),
                *(s.numpy() for s in part.nested_row_splits),
            ]
        elif isinstance(part, tf.SparseTensor):
            arrays += [part.indices.numpy(), part.values.numpy()]
        else:
            arrays.append(np.asarray(part))
    small = "bfloat16"  # Which NumPy does not know as a number.
    return [a.astype("float32") if a.dtype.name == small else a for a in arrays]
