"""`fit` of tf_keras, which is Keras 2: a custom step as its own guides write it."""

import tensorflow as tf
import tf_keras as keras

from benchmarks.contenders.fitting import Fit


def prepare(workload, strategy, fused):
    with strategy.scope():
        model = _step_class(workload)(*workload.network(keras))
        model.compile(optimizer=workload.optimizer(keras), steps_per_execution=fused)
    return Fit(keras, model, workload)


def _step_class(workload) -> type:
    class CustomModel(keras.Model):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_tracker = keras.metrics.Mean(name="loss")
            self.metric = workload.metric(keras)
            # Under a strategy, Keras 2 leaves the mean over rows to the step.
            self.loss_fn = workload.loss(keras, reduction="none")

        def train_step(self, data):
            x, y = data

            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                losses = self.loss_fn(y, y_pred)
                loss = tf.nn.compute_average_loss(
                    losses, global_batch_size=workload.batch_size
                )

            trainable_vars = self.trainable_variables
            gradients = tape.gradient(loss, trainable_vars)
            self.optimizer.apply_gradients(zip(gradients, trainable_vars, strict=True))

            self.loss_tracker.update_state(losses)
            self.metric.update_state(y, y_pred)
            return {
                "loss": self.loss_tracker.result(),
                self.metric.name: self.metric.result(),
            }

        @property
        def metrics(self):
            return [self.loss_tracker, self.metric]

    return CustomModel
