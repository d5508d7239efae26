"""The low-level custom `train_step` of Keras's guide, trained by `fit`.

https://keras.io/guides/custom_train_step_in_tensorflow/. Loss and metric are those of
the workload, and the base class is a parameter.
"""

import keras
import tensorflow as tf

from benchmarks.contenders.fitting import Fit


def step_class(base: type, workload) -> type:
    """The guide's class, derived from `base`."""

    class CustomModel(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_tracker = keras.metrics.Mean(name="loss")
            self.metric = workload.metric(keras)
            self.loss_fn = workload.loss(keras)

        def train_step(self, data):
            x, y = data

            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.loss_fn(y, y_pred)

            trainable_vars = self.trainable_variables
            gradients = tape.gradient(loss, trainable_vars)
            self.optimizer.apply(gradients, trainable_vars)

            self.loss_tracker.update_state(loss)
            self.metric.update_state(y, y_pred)
            return {
                "loss": self.loss_tracker.result(),
                self.metric.name: self.metric.result(),
            }

        @property
        def metrics(self):
            return [self.loss_tracker, self.metric]

    return CustomModel


def prepare(base: type, workload, strategy, fused):
    """Prepares `fit` of the guide's class."""
    with strategy.scope():
        model = step_class(base, workload)(*workload.network(keras))
        model.compile(optimizer=workload.optimizer(keras), steps_per_execution=fused)
    return Fit(keras, model, workload)
