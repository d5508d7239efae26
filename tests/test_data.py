"""Every input Keras takes: each global batch is trained once, and cut by rows."""

import warnings

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas, pick
from keras import layers

import distfit
from distfit.partition.exchanges import Replicas
from distfit.training import shards
from distfit.training.drivers import drivers_of
from distfit.training.global_batches import GlobalBatches
from distfit.training.inputs import without_autotune
from distfit.training.shares import Layout, shares, shares_of_shards

ROWS, BATCH = 45, 10  # Four batches of 10 and one of 5 rows.


class Records(distfit.Model):
    """Adds up its rows, so that a lost or doubled row shows."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        x = tf.cast(tf.nest.flatten(x)[0], tf.float32)
        rows = tf.cast(tf.shape(x)[0], tf.float32)
        self.total.update_state(tf.reduce_sum(x, axis=range(1, x.shape.rank)))
        self.rows.update_state(tf.ones((tf.shape(x)[0],)))
        return {"total": self.total.result(), "rows": self.rows.result(), "r": rows}


def _records(strategy, steps_per_execution=1, run_eagerly=False):
    with strategy.scope():
        model = Records()
        model.total = keras.metrics.Sum(name="total")
        model.rows = keras.metrics.Sum(name="rows")
        model.compile(steps_per_execution=steps_per_execution, run_eagerly=run_eagerly)
    return model


def _x():
    return np.arange(ROWS * 3, dtype="float32").reshape(ROWS, 3)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        rows = _x()[index * BATCH : (index + 1) * BATCH]
        return rows, rows[:, :1]


def _generator():
    for index in range(5):
        yield Batches()[index]


INPUTS = {
    "arrays": lambda: {"x": _x(), "batch_size": BATCH},
    "shuffled": lambda: {"x": _x(), "batch_size": BATCH, "shuffle": True},
    "lists": lambda: {"x": [_x(), _x()], "y": _x(), "batch_size": BATCH},
    "dataset": lambda: {"x": tf.data.Dataset.from_tensor_slices(_x()).batch(BATCH)},
    "unknown": lambda: {
        "x": tf.data.Dataset.from_tensor_slices(_x())
        .batch(BATCH)
        .filter(lambda t: True)
    },
    "pydataset": lambda: {"x": Batches()},
    "generator": lambda: {"x": _generator()},
    "dict": lambda: {"x": {"a": _x(), "b": {"c": _x()}}, "batch_size": BATCH},
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("fused", [1, 4])
def test_every_row_is_trained_once(make_strategy, name, fused):
    for replicas in pick([4], [1, 2, 4]):
        model = _records(make_strategy(replicas), fused)
        logs = model.fit(**INPUTS[name](), verbose=0).history
        assert logs["rows"] == [ROWS]
        assert logs["total"] == [_x().sum()]


@pytest.mark.parametrize("name", pick(["unknown"], ["arrays", "unknown"]))
def test_every_row_is_trained_once_when_run_eagerly(make_strategy, name):
    model = _records(make_strategy(2), 2, run_eagerly=True)
    seen = []
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(int(logs["rows"]))
    )
    logs = model.fit(**INPUTS[name](), epochs=2, verbose=0, callbacks=[keep]).history
    assert seen == [20, 40, 45] * 2
    assert logs["rows"] == [ROWS] * 2
    assert logs["total"] == [_x().sum()] * 2


def test_epochs_of_a_dataset_of_unknown_length(make_strategy):
    for fused in (1, 4):
        model = _records(make_strategy(2), fused)
        history = model.fit(**INPUTS["unknown"](), epochs=3, verbose=0).history
        assert history["rows"] == [ROWS] * 3


def test_steps_per_epoch_continues_through_the_data(make_strategy):
    x = tf.data.Dataset.from_tensor_slices(_x()).batch(BATCH)
    for dataset in (x, x.filter(lambda t: True)):
        model = _records(make_strategy(2), 2)
        history = model.fit(dataset.repeat(), epochs=3, steps_per_epoch=3, verbose=0)
        # 10+10+10, 10+5+10, 10+10+10
        assert history.history["rows"] == [30, 25, 30]


def test_running_out_of_data_warns_as_keras_does(make_strategy):
    for name in ("dataset", "unknown", "generator"):
        model = _records(make_strategy(2), 2)
        with pytest.warns(UserWarning, match="ran out of data"):
            history = model.fit(
                **INPUTS[name](), epochs=1, steps_per_epoch=9, verbose=0
            )
        assert history.history["rows"] == [ROWS]


def test_a_generator_is_not_started_anew(make_strategy):
    """Keras reads the first batches of a generator ahead, and replays them."""
    model = _records(make_strategy(2))
    with pytest.warns(UserWarning, match="ran out of data"):
        history = model.fit(
            _generator(), epochs=4, steps_per_epoch=3, verbose=0
        ).history
    assert history["rows"] == [30, 15]


@pytest.mark.parametrize("dtype", ["string", "bool", "int32", "ragged", "sparse"])
def test_any_dtype_that_a_layer_accepts(make_strategy, dtype):
    """Stock Keras crashes in its symbolic build, which averages the first batch."""
    numbers = np.arange(11)
    y = numbers.astype("float32")[:, None]
    x = {
        "string": tf.constant([str(n) for n in numbers]),
        "bool": tf.constant(numbers % 2 == 0),
        "int32": tf.constant(numbers, tf.int32),
        "ragged": tf.ragged.range(numbers % 4 + 1),
        "sparse": tf.sparse.from_dense(numbers[:, None] * [0.0, 1.0]),
    }[dtype]

    class Sums(distfit.Model):
        def train_step(self, data):
            x, y = data
            if dtype == "ragged":
                x = tf.reduce_sum(x, axis=1)
            if dtype == "sparse":
                x = tf.sparse.to_dense(x)[:, 1]
            if dtype == "string":
                x = tf.strings.to_number(x)
            self.total.update_state(tf.cast(x, tf.float32) * y[:, 0])
            return {"total": self.total.result()}

    totals = []
    for replicas in (1, 3):
        with make_strategy(replicas).scope():
            model = Sums()
            model.total = keras.metrics.Sum(name="total")
            model.compile()
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
        totals += model.fit(data, verbose=0).history["total"]
    assert totals[0] == totals[1] != 0


def test_first_batch_that_splits_unevenly(make_strategy):
    """Stock Keras: AddN must have the same size and shape."""
    x, y = comparing.regression_data(7)
    with make_strategy(3).scope():
        model = distfit.Sequential([layers.Dense(1)])
        model.compile("sgd", "mse")
    assert np.isfinite(model.fit(x, y, batch_size=7, verbose=0).history["loss"][0])


def test_what_has_other_rows_by_an_open_spec(make_strategy):
    """A table beside the rows: its size, if known, shows that it has none."""
    x, table = np.ones((7, 4), "float32"), np.ones((3, 4), "float32")

    class Tabled(distfit.Model):
        def train_step(self, data):
            x, table = data
            return {"sum": tf.reduce_sum(x @ tf.transpose(table))}

    def trained(size):
        specs = (tf.TensorSpec((None, 4)), tf.TensorSpec((size, 4)))
        data = tf.data.Dataset.from_generator(
            lambda: iter([(x, table)]), output_signature=specs
        )
        with make_strategy(2).scope():
            model = Tabled()
            model.compile()
        return model.fit(data, verbose=0).history["sum"]

    assert trained(3) == [7 * 3 * 4]
    with pytest.raises(tf.errors.InvalidArgumentError, match="same number of rows"):
        trained(None)


def test_train_on_batch_splits_the_batch(make_strategy):
    """Stock Keras gives every replica the whole batch."""
    x, y = comparing.regression_data(10)

    def build():
        model = distfit.Sequential([keras.Input((8,)), layers.Dense(1)])
        model.compile("sgd", "mse", metrics=["mae"])
        return model

    found = []
    for replicas in (1, 2, 4):
        keras.utils.set_random_seed(2)
        with make_strategy(replicas).scope():
            model = build()
        logs = [model.train_on_batch(x, y, return_dict=True) for _ in range(3)]
        logs.append(model.test_on_batch(x, y, return_dict=True))
        logs.append({"few": model.test_on_batch(x[:1], y[:1])[0]})
        logs.append({"sum": float(model.predict_on_batch(x).sum())})
        found.append(logs)
    for other in found[1:]:
        for one_logs, other_logs in zip(found[0], other, strict=True):
            comparing.assert_close_logs(one_logs, other_logs, 1e-5)
    with make_strategy(2).scope():
        model = _records(make_strategy(2))
    assert model.train_on_batch(_x(), return_dict=True)["rows"] == ROWS


def test_train_on_batch_with_class_weight(make_strategy):
    with make_strategy(2).scope():
        model = distfit.Sequential([keras.Input((3,)), layers.Dense(2)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
    y = np.arange(ROWS) % 2
    plain = model.test_on_batch(_x(), y)
    doubled = model.train_on_batch(_x(), y, class_weight={0: 2.0, 1: 2.0})
    assert doubled == pytest.approx(2 * plain, rel=1e-5)


def test_validation_split_and_frequency(make_strategy):
    histories = []
    for replicas in (1, 2):
        keras.utils.set_random_seed(2)
        with make_strategy(replicas).scope():
            model = distfit.Sequential([keras.Input((8,)), layers.Dense(1)])
            model.compile("sgd", "mse")
        x, y = comparing.regression_data(ROWS)
        history = model.fit(
            x,
            y,
            batch_size=BATCH,
            epochs=5,
            initial_epoch=1,
            validation_split=0.3,
            validation_freq=2,
            validation_batch_size=4,
            shuffle=False,
            verbose=0,
        )
        assert history.epoch == [1, 2, 3, 4]
        assert len(history.history["val_loss"]) == 2
        histories.append(history.history)
    comparing.assert_close_logs(*histories, 1e-5)


def test_predict_of_several_outputs_is_complete_and_in_order(make_strategy):
    x = _x()
    for replicas in (1, 2, 3, 4):
        with make_strategy(replicas).scope():
            inputs = keras.Input((3,))
            doubled = layers.Rescaling(2.0)(inputs)
            model = distfit.Model(inputs, {"same": inputs, "double": doubled})
        for batch_size in (BATCH, 2, 22):
            predicted = model.predict(x, batch_size=batch_size, verbose=0)
            np.testing.assert_array_equal(predicted["same"], x)
            np.testing.assert_array_equal(predicted["double"], 2 * x)
        unknown = tf.data.Dataset.from_tensor_slices(x).batch(7).filter(lambda t: True)
        np.testing.assert_array_equal(model.predict(unknown, verbose=0)["same"], x)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_rows_of_replicas_cover_every_row_once(rows, replicas):
    """Where there are fewer rows than replicas, some have none."""
    own = Replicas(None, [f"CPU:{i}" for i in range(replicas)], replicas)
    x = tf.range(rows)
    share = shares((x, tf.range(3)), [True, False], own)
    parts, tables = share.parts
    assert np.concatenate(parts).tolist() == list(range(rows))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert [int(n) for n in share.count] == sizes
    assert [int(n) for n in share.start] == np.cumsum([0, *sizes[:-1]]).tolist()
    assert all(int(n) == rows for n in share.total)
    assert [len(table) for table in tables] == [3] * replicas


def test_rows_of_shards_follow_each_other():
    own = Replicas(None, [f"CPU:{i}" for i in range(4)], 4)
    # A replica without rows brings one that counts as 0.
    batches = [(tf.constant(rows),) for rows in ([0], [1, 2, 3], [0], [4, 5])]
    share = shares_of_shards(batches, tf.constant([0, 3, 0, 2]), [True], own)
    (parts,) = share.parts
    assert [part.numpy().tolist() for part in parts] == [[], [1, 2, 3], [], [4, 5]]
    assert [int(n) for n in share.start] == [0, 0, 3, 3]
    assert all(int(n) == 5 for n in share.total)


class Mixes(distfit.Model):
    """Does everything in a step that depends on which replica has which rows."""

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()
        self.dense = layers.Dense(1)
        self.rows = keras.metrics.Sum(name="rows")
        self.mae = keras.metrics.MeanAbsoluteError(name="mae")
        self.noise = keras.random.SeedGenerator(3)

    def call(self, x, training=False):
        return self.dense(self.norm(x, training=training))

    def train_step(self, data):
        x, y = data
        x += 0.1 * keras.random.normal(tf.shape(x), seed=self.noise)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            largest = tf.reduce_max(y_pred)
            loss = tf.reduce_mean(tf.square(y - y_pred)) + 0.01 * largest
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        self.rows.update_state(tf.ones_like(y))
        self.mae.update_state(y, y_pred)
        logs = {m.name: m.result() for m in (self.rows, self.mae)}
        return {"loss": loss, "largest": largest, **logs}

    @property
    def metrics(self):
        return [self.rows, self.mae]


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [2, 3, 4]))
def test_batches_that_replicas_bring_themselves_equal_one_device(
    make_strategy, replicas
):
    """Batches of unequal sizes; at the end some replicas, or all but one, have none."""
    sizes = [3, 1, 2, 4, 1, 1, 2, 5, 2]
    x, y = comparing.regression_data(sum(sizes))
    ends = np.cumsum([0, *sizes])
    parts = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]

    def dataset_of(slices):
        def batches():
            yield from ((x[part], y[part]) for part in slices)

        spec = (tf.TensorSpec([None, 8]), tf.TensorSpec([None, 1]))
        return tf.data.Dataset.from_generator(batches, output_signature=spec)

    starts = ends[::replicas]
    joined = [slice(*pair) for pair in zip(starts, [*starts[1:], None], strict=True)]
    joined = [part for part in joined if len(x[part])]

    def dataset_fn(context):
        own = slice(context.input_pipeline_id, None, context.num_input_pipelines)
        return dataset_of(parts[own])

    inputs = {1: dataset_of(joined), replicas: dataset_fn}

    def build():
        model = Mixes()
        model.compile(keras.optimizers.Adam(0.01), steps_per_execution=2)
        return model

    runs = []
    for number, given in inputs.items():

        def fit(model, data=given):
            return model.fit(data, epochs=2, verbose=0)

        def then(model, data=given):
            return None, model.predict(data, verbose=0)

        runs.append(comparing.run(make_strategy(number), build, fit, then))
    comparing.assert_same(*runs)
    assert runs[1].history["rows"] == [sum(sizes)] * 2


def test_data_are_told_apart_by_content():
    def sample(values, dtype):
        batches = GlobalBatches(np.array(values, dtype), batch_size=2)
        return batches.facts("the data")["content of the data"]

    for values, dtype in (([[1], [2], [3]], "int64"), (["a", "bc", "d"], object)):
        assert sample(values, dtype) == sample(list(values), dtype)
        assert sample(values, dtype) != sample(values[::-1], dtype)
    assert sample([[1], [2]], "int64") != sample([[1], [2], [1]], "int64")
    rows = np.zeros((500, 3))
    assert all(
        sample(rows, "f") != sample(rows + np.eye(500, 3, k), "f") for k in (0, -77)
    )


def test_a_function_for_data_returns_a_dataset(make_strategy):
    model = _records(make_strategy(2))
    with pytest.raises(ValueError, match="must return the `tf.data.Dataset`"):
        model.fit(lambda context: _x(), verbose=0)
    with pytest.raises(ValueError, match="must contain targets and weights"):
        model.fit(lambda context: _x(), _x(), verbose=0)


@pytest.mark.parametrize("kind", ["ragged", "sparse", "table", "scalar"])
def test_a_function_for_data_gives_nothing_but_rows(make_strategy, kind):
    """Each replica would bring a different table, unnoticed."""
    beside = {
        "ragged": lambda rows: tf.RaggedTensor.from_tensor(rows),
        "sparse": lambda rows: tf.sparse.from_dense(rows),
        "table": lambda rows: tf.zeros((3, 3)),
        "scalar": lambda rows: tf.constant(1.0),
    }[kind]
    dataset = tf.data.Dataset.from_tensor_slices(_x()).batch(2, drop_remainder=True)
    dataset = dataset.map(lambda rows: ({"x": rows, "z": beside(rows)},))
    model = _records(make_strategy(2))
    with pytest.raises(ValueError, match="dense tensors with the same number of rows"):
        model.fit(lambda context: dataset, verbose=0)


def test_a_table_of_an_open_size_in_a_shard_is_an_error(make_strategy):
    rows = tf.data.Dataset.from_tensor_slices(_x()).batch(2)
    tables = tf.data.Dataset.from_tensor_slices(_x()).batch(3).repeat()
    model = _records(make_strategy(2))
    with pytest.raises(tf.errors.InvalidArgumentError, match="the same number of rows"):
        model.fit(lambda context: tf.data.Dataset.zip(rows, tables), verbose=0)


def test_stand_ins_are_one_row_of_the_data_or_of_zeros():
    rows = tf.data.Dataset.from_tensor_slices(
        {"text": ["a", "b", "c"], "x": np.ones((3, 2), "float32")}
    ).batch(2)
    for dataset, first, x in ((rows, b"a", 1), (rows.take(0), b"", 0)):
        full = [2, 1] if first else []
        elements = list(shards.with_stand_ins(dataset).take(len(full) + 2))
        assert [int(count) for _, count in elements] == [*full, 0, 0]
        batch = elements[-1][0]
        assert batch["text"].numpy().tolist() == [first]
        assert batch["x"].numpy().tolist() == [[x, x]]


def test_what_has_rows_is_told_from_what_has_none():
    """A tensor has rows if its first dimension is that of the batch."""
    x, table = tf.TensorSpec([8, 3]), tf.TensorSpec([5, 3])
    some = Layout((x, {"table": table, "y": tf.TensorSpec([8])}))
    assert some.rows == 8
    assert some.has_rows == [True, False, True]
    free = Layout((tf.TensorSpec([None, 3]), tf.TensorSpec([None])))
    assert free.rows is None and free.has_rows == [True, True]


def test_a_batch_tells_which_of_the_open_sizes_are_its_rows():
    open_sizes = Layout(
        ((tf.TensorSpec([None, 3]), tf.TensorSpec([None, 3])), tf.TensorSpec([None])),
        ((np.zeros((5, 3)), np.zeros((8, 3))), np.zeros(8)),
    )
    assert open_sizes.has_rows == [False, True, True]
    assert open_sizes.cut == ((False, True), True)
    assert open_sizes.rows is None


class Beside(distfit.Model):
    """Has rows, a table, and other rows with a number of their own."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def loss_of(self, data):
        (x, table, others), y = data
        distances = self.dense(x)[:, None] - table[None]
        loss = tf.reduce_mean(tf.square(distances)) + tf.reduce_mean(y)
        return loss + tf.reduce_mean(tf.square(self.dense(others)))

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(data)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}

    def test_step(self, data):
        return {"loss": self.loss_of(data)}

    def predict_step(self, data):
        return self.dense(data[0][0])


