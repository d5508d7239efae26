"""Orbit's `Controller` and `StandardTrainer`, with Keras 2 as the Model Garden uses it.

A loop of Orbit is an execution here. Metrics are read once an epoch, as by the others;
a trainer that returns them from `train_loop_end` would read them after each loop.
"""

import orbit
import tensorflow as tf
import tf_keras as keras


def prepare(workload, strategy, fused):
    with strategy.scope():
        trainer = _Trainer(workload, strategy)
        controller = orbit.Controller(
            global_step=trainer.optimizer.iterations,
            trainer=trainer,
            strategy=strategy,
            steps_per_loop=fused,
        )

    def train():
        for metric in trainer.metrics:
            metric.reset_state()
        steps = trainer.optimizer.iterations.numpy() + workload.epoch_steps
        controller.train(steps, checkpoint_at_completion=False)
        return {metric.name: float(metric.result()) for metric in trainer.metrics}

    return train


class _Trainer(orbit.StandardTrainer):
    def __init__(self, workload, strategy):
        dataset = strategy.experimental_distribute_dataset(workload.dataset())
        super().__init__(dataset)
        self.workload = workload
        self.strategy = strategy
        self.model = keras.Model(*workload.network(keras))
        self.optimizer = workload.optimizer(keras)
        self.optimizer.build(self.model.trainable_variables)
        self.loss_fn = workload.loss(keras, reduction="none")
        self.metrics = [keras.metrics.Mean(name="loss"), workload.metric(keras)]

    def train_step(self, iterator):
        self.strategy.run(self._replica_step, args=(next(iterator),))

    def _replica_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self.model(x, training=True)
            losses = self.loss_fn(y, y_pred)
            loss = tf.nn.compute_average_loss(
                losses, global_batch_size=self.workload.batch_size
            )
        variables = self.model.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self.metrics[0].update_state(losses)
        self.metrics[1].update_state(y, y_pred)
