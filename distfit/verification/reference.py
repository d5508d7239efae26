"""The reference: the steps of a model on one device, without distfit.

`train_step`, `test_step` and `predict_step` are called by hand in a `tf.function`, as
stock Keras calls them.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from distfit import _keras
from distfit.partition.tracing import drawing_operations, place_of
from distfit.training import checks
from distfit.training.predictions import joined
from distfit.verification.batches import Batch, Source
from distfit.verification.recording import (
    ORDER,
    Gradients,
    Recording,
    Step,
    Values,
    Variables,
    flat_arrays,
    log_arrays,
)

# Relative errors of the perturbed weights, in rounding errors. They represent all sums
# of a step, whose terms N replicas add up in another order.
_ROUNDINGS = 8
_STEPS = {"evaluate": "test_step", "predict": "predict_step", "fit": "train_step"}


class OneDevice:
    """A model on one device.

    Args:
        make_model: Returns the compiled model.
        source: The data.

    Attributes:
        labels: The names of its variables, by check.
        initial: The values from which every run starts.
    """

    def __init__(self, make_model: Callable[[], keras.Model], source: Source):
        self._source = source
        self.model = make_model()
        self.labels: dict[str, list[str]] = {}
        self.initial: Values = {}
        self._unseeded = keras.random.SeedGenerator(0)
        self._gradients = Gradients(self.model)
        self._functions: dict[str, Callable] = {}
        self._graphs: list[Any] = []
        self._errors: dict[str, Exception] = {}
        self._outside: list[tuple[tf.Variable, Any]] = []

    def prepare(self, batch: Batch) -> Exception | None:
        """Traces the steps, which builds what they need.

        Args:
            batch: A batch to build on if the model runs eagerly.

        Returns:
            The exception that the training step fails with, or None.
        """
        with _keras.global_seed_generator(self._unseeded):
            for mode in reversed(ORDER):  # The training step first, as in `fit()`.
                try:
                    self._functions[mode] = self._compiled(mode, batch)
                except Exception as error:
                    self._errors[mode] = error
        if "fit" in self._errors:
            return self._errors["fit"]
        self._variables = Variables(self.model, self.labels)
        self.initial = self._variables.values()
        self._find_outside()
        self._gradients.clear()
        return None

    def _compiled(self, mode: str, batch: Batch) -> Callable:
        step = getattr(self.model, _STEPS[mode])
        if checks.runs_eagerly(self.model):
            step(batch.tensors)
            return step
        function = self._function(mode)
        self._graphs.append(function.get_concrete_function().graph)
        return function

    def _function(self, mode: str) -> Any:
        step = getattr(self.model, _STEPS[mode])

        def run(batch):
            return step(batch)

        return tf.function(run, autograph=False, input_signature=[self._source.spec])

    def _find_outside(self) -> None:
        """Finds variables of the steps that are not the model's, such as a closure's.

        They may be shared with other instances of the model.
        """
        known = {id(variable) for _, _, variable in self._variables}
        known.add(id(self._unseeded.state.value))
        for graph in self._graphs:
            for variable in graph.variables:
                if id(variable) not in known:
                    known.add(id(variable))
                    self._outside.append((variable, tf.identity(variable)))

    def restore_outside(self) -> None:
        """Gives variables that are not the model's their initial values."""
        for variable, value in self._outside:
            variable.assign(value)

    def record(
        self,
        batches: list[Batch],
        other: Recording | None = None,
        perturbation: int | None = None,
    ) -> Recording:
        """Runs the batches from the initial weights.

        Args:
            batches: The global batches.
            other: If given, each training step after the first starts from the values
                that this recording had before it, so that a difference after a step was
                made by that step.
            perturbation: If given, the seed of small errors in the weights before each
                training step, and before evaluating and predicting.
        """
        starts = [self.initial]
        if other is not None:
            starts += [step.values for step in other.fit[:-1]]
        if perturbation is not None:
            generator = np.random.default_rng(perturbation)
            error = _ROUNDINGS * _precision(self.model)
            starts = [_perturbed(values, generator, error) for values in starts]
        recording = Recording(errors=dict(self._errors))
        run: dict[str, Callable] = {
            "fit": functools.partial(self._fit, starts=starts),
            "evaluate": self._evaluate,
            "predict": self._predict,
        }
        with _keras.global_seed_generator(self._unseeded):
            for mode in ORDER:
                if mode in recording.errors:
                    continue
                self.restore_outside()
                self._variables.restore(starts[0])
                self._unseeded.state.assign([0, 0])
                self.model.reset_metrics()
                try:
                    run[mode](recording, self._fresh(mode), batches)
                except Exception as error:
                    recording.errors[mode] = error
        return recording

    def _fresh(self, mode: str) -> Callable:
        """The function of a step, whose seeded operations start again."""
        draws = any(map(drawing_operations, self._graphs))
        if checks.runs_eagerly(self.model) or not draws:
            return self._functions[mode]
        return self._function(mode)

    def _fit(
        self,
        recording: Recording,
        train: Callable,
        batches: list[Batch],
        starts: list[Values],
    ) -> None:
        before = starts[0]
        for index, batch in enumerate(batches):
            if 0 < index < len(starts):
                before = starts[index]
                self._variables.restore(before)
            step = Step(batch, log_arrays(train(batch.tensors)), before)
            self._gradients.move_to(step, self.labels)
            step.values |= self._variables.values()
            before = step.values
            recording.fit.append(step)

    def _evaluate(self, recording: Recording, test: Callable, batches: list[Batch]):
        for batch in batches:
            step = Step(batch, log_arrays(test(batch.tensors)))
            recording.evaluate.append(step)

    def _predict(self, recording: Recording, predict: Callable, batches: list[Batch]):
        outputs = [predict(batch.tensors) for batch in batches]
        recording.predict = flat_arrays(joined(outputs))

    def unseeded_draws(self) -> list[str]:
        """The user's lines that draw random numbers without a seed."""
        lines = {
            place_of(op.traceback or ()): None
            for graph in self._graphs
            for op in drawing_operations(graph)
            if op.get_attr("seed") == 0 and op.get_attr("seed2") == 0
        }
        return [line for line in lines if line is not None]


def check_compiled(model: Any) -> None:
    """Raises a `ValueError` unless a model can be trained."""
    if not isinstance(model, keras.Model) or not model.compiled:
        raise ValueError(
            "The function that makes the model must return a compiled `keras.Model`. "
            f"Received: {type(model).__name__}. Call `compile()` on the model, and "
            "return it."
        )


def _perturbed(values: Values, generator: np.random.Generator, error: float) -> Values:
    """The values, each weight larger or smaller by a relative error."""

    def off(value):
        sign = generator.choice([-1.0, 1.0], value.shape)
        return (value * (1 + error * sign)).astype(value.dtype)

    return {
        (check, label): off(value) if check == "weight" else value
        for (check, label), value in values.items()
    }


def _precision(model: keras.Model) -> float:
    """The largest relative rounding error of the types that the model computes in."""
    used = {layer.compute_dtype for layer in _keras.layers_of(model)}
    used |= {variable.dtype for variable in model.trainable_variables}
    floats = [dtype for dtype in map(tf.as_dtype, used) if dtype.is_floating]
    return max(float(ml_dtypes.finfo(d.as_numpy_dtype).eps) for d in floats)
