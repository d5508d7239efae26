"""`fit` of Keras 3, with the same strategy as the others."""

import keras

from benchmarks.contenders import guide


def prepare(workload, strategy, fused):
    return guide.prepare(keras.Model, workload, strategy, fused)
