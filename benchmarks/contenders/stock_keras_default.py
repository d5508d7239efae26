"""`fit` of Keras 3 with the default reduction of `MirroredStrategy`.

It sums over replicas by TensorFlow's collective operations, with which Keras's loop
over the steps of an execution crashes.
"""

import keras
import tensorflow as tf

from benchmarks.contenders import guide


def prepare(workload, strategy, fused):
    strategy = tf.distribute.MirroredStrategy(strategy.extended.worker_devices)
    return guide.prepare(keras.Model, workload, strategy, fused)
