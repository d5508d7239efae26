"""Every loss, reduced in any way by Keras or by hand, equals one device."""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas, pick
from keras import layers

import distfit

REPLICAS = pick([3], [2, 3])
ROWS, BATCH = 44, 14  # Batches of 14, 14, 14 and 2 rows.


def _mlp(outputs=1, **dense):
    inputs = keras.Input((8,))
    hidden = layers.Dense(6, activation="tanh", **dense)(inputs)
    return distfit.Model(inputs, layers.Dense(outputs)(hidden))


def _assert_equal_on_all(make_strategy, build, fit, replicas=REPLICAS):
    one = comparing.run(make_strategy(1), build, fit)
    for n in replicas:
        comparing.assert_same(one, comparing.run(make_strategy(n), build, fit))
    return one


def _fit(*data, **arguments):
    options = {"batch_size": BATCH, "epochs": 3, "shuffle": False, "verbose": 0}
    return lambda model: model.fit(*data, **options | arguments)


def _weights(rows=ROWS):
    return np.random.default_rng(5).uniform(0.1, 3.0, rows).astype("float32")


# Adam hides a factor of all gradients.
@pytest.mark.parametrize("optimizer", pick(["sgd"], ["sgd", "adam"]))
@pytest.mark.parametrize(
    "reduction",
    pick(
        ["sum_over_batch_size", "mean_with_sample_weight"],
        ["sum_over_batch_size", "mean", "sum", "mean_with_sample_weight"],
    ),
)
def test_reduction_with_sample_weight(make_strategy, reduction, optimizer):
    def build():
        model = _mlp()
        model.compile(
            keras.optimizers.get(
                {"class_name": optimizer, "config": {"learning_rate": 0.01}}
            ),
            loss=keras.losses.MeanSquaredError(reduction=reduction),
            metrics=["mae"],
            weighted_metrics=["mse"],
        )
        return model

    data = comparing.regression_data(ROWS)
    _assert_equal_on_all(make_strategy, build, _fit(*data, sample_weight=_weights()))


def _scalar_loss(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred))


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_function_that_returns_a_scalar(make_strategy, weighted):
    """Stock Keras multiplies its gradient and its value by N."""

    def build():
        model = _mlp()
        model.compile("sgd", loss=_scalar_loss)
        return model

    weights = {"sample_weight": _weights()} if weighted else {}
    _assert_equal_on_all(
        make_strategy, build, _fit(*comparing.regression_data(ROWS), **weights)
    )


def test_regularization(make_strategy):
    def build():
        model = _mlp(
            kernel_regularizer=keras.regularizers.L2(0.1),
            bias_regularizer="l1",
            activity_regularizer=keras.regularizers.L2(0.01),
        )
        model.compile("adam", loss="mse")
        return model

    _assert_equal_on_all(make_strategy, build, _fit(*comparing.regression_data(ROWS)))


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(tf.reduce_mean(tf.square(x)))
        return x


def test_add_loss_next_to_batch_normalization(make_strategy):
    """Replicas take turns at every exchange, yet each keeps the losses it collected."""

    def build():
        inputs = keras.Input((8,))
        x = AddsLoss()(layers.Dense(6)(inputs))
        x = layers.BatchNormalization()(x)
        x = AddsLoss()(layers.Dense(4)(x))
        model = distfit.Model(inputs, layers.Dense(1)(x))
        model.compile(keras.optimizers.SGD(0.01), loss="mse")
        return model

    _assert_equal_on_all(make_strategy, build, _fit(*comparing.regression_data(ROWS)))


class Minimizes(distfit.Model):
    """Minimises the loss that `logs_of(x, y)` computes, and returns those logs."""

    def train_step(self, data):
        with tf.GradientTape() as tape:
            logs = self.logs_of(*data)
        gradients = tape.gradient(logs["loss"], self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return logs


class RawSum(Minimizes):
    def logs_of(self, x, y):
        loss = self.loss_fn(y, self(x, training=True)) + sum(self.losses)
        return {"loss": loss}


def test_raw_sum_of_the_models_losses(make_strategy):
    def build():
        inputs = keras.Input((8,))
        dense = layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.1))
        model = RawSum(inputs, dense(inputs))
        model.loss_fn = keras.losses.MeanSquaredError()
        model.compile("sgd")
        return model

    _assert_equal_on_all(make_strategy, build, _fit(*comparing.regression_data(ROWS)))


