"""`distfit.verify`: right models pass, and what differs is named."""

import html.parser
import json
import os

import keras
import mistakes
import numpy as np
import pytest
import tensorflow as tf
from breadth import pick
from keras import layers

import distfit


def verify(make_model, data=None, **arguments):
    arguments = {"batch_size": 8, "replicas": (2,), **arguments}
    return distfit.verify(make_model, data or mistakes.data(), **arguments)


# Models that differ.


@pytest.fixture(scope="module")
def divided():
    """The report on a model whose loss is divided by the number of replicas."""
    make = mistakes.build(mistakes.DividedByReplicas, optimizer=keras.optimizers.Adam)
    return verify(make, replicas=(2, 4), steps=2)


def test_a_factor_of_the_gradient_is_told(divided):
    """With Adam the weights hardly show it, but the gradients do."""
    assert not divided.ok and not divided.problems
    first = [d for d in divided.deviations if d.check == "gradient" and d.step == 0]
    assert {(d.replicas, round(d.ratio, 4)) for d in first} == {(2, 0.5), (4, 0.25)}
    assert divided.verdict == (
        "NOT OK: DividedByReplicas on 2, 4 replicas. First to differ: the log of loss, "
        "in step 1 (8 rows). It is 0.5 times that of one device on 2 replicas and 0.25 "
        "times that of one device on 4 replicas."
    )


def test_updates_are_compared_where_gradients_agree():
    make = mistakes.build(mistakes.Right, optimizer=mistakes.rate_by_replicas)
    report = verify(make)
    first = [d for d in report.deviations if d.step == 0 and not d.ok]
    assert {d.check for d in first} == {"update", "slot"}
    assert {d.label for d in first if d.check == "slot"} == {"sgd/learning_rate"}
    assert all(d.ratio == pytest.approx(2, rel=1e-3) for d in first)


def test_a_step_that_distributes_by_itself_is_named_with_its_line():
    (problem,) = verify(mistakes.build(mistakes.RunsOnReplicas)).problems
    assert problem.kind == "fails on 2 replicas"
    assert problem.place == mistakes.place(mistakes.RunsOnReplicas)
    assert "`fit` works on one device" in problem.message


def test_a_variable_of_one_replica_is_refused_by_name():
    make = mistakes.build(mistakes.Right, hidden=[mistakes.LocalMean])
    report = verify(make)
    (problem,) = report.problems
    assert problem.kind == "fails on 2 replicas"
    assert "aggregation SUM" in problem.message
    assert report.verdict == "NOT OK: Right on 2 replicas: fails on 2 replicas."


def test_a_model_that_fails_on_one_device_is_told_with_its_line():
    report = verify(mistakes.build(mistakes.Broken))
    (problem,) = report.problems
    assert (problem.kind, report.ok) == ("fails on one device", False)
    assert problem.place == mistakes.place(mistakes.Broken)
    assert "no such column" in problem.message and "Traceback" in problem.traceback


def test_a_variable_made_of_a_value_of_the_step_fails_on_one_device():
    (problem,) = verify(mistakes.build(mistakes.VariableOfValue)).problems
    assert problem.kind == "fails on one device"


def test_draws_without_a_seed_are_named_with_their_line():
    (problem,) = verify(mistakes.build(mistakes.UnseededNoise)).problems
    assert problem.kind == "does not repeat"
    assert problem.place == mistakes.place(mistakes.UnseededNoise)


def test_state_of_a_python_function_cannot_be_compared():
    report = verify(mistakes.build(mistakes.CountsInPython))
    (problem,) = report.problems
    assert (problem.kind, problem.place) == ("does not repeat", None)
    assert "another log of loss" in problem.message
    assert not report.deviations


# Models without a mistake.


@pytest.fixture(scope="module")
def right():
    """The report on a right model, by several numbers of replicas.

    The gradient of the bias before BatchNormalization is only rounding errors, which
    this optimizer turns into whole steps: they must not count.
    """
    make = mistakes.build(
        mistakes.Right,
        optimizer=lambda: keras.optimizers.Adam(0.01, epsilon=1e-12),
        hidden=[layers.BatchNormalization, lambda: layers.Dropout(0.5)],
    )
    return verify(make, replicas=(1, 3), steps=4)


def test_a_right_model_is_compared_in_every_respect(right):
    assert right.ok, str(right)
    assert {d.check for d in right.deviations} == {
        "log",
        "gradient",
        "update",
        "state",
        "slot",
        "replicas agree",
        "evaluate",
        "predict",
    }
    assert {d.replicas for d in right.deviations} == {1, 3}
    compared = {
        (d.batch.kind, d.batch.rows)
        for d in right.deviations
        if d.replicas == 3 and d.batch is not None
    }
    assert compared == {("even", 6), ("uneven", 8), ("few rows", 2)}
    assert max(d.step for d in right.deviations) == 3
    assert max(d.value for d in right.deviations) < 1e-5


def test_states_are_those_of_layers_seed_generators_and_metrics(right):
    labels = {d.label for d in right.deviations if d.check == "state"}
    assert {"batch_normalization/moving_mean", "loss/total"} <= labels
    assert any("seed_generator" in label for label in labels)


