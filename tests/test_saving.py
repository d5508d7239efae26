"""Saved files are stock: they open with and without a strategy, and in plain Keras."""

import json
import zipfile

import comparing
import keras
import numpy as np
import pytest
from breadth import pick
from keras import layers

import distfit


@keras.saving.register_keras_serializable(package="tests")
class Custom(distfit.Model):
    """A functional model with its own step."""

    def train_step(self, data):
        return super().train_step(data)


def _compiled(cls=Custom):
    inputs = keras.Input((8,))
    x = layers.BatchNormalization()(layers.Dense(4, kernel_regularizer="l2")(inputs))
    model = cls(inputs, layers.Dense(1)(layers.Dropout(0.5, seed=1)(x)))
    loss = keras.losses.Huber(delta=0.7)
    model.compile(keras.optimizers.Adam(0.02), loss, metrics=["mae"])
    return model


def _trained(strategy, cls=Custom):
    with strategy.scope():
        model = _compiled(cls)
    model.fit(*comparing.regression_data(20), batch_size=7, verbose=0)
    return model


def _predictions(model):
    return model.predict(comparing.regression_data(9)[0], verbose=0)


@pytest.mark.parametrize(
    "cls, saving, loading",
    pick(
        [(Custom, 2, 4)],
        [
            (cls, *replicas)
            for cls in (Custom, distfit.Model)
            for replicas in ((2, 1), (1, 2), (2, 4), (2, None))
        ],
    ),
)
def test_whole_model_continues_on_other_replicas(
    make_strategy, tmp_path, cls, saving, loading
):
    model = _trained(make_strategy(saving), cls)
    path = tmp_path / "model.keras"
    model.save(path)
    if loading is None:
        loaded = keras.saving.load_model(path)
    else:
        with make_strategy(loading).scope():
            loaded = keras.saving.load_model(path)
    np.testing.assert_allclose(_predictions(model), _predictions(loaded), atol=1e-6)
    assert int(loaded.optimizer.iterations.numpy()) == 3
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    loaded.fit(*comparing.regression_data(20), batch_size=7, verbose=0)
    assert int(loaded.optimizer.iterations.numpy()) == 6


def test_optimizer_and_loss_are_saved_as_the_stock_classes(make_strategy, tmp_path):
    path = tmp_path / "model.keras"
    _trained(make_strategy(2)).save(path)
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    stock = _compiled(keras.Model)
    for name in ("optimizer", "loss"):
        saved, expected = (
            c[name] for c in (config["compile_config"], stock.get_compile_config())
        )
        for key in ("module", "class_name", "registered_name"):
            assert saved[key] == expected[key]
        saved["config"].pop("name"), expected["config"].pop("name")
        assert saved["config"] == expected["config"]
    batch_normalization = json.dumps(config["config"])
    assert '"synchronized": false' in batch_normalization


@pytest.mark.parametrize("replicas", pick([2], [1, 2]))
def test_weights_open_in_plain_keras_and_back(make_strategy, tmp_path, replicas):
    model = _trained(make_strategy(replicas))
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    plain = _compiled(keras.Model)
    plain.optimizer.build(plain.trainable_variables)
    plain.load_weights(path)
    np.testing.assert_allclose(_predictions(model), _predictions(plain), atol=1e-6)
    plain.save_weights(path)
    with make_strategy(4).scope():
        other = _compiled()
        other.optimizer.build(other.trainable_variables)
    other.load_weights(path)
    comparing.check_replicas_agree(make_strategy(4), other)
    np.testing.assert_allclose(_predictions(model), _predictions(other), atol=1e-6)


def test_checkpoint_and_best_weights_callbacks(make_strategy, tmp_path):
    with make_strategy(2).scope():
        model = _compiled()
    path = tmp_path / "best.keras"
    x, y = comparing.regression_data(30)
    model.fit(
        x,
        y,
        batch_size=7,
        epochs=3,
        validation_split=0.3,
        verbose=0,
        callbacks=[
            keras.callbacks.ModelCheckpoint(path, save_best_only=True),
            keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True),
        ],
    )
    np.testing.assert_allclose(
        _predictions(model), _predictions(keras.saving.load_model(path)), atol=1e-5
    )