def test_several_outputs_with_loss_weights(make_strategy):
    def build():
        inputs = {"a": keras.Input((8,), name="a"), "b": keras.Input((8,), name="b")}
        joined = layers.Concatenate()([inputs["a"], inputs["b"]])
        outputs = {
            "size": layers.Dense(1, name="size")(joined),
            "kind": layers.Dense(3, activation="softmax", name="kind")(joined),
        }
        model = distfit.Model(inputs, outputs)
        model.compile(
            "adam",
            loss={"size": "mse", "kind": "sparse_categorical_crossentropy"},
            loss_weights={"size": 0.3, "kind": 2.0},
            metrics={"size": ["mae"], "kind": ["accuracy"]},
        )
        return model

    x, y = comparing.regression_data(ROWS)
    kinds = np.random.default_rng(1).integers(0, 3, ROWS)
    one = _assert_equal_on_all(
        make_strategy, build, _fit({"a": x, "b": -x}, {"size": y, "kind": kinds})
    )
    assert {"loss", "size_loss", "kind_loss", "size_mae", "kind_accuracy"} == set(
        one.history
    )


def _sequences():
    generator = np.random.default_rng(2)
    tokens = generator.integers(1, 20, (ROWS, 7))
    lengths = generator.integers(1, 8, ROWS)
    return np.where(np.arange(7) < lengths[:, None], tokens, 0)


@pytest.mark.parametrize(
    "reduction, weighted",
    [
        ("mean_with_sample_weight", True),
        *pick([], [("sum_over_batch_size", True), ("mean_with_sample_weight", False)]),
        *pick([], [("sum_over_batch_size", False)]),
    ],
)
def test_masked_sequences(make_strategy, reduction, weighted):
    def build():
        inputs = keras.Input((7,), dtype="int32")
        x = layers.Embedding(20, 5, mask_zero=True)(inputs)
        x = layers.SimpleRNN(4, return_sequences=True)(x)
        model = distfit.Model(inputs, layers.Dense(20)(x))
        loss = keras.losses.SparseCategoricalCrossentropy(True, reduction=reduction)
        model.compile("adam", loss=loss, metrics=["accuracy"])
        return model

    tokens = _sequences()
    weights = {}
    if weighted:
        weights = {"sample_weight": np.repeat(_weights()[:, None], 7, axis=1)}
    _assert_equal_on_all(
        make_strategy, build, _fit(tokens, tokens, **weights), pick([4], [2, 4])
    )


class SelectsRows(Minimizes):
    """Its loss sees a number of rows that depends on the data."""

    def logs_of(self, x, y):
        y_pred = self(x, training=True)
        chosen = y[:, 0] > 0
        loss = self.loss_fn(y[chosen], y_pred[chosen])
        return {"loss": loss}


def test_loss_of_rows_chosen_by_the_data(make_strategy):
    def build():
        model = guide_model(SelectsRows)
        model.loss_fn = keras.losses.MeanSquaredError()
        model.compile("adam")
        return model

    _assert_equal_on_all(make_strategy, build, _fit(*comparing.regression_data(ROWS)))


def guide_model(cls):
    inputs = keras.Input((8,))
    return cls(inputs, layers.Dense(1)(inputs))


class NonLinear(Minimizes):
    """Uses the value of a loss in ways that need the value of the whole batch."""

    def logs_of(self, x, y):
        y_pred = self(x, training=True)
        mse, mae = self.loss_fns[0](y, y_pred), self.loss_fns[1](y, y_pred)
        loss = tf.sqrt(mse) * mae
        return {"loss": loss, "mse": mse}


def test_product_of_losses(make_strategy):
    """The gradient of a product contains the values of its factors."""

    def build():
        model = guide_model(NonLinear)
        model.loss_fns = [
            keras.losses.MeanSquaredError(),
            keras.losses.MeanAbsoluteError(),
        ]
        model.compile("adam")
        return model

    _assert_equal_on_all(make_strategy, build, _fit(*comparing.regression_data(ROWS)))


class ByHand(Minimizes):
    def logs_of(self, x, y):
        errors = tf.square(y - self(x, training=True))
        return {"loss": tf.reduce_mean(errors)}


def test_mean_by_hand(make_strategy):
    def build():
        model = guide_model(ByHand)
        model.compile("adam")
        return model

    _assert_equal_on_all(make_strategy, build, _fit(*comparing.regression_data(ROWS)))


