"""`distfit.Model`, and `fit`, `evaluate` and `predict` for any `keras.Model`."""

import functools
from typing import Any

import keras

from distfit import _keras
from distfit.training import fitting, loop
from distfit.training.logs import in_order_of_metrics


def fit(
    model: keras.Model,
    x=None,
    y=None,
    batch_size=None,
    epochs=1,
    verbose="auto",
    callbacks=None,
    validation_split=0.0,
    validation_data=None,
    shuffle=True,
    class_weight=None,
    sample_weight=None,
    initial_epoch=0,
    steps_per_epoch=None,
    validation_steps=None,
    validation_batch_size=None,
    validation_freq=1,
    resume_from=None,
) -> keras.callbacks.History:
    """Trains a model of any class. Arguments are those of `keras.Model.fit`.

    Build and compile the model in the scope of a strategy, e.g. that of
    `distfit.create_strategy`, and write its `train_step` for one device. `batch_size`
    is the size of the global batch; a dataset, PyDataset or generator yields global
    batches.

    Returns:
        A `keras.callbacks.History`.

    Raises:
        ValueError: before any work, for data, arguments or objects that cannot be
            trained.
    """
    return fitting.fit(**locals())


def evaluate(
    model: keras.Model,
    x=None,
    y=None,
    batch_size=None,
    verbose="auto",
    sample_weight=None,
    steps=None,
    callbacks=None,
    return_dict=False,
) -> Any:
    """Evaluates a model of any class. Arguments are those of `keras.Model.evaluate`.

    Returns:
        The loss, or a list of the loss and the metrics; a dict if `return_dict`.
    """
    logs = loop.evaluate(
        model,
        x=x,
        y=y,
        batch_size=batch_size,
        verbose=verbose,
        sample_weight=sample_weight,
        steps=steps,
        callbacks=callbacks,
    )
    return logs if return_dict else in_order_of_metrics(model, logs)


def predict(
    model: keras.Model,
    x,
    batch_size=None,
    verbose="auto",
    steps=None,
    callbacks=None,
) -> Any:
    """Predicts every row, in order. Arguments are those of `keras.Model.predict`.

    Returns:
        NumPy array(s) with a row for each row of `x`.
    """
    return loop.predict(
        model,
        x,
        batch_size=batch_size,
        verbose=verbose,
        steps=steps,
        callbacks=callbacks,
    )


class Model(keras.Model):
    """A `keras.Model` whose `fit`, `evaluate` and `predict` are distfit's.

    Write `train_step`, `test_step`, `compute_loss` and the rest as for one device, and
    build the model in the scope of a strategy from `distfit.create_strategy`. Inside a
    step the batch is the global batch.

    Subclassed, functional (`distfit.Model(inputs, outputs)`) and sequential models
    (`distfit.Sequential`) all work.
    """

    def __new__(cls, *args, **kwargs):
        if cls is Model and _is_functional(args, kwargs):
            cls = Functional
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args, **kwargs):
        if not isinstance(self, keras.Sequential):
            _become_functional_or_not(self, args, kwargs)
        super().__init__(*args, **kwargs)

    @functools.wraps(fit)
    def fit(self, *args, **kwargs):
        return fit(self, *args, **kwargs)

    @functools.wraps(evaluate)
    def evaluate(self, *args, **kwargs):
        return evaluate(self, *args, **kwargs)

    @functools.wraps(predict)
    def predict(self, *args, **kwargs):
        return predict(self, *args, **kwargs)

    def train_on_batch(
        self, x, y=None, sample_weight=None, class_weight=None, return_dict=False
    ):
        """Trains on one global batch, as `keras.Model.train_on_batch`."""
        if class_weight is not None:
            sample_weight = _class_weights(y, class_weight, sample_weight)
        logs = loop.train_on_batch(self, _packed(x, y, sample_weight))
        return logs if return_dict else in_order_of_metrics(self, logs)

    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False):
        """Evaluates one global batch, as `keras.Model.test_on_batch`."""
        logs = loop.test_on_batch(self, _packed(x, y, sample_weight))
        return logs if return_dict else in_order_of_metrics(self, logs)

    def predict_on_batch(self, x):
        """Predicts one global batch, as `keras.Model.predict_on_batch`."""
        return loop.predict_on_batch(self, x)


@keras.saving.register_keras_serializable(package="distfit")
class Functional(Model, _keras.Functional):
    """The class of `distfit.Model(inputs, outputs)`."""


@keras.saving.register_keras_serializable(package="distfit")
class Sequential(Model, keras.Sequential):
    """A `keras.Sequential` that trains like a `distfit.Model`."""


def _become_functional_or_not(model: Model, args, kwargs) -> None:
    """Makes a subclass functional if it is called with inputs and outputs.

    Keras does so by rewriting the bases of that class and of all classes above it, up
    to `keras.Model`: `distfit.Model` itself would become functional, and the next
    subclassed model could not be built. Here only the class itself gains a base.
    """
    cls = type(model)
    if not _is_functional(args, kwargs):
        return
    if not issubclass(cls, _keras.Functional):
        cls.__bases__ = (*cls.__bases__, _keras.Functional)


def _is_functional(args: tuple, kwargs: dict) -> bool:
    """Whether a model is called with inputs and outputs, as Keras decides it."""
    return (
        len(args) == 2
        or (len(args) == 1 and "outputs" in kwargs)
        or {"inputs", "outputs"} <= kwargs.keys()
    )


def _class_weights(y, class_weight, sample_weight):
    if sample_weight is not None:
        raise ValueError(
            "Arguments `sample_weight` and `class_weight` cannot be specified at the "
            f"same time. Received: sample_weight={sample_weight}, "
            f"class_weight={class_weight}"
        )
    return _keras.class_weight_to_sample_weights(y, class_weight)


def _packed(x, y, sample_weight):
    return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
