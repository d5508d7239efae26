"""What people do with gradients by hand, on 2 and 3 replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import optimizers
from pieces import Program, compiled, mlp, numbers

import distfit
from distfit.partition import tracing
from distfit.verification.precision import doubled

DATA = numbers(5), numbers(1, seed=2)


class Regression(Program):
    """A squared error, with a step for subclasses to override."""

    def __init__(self):
        super().__init__(mlp(5, 1))
        self.prepare()

    def prepare(self):
        """Makes what the step needs."""

    def loss_of(self, x, y):
        return tf.reduce_mean(tf.square(y - self.net(x, training=True)))

    def gradients(self, *data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(*data)
        return loss, tape.gradient(loss, self.trainable_variables)

    def zeros(self):
        return [
            self.add_weight(
                shape=v.shape, initializer="zeros", trainable=False, name=f"slot{i}"
            )
            for i, v in enumerate(self.net.trainable_variables)
        ]


class SharpnessAware(Regression):
    """The gradient where the loss is highest nearby."""

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        scale = 0.05 / (tf.linalg.global_norm(gradients) + 1e-12)
        moves = [g * scale for g in gradients]
        for variable, move in zip(self.trainable_variables, moves, strict=True):
            variable.assign_add(move)
        _, gradients = self.gradients(*data)
        for variable, move in zip(self.trainable_variables, moves, strict=True):
            variable.assign_sub(move)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"raw": loss}


def test_sharpness_aware_steps(assert_same):
    assert_same(compiled(SharpnessAware), *DATA)


class ClippedByNorm(Regression):
    """Each gradient on its own."""

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        gradients = [tf.clip_by_norm(g, 0.1) for g in gradients]
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"raw": loss}


class ClippedByValue(Regression):
    """Each element on its own, and weights, too."""

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        gradients = [tf.clip_by_value(g, -0.05, 0.05) for g in gradients]
        self.optimizer.apply(gradients, self.trainable_variables)
        for variable in self.trainable_variables:
            variable.assign(tf.clip_by_value(variable, -0.5, 0.5))
        return {"raw": loss}


@pytest.mark.parametrize("make", [ClippedByNorm, ClippedByValue])
def test_clipping_by_hand(assert_same, make):
    assert_same(compiled(make), *DATA)


class Accumulating(Regression):
    """Applies the mean gradient of two batches, with zeros in between."""

    def prepare(self):
        self.sums = self.zeros()
        self.steps = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="steps"
        )

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        self.steps.assign_add(1)
        for total, gradient in zip(self.sums, gradients, strict=True):
            total.assign_add(gradient)
        due = tf.cast(tf.equal(self.steps % 2, 0), tf.float32)
        self.optimizer.apply(
            [due * total / 2.0 for total in self.sums], self.net.trainable_variables
        )
        for total in self.sums:
            total.assign(total * (1 - due))
        return {"raw": loss}


class AccumulatingInBranch(Accumulating):
    """The same, where a branch applies it."""

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        self.steps.assign_add(1)
        for total, gradient in zip(self.sums, gradients, strict=True):
            total.assign_add(gradient)
        tf.cond(tf.equal(self.steps % 2, 0), self.update, lambda: 0)
        return {"raw": loss}

    def update(self):
        self.optimizer.apply(
            [tf.convert_to_tensor(total) / 2.0 for total in self.sums],
            self.net.trainable_variables,
        )
        for total in self.sums:
            total.assign(tf.zeros_like(total))
        return 0


@pytest.mark.parametrize("make", [Accumulating, AccumulatingInBranch])
def test_accumulation_by_hand(assert_same, make):
    def build():
        model = make()
        model.compile("sgd")
        model.optimizer.build(model.net.trainable_variables)
        return model

    assert_same(build, *DATA)


class LearnedWeights(Regression):
    """Two losses, weighted by learned uncertainties."""

    def prepare(self):
        self.scales = self.add_weight(shape=(2,), initializer="zeros", name="scales")

    def loss_of(self, x, y):
        errors = y - self.net(x, training=True)
        losses = tf.stack(
            [tf.reduce_mean(tf.square(errors)), tf.reduce_mean(tf.abs(errors))]
        )
        scales = tf.convert_to_tensor(self.scales)
        return tf.reduce_sum(tf.exp(-scales) * losses + scales)


def test_learned_weights_of_losses(assert_same):
    assert_same(compiled(LearnedWeights), *DATA)


class AdamByHand(Regression):
    """Moments in variables of the model, and a counter."""

    def prepare(self):
        self.first, self.second = self.zeros(), self.zeros()
        self.steps = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="steps"
        )

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        self.steps.assign_add(1.0)
        time = tf.convert_to_tensor(self.steps)
        rate = 0.01 * tf.sqrt(1 - 0.999**time) / (1 - 0.9**time)
        slots = zip(
            self.trainable_variables, gradients, self.first, self.second, strict=True
        )
        for variable, gradient, first, second in slots:
            first.assign(0.9 * first + 0.1 * gradient)
            second.assign(0.999 * second + 0.001 * tf.square(gradient))
            variable.assign_sub(rate * first / (tf.sqrt(second) + 1e-7))
        return {"raw": loss}


def test_adam_by_hand(assert_same):
    assert_same(compiled(AdamByHand), *DATA)


class Meta(Regression):
    """Learns weights that one gradient step improves a lot."""

    def train_step(self, data):
        x, y = data
        weights = self.net.trainable_variables
        with tf.GradientTape() as outer:
            values = [tf.convert_to_tensor(w) for w in weights]
            with tf.GradientTape() as inner:
                inner.watch(values)
                loss = self.loss_with(values, x[:, :], y)
            steps = inner.gradient(loss, values)
            moved = [v - 0.1 * s for v, s in zip(values, steps, strict=True)]
            after = self.loss_with(moved, x, y + 0.5)
        self.optimizer.apply(outer.gradient(after, values), weights)
        return {"raw": after}

    def loss_with(self, values, x, y):
        kernel, bias, last, last_bias = values
        hidden = tf.tanh(tf.matmul(x, kernel) + bias)
        return tf.reduce_mean(tf.square(y - tf.matmul(hidden, last) - last_bias))


def test_step_within_a_step(assert_same):
    assert_same(compiled(Meta), *DATA)


class Shared(keras.Model):
    """Two heads on one body: each optimizer updates its head and the body."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = mlp(5, 4), [mlp(4, 1), mlp(4, 1)]

    def compile(self):
        super().compile()
        self.both = [optimizers.Adam(0.01), optimizers.RMSprop(0.01)]

    def train_step(self, data):
        x, y = data
        logs = {}
        for i, (head, optimizer) in enumerate(zip(self.heads, self.both, strict=True)):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((y[:, i : i + 1] - head(self.body(x))) ** 2)
            weights = [*self.body.trainable_variables, *head.trainable_variables]
            optimizer.apply(tape.gradient(loss, weights), weights)
            logs[f"raw_{i}"] = loss
        return logs