class BesideRows(keras.utils.PyDataset):
    """Three batches: of 7 rows and 12 others, of 6 and 12, and of 3 and 5."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        rows, others = [(7, 12), (6, 12), (3, 5)][index]
        sizes = (rows, 7, others)  # The table is as long as the first batch by chance.
        x, table, more = (generator.random((n, 3), "float32") for n in sizes)
        return (x, table, more), x[:, :1]


@pytest.mark.parametrize(
    "kind", pick(["generator", "on batch"], ["pydataset", "generator", "on batch"])
)
def test_what_is_beside_the_rows_is_not_cut(make_strategy, kind):
    found = []
    for replicas in (1, 3):
        keras.utils.set_random_seed(0)
        with make_strategy(replicas).scope():
            model = Beside()
            model.compile(keras.optimizers.SGD(0.1))
        batches = BesideRows()
        if kind == "on batch":
            logs = [model.train_on_batch(*batches[i]) for i in (0, 1, 2)]
            logs.append(model.test_on_batch(*batches[2]))
            outputs = model.predict_on_batch(batches[2][0])
        else:
            data = batches if kind == "pydataset" else (batches[i] for i in range(3))
            logs = model.fit(data, verbose=0).history["loss"]
            logs.append(model.evaluate(batches, verbose=0, return_dict=True)["loss"])
            outputs = model.predict(batches, verbose=0)
        found.append([*logs, *np.ravel(outputs)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


class Quadruples(keras.Model):
    def train_step(self, data):
        near, far, target, weight = data
        with tf.GradientTape() as tape:
            error = self(near) - self(far) - target
            error = tf.reduce_mean(weight * tf.square(error))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(error, variables), variables)
        return {"error": error}


def _rows_and_their_order(fit, strategy, **options):
    """Trains with logs that depend on the order of rows; returns those of epochs."""
    keras.utils.set_random_seed(1)
    with comparing.scope_of(strategy):
        inputs = keras.Input((8,))
        model = keras.Model(inputs, layers.Dense(1)(inputs))
        model.compile(keras.optimizers.SGD(0.05), "mse")
    history = fit(model, epochs=4, verbose=0, **options).history
    return comparing.Run(history, model.get_weights())


@pytest.mark.parametrize("kind", ["dataset", "arrays", "batches of arrays"])
def test_rows_are_shuffled_as_by_stock_keras(make_strategy, kind):
    """Also those of a dataset whose seed gives another order for each iterator."""

    def options():
        keras.utils.set_random_seed(1)  # The order of a dataset depends on it, too.
        x, y = comparing.regression_data(22)
        if kind == "dataset":
            dataset = tf.data.Dataset.from_tensor_slices((x, y))
            dataset = without_autotune(dataset.shuffle(22, seed=3).batch(4))
            other = dataset.map(lambda x, y: (-x, y))
            return {"x": dataset, "validation_data": other, "shuffle": False}
        shuffle = "batch" if kind == "batches of arrays" else True
        return {"x": x, "y": y, "batch_size": 4, "shuffle": shuffle}

    one = _rows_and_their_order(keras.Model.fit, None, **options())
    two = _rows_and_their_order(distfit.fit, make_strategy(2), **options())
    comparing.assert_same(one, two)


def test_elements_may_have_whatever_the_step_takes(make_strategy):
    def train(fit, strategy):
        keras.utils.set_random_seed(1)
        with comparing.scope_of(strategy):
            inputs = keras.Input((8,))
            model = Quadruples(inputs, layers.Dense(1)(inputs))
            model.compile(keras.optimizers.SGD(0.05))
        x, y = comparing.regression_data(22)
        weight = np.linspace(0, 1, 22, dtype="float32")[:, None]
        dataset = tf.data.Dataset.from_tensor_slices((x, -x[::-1], y, weight))
        options = {"epochs": 2, "shuffle": False, "verbose": 0}
        dataset = without_autotune(dataset.batch(5))
        history = fit(model, dataset, **options).history
        return comparing.Run(history, model.get_weights())

    one = train(keras.Model.fit, None)
    comparing.assert_same(one, train(distfit.fit, make_strategy(3)))


SIZES = (5, 2, 7, 1, 1, 6, 2)  # On 3 replicas four batches leave one without rows.


def _images():
    """Batches of images of `SIZES`, and labels."""
    generator = np.random.default_rng(0)
    for rows in SIZES:
        yield (
            generator.random((rows, 6, 6, 1), "float32"),
            generator.random((rows, 2), "float32"),
        )


def _convolutional(strategy, fused):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = distfit.Sequential(
            [
                keras.Input((6, 6, 1)),
                layers.Conv2D(3, 3, activation="relu"),
                layers.MaxPooling2D(2),
                layers.Flatten(),
                layers.Dense(2),
            ]
        )
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            "mse",
            metrics=["mae"],
            steps_per_execution=fused,
        )
    return model


@pytest.mark.parametrize(
    "length, fused",
    pick(
        [("unknown", 1)],
        [("known", 4), ("unknown", 1), ("known", 1), ("unknown", 4)],
    ),
)
def test_convolutions_of_batches_that_leave_replicas_without_rows(
    make_strategy, length, fused
):
    """Image kernels fail or give wrong results without rows."""
    signature = (
        tf.TensorSpec((None, 6, 6, 1), tf.float32),
        tf.TensorSpec((None, 2), tf.float32),
    )
    dataset = tf.data.Dataset.from_generator(_images, output_signature=signature)
    if length == "known":
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(SIZES)))
    found = []
    for replicas in (1, 3):
        model = _convolutional(make_strategy(replicas), fused)
        history = model.fit(dataset, epochs=2, verbose=0).history
        evaluated = model.evaluate(dataset, verbose=0)
        predictions = model.predict(dataset, verbose=0)
        assert predictions.shape == (sum(SIZES), 2)
        found.append([*history["loss"], *history["mae"], *evaluated, *predictions.flat])
        for x, y in _images():
            found[-1] += model.train_on_batch(x, y)
            found[-1] += list(model.predict_on_batch(x).flat)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_dataset_that_ends_before_its_length(make_strategy):
    signature = (
        tf.TensorSpec((None, 6, 6, 1), tf.float32),
        tf.TensorSpec((None, 2), tf.float32),
    )
    dataset = tf.data.Dataset.from_generator(_images, output_signature=signature)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(SIZES) + 1))
    model = _convolutional(make_strategy(3), 1)
    with pytest.raises(tf.errors.FailedPreconditionError, match="expected to contain"):
        model.fit(dataset, verbose=0)


def test_no_warning_of_shuffling_for_datasets_and_generators(make_strategy):
    model = _records(make_strategy(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(**INPUTS["dataset"](), verbose=0)
        model.fit(**INPUTS["generator"](), verbose=0)


class Shuffles(Batches):
    """Records when it is called at the start and end of an epoch."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_epoch_begin(self):
        self.calls.append("begin")

    def on_epoch_end(self):
        self.calls.append("end")


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # By stock Keras.
@pytest.mark.parametrize("steps", pick([3], [None, 3]))
@pytest.mark.parametrize("validated", pick([True], [False, True]))
def test_a_pydataset_is_told_of_epochs_as_by_stock_keras(
    make_strategy, steps, validated
):
    def calls(base, strategy):
        with strategy.scope():
            model = base([keras.Input((3,)), layers.Dense(1)])
            model.compile("sgd", "mse")
        data, validation = Shuffles(), Shuffles()
        arguments = {"validation_data": validation} if validated else {}
        model.fit(data, epochs=3, steps_per_epoch=steps, verbose=0, **arguments)
        of_fit = data.calls[:], validation.calls[:]
        model.evaluate(data, verbose=0)
        of_evaluate = data.calls[:]
        model.predict(data, verbose=0)
        ends = [c.count("end") for c in (*of_fit, of_evaluate, data.calls)]
        return ends, [c.count("begin") for c in (*of_fit, of_evaluate, data.calls)]

    stock = calls(keras.Sequential, tf.distribute.get_strategy())
    for replicas in (1, 2):
        assert calls(distfit.Sequential, make_strategy(replicas)) == stock


