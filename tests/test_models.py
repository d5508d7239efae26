"""The reference models train, and give one device's numbers on several replicas."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import pick

from distfit import datasets, models
from distfit.models import gan, mnist_cnn

REGRESSIONS = ("custom_step", "low_level_step", "weighted_step", "custom_eval")
OPTIMIZERS = {
    "gan": ["d_optimizer", "g_optimizer"],
    "wgan_gp": ["c_optimizer", "g_optimizer"],
}  # of models that have others than `optimizer`
SETTINGS = set("dataset batch_size epochs steps_per_epoch learning_rate seed".split())


class BatchLogs(keras.callbacks.Callback):
    """Keeps the logs of every step."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(dict(logs))


def configure(name, **settings):
    config = models.get(name).get_config()
    config.update(settings)
    return config


def build(name, strategy, config):
    with strategy.scope():
        return models.get(name).build(config)


def load(name, config):
    module = models.get(name)
    load_data = getattr(
        module, "data", lambda config: datasets.load(config.dataset, config)
    )
    return load_data(config)


def fit(model, train, config, **arguments):
    names = ("x", "y", "sample_weight")
    train = train if isinstance(train, tuple) else (train,)
    return model.fit(
        **dict(zip(names, train, strict=False)),
        batch_size=config.batch_size,
        epochs=config.epochs,
        steps_per_epoch=config.steps_per_epoch,
        verbose=0,
        **arguments,
    ).history


def train(name, strategy, **settings):
    """Trains a reference model on its data. Returns the model and the history."""
    config = configure(name, **settings)
    model = build(name, strategy, config)
    rows, validation = load(name, config)
    if name == "low_level_step":  # compiled without a loss to validate with
        validation = None
    return model, fit(model, rows, config, validation_data=validation)


def assert_same_history(history, expected, rtol):
    assert history.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(history[key], values, rtol=rtol, err_msg=key)


def assert_same_weights(model, expected, atol=1e-5):
    pairs = zip(model.get_weights(), expected.get_weights(), strict=True)
    for weights, expected_weights in pairs:
        np.testing.assert_allclose(weights, expected_weights, atol=atol)


# The package


@pytest.mark.parametrize("name", models.NAMES)
def test_each_model_has_the_common_settings_and_says_how_it_is_run(name):
    module = models.get(name)
    assert SETTINGS <= set(module.get_config().keys())
    assert f"python -m launch --model={name}" in module.__doc__


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"custom_step, .*mnist_cnn.*Received: model='resnet'"
    ):
        models.get("resnet")


@pytest.mark.parametrize("name", models.NAMES)
def test_seed_and_learning_rate_are_honoured(name, make_strategy):
    def built(**settings):
        return build(name, make_strategy(1), configure(name, **settings))

    model, again, other = built(learning_rate=0.25), built(), built(seed=7)
    names = OPTIMIZERS.get(name, ["optimizer"])
    assert [float(getattr(model, n).learning_rate) for n in names] == [0.25] * len(
        names
    )
    assert_same_weights(model, again, atol=0)
    kernel, other_kernel = model.trainable_weights[0], other.trainable_weights[0]
    assert not np.allclose(kernel.numpy(), other_kernel.numpy())


# The four regressions


@pytest.mark.parametrize("name", pick(["low_level_step"], REGRESSIONS))
def test_two_replicas_equal_one(name, make_strategy):
    # 31 rows do not divide evenly, and the last batch has 8.
    settings = {"batch_size": 31, "epochs": 2, "learning_rate": 0.01}
    expected_model, expected = train(name, make_strategy(1), **settings)
    model, history = train(name, make_strategy(2), **settings)
    assert_same_history(history, expected, rtol=1e-5)
    assert_same_weights(model, expected_model)
    assert history["loss"][1] < history["loss"][0]


