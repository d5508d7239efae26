"""`distfit.verify` names each planted mistake, and finds none in right models."""

import html.parser
import json

import comparing
import guide
import keras
import mistakes
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import distfit


def verify(make_model, data=None, **arguments):
    arguments = {"batch_size": 8, "replicas": (2, 4), **arguments}
    return distfit.verify(make_model, data or mistakes.data(), **arguments)


# Mistakes that one class makes, and the line of which is known.

WITH_PLACE = {
    "BareMean": "mean of local rows",
    "BareMeanOfPart": "mean of local rows",
    "SumByHand": "summed twice",
    "LocalPairs": "pairs of local rows",
    "SameNoise": "identical noise",
    "SameNoiseByNumber": "identical noise",
    "UnseededNoise": "unseeded noise",
    "OneNumberPerReplica": "noise that is not by row",
    "LargestLog": "log that is no mean of rows",
    "LocalScalarInMetric": "metric of local numbers",
    "OptimizerInStep": "made inside the step",
    "VariableInStep": "made inside the step",
    "FirstReplicaOnly": "depends on the replica",
    "PythonCounter": "Python value in the step",
}


@pytest.mark.parametrize("name", WITH_PLACE)
def test_mistake_is_named_with_its_line(name):
    cls = getattr(mistakes, name)
    report = verify(mistakes.build(cls), replicas=(2,))
    assert not report.ok
    (finding,) = report.findings
    assert finding.kind == WITH_PLACE[name]
    assert finding.place == mistakes.place(cls)
    assert finding.advice