@pytest.fixture
def limits():
    yield
    keras.config.set_max_epochs(None)
    keras.config.set_max_steps_per_epoch(None)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_limits_of_keras_count(make_strategy, limits):
    keras.config.set_max_epochs(2)
    keras.config.set_max_steps_per_epoch(3)
    with pytest.warns(UserWarning, match="Limiting"):
        model = _records(make_strategy(2))
        history = model.fit(_x(), batch_size=BATCH, epochs=5, shuffle=False, verbose=0)
    # The second epoch continues where the first stopped.
    assert history.history["rows"] == [30, 15]
    assert history.epoch == [0, 1]

    def stock():
        model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    def ours():
        with make_strategy(2).scope():
            model = distfit.Sequential([keras.Input((3,)), layers.Dense(1)])
            model.compile("sgd", "mse")
        return model

    found, histories = [], []
    for build in (stock, ours):
        keras.utils.set_random_seed(0)
        model = build()
        with pytest.warns(UserWarning, match="Limiting"):
            fitted = model.fit(
                _x() / 100,
                _x()[:, :1] / 100,
                batch_size=BATCH,
                epochs=5,
                shuffle=False,
                verbose=0,
            )
            evaluated = model.evaluate(_x(), _x()[:, :1], batch_size=BATCH, verbose=0)
            predicted = model.predict(_x(), batch_size=BATCH, verbose=0)
        found.append((fitted.epoch, np.shape(predicted), evaluated))
        histories.append(fitted.history)
    assert found[0][:2] == found[1][:2]
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-5)
    comparing.assert_close_logs(*histories, 1e-5)


