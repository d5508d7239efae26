import tensorflow as tf
import numpy as np
from rules import check, splits
from hypothesis import given, settings

@given(splits())
@settings(deadline=None, max_examples=10)
def test_mean(counts):
    x = np.random.default_rng(0).normal(size=(sum(counts), 3)).astype("float32")
    o = check(lambda x: tf.reduce_mean(tf.square(x)), [x], counts)
    assert o.layouts == ["partial"], o
    check(lambda x: x / tf.sqrt(tf.math.reduce_variance(x, 0) + 1.), [x], counts)
    check(lambda x: tf.matmul(x, x, transpose_b=True), [x], counts)
    check(lambda x: tf.reduce_max(x, 0), [x], counts)