class Contrastive(Minimizes):
    """Every row is compared with all rows of the batch."""

    def logs_of(self, x, y):
        z = self(x, training=True)
        similarity = tf.matmul(z, z, transpose_b=True)
        loss = tf.reduce_mean(tf.reduce_logsumexp(similarity, axis=1))
        return {"loss": loss, "rows": tf.cast(tf.shape(similarity)[1], tf.float32)}


def test_pairs_over_the_batch(make_strategy):
    def build():
        inputs = keras.Input((8,))
        model = Contrastive(inputs, layers.Dense(3)(inputs))
        model.compile(keras.optimizers.SGD(0.05))
        return model

    one = _assert_equal_on_all(
        make_strategy, build, _fit(*comparing.regression_data(ROWS))
    )
    assert one.history["rows"] == [2.0] * 3  # Those of the last batch.


def test_class_weight(make_strategy):
    def build():
        inputs = keras.Input((8,))
        model = distfit.Model(inputs, layers.Dense(3, activation="softmax")(inputs))
        model.compile("adam", loss="sparse_categorical_crossentropy")
        return model

    x, _ = comparing.regression_data(ROWS)
    kinds = np.random.default_rng(1).integers(0, 3, ROWS)
    _assert_equal_on_all(
        make_strategy, build, _fit(x, kinds, class_weight={0: 0.2, 1: 1.0, 2: 3.0})
    )


OUTSIDE = keras.losses.MeanSquaredError()


class UsesLossFromOutside(Minimizes):
    """Calls a loss that is not its attribute, and reads the losses of a submodel."""

    def __init__(self):
        super().__init__()
        penalised = layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.1))
        self.encoder = keras.Sequential([keras.Input((8,)), AddsLoss(), penalised])
        self.built = True

    def logs_of(self, x, y):
        loss = OUTSIDE(y, self.encoder(x)) + sum(self.encoder.losses)
        return {"loss": loss}


def test_loss_that_is_no_attribute_and_losses_of_a_part(make_strategy):
    def build():
        model = UsesLossFromOutside()
        model.compile("sgd")
        return model

    _assert_equal_on_all(make_strategy, build, _fit(*comparing.regression_data(ROWS)))


class HalvesItsRows(Minimizes):
    """Splits its rows into parts, as paired views or mixup do."""

    def logs_of(self, x, y):
        halves = tf.split(x, 2)
        loss = self.loss_fn(y, tf.concat([self(half) for half in halves], 0))
        return {"loss": loss}


def test_step_that_divides_its_rows(make_strategy):
    def build():
        model = guide_model(HalvesItsRows)
        model.loss_fn = keras.losses.MeanSquaredError()
        model.compile("sgd")
        return model

    data = comparing.regression_data(48)
    fit = _fit(*data, batch_size=24)
    _assert_equal_on_all(make_strategy, build, fit, pick([4], [2, 4]))


class Nested(Minimizes):
    """Computes its loss in one nested function, and pairs of rows in another."""

    def logs_of(self, x, y):
        @tf.function
        def error(y_pred):
            return self.loss_fn(y, y_pred)

        @tf.function
        def spread(y_pred):
            return tf.reduce_mean(tf.abs(y_pred - tf.transpose(y_pred)))

        y_pred = self(x, training=True)
        return {"loss": error(y_pred) + 0.1 * spread(y_pred)}


class NestedStep(ByHand):
    @tf.function
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize("cls", [Nested, NestedStep])
def test_loss_and_updates_in_a_nested_function(make_strategy, cls):
    def build():
        model = guide_model(cls)
        model.loss_fn = keras.losses.MeanSquaredError()
        model.compile("adam")
        return model

    one = _assert_equal_on_all(
        make_strategy, build, _fit(*comparing.regression_data(ROWS))
    )
    assert np.ptp(one.history["loss"]) > 0