class OptionalInput(distfit.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, inputs):
        first, second = inputs
        return self.dense(second if first is None else first + second)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # By stock Keras.
@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [2, 3]))
@pytest.mark.parametrize("given", pick([True], [False, True]))
def test_an_optional_input_whose_first_leaf_is_none(make_strategy, replicas, given):
    x, y = comparing.regression_data(23)

    def batches(*others):
        def generate():
            for start in range(0, 23, 7):
                rows = slice(start, start + 7)
                inputs = (x[rows] if given else None, x[rows])
                yield (inputs, *(other[rows] for other in others))

        return generate()

    def run(replicas):
        def build():
            model = OptionalInput()
            model.compile("sgd", "mse", metrics=["mae"])
            return model

        def then(model):
            logs = model.evaluate(batches(y), verbose=0, return_dict=True)
            return logs, model.predict(batches(), verbose=0)

        return comparing.run(
            make_strategy(replicas),
            build,
            lambda model: model.fit(batches(y), verbose=0),
            then,
        )

    comparing.assert_same(run(1), run(replicas))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # By stock Keras.
@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [1, 2, 3]))
@pytest.mark.parametrize("sizes", [(6, 6), (6, 2, 1)])
def test_predictions_of_another_width_in_each_batch(make_strategy, replicas, sizes):
    """As wide as the longest string of the whole batch; ragged, if batches differ."""
    texts = ["a b c", "d", "e f", "g h i j", "k", "l"] + ["m", "n o", "p q r s t", "u"]
    texts += ["v w", "x"]
    texts = tf.constant(texts[: sum(sizes)])

    def predicted(base, strategy):
        class Splits(base):
            def predict_step(self, data):
                return tf.strings.split(data).to_tensor("-")

        def batches():
            start = 0
            for size in sizes:
                yield texts[start : start + size]
                start += size

        spec = tf.TensorSpec([None], tf.string)
        data = tf.data.Dataset.from_generator(batches, output_signature=spec)
        with strategy.scope():
            model = Splits()
        return model.predict(data, verbose=0)

    stock = predicted(keras.Model, tf.distribute.get_strategy())
    found = predicted(distfit.Model, make_strategy(replicas))
    assert type(stock) is type(found)
    assert _as_list(found) == _as_list(stock)