def test_the_first_two_steps_of_the_guide_train_alike(make_strategy):
    settings = {"epochs": 1, "steps_per_epoch": 5}
    compiled, _ = train("custom_step", make_strategy(2), **settings)
    low_level, _ = train("low_level_step", make_strategy(2), **settings)
    assert_same_weights(low_level, compiled)


@pytest.mark.parametrize("given", ["by row", "by class"])
def test_weights_of_rows_and_classes_count_as_worked_out_by_hand(given, make_strategy):
    config = configure("weighted_step", epochs=1, batch_size=30, learning_rate=0.0)
    model = build("weighted_step", make_strategy(2), config)
    rng = np.random.default_rng(0)
    x = rng.random((90, 32), "float32")
    y = rng.integers(0, 2, (90, 1)).astype("float32")
    weights = np.where(y == 1, 3.0, 0.5).astype("float32")
    if given == "by row":
        history = fit(model, (x, y, weights), config)
    else:
        history = fit(model, (x, y), config, class_weight={0: 0.5, 1: 3.0})
    errors = x @ model.get_weights()[0] - y  # the weights do not change
    weighted_mae = np.sum(weights * np.abs(errors)) / np.sum(weights)
    assert history["loss"] == pytest.approx([np.mean(weights * errors**2)], rel=1e-5)
    assert history["mae"] == pytest.approx([np.mean(np.abs(errors))], rel=1e-5)
    assert history["weighted_mae"] == pytest.approx([weighted_mae], rel=1e-5)


@pytest.mark.parametrize("replicas", pick([2], [1, 2]))
def test_evaluate_of_custom_eval_gives_the_errors_worked_out_by_hand(
    replicas, make_strategy
):
    model = build("custom_eval", make_strategy(replicas), configure("custom_eval"))
    rng = np.random.default_rng(0)
    x, y = rng.random((90, 32), "float32"), rng.random((90, 1), "float32")
    errors = x @ model.get_weights()[0] - y
    results = model.evaluate(x, y, batch_size=30, verbose=0, return_dict=True)
    assert results["loss"] == pytest.approx(np.mean(errors**2), rel=1e-5)
    assert results["mae"] == pytest.approx(np.mean(np.abs(errors)), rel=1e-5)


# The GAN


def digits(rows):
    config = configure("gan")
    return load("gan", config)[0][:rows]


GAN_STEPS = pick([4], [20])[0]  # The last batch has 5 of 12 digits.


def train_gan(strategy, *, with_labels=False, callbacks=()):
    """Trains on batches of 12 digits. Returns every step's logs."""
    keras.utils.set_random_seed(0)
    config = configure("gan", batch_size=12, steps_per_epoch=None)
    model = build("gan", strategy, config)
    rows = 12 * (GAN_STEPS - 1) + 5
    images, steps = digits(rows), BatchLogs()
    train = (images, np.zeros(rows)) if with_labels else images
    fit(model, train, config, callbacks=[steps, *callbacks])
    return steps.logs


@pytest.fixture(scope="module")
def gan_on_one_device(make_strategy):
    """The logs of every step."""
    return train_gan(make_strategy(1))


@pytest.fixture(scope="module", params=pick([4], [2, 4]))
def gan_on_replicas(request, make_strategy, tmp_path_factory):
    """The logs of every step, and the folder of the drawings."""
    folder = tmp_path_factory.mktemp("gan")
    callbacks = gan.callbacks(configure("gan"), folder)
    return train_gan(make_strategy(request.param), callbacks=callbacks), folder


def test_gan_losses_do_not_depend_on_the_replicas(gan_on_one_device, gan_on_replicas):
    logs, _ = gan_on_replicas
    assert len(logs) == len(gan_on_one_device) == GAN_STEPS
    for key in ("d_loss", "g_loss"):
        losses, expected = (
            [step[key] for step in steps] for steps in (logs, gan_on_one_device)
        )
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=key)