def test_a_step_by_hand_is_that_of_one_device():
    report = verify(mistakes.build(mistakes.ByHand))
    assert report.ok, str(report)
    assert {"largest", "error"} <= {d.label for d in report.deviations}


def accumulating():
    inner = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2, clipnorm=0.1)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)


def test_an_optimizer_that_accumulates_parts_on_each_replica():
    report = verify(mistakes.build(mistakes.Right, optimizer=accumulating), steps=4)
    assert report.ok, str(report)
    labels = {d.label for d in report.deviations if d.check == "slot"}
    assert any("gradient_accumulator" in label for label in labels)


class Words(mistakes.Right):
    """Draws with a seed of TensorFlow, and predicts strings and ragged rows."""

    def loss_of(self, x, y):
        noise = tf.random.normal(tf.shape(x), seed=3)
        return super().loss_of(x + 0.1 * noise, y)

    def predict_step(self, data):
        positive = self(data[0]) > 0
        ragged = tf.RaggedTensor.from_tensor(tf.cast(data[0] > 0, "int32"), padding=0)
        return {"text": tf.as_string(positive), "ragged": ragged}

    def train_step(self, data):
        return {**super().train_step(data), "log[/red]": tf.constant(1.0)}


class Spread(keras.metrics.Metric):
    """Has a dict as its result."""

    def __init__(self, name="spread", **kwargs):
        super().__init__(name=name, **kwargs)
        self.total = self.add_variable((), "zeros")
        self.rows = self.add_variable((), "zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign(self.total + tf.reduce_sum(y_pred))
        self.rows.assign(self.rows + tf.cast(tf.shape(y_pred)[0], "float32"))

    def result(self):
        return {"mean": self.total / self.rows, "rows": self.rows}


class Twins(keras.Model):
    """Two layers with the same name, built by the first step."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(4, name="same")
        self.second = layers.Dense(1, name="same")

    def call(self, x):
        return self.second(self.first(x))


def twins():
    model = Twins()
    model.compile("adam", "mse", metrics=[Spread()])
    return model


def in_bfloat16():
    with_policy = {"dtype": "mixed_bfloat16"}
    inputs = keras.Input((8,))
    hidden = layers.Dense(6, activation="tanh", **with_policy)(inputs)
    model = keras.Model(inputs, layers.Dense(1, **with_policy)(hidden))
    model.compile("sgd", "mse")
    return model


TRACKER = keras.metrics.Mean(name="tracked")


class Tracked(mistakes.Right):
    """Keeps its loss in a module-level metric."""

    @property
    def metrics(self):
        return [TRACKER]

    def train_step(self, data):
        TRACKER.update_state(super().train_step(data)["loss"])
        return {"tracked": TRACKER.result()}


RIGHT = {
    "eager": mistakes.build(mistakes.Right, run_eagerly=True),
    "text and seeded draws": mistakes.build(Words),
    "unbuilt": twins,
    "bfloat16": in_bfloat16,
    "metric of the module": mistakes.build(Tracked),
    "XLA and weights": mistakes.build(distfit.Model, jit_compile=True),
}
FEW_RIGHT = ["text and seeded draws", "bfloat16"]


@pytest.mark.parametrize("name", pick(FEW_RIGHT, list(RIGHT)))
def test_right_model_passes(name):
    x, y = mistakes.data()
    weights = np.linspace(0, 2, len(x), dtype="float32")
    data = (x, y, weights) if "weights" in name else (x, y)
    report = verify(RIGHT[name], data, replicas=pick([4], [1, 2, 4]))
    assert report.ok, str(report)
    assert {"gradient", "update", "log"} <= {d.check for d in report.deviations}
    assert "OK" in str(report)


class AlmostTied(keras.Model):
    """The larger of two sums of the batch decides which way the weights go.

    In float32, 10,000 + 0.0004 loses the 0.0004, but 1 + 0.0004 does not: whether the
    first sum is 1 or 1.0004 depends on the order of its terms, the second is between.
    """

    ROWS = np.array([[1e4, 1.0002], [4e-4, 0], [-9999, 0], [4e-4, 0]], "float32")

    def __init__(self):
        super().__init__()
        self.gates = self.add_weight(shape=(4,), initializer="ones", name="gates")
        self.size = self.add_weight(shape=(), initializer="ones", name="size")

    def train_step(self, data):
        # Rounded, so that they are equal from weights that are off by rounding errors.
        gates = tf.unstack(tf.round(100 * self.gates))
        first, second = tf.unstack(tf.reduce_sum(data, 0))
        first = gates[0] * gates[1] * first
        sign = tf.where(first > gates[2] * gates[3] * second, 1.0, -1.0)
        self.optimizer.apply([sign], [self.size.value])
        return {"size": tf.identity(self.size.value)}


def test_a_tie_that_rounding_decides_is_no_difference():
    def make():
        model = AlmostTied()
        model.compile(keras.optimizers.SGD(0.1))
        return model

    report = verify(make, (AlmostTied.ROWS,), batch_size=4, steps=1)
    assert not report.problems, str(report)
    assert report.ok, str(report)
    assert "Set aside" in str(report) and "First to differ" in report.set_aside[0]


class LoopOverRows(mistakes.Right):
    """Needs the number of rows as a Python number."""

    def loss_of(self, x, y):
        y_pred = self(x, training=True)
        return sum(tf.square(y[i, 0] - y_pred[i, 0]) for i in range(x.shape[0]))


def test_a_step_that_needs_the_number_of_rows_gets_batches_of_that_size():
    dataset = tf.data.Dataset.from_tensor_slices(mistakes.data(24))
    make = mistakes.build(LoopOverRows)
    report = verify(make, dataset.batch(4, drop_remainder=True), steps=1)
    assert report.ok, str(report)
    assert {d.batch.rows for d in report.deviations if d.batch} == {4}
    (problem,) = verify(make, dataset.batch(4)).problems
    assert problem.kind == "fails on one device"


@pytest.mark.parametrize("sizes", pick(["open"], ["in the specs", "open"]))
def test_a_table_beside_the_rows_is_not_cut(sizes):
    class Centred(mistakes.Right):
        def loss_of(self, x, y):
            x, centres = x
            return super().loss_of(x + tf.reduce_sum(centres, 0), y)

        def test_step(self, data):
            (x, _), y = data
            return {"loss": self.compute_loss(y=y, y_pred=self(x))}

        def predict_step(self, data):
            return self(data[0][0])

    centres = tf.random.stateless_normal((5, 8), seed=(1, 2))
    dataset = tf.data.Dataset.from_tensor_slices(mistakes.data(24)).batch(8)
    dataset = dataset.map(lambda x, y: ((x, centres), y))
    data = dataset if sizes == "in the specs" else (batch for batch in dataset)
    report = verify(mistakes.build(Centred), data)
    assert report.ok, str(report)


# What is not partitioned.


def test_what_every_replica_computes_in_full_is_named_and_no_failure():
    report = verify(mistakes.build(mistakes.SingularRows), steps=1)
    assert report.ok, str(report)
    place = mistakes.place(mistakes.SingularRows)
    entries = {e.operation: e for e in report.not_partitioned}
    assert entries["Svd"].line.startswith(place)
    assert 0 < entries["Svd"].share < 1
    assert len({(e.operation, e.line) for e in report.not_partitioned}) == len(
        report.not_partitioned
    )
    assert "computed in full on every replica" in str(report)
    assert os.path.basename(place) in report.to_html()


# The report.


class Page(html.parser.HTMLParser):
    """The text of a page and the kinds of its elements."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.references = "", set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_a_table_json_and_a_page_of_its_own(divided, tmp_path):
    divided.save(tmp_path / "new")
    lines = str(divided).splitlines()
    assert lines[0].split() == ["part", "check", "worst", "deviation", "verdict"]
    assert lines[-1] == divided.verdict
    stored = json.loads((tmp_path / "new" / "report.json").read_text())
    assert stored["ok"] is False and stored["verdict"] == divided.verdict
    logs = [d for d in stored["deviations"] if d["check"] == "log" and d["step"] == 1]
    assert [d["ratio"] for d in logs] == pytest.approx([0.5, 0.25])
    page = Page((tmp_path / "new" / "report.html").read_text())
    assert {"svg", "table", "h1"} <= page.tags
    assert page.references == []
    assert "First to differ" in page.text


# Bad arguments.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"replicas": ()}, r"at least 1. Received: replicas=\(\)"),
        ({"replicas": (0, 2)}, r"at least 1. Received: replicas=\(0, 2\)"),
        ({"steps": 0}, "`steps` must be at least 1. Received: steps=0"),
        ({"tolerance": 0.0}, "`tolerance` must be positive. Received: tolerance=0.0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1. Received: batch_size=0"),
        (
            {"batch_size": 3, "replicas": (2, 4)},
            "Received: a batch of 3 rows for 4 replicas",
        ),
    ],
)
def test_arguments_are_checked_before_any_work(arguments, message):
    def make():
        raise AssertionError("work has begun")

    with pytest.raises(ValueError, match=message):
        verify(make, **arguments)


def test_function_that_returns_no_compiled_model():
    with pytest.raises(ValueError, match="a compiled `keras.Model`. Received: Seq"):
        verify(lambda: keras.Sequential([keras.Input((8,)), layers.Dense(1)]))


def test_error_of_the_function_that_makes_the_model_is_its_own():
    def make():
        raise KeyError("no such setting")

    with pytest.raises(KeyError, match="no such setting"):
        verify(make)


def test_the_same_model_twice():
    model = mistakes.build(mistakes.Right)()
    with pytest.raises(ValueError, match="a new one each time. Received: the same"):
        verify(lambda: model)


def test_call_in_the_scope_of_a_strategy(make_strategy):
    with make_strategy(2).scope():
        with pytest.raises(ValueError, match="of its own. Received: a call in the"):
            verify(mistakes.build(mistakes.Right))


def test_too_few_devices():
    with pytest.raises(RuntimeError, match="not enough devices for 64 replicas"):
        verify(None, batch_size=64, data=mistakes.data(64), replicas=(64,))