def _as_list(values):
    return values.to_list() if hasattr(values, "to_list") else values.tolist()


class Tempered(distfit.Model):
    """Divides by a temperature that comes with each batch."""

    def build(self, shape):
        self.dense = layers.Dense(1)
        self.dense.build((None, 8))

    def call(self, data):
        return self.dense(data["rows"]) / data["temperature"]


@pytest.mark.parametrize("rows", pick(["open"], ["open", "fixed"]))
def test_a_scalar_beside_the_rows_is_that_of_all(make_strategy, rows):
    x, y = comparing.regression_data(22)

    def batches():
        dataset = tf.data.Dataset.from_tensor_slices((x, y))
        dataset = dataset.batch(4, drop_remainder=rows == "fixed").enumerate(1)
        return dataset.map(
            lambda i, batch: (
                {"rows": batch[0], "temperature": tf.cast(i, "float32")},
                batch[1],
            )
        )

    def build():
        model = Tempered()
        model.build(None)
        model.compile("sgd", "mse", steps_per_execution=2)
        return model

    def then(model):
        given = {"rows": x[:5], "temperature": np.float32(2)}
        model.train_on_batch(given, y[:5])
        evaluation = model.evaluate(batches(), verbose=0, return_dict=True)
        return evaluation, model.predict_on_batch(given)

    def fit(model):
        return model.fit(batches(), epochs=2, verbose=0)

    one, three = (comparing.run(make_strategy(n), build, fit, then) for n in (1, 3))
    comparing.assert_same(one, three)
    assert len(one.predictions) == 5


