"""`distfit.Model`: a `keras.Model` whose steps run on every replica of a strategy."""

from typing import Any

import keras

from distfit import _keras, loop, losses, optimizers


class Model(keras.Model):
    """A `keras.Model` that trains on N replicas with the numbers of one device.

    Write `train_step`, `test_step`, `compute_loss` and the rest as for one device, and
    build the model in the scope of a strategy from `distfit.create_strategy`. Inside a
    step a batch has the rows of this replica, and everything else is that of the global
    batch: the value of a loss, the update of an optimizer, the result of a metric.

    Losses and optimizers that are assigned to attributes or compiled get their
    global-batch form, as Keras wraps lists and dicts to track layers. Subclassed,
    functional (`distfit.Model(inputs, outputs)`) and sequential models
    (`distfit.Sequential`) all work.

    Attributes:
        batch_statistics: `"global"` (default): BatchNormalization normalises with the
            statistics of the global batch. `"local"`: with those of a replica's rows.
        check_finite: Whether steps look for losses that are not finite, as the callback
            `distfit.callbacks.NonFinite` asks them to.
    """

    batch_statistics = "global"
    check_finite = False

    def __new__(cls, *args, **kwargs):
        if cls is Model and _keras.functional_init_arguments(args, kwargs):
            cls = Functional
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args, **kwargs):
        if not isinstance(self, keras.Sequential):
            _become_functional_or_not(self, args, kwargs)
        super().__init__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, adapted(value))

    def fit(
        self,
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
    ) -> keras.callbacks.History:
        """Trains the model. Arguments are those of `keras.Model.fit`.

        `batch_size` is that of the global batch, and a dataset, PyDataset or generator
        gives global batches.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: for data, arguments or objects that cannot be trained, before
                any work.
        """
        arguments = {
            k: v for k, v in locals().items() if k not in ("self", "__class__")
        }
        return loop.fit(self, **arguments)

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        steps=None,
        callbacks=None,
        return_dict=False,
    ):
        """Evaluates the model. Arguments are those of `keras.Model.evaluate`.

        Returns:
            The loss, or a list of the loss and the metrics; a dict if `return_dict`.
        """
        logs = loop.evaluate(
            self,
            x=x,
            y=y,
            batch_size=batch_size,
            verbose=verbose,
            sample_weight=sample_weight,
            steps=steps,
            callbacks=callbacks,
        )
        return logs if return_dict else _keras.in_order_of_metrics(self, logs)

    def predict(self, x, batch_size=None, verbose="auto", steps=None, callbacks=None):
        """Predicts every row, in order. Arguments are those of `keras.Model.predict`.

        Returns:
            NumPy array(s) with a row for each row of `x`.
        """
        return loop.predict(
            self,
            x,
            batch_size=batch_size,
            verbose=verbose,
            steps=steps,
            callbacks=callbacks,
        )

    def train_on_batch(
        self, x, y=None, sample_weight=None, class_weight=None, return_dict=False
    ):
        """Trains on one global batch, as `keras.Model.train_on_batch`."""
        if class_weight is not None:
            sample_weight = _class_weights(y, class_weight, sample_weight)
        logs = loop.train_on_batch(self, _packed(x, y, sample_weight))
        return logs if return_dict else _keras.in_order_of_metrics(self, logs)

    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False):
        """Evaluates one global batch, as `keras.Model.test_on_batch`."""
        logs = loop.test_on_batch(self, _packed(x, y, sample_weight))
        return logs if return_dict else _keras.in_order_of_metrics(self, logs)

    def predict_on_batch(self, x):
        """Predicts one global batch, as `keras.Model.predict_on_batch`."""
        return loop.predict_on_batch(self, x)

    def first_non_finite(self) -> tuple[int, int] | None:
        """Where a loss of this epoch first was NaN or infinite, with `check_finite`.

        Returns:
            `(step, replica)`, steps counted from 1 and replicas from 0, or None.
        """
        return loop.first_non_finite(self)


@keras.saving.register_keras_serializable(package="distfit")
class Functional(Model, _keras.Functional):
    """What `distfit.Model(inputs, outputs)` returns."""


@keras.saving.register_keras_serializable(package="distfit")
class Sequential(Model, keras.Sequential):
    """A `keras.Sequential` that trains like a `distfit.Model`."""


def _become_functional_or_not(model: Model, args, kwargs) -> None:
    """Makes the class of a subclass called with inputs and outputs functional.

    Keras does so by rewriting the bases of that class and of all classes above it, up
    to `keras.Model`: `distfit.Model` itself would become functional, and the next
    subclassed model could not be made. Here only the class itself gets another base.
    """
    cls = type(model)
    if not _keras.functional_init_arguments(args, kwargs):
        return
    if not issubclass(cls, _keras.Functional):
        cls.__bases__ = (*cls.__bases__, _keras.Functional)


def adapted(value: Any) -> Any:
    """The global-batch form of losses and optimizers, also in lists and dicts.

    What holds neither is returned as the very object that it is.
    """
    if type(value) is dict:
        items = {key: adapted(item) for key, item in value.items()}
        return items if any(items[k] is not value[k] for k in value) else value
    if type(value) in (list, tuple):
        new = [adapted(item) for item in value]
        changed = any(a is not b for a, b in zip(new, value, strict=True))
        return type(value)(new) if changed else value
    return optimizers.adapt(losses.adapt(value))


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