class LearnsItsWeight(Minimizes):
    """Multiplies a loss with a number that is learned."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = self.add_weight(shape=(), initializer="zeros", name="scale")

    def logs_of(self, x, y):
        error = keras.losses.MeanSquaredError()(y, self(x, training=True))
        return {"loss": tf.exp(-self.scale) * error + self.scale}


def test_trainable_weight_of_a_loss(make_strategy):
    def build():
        model = guide_model(LearnsItsWeight)
        model.compile("adam")
        return model

    _assert_equal_on_all(make_strategy, build, _fit(*comparing.regression_data(ROWS)))


OVER_THE_BATCH = {
    "dice": lambda: keras.losses.Dice(axis=(0, 1)),
    "tversky": lambda: keras.losses.Tversky(axis=(0,)),
    "sum": lambda: lambda y, p: tf.reduce_sum(tf.square(y - p)),
    "largest": lambda: lambda y, p: tf.reduce_max(tf.square(y - p)),
}


@pytest.mark.parametrize("name", pick(["dice", "largest"], list(OVER_THE_BATCH)))
def test_loss_that_is_no_mean_of_rows(make_strategy, name):
    """Stock Keras averages what replicas compute separately."""

    def build():
        inputs = keras.Input((8,))
        model = distfit.Model(inputs, layers.Dense(3, activation="sigmoid")(inputs))
        model.compile(keras.optimizers.SGD(0.01), OVER_THE_BATCH[name]())
        return model

    x, _ = comparing.regression_data(ROWS)
    y = (x[:, :3] > 0).astype("float32")
    _assert_equal_on_all(make_strategy, build, _fit(x, y), replicas=(3,))


class Positions(layers.Layer):
    """Adds a learned vector for each position."""

    def build(self, shape):
        self.places = layers.Embedding(shape[1], shape[2])

    def call(self, x):
        return x + self.places(tf.range(tf.shape(x)[1]))


@pytest.mark.parametrize("optimizer", pick(["adagrad"], ["adam", "rmsprop", "adagrad"]))
def test_learned_positions(make_strategy, optimizer):
    """Every replica uses the same positions, and each position counts once."""

    def build():
        inputs = keras.Input((7,), dtype="int32")
        x = Positions()(layers.Embedding(20, 5)(inputs))
        x = layers.GlobalAveragePooling1D()(layers.Dense(4, activation="tanh")(x))
        model = distfit.Model(inputs, layers.Dense(1)(x))
        model.compile(optimizer, "mse")
        return model

    y = comparing.regression_data(ROWS)[1]
    _assert_equal_on_all(make_strategy, build, _fit(_sequences(), y), replicas=(3,))


class AverageLoss(distfit.Model):
    """Divides by the size of a global batch, as the guide to tf.distribute does."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            errors = keras.losses.mean_squared_error(y, self(x, training=True))
            loss = tf.nn.compute_average_loss(errors, global_batch_size=7)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {}


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [2, 3, 4]))
def test_loss_that_the_step_scales_itself_in_a_batch_of_few_rows(
    make_strategy, replicas
):
    """The last batch has 1 row, and each replica computes the loss of all of it."""

    def run(strategy):
        def build():
            inputs = keras.Input((8,))
            model = AverageLoss(inputs, layers.Dense(1)(inputs))
            model.compile(keras.optimizers.SGD(0.1))
            return model

        x, y = comparing.regression_data(22)
        return comparing.run(
            strategy,
            build,
            lambda m: m.fit(x, y, batch_size=7, shuffle=False, verbose=0),
        )

    comparing.assert_same(run(make_strategy(1)), run(make_strategy(replicas)))


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [2, 3, 4]))
def test_unreduced_loss_in_a_batch_of_few_rows(make_strategy, replicas):
    def run(strategy):
        def build():
            inputs = keras.Input((8,))
            model = distfit.Model(inputs, layers.Dense(1)(inputs))
            loss = keras.losses.MeanAbsoluteError(reduction=None)
            model.compile(keras.optimizers.SGD(0.1), loss)
            return model

        x, y = comparing.regression_data(22)
        return comparing.run(
            strategy,
            build,
            lambda m: m.fit(x, y, batch_size=7, epochs=2, shuffle=False, verbose=0),
        )

    comparing.assert_same(run(make_strategy(1)), run(make_strategy(replicas)))


@pytest.mark.parametrize("rows", pick([3], [1, 3, 9]))
def test_all_rows_for_each_row(make_strategy, rows):
    """Also in batches with fewer rows than replicas."""

    class Repeats(distfit.Model):
        def predict_step(self, data):
            return tf.repeat(data[tf.newaxis], tf.shape(data)[0], axis=0)

    with make_strategy(4).scope():
        model = Repeats()
    numbers = np.arange(7, 7 + rows, dtype="int32")
    repeated = model.predict(numbers, batch_size=rows, verbose=0)
    np.testing.assert_array_equal(repeated, np.tile(numbers, (rows, 1)))


