"""A hand-written loop as in TensorFlow's guides: the least that such a loop costs.

It is correct for full batches and a plain loss, and checks neither: each replica
divides its loss by the size of the global batch, and its metrics see its own rows.
"""

import keras
import tensorflow as tf


def prepare(workload, strategy, fused, make_optimizer=None):
    dataset = strategy.experimental_distribute_dataset(workload.dataset())
    iterator = iter(dataset)
    with strategy.scope():
        model = keras.Model(*workload.network(keras))
        optimizer = (make_optimizer or workload.optimizer)(keras)
        optimizer.build(model.trainable_variables)
        loss_fn = workload.loss(keras, reduction="none")
        metrics = [keras.metrics.Mean(name="loss"), workload.metric(keras)]

    def replica_step(data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            losses = loss_fn(y, y_pred)
            loss = tf.reduce_sum(losses) / workload.batch_size
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        # Keras sums them over the replicas.
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        metrics[0].update_state(losses)
        metrics[1].update_state(y, y_pred)

    @tf.function
    def run_one(iterator):
        strategy.run(replica_step, args=(next(iterator),))

    @tf.function
    def run_many(iterator, steps):
        for _ in tf.range(steps):
            strategy.run(replica_step, args=(next(iterator),))

    def train():
        for metric in metrics:
            metric.reset_state()
        for _ in range(workload.epoch_steps // fused):
            if fused == 1:
                run_one(iterator)
            else:
                run_many(iterator, tf.constant(fused))
        return {metric.name: float(metric.result()) for metric in metrics}

    return train
