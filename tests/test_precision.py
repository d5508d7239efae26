"""Steps in float64: the same steps, without the rounding of float32."""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import pick
from keras import layers

import distfit
from distfit.partition import tracing
from distfit.verification.precision import doubled


def _flow(x):
    """Branches, loops and lists, with an effect in a branch that returns nothing."""

    @tf.function
    def nested(rows):
        return tf.map_fn(lambda row: tf.math.log1p(tf.square(row)), rows)

    total = tf.reduce_sum(x)
    x = tf.cond(total > 0.0, lambda: 2.0 * x, lambda: tf.sin(x))
    x = tf.switch_case(tf.constant(1), [lambda: x, lambda: 3.0 * x, lambda: -x])
    powers = tf.while_loop(
        lambda i, kept: i < 3, lambda i, kept: (i + 1, tf.tanh(kept) + x), (0, x)
    )
    tf.cond(total > 1e9, lambda: tf.print("large"), lambda: tf.no_op())
    return nested(x) + powers[1]


def _others(x):
    """Operations that have no float64 kernel, or must not change."""
    image = tf.image.resize(x[:, :, None, None], [8, 1])[:, :, 0, 0]
    doubled = tf.numpy_function(lambda t: 2 * t, [x], tf.float32)
    bits = tf.cast(tf.bitcast(x, tf.int32) % 7, tf.float32)
    words = tf.strings.to_number(tf.strings.as_string(x, precision=3))
    noise = tf.random.stateless_uniform(tf.shape(x), [1, 2])
    return image + tf.ensure_shape(doubled, x.shape) + bits + words + noise


BODIES = {
    "dense": lambda: [layers.Dense(4, activation="tanh"), layers.BatchNormalization()],
    "convolution": lambda: [
        layers.Reshape((4, 2, 1)),
        layers.Conv2D(3, 2, activation="relu"),
        layers.MaxPooling2D((2, 1)),
        layers.Flatten(),
    ],
    "recurrent": lambda: [
        layers.Reshape((4, 2)),
        layers.LSTM(3, return_sequences=True),
        layers.GRU(3),
    ],
    "random": lambda: [layers.Dropout(0.5, seed=1), layers.GaussianNoise(0.1, seed=2)],
    "embedding": lambda: [
        layers.Discretization(bin_boundaries=[-1.0, 0.0, 1.0]),
        layers.Embedding(4, 3),
        layers.Flatten(),
    ],
    "flow": lambda: [layers.Lambda(_flow)],
    "others": lambda: [layers.Lambda(_others, output_shape=(8,))],
}


@pytest.mark.parametrize("name", pick(["convolution", "random"], list(BODIES)))
def test_steps_in_float64_are_the_same_on_all_replicas(make_strategy, name):
    def build():
        body = BODIES[name]()
        model = keras.Sequential([keras.Input((8,)), *body, layers.Dense(1)])
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
        return model

    def fit(model):
        data = comparing.regression_data(20)
        return distfit.fit(model, *data, batch_size=7, shuffle=False, verbose=0)

    single = comparing.run(make_strategy(1), build, fit)
    with tracing.changed(doubled):
        one, three = (comparing.run(make_strategy(n), build, fit) for n in (1, 3))
    comparing.assert_same(single, one, 1e-4, 1e-4)
    comparing.assert_same(one, three, 1e-7, 1e-7)


def test_what_rounds_in_float32_does_not_in_float64():
    """A step of 1e8 + 1 - 1e8: the 1 is lost in float32."""

    def step(batch):
        large = 1e8 * tf.reduce_sum(batch)
        return {"rest": (large + 1.0) - large}

    spec = tf.TensorSpec([None], tf.float32)
    found = []
    for change in (lambda graph, spec: graph, doubled):
        with tracing.changed(change):
            graph = tracing.trace(step, spec, tf.init_scope)
        run = tf.compat.v1.wrap_function(
            lambda x, g=graph: tf.graph_util.import_graph_def(
                g.as_graph_def(), {g.inputs[0].name: x}, [g.outputs[0].name]
            ),
            [spec],
        )
        (rest,) = run(np.ones(1, "float32"))
        assert rest.dtype == tf.float32
        found.append(float(rest))
    assert found == [0, 1]
