"""Programs of reads and writes: variables hold what those of one device would hold."""

import numpy as np
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import compiled_step

ROWS = 7
SUM = {
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.SUM,
}


def places(x):
    """For each row a place in a variable."""
    return tf.cast(10 * tf.abs(x[:, 0]), tf.int32) % 5


MIRRORED = {
    "assign a sum": lambda v, x: v.assign(v * 0.5 + tf.reduce_sum(x, 0)),
    "assign a mean": lambda v, x: v.assign(v + tf.reduce_mean(x)),
    "add": lambda v, x: v.assign_add(tf.reduce_max(x) + tf.zeros([5, 3])),
    "subtract": lambda v, x: v.assign_sub(tf.zeros([5, 3]) + tf.reduce_sum(x, 0)),
    "add at places": lambda v, x: v.scatter_add(tf.IndexedSlices(x, places(x))),
    "subtract at places": lambda v, x: v.scatter_sub(tf.IndexedSlices(x, places(x))),
    "set a place": lambda v, x: v.scatter_update(
        tf.IndexedSlices(tf.reduce_sum(x, 0, keepdims=True), [2])
    ),
    "larger": lambda v, x: v.scatter_max(tf.IndexedSlices(x, places(x))),
    "add elements": lambda v, x: v.scatter_nd_add(places(x)[:, None], x),
    "set an element": lambda v, x: v.scatter_nd_update([[1, 2]], [tf.reduce_min(x)]),
    "larger elements": lambda v, x: v.scatter_nd_max(places(x)[:, None], x),
    "part of it": lambda v, x: v[1:3].assign(tf.zeros([2, 3]) + tf.reduce_mean(x, 0)),
    "nothing": lambda v, x: None,
}
SUMMED = {
    "add rows": lambda v, x: v.assign_add(tf.reduce_sum(x, 0)),
    "add a count": lambda v, x: v.assign_add(
        tf.zeros([3]) + tf.cast(tf.shape(x)[0], tf.float32)
    ),
    "add what all have": lambda v, x: v.assign_add(tf.ones([3])),
    "from itself": lambda v, x: v.assign(v * 0.5 + tf.reduce_max(x, 0)),
    "subtract": lambda v, x: v.assign_sub(tf.reduce_mean(x, 0)),
    "nothing": lambda v, x: None,
}
programs = st.lists(
    st.tuples(st.sampled_from(list(MIRRORED)), st.sampled_from(list(SUMMED))),
    min_size=1,
    max_size=4,
)


def made(scope):
    """A mirrored and a summed variable."""
    with scope:
        table = np.linspace(-1, 1, 15, dtype="float32").reshape(5, 3)
        return tf.Variable(table), tf.Variable(tf.zeros([3]), **SUM)


def run(program, mirrored, summed, x):
    """Runs a program, and returns what it reads on the way."""
    read = []
    for first, second in program:
        MIRRORED[first](mirrored, x)
        SUMMED[second](summed, x)
        read.append(tf.reduce_sum(tf.gather(mirrored, places(x)) * x, 1))
        read.append(summed + tf.reduce_sum(mirrored, 0))
    return read


@settings(deadline=None, max_examples=8)
@given(programs, st.integers(2, 3))
def test_programs_of_reads_and_writes(program, replicas):
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    alone = made(tf.device("CPU:0"))
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    several = made(strategy.scope())
    step = compiled_step(lambda x: run(program, *several, x), x, strategy)
    for _ in range(2):
        expected = run(program, *alone, tf.constant(x))
        for got, want in zip(step(), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for one, many in zip(alone, several, strict=True):
        np.testing.assert_allclose(many.numpy(), one.numpy(), rtol=1e-5, atol=1e-5)
    for copy in several[0].values:
        np.testing.assert_array_equal(copy, several[0].values[0])