def test_several_optimizers_on_shared_weights(assert_same):
    def build():
        model = Shared()
        model.compile()
        return model

    assert_same(build, numbers(5), numbers(2, seed=2))


class Penalized(Regression):
    """The loss and the norm of its own gradient."""

    def loss_of(self, x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            predictions = self.net(x, training=True)
        slopes = tape.gradient(predictions, x)
        penalty = tf.reduce_mean(tf.reduce_sum(slopes**2, axis=1))
        return tf.reduce_mean(tf.square(y - predictions)) + 0.1 * penalty


def test_penalty_on_the_slope(assert_same):
    assert_same(compiled(Penalized, "adam", 0.01), *DATA)


class Decides(Regression):
    """Branches and loops in a compiled step that use values computed before them."""

    @tf.function
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            predictions = self.net(x, training=True)
            loss = tf.reduce_mean(tf.square(y - predictions))
            rounds = 0
            while loss > 0.3 and rounds < 6:
                loss = loss * 0.7
                rounds += 1
            if tf.reduce_mean(predictions) > 0.0:
                loss = loss * 2.0
            for row in x[:2]:
                loss += 0.01 * tf.reduce_sum(row) * tf.reduce_mean(predictions)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"raw": loss, "rounds": rounds}


class ForwardMode(Regression):
    """A derivative in the direction of the rows in reverse order."""

    def loss_of(self, x, y):
        direction = tf.reverse(x, [0])
        with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
            predictions = self.net(x, training=True)
        slopes = accumulator.jvp(predictions)
        return tf.reduce_mean(tf.square(y - predictions) + tf.square(slopes))


@pytest.mark.parametrize("program", [Decides, ForwardMode])
@pytest.mark.parametrize("fused", [1, 3])
def test_decisions_and_derivatives_in_a_step(assert_same, program, fused):
    assert_same(compiled(program, steps_per_execution=fused), *DATA)


class LoopInCall(Regression):
    """A loop in a compiled `call`, whose gradient adds to its graph."""

    @tf.function
    def call(self, x, training=None):
        for _ in tf.range(3):
            x = tf.tanh(x + self.net(x))
        return tf.reduce_sum(x, -1, keepdims=True)

    def loss_of(self, x, y):
        return tf.reduce_mean(tf.square(y - self(x, training=True)))

    def test_step(self, data):
        return {"raw": self.loss_of(*data)}


def test_a_compiled_call_is_trained_evaluated_and_used(make_strategy):
    """In float64: Adam amplifies rounding in small gradients."""
    results = []
    for replicas in (1, 2, 3):
        keras.utils.set_random_seed(7)
        with make_strategy(replicas).scope():
            model = compiled(LoopInCall)()
        with tracing.changed(doubled):
            history = distfit.fit(model, *DATA, batch_size=8, verbose=0).history
            loss = distfit.evaluate(model, *DATA, batch_size=8, verbose=0)
            predictions = distfit.predict(model, DATA[0], batch_size=8, verbose=0)
        results.append([*history["raw"], loss, *predictions.flat])
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-6, atol=1e-6)


class PerRow(Regression):
    """Clips the gradient of each row, and logs row by row."""

    def prepare(self):
        # A variable of TensorFlow itself, whose elements are set in place.
        self.bank = tf.Variable(tf.zeros([8]), trainable=False)

    def train_step(self, data):
        x, y = data
        weights = self.trainable_variables
        with tf.GradientTape() as tape:
            losses = tf.reduce_sum(tf.square(y - self.net(x, training=True)), -1)
        rows = tape.jacobian(losses, weights, experimental_use_pfor=False)
        clipped = [tf.reduce_mean(tf.clip_by_value(g, -0.1, 0.1), 0) for g in rows]
        self.optimizer.apply(clipped, weights)
        places = tf.range(tf.shape(x)[0])[:, None] % 8
        self.bank.scatter_nd_update(places, losses)
        return {"raw": tf.reduce_sum(self.bank), "losses": losses}


def test_gradients_of_each_row_that_are_clipped(assert_same):
    assert_same(compiled(PerRow), *DATA)


@pytest.mark.parametrize("size", [1, 6])
def test_logs_of_each_row(assert_same, size):
    """With batches of a fixed size, also of fewer rows than replicas."""
    rows = tf.data.Dataset.from_tensor_slices(DATA).batch(size, drop_remainder=True)
    assert_same(compiled(PerRow, steps_per_execution=3), rows)