def test_a_table_beside_the_rows_is_not_cut(make_strategy):
    centers = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")

    class Nearest(distfit.Model):
        def train_step(self, data):
            (x, table), y = data
            with tf.GradientTape() as tape:
                near = tf.matmul(x, table, transpose_b=True)
                loss = tf.reduce_mean(tf.square(y - self(x) - near[:, :1]))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    def build():
        inputs = keras.Input((8,))
        model = Nearest(inputs, layers.Dense(1)(inputs))
        model.compile("sgd")
        return model

    def fit(model):
        data = tf.data.Dataset.from_tensor_slices(comparing.regression_data(24))
        data = data.batch(8, drop_remainder=True)
        data = data.map(lambda x, y: ((x, tf.constant(centers)), y))
        return model.fit(data, epochs=2, verbose=0)

    one, two = (comparing.run(make_strategy(n), build, fit) for n in (1, 2))
    comparing.assert_same(one, two)


def _convolution(base, strategy, rest=()):
    keras.utils.set_random_seed(1)
    with comparing.scope_of(strategy):
        inputs = keras.Input((None, None, 1))
        outputs = layers.Conv2D(1, 3, padding="same")(inputs)
        for layer in rest:
            outputs = layer(outputs)
        model = base(inputs, outputs)
        model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def _pictures(*shape):
    generator = np.random.default_rng(shape)
    return tuple(generator.random((*shape, 1), "float32") for _ in range(2))