def test_gan_writes_a_grid_of_64_drawings_after_each_epoch(gan_on_replicas):
    _, folder = gan_on_replicas
    image = tf.io.decode_png((folder / "samples" / "epoch-001.png").read_bytes())
    assert image.shape == (8 * 28, 8 * 28, 1)
    assert image.dtype == tf.uint8


def test_a_drawing_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    write = tf.io.write_file

    def write_a_part(name, contents):
        write(name, "a part")
        raise OSError("disk full")

    def draw(points, training):
        return tf.zeros((len(points), 4, 4, 1))

    monkeypatch.setattr(tf.io, "write_file", write_a_part)
    samples = gan.SampleImages(tmp_path, latent_dim=2, seed=1)
    samples.set_model(types.SimpleNamespace(generator=draw))
    with pytest.raises(OSError, match="disk full"):
        samples.on_epoch_end(0)
    assert not (tmp_path / "epoch-001.png").exists()


def test_gan_ignores_labels(make_strategy, gan_on_one_device):
    assert train_gan(make_strategy(1), with_labels=True) == gan_on_one_device


def test_gan_trains_on_all_images_and_validates_on_none():
    (x_train, _), (x_test, _) = datasets.load("mnist", configure("gan"))
    images, validation = load("gan", configure("gan"))
    assert images.shape == (len(x_train) + len(x_test), 28, 28, 1)
    assert validation is None


def test_image_grid_lays_images_out_by_rows_and_scales_them():
    shades = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], "float32")
    images = np.broadcast_to(shades[:, None, None, None], (6, 2, 1, 1))
    grid = gan.image_grid(tf.constant(images), columns=3).numpy()[..., 0]
    top, bottom = [0, 51, 102], [153, 204, 255]
    assert grid.tolist() == [top, top, bottom, bottom]


def test_a_saved_gan_draws_the_same_images(make_strategy, tmp_path):
    model = build("gan", make_strategy(2), configure("gan", latent_dim=4))
    model.save(tmp_path / "gan.keras")
    loaded = keras.saving.load_model(tmp_path / "gan.keras", compile=False)
    points = np.ones((2, 4), "float32")
    np.testing.assert_allclose(
        loaded.generator(points), model.generator(points), rtol=1e-6
    )


# The classifier


@pytest.mark.parametrize("replicas", pick([2], [1, 2]))
def test_mnist_cnn_learns(replicas, make_strategy):
    config = configure("mnist_cnn", batch_size=32, epochs=3, steps_per_epoch=8)
    model = build("mnist_cnn", make_strategy(replicas), config)
    (x, y), _ = load("mnist_cnn", config)
    history = fit(model, (x[:768], y[:768]), config)
    assert history["loss"][-1] < 0.8 * history["loss"][0]


def test_mnist_cnn_lowers_its_learning_rate_by_a_cosine(make_strategy):
    config = configure("mnist_cnn", batch_size=8, epochs=4, steps_per_epoch=1)
    config.learning_rate = 0.1
    model = build("mnist_cnn", make_strategy(2), config)
    (x, y), _ = load("mnist_cnn", config)
    schedule = mnist_cnn.callbacks(config, "unused")[:1]
    history = fit(model, (x[:32], y[:32]), config, callbacks=schedule)
    expected = [0.1, 0.0853553, 0.05, 0.0146447]
    np.testing.assert_allclose(history["learning_rate"], expected, rtol=1e-5)


def test_mnist_cnn_stops_when_its_validation_loss_no_longer_falls(make_strategy):
    config = configure("mnist_cnn", batch_size=8, epochs=9, steps_per_epoch=1)
    config.patience = 1
    model = build("mnist_cnn", make_strategy(1), config)
    (x, y), _ = load("mnist_cnn", config)
    # The better the model, the higher its loss on wrong labels.
    mislabelled = (x[:8], (y[:8] + 1) % 10)
    stopping = mnist_cnn.callbacks(config, "unused")[1:]
    history = fit(
        model, (x[:72], y[:72]), config, callbacks=stopping, validation_data=mislabelled
    )
    assert len(history["loss"]) < 9
