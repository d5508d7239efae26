"""A custom `train_step` around the loss and the metrics of `compile()`.

    python -m launch --model=custom_step

Measured, on 1 and on 2 replicas alike: loss 1.3674, mae 0.9365, val_loss 1.2373
after 3 epochs, in 2 seconds on 2 CPU cores.
"""

import keras
import ml_collections
import tensorflow as tf

import distfit
from distfit.models import regression


@keras.saving.register_keras_serializable(package="distfit")
class CustomStep(distfit.Model):
    """The guide's first model: forward, `compute_loss`, gradients, `apply`, metrics."""

    def train_step(self, data):
        x, y = data

        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)

        trainable_vars = self.trainable_variables
        gradients = tape.gradient(loss, trainable_vars)
        self.optimizer.apply(gradients, trainable_vars)

        # `self.metrics` holds the tracker of the loss next to the compiled metrics.
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {m.name: m.result() for m in self.metrics}


def get_config() -> ml_collections.ConfigDict:
    return regression.default_config(epochs=3)


def build(config: ml_collections.ConfigDict) -> distfit.Model:
    keras.utils.set_random_seed(config.seed)
    inputs = keras.Input(shape=(32,))
    outputs = keras.layers.Dense(1)(inputs)
    model = CustomStep(inputs, outputs)
    model.compile(
        optimizer=keras.optimizers.Adam(config.learning_rate),
        loss="mse",
        metrics=["mae"],
    )
    return model