def test_data_of_other_sizes_are_not_taken_for_those_before(make_strategy):
    """Sizes that a step knows are constants in its graph."""

    def numbers(model, fit, evaluate, predict):
        found = []
        for height, width in ((8, 8), (6, 4), (8, 8), (4, 12)):
            data = _pictures(7, height, width)
            options = {"batch_size": 3, "verbose": 0}
            found.append(evaluate(model, *data, **options))
            history = fit(model, *data, shuffle=False, **options).history
            found.append(history["loss"][0])
            found += predict(model, data[0], **options).ravel().tolist()
        return found

    stock = keras.Model
    one = numbers(_convolution(stock, None), stock.fit, stock.evaluate, stock.predict)
    model = _convolution(stock, make_strategy(2))
    two = numbers(model, distfit.fit, distfit.evaluate, distfit.predict)
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


class NeedsSizes(distfit.Model):
    def train_step(self, data):
        x, y = data
        return super().train_step((x / (x.shape[1] * x.shape[2]), y))


@pytest.mark.parametrize("base", [distfit.Model, NeedsSizes])
def test_batches_may_change_their_sizes(make_strategy, base):
    """Steps are not compiled for each size, as a `tf.function` relaxes shapes.

    Unless the step must know the sizes, which stock Keras does not support.
    """

    def losses(base, strategy):
        model, found = _convolution(base, strategy), []
        for size in (8, 4, 6, 8, 3, 5):
            loss = model.train_on_batch(*_pictures(5, size, 4))
            found.append(float(np.ravel(loss)[0]))
            model.reset_metrics()
        return model, found

    alone = make_strategy(1) if base is NeedsSizes else None
    _, one = losses(base if alone else keras.Model, alone)
    model, three = losses(base, make_strategy(3))
    np.testing.assert_allclose(three, one, rtol=1e-5)
    assert len(drivers_of(model, "train")) == (5 if base is NeedsSizes else 2)