class Reads(distfit.Model):
    """A step that does something with the value of its loss, in one of many ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.layer = layers.Dense(1)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.total = keras.metrics.Sum(name="total")
        self.mean = keras.metrics.Mean(name="mean")
        self.kept = self.add_weight(shape=(), trainable=False, name="kept")
        self.variable = tf.Variable(0.0, trainable=False)

    def call(self, x):
        return self.layer(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.losses.MeanSquaredError()(y, self(x, training=True))
            taken = tf.square(loss) if self.how == "gradient" else loss
        gradients = tape.gradient(taken, self.trainable_variables)
        if self.how == "scaled gradient":
            gradients = [g / (1.0 + loss) for g in gradients]
        if self.how == "condition":
            gradients = tf.cond(
                loss < 2.0, lambda: [0.5 * g for g in gradients], lambda: gradients
            )
        self.optimizer.apply(gradients, self.trainable_variables)
        self.loss_tracker.update_state(loss)
        logs = {"loss": self.loss_tracker.result(), "raw": loss}
        if self.how == "weight":
            self.kept.assign(loss)
        elif self.how == "variable":
            self.variable.assign(loss)
        elif self.how == "metric":
            self.total.update_state(loss)
            logs["total"] = self.total.result()
        elif self.how == "weighted":
            self.mean.update_state(loss, sample_weight=2.0)
            logs["mean"] = self.mean.result()
        elif self.how == "log":
            logs["twice"] = 2.0 * loss + self.loss_tracker.result()
        elif self.how == "python":
            tf.py_function(READ.append, [loss], [])
        return logs


READ: list = []
WAYS = ("gradient", "scaled gradient", "condition", "weight", "variable", "metric")
FEW_WAYS = ["condition", "variable"]


@pytest.mark.parametrize(
    "how", pick(FEW_WAYS, ["", *WAYS, "weighted", "log", "python"])
)
def test_the_value_of_a_loss_is_there_for_steps_that_read_it(make_strategy, how):
    runs, values = [], []
    for replicas in (1, 2):

        def build():
            model = Reads(how)
            model.compile(keras.optimizers.SGD(0.05))
            return model

        def fit(model):
            READ.clear()
            x, y = comparing.regression_data(22)
            history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
            read = sorted({round(float(value), 4) for value in READ})
            values.append([float(model.kept), float(model.variable.value()), *read])
            return history

        runs.append(comparing.run(make_strategy(replicas), build, fit))
    comparing.assert_same(*runs)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-4)


class OverZero(keras.Model):
    """Weights its gradients by a loss divided by its average, which is 0 at first."""

    def __init__(self, *args, only_first_rows=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.average = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.only_first_rows = only_first_rows

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            each = tf.square(self(x) - y)
            if self.only_first_rows:
                each *= tf.cast(tf.range(tf.shape(x)[0]) < 2, tf.float32)[:, None]
            error = tf.reduce_mean(each)
        variables = self.trainable_variables
        weight = tf.minimum(error / self.average, 2.0)
        gradients = [weight * g for g in tape.gradient(error, variables)]
        self.optimizer.apply(gradients, variables)
        self.average.assign(0.9 * self.average + 0.1 * error)
        return {"error": error, "weight": weight}


@pytest.mark.parametrize("only_first_rows", [False, True])
def test_a_part_of_zero_over_zero_is_not_that_of_the_sum(
    make_strategy, only_first_rows
):
    def train(fit, strategy):
        keras.utils.set_random_seed(0)
        with comparing.scope_of(strategy):
            inputs = keras.Input((8,))
            outputs = layers.Dense(1)(inputs)
            model = OverZero(inputs, outputs, only_first_rows=only_first_rows)
            model.compile(keras.optimizers.SGD(0.02))
        data = comparing.regression_data(12)
        options = {"batch_size": 7 if only_first_rows else 2, "epochs": 2}
        history = fit(model, *data, shuffle=False, verbose=0, **options).history
        return comparing.Run(history, model.get_weights())

    one = train(keras.Model.fit, None)
    assert np.isfinite(one.history["weight"]).all()
    comparing.assert_same(one, train(distfit.fit, make_strategy(3)))