@pytest.mark.parametrize(
    "layer, kind, label",
    [
        (mistakes.CentredRows, "statistic of local rows", None),
        (mistakes.CountedRows, "state of one replica", "counted_rows/rows"),
        (mistakes.ReplicaVariable, "state of one replica", "replica_variable/mean"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layer_that_sees_one_replica_is_named_with_its_line(layer, kind, label):
    make = mistakes.build(mistakes.Right, hidden=[layer])
    (finding,) = verify(make, replicas=(2,)).findings
    assert finding.kind == kind
    assert finding.place == mistakes.place(layer)
    if label is not None:
        assert label in finding.message


def test_gradient_that_is_n_times_too_large_is_told_as_such():
    """With Adam the weights hardly show it: the gradients do."""
    make = mistakes.build(mistakes.BareMean, optimizer=keras.optimizers.Adam)
    report = verify(make)
    (finding,) = report.findings
    assert "2 times and 4 times that of one device" in finding.message
    assert "distfit.global_mean" in finding.advice


class LocalStatistics(mistakes.Right):
    batch_statistics = "local"


def test_local_batch_statistics_are_named():
    make = mistakes.build(LocalStatistics, hidden=[layers.BatchNormalization])
    (finding,) = verify(make, replicas=(2,)).findings
    assert finding.kind == "local batch statistics"
    assert "batch_normalization" in finding.message


def test_metric_that_is_never_reset_is_named():
    (finding,) = verify(mistakes.build(mistakes.UnlistedMetric), replicas=(2,)).findings
    assert finding.kind == "metric that is never reset"
    assert "'error'" in finding.message


def test_metric_made_out_of_scope_is_named():
    metric = keras.metrics.MeanAbsoluteError(name="made_elsewhere")

    def make():
        model = mistakes.build(distfit.Model)()
        model.compile("sgd", "mse", metrics=[metric])
        return model

    (finding,) = verify(make, replicas=(2,)).findings
    assert finding.kind == "made outside the scope"
    assert "made_elsewhere" in finding.message


def test_model_that_fails_on_one_device_is_told_with_its_line():
    class Broken(mistakes.Right):
        def loss_of(self, x, y):
            raise KeyError("no such column")

    report = verify(mistakes.build(Broken))
    (finding,) = report.findings
    assert (finding.kind, report.ok) == ("fails on one device", False)
    assert "no such column" in finding.message
    assert finding.place.startswith(__file__)


# Models without a mistake.


def test_right_model_is_compared_in_every_respect():
    report = verify(
        mistakes.build(
            mistakes.Right,
            optimizer=lambda: keras.optimizers.Adam(0.01),
            hidden=[layers.BatchNormalization, lambda: layers.Dropout(0.5)],
        ),
        replicas=(1, 2, 3, 4),
        steps=6,
    )
    assert report.ok, str(report)
    deviations = report.columns[0].deviations
    assert {d.check for d in deviations} == {
        "log",
        "gradient",
        "update",
        "state",
        "slot",
        "replicas agree",
        "evaluate",
        "predict",
    }
    assert {d.replicas for d in deviations} == {1, 2, 3, 4}
    compared = {
        (d.batch.kind, d.batch.rows)
        for d in deviations
        if d.replicas == 3 and d.batch is not None
    }
    assert compared == {("even", 6), ("uneven", 8), ("few rows", 2)}
    assert max(d.step for d in deviations) == 5
    assert max(d.value for d in deviations) < 1e-5


def accumulating():
    inner = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2, clipnorm=0.1)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)


def test_optimizer_that_accumulates_parts_on_each_replica():
    report = verify(mistakes.build(mistakes.Right, optimizer=accumulating), steps=4)
    assert report.ok, str(report)
    labels = {d.label for d in report.columns[0].deviations if d.check == "slot"}
    assert any("gradient_accumulator" in label for label in labels)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_draws_for_several_inputs_at_once_are_compared(side_by_side):
    """A draw for twice the rows: two batches, or two numbers for each row."""

    class Doubled(mistakes.Right):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seeds = keras.random.SeedGenerator(1)

        def loss_of(self, x, y):
            noise = keras.random.normal((2 * tf.shape(x)[0], 8), seed=self.seeds)
            shape = (2, -1, 8) if side_by_side else (-1, 2, 8)
            noise = tf.reduce_sum(
                tf.reshape(noise, shape), axis=0 if side_by_side else 1
            )
            return super().loss_of(x + 0.1 * noise, y)

    report = verify(mistakes.build(Doubled))
    assert report.ok, str(report)


def test_draws_in_a_nested_function_are_compared():
    class Nested(mistakes.Right):
        @tf.function
        def call(self, x, training=False):
            return super().call(x, training=training)

    make = mistakes.build(Nested, hidden=[lambda: layers.Dropout(0.5)])
    report = verify(make)
    assert report.ok, str(report)


def test_rounding_that_an_optimizer_makes_much_of_is_no_finding():
    """A bias before BatchNormalization has no gradient but rounding errors."""
    report = verify(
        mistakes.build(
            mistakes.Right,
            optimizer=lambda: keras.optimizers.Adam(0.1, epsilon=1e-12),
            hidden=[layers.BatchNormalization],
        )
    )
    assert report.ok, str(report)


def test_datasets_ragged_rows_and_weights(make_strategy):
    x, y = mistakes.data(24)
    weights = np.linspace(0, 2, 24, dtype="float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(8)
    make = mistakes.build(distfit.Model)
    assert verify(make, dataset).ok
    assert verify(make, (x, y, weights)).ok


def images():
    generator = np.random.default_rng(1)
    x = generator.random((24, 6, 6, 1), "float32")
    return x, generator.random((24, 1), "float32")


def augmented():
    inputs = keras.Input((6, 6, 1))
    x = layers.RandomFlip(seed=1)(inputs)
    x = layers.RandomRotation(0.2, seed=2)(x)
    x = layers.Conv2D(3, 3)(x)
    x = layers.SpatialDropout2D(0.4, seed=3)(x)
    outputs = layers.Dense(1)(layers.Flatten()(x))
    model = distfit.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


class Unseeded(mistakes.Right):
    """Draws from Keras's global generator, and makes a layer that holds nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.best = float("nan")

    def loss_of(self, x, y):
        x = layers.LeakyReLU()(x)
        noise = keras.random.normal(tf.shape(x)) + distfit.random.normal(tf.shape(x))
        return super().loss_of(x + 0.1 * noise, y)

    def note(self):
        return self.best


class TrackedMean(mistakes.Right):
    """Its loss is known from other numbers on each replica, if there are few rows."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tracker = keras.metrics.Mean(name="tracked")

    @property
    def metrics(self):
        return [self.tracker]

    def loss_of(self, x, y):
        loss = distfit.global_mean(tf.square(y - self(x, training=True)))
        self.tracker.update_state(loss)
        return loss

    def train_step(self, data):
        return {**super().train_step(data), "tracked": self.tracker.result()}


class ClippedWeights(mistakes.Right):
    """Assigns weights before it differentiates them."""

    def loss_of(self, x, y):
        for weight in self.trainable_variables:
            weight.assign(tf.clip_by_value(weight, -0.3, 0.3))
        return super().loss_of(x, y)


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


def twice_named():
    inputs = keras.Input((8,))

    class Twins(distfit.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Dense(4, name="same")
            self.second = layers.Dense(1, name="same")

        def call(self, x):
            return self.second(self.first(x))

    model = Twins()
    model(inputs)
    model.compile(keras.optimizers.Adafactor(0.01), "mse")
    return model


def measured():
    model = mistakes.build(distfit.Model)()
    metrics = [keras.metrics.MeanAbsoluteError(), Spread()]
    model.compile("adam", "mse", metrics=metrics)
    return model


def in_bfloat16():
    with_policy = {"dtype": "mixed_bfloat16"}
    inputs = keras.Input((8,))
    hidden = layers.Dense(6, activation="tanh", **with_policy)(inputs)
    model = distfit.Model(inputs, layers.Dense(1, **with_policy)(hidden))
    model.compile("sgd", "mse")
    return model


def by_xla():
    model = mistakes.build(distfit.Model, hidden=[lambda: layers.Dropout(0.5)])()
    model.compile("sgd", "mse", jit_compile=True)
    return model


class Words(distfit.Model):
    def predict_step(self, data):
        positive = self(data[0]) > 0
        ragged = tf.RaggedTensor.from_tensor(tf.cast(data[0] > 0, "int32"), padding=0)
        return {"text": tf.as_string(positive), "ragged": ragged}

    def train_step(self, data):
        return {**super().train_step(data), "log[/red]": tf.constant(1.0)}


RIGHT = {
    "augmentation": augmented,
    "unseeded draws": mistakes.build(Unseeded),
    "tracked loss": mistakes.build(
        TrackedMean, hidden=[lambda: layers.Dropout(0.5, seed=1)]
    ),
    "clipped weights": mistakes.build(ClippedWeights),
    "spectral normalisation": mistakes.build(
        mistakes.Right, hidden=[lambda: layers.SpectralNormalization(layers.Dense(4))]
    ),
    "names that occur twice": twice_named,
    "metrics": measured,
    "bfloat16": in_bfloat16,
    "XLA": by_xla,
    "predictions of text": mistakes.build(Words),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_model_has_no_finding(name):
    data = images() if name == "augmentation" else None
    report = verify(RIGHT[name], data, replicas=(2,))
    assert report.ok, str(report)
    checks = {d.check for d in report.columns[0].deviations}
    assert {"gradient", "update", "log"} <= checks
    assert "OK" in str(report)


def test_penalty_that_every_replica_counts_is_named_with_its_line():
    (finding,) = verify(mistakes.build(mistakes.PenaltyByHand), replicas=(2,)).findings
    assert finding.kind == "penalty that every replica counts"
    assert finding.place == mistakes.place(mistakes.PenaltyByHand)


def test_weights_changed_by_hand_are_named():
    (finding,) = verify(mistakes.build(mistakes.DescentByHand), replicas=(2,)).findings
    assert finding.kind == "weights of one replica"


# Models of Keras itself.


def test_stock_model_is_run_both_ways():
    def make():
        model = guide.mlp(guide.classes(keras.Model).LowLevelStep)
        model.compile(keras.optimizers.SGD(0.1))
        return model

    report = verify(make, comparing.regression_data(24))
    stock, mended = report.columns
    assert (stock.name, mended.name) == ("Keras", "distfit")
    assert not stock.ok
    assert mended.ok
    assert not report.ok
    assert {f.kind for f in report.findings} >= {"loss divided by the replicas"}
    assert all("distfit.Model" in finding.advice for finding in report.findings)
    assert "Keras: worst" in str(report)


def test_raw_losses_are_named_under_keras():
    regularized = [lambda: layers.Dense(6, kernel_regularizer="l2")]
    report = verify(
        mistakes.build(mistakes.RawLosses, hidden=regularized), replicas=(2,)
    )
    found = {finding.kind: finding for finding in report.findings}
    finding = found["losses that are not scaled"]
    assert finding.place == mistakes.place(mistakes.RawLosses)
    assert report.columns[1].ok


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


def test_report_is_a_table_json_and_a_page_of_its_own(tmp_path):
    report = verify(mistakes.build(mistakes.BareMean), replicas=(2,))
    report.save(tmp_path / "new")
    text = str(report)
    assert "dense/kernel" not in text.splitlines()[0]
    assert "mean of local rows" in text
    assert text.splitlines()[-1] == "NOT OK: BareMean on 2 replicas: 1 finding."
    stored = json.loads((tmp_path / "new" / "report.json").read_text())
    assert stored["ok"] is False
    assert stored["findings"][0]["place"] == mistakes.place(mistakes.BareMean)
    gradients = [
        d
        for d in stored["columns"][0]["deviations"]
        if d["check"] == "gradient" and d["step"] == 1
    ]
    assert gradients
    assert all(d["ratio"] == pytest.approx(2) for d in gradients)
    page = Page((tmp_path / "new" / "report.html").read_text())
    assert {"svg", "table", "h1"} <= page.tags
    assert page.references == []
    assert "mean of local rows" in page.text


# Bad arguments.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"replicas": ()}, r"at least 1. Received: replicas=\(\)"),
        ({"replicas": (0, 2)}, r"at least 1. Received: replicas=\(0, 2\)"),
        ({"steps": 0}, "`steps` must be at least 1. Received: steps=0"),
        ({"tolerance": 0.0}, "`tolerance` must be positive. Received: tolerance=0.0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1. Received: batch_size=0"),
        ({"batch_size": 3}, "Received: a batch of 3 rows for 4 replicas"),
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
