"""The reference models with losses over the global batch: by hand, and on N replicas.

Batches of 4, 5 and 1 rows divide among 4 replicas evenly, unevenly, and not at all.
"""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import pick

from distfit import datasets, models
from distfit.models import contrastive, distillation, masked_lm, vae, wgan_gp

NAMES = ("vae", "contrastive", "wgan_gp", "distillation", "masked_lm")
# Rounds of the critic and blocks of the transformer cost time when they are compiled.
SMALL = {
    "wgan_gp": {"critic_steps": 2, "latent_dim": 4},
    "masked_lm": {"width": 8, "heads": 2, "blocks": 1},
}
ROWS = 11


def configure(name, **settings):
    config = models.get(name).get_config()
    config.update(SMALL.get(name, {}))
    config.update(settings)
    return config


def build(name, strategy, **settings):
    with strategy.scope():
        return models.get(name).build(configure(name, **settings))


def load(name, rows=ROWS):
    """The first rows of a model's training data: a tuple of what `fit()` takes."""
    module, config = models.get(name), configure(name)
    load_data = getattr(module, "data", lambda c: datasets.load(c.dataset, c))
    train, _ = load_data(config)
    train = train if isinstance(train, tuple) else (train,)
    return tuple(array[:rows] for array in train)


# On N replicas


def batches(name):
    """A dataset of batches of 4, 5 and 1 rows."""
    rows = load(name)
    parts = [
        tf.data.Dataset.from_tensors(tuple(array[start:stop] for array in rows))
        for start, stop in ((0, 4), (4, 9), (9, 10))
    ]
    return parts[0].concatenate(parts[1]).concatenate(parts[2])


def trained(name, strategy):
    """The results of 2 epochs, and of evaluating and predicting after them."""
    data = batches(name)
    # Adam divides a gradient by its own size, so where that is almost zero, rounding
    # errors of a sum become steps of the size of the learning rate.
    config = configure(name, learning_rate=0.0001)

    def fit(model):
        return model.fit(data, epochs=2, verbose=0)

    def then(model):
        if name == "wgan_gp":  # which has nothing to evaluate
            return None, None
        evaluation = model.evaluate(data, verbose=0, return_dict=True)
        return evaluation, model.predict(data, verbose=0)

    return comparing.run(strategy, lambda: models.get(name).build(config), fit, then)


# The others differ from it in nothing that `verify` does not compare, and
# tests/programs has their losses by hand.
@pytest.mark.parametrize("name", pick(["vae"], NAMES))
def test_four_replicas_equal_one(name, make_strategy):
    one = trained(name, make_strategy(1))
    comparing.assert_same(one, trained(name, make_strategy(4)))
    # Also in the batch with one row, in which some losses have nothing to count.
    assert np.all(np.isfinite(list(one.history.values())))
    assert all(np.all(np.isfinite(weights)) for weights in one.weights)


# Settings and saving


@pytest.mark.parametrize(
    "name, settings",
    [
        ("vae", {"latent_dim": 0}),
        ("contrastive", {"temperature": 0.0}),
        ("contrastive", {"labelled": 4}),
        ("wgan_gp", {"critic_steps": 0}),
        ("distillation", {"temperature": -1.0}),
        ("distillation", {"teacher_weight": 1.5}),
        ("masked_lm", {"mask_rate": 0.0}),
        ("masked_lm", {"width": 10, "heads": 3}),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, settings, make_strategy):
    key, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"Received: {key}={value}.* Pass "):
        build(name, make_strategy(1), **settings)


def numbers(config):
    return {key: value for key, value in config.items() if not isinstance(value, dict)}


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_has_the_same_weights_and_settings(name, make_strategy, tmp_path):
    model = build(name, make_strategy(2))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert type(loaded) is type(model)
    assert numbers(loaded.get_config()) == numbers(model.get_config())
    for weights, expected in zip(
        loaded.get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(weights, expected)


# The variational autoencoder


def test_kl_divergence_equals_its_integral():
    mean, log_variance = np.array([0.0, 0.7, -2.0]), np.array([0.0, 0.5, -1.0])
    x = np.linspace(-15, 15, 20001)[:, np.newaxis]
    variance = np.exp(log_variance)
    log_p = -0.5 * ((x - mean) ** 2 / variance + log_variance)
    p = np.exp(log_p) / np.sqrt(2 * np.pi)
    expected = np.sum(p * (log_p + 0.5 * x**2), axis=0) * (x[1, 0] - x[0, 0])
    # Each of the three as one row of one dimension, and all as one row.
    by_row = vae.kl_divergence(mean[:, np.newaxis], log_variance[:, np.newaxis])
    np.testing.assert_allclose(by_row, expected, atol=1e-8)
    together = vae.kl_divergence(mean[np.newaxis], log_variance[np.newaxis])
    np.testing.assert_allclose(together, [expected.sum()], atol=1e-8)


def test_vae_losses_are_those_worked_out_by_hand(make_strategy):
    (images,) = load("vae", rows=5)
    model = build("vae", make_strategy(2))
    logs = model.test_on_batch(images, return_dict=True)
    mean, log_variance = (np.float64(part) for part in model.encoder(images))
    kl = 0.5 * np.sum(np.exp(log_variance) + mean**2 - 1 - log_variance, axis=1)
    assert logs["kl_loss"] == pytest.approx(np.mean(kl), rel=1e-4)
    # Before training all shades are near 1/2, whatever the noise.
    assert logs["reconstruction_loss"] == pytest.approx(784 * np.log(2), rel=0.02)
    total = logs["kl_loss"] + logs["reconstruction_loss"]
    assert logs["loss"] == pytest.approx(total, rel=1e-6)


# Contrastive learning


def unit_points(rows, seed):
    points = np.random.default_rng(seed).normal(size=(rows, 4))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_nt_xent_is_that_of_the_paper():
    first, second = unit_points(5, 0), unit_points(5, 1)
    losses, found = contrastive.nt_xent(first, second, temperature=0.3)
    points = np.concatenate([first, second])
    for i in range(10):
        partner = (i + 5) % 10
        others = [k for k in range(10) if k != i]
        exp = {k: np.exp(points[i] @ points[k] / 0.3) for k in others}
        expected = -np.log(exp[partner] / sum(exp.values()))
        assert losses[i].numpy() == pytest.approx(expected, rel=1e-6)
        assert found[i].numpy() == (max(exp, key=exp.get) == partner)


def test_nt_xent_of_a_single_pair_is_zero():
    losses, found = contrastive.nt_xent(unit_points(1, 0), unit_points(1, 1), 0.1)
    assert losses.numpy().tolist() == [0, 0]
    assert found.numpy().tolist() == [1, 1]


def test_distorted_digits_keep_their_place_and_their_ink(make_strategy):
    (images,) = load("contrastive", rows=50)
    seed = keras.random.SeedGenerator(0)
    views = [contrastive.distort(images, seed).numpy() for _ in range(2)]
    assert not np.allclose(views[0], views[1])
    for view in views:
        assert view.shape == images.shape
        # Most of a digit is still there, a little larger or smaller.
        assert np.mean(view) == pytest.approx(np.mean(images), rel=0.3)


def test_knn_accuracy_counts_votes_of_the_nearest_directions():
    features = np.array([[1.0, 0.1], [2.0, 0.0], [9.0, 1.0], [0.0, 1.0], [0.1, 3.0]])
    labels = np.array([0, 0, 1, 1, 1])
    test = np.array([[5.0, 0.2], [0.1, 0.9]])
    accuracy = contrastive.knn_accuracy(
        features, labels, test, np.array([0, 0]), neighbours=3
    )
    assert accuracy == 0.5  # The first is right; the second's neighbours are 1, 1, 1.


def test_contrastive_logs_the_accuracy_of_its_neighbours(make_strategy):
    (images,) = load("contrastive", rows=12)
    labels = np.arange(12) % 2
    model = build("contrastive", make_strategy(1))
    callback = contrastive.NearestNeighbours((images, labels), (images[:3], labels[:3]))
    history = model.fit(images, batch_size=6, verbose=0, callbacks=[callback]).history
    assert 0 <= history["knn_accuracy"][0] <= 1


# The Wasserstein GAN


def test_gradient_penalty_of_a_linear_critic_follows_from_its_weights():
    critic = keras.Sequential(
        [keras.Input((2, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(1)]
    )
    slope = np.array([1.0, -2.0, 0.5, 3.0], "float32")
    critic.set_weights([slope[:, np.newaxis], np.array([7.0])])
    images = tf.constant(np.random.default_rng(0).random((3, 2, 2, 1), "float32"))
    penalty = wgan_gp.gradient_penalty(critic, images)
    expected = (np.linalg.norm(slope) - 1) ** 2
    np.testing.assert_allclose(penalty, [expected] * 3, rtol=1e-6)


def test_gradient_penalty_of_a_flat_critic_has_a_gradient():
    critic = keras.Sequential(
        [
            keras.Input((2, 2, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(1, kernel_initializer="zeros"),
        ]
    )
    with tf.GradientTape() as tape:
        penalty = wgan_gp.gradient_penalty(critic, tf.ones((3, 2, 2, 1)))
    np.testing.assert_allclose(penalty, [1.0] * 3, rtol=1e-5)
    assert np.all(np.isfinite(tape.gradient(penalty, critic.trainable_weights[0])))


def test_wgan_updates_the_critic_more_often_and_draws(make_strategy, tmp_path):
    model = build("wgan_gp", make_strategy(1))
    config = configure("wgan_gp")
    callbacks = wgan_gp.callbacks(config, tmp_path)
    model.fit(*load("wgan_gp"), batch_size=6, verbose=0, callbacks=callbacks)
    assert int(model.g_optimizer.iterations.numpy()) == 2
    assert int(model.c_optimizer.iterations.numpy()) == 2 * config.critic_steps
    image = tf.io.decode_png((tmp_path / "samples" / "epoch-001.png").read_bytes())
    assert image.shape == (8 * 28, 8 * 28, 1)


# Distillation


def test_only_the_callback_trains_the_teacher(make_strategy):
    model = build("distillation", make_strategy(1))
    x, y = load("distillation")
    untrained = model.teacher.get_weights()
    teaching = distillation.TrainTeacher(x, y, batch_size=5, epochs=1)
    model.fit(x, y, batch_size=5, epochs=0, verbose=0, callbacks=[teaching])
    teacher, student = model.teacher.get_weights(), model.student.get_weights()
    assert not np.allclose(teacher[0], untrained[0])
    assert not model.teacher.trainable_weights

    model.fit(x, y, batch_size=5, verbose=0)
    for weights, expected in zip(model.teacher.get_weights(), teacher, strict=True):
        np.testing.assert_array_equal(weights, expected)
    assert not np.allclose(model.student.get_weights()[0], student[0])


def test_distillation_losses_are_those_worked_out_by_hand(make_strategy):
    model = build("distillation", make_strategy(2), temperature=2.0, teacher_weight=0.7)
    x, y = load("distillation")
    logs = model.evaluate(x, y, batch_size=11, verbose=0, return_dict=True)

    def log_softmax(logits):
        return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))

    student = np.float64(model.student(x))
    teacher = np.float64(model.teacher(x, training=False))
    label_loss = -np.mean(log_softmax(student)[np.arange(ROWS), y])
    p, q = log_softmax(teacher / 2), log_softmax(student / 2)
    teacher_loss = 4 * np.mean(np.sum(np.exp(p) * (p - q), axis=1))
    assert logs["label_loss"] == pytest.approx(label_loss, rel=1e-5)
    assert logs["teacher_loss"] == pytest.approx(teacher_loss, rel=1e-4)
    expected = 0.3 * label_loss + 0.7 * teacher_loss
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)
    assert logs["accuracy"] == pytest.approx(np.mean(student.argmax(axis=1) == y))


# The masked language model


class HidesEvenTokens(masked_lm.MaskedLM):
    """Hides tokens that a test can hide, too."""

    def choose(self, tokens):
        return tf.logical_and(tokens % 2 == 0, tokens != masked_lm.PADDING)


@pytest.mark.parametrize("replicas", pick([2], [1, 2]))
def test_masked_loss_is_the_mean_over_hidden_tokens(replicas, make_strategy):
    (tokens,) = load("masked_lm", rows=5)
    tokens[0] = np.where(tokens[0] % 2 == 0, 0, tokens[0])  # A row that hides none.
    with make_strategy(replicas).scope():
        network = masked_lm.make_network(tokens.shape[1], width=8, heads=2, blocks=1)
        model = HidesEvenTokens(network)
        model.compile(optimizer="sgd")
    logs = model.test_on_batch(tokens, return_dict=True)

    hidden = (tokens % 2 == 0) & (tokens != masked_lm.PADDING)
    assert not hidden[0].any() and len(set(hidden.sum(axis=1))) > 1
    logits = np.float64(network(np.where(hidden, masked_lm.MASK, tokens)))
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    right = np.take_along_axis(log_p, tokens[..., np.newaxis], axis=-1)[..., 0]
    assert logs["loss"] == pytest.approx(-np.mean(right[hidden]), rel=1e-5)
    expected = np.mean((logits.argmax(axis=-1) == tokens)[hidden])
    assert logs["masked_accuracy"] == pytest.approx(expected)


def test_padding_does_not_reach_the_tokens(make_strategy):
    with make_strategy(1).scope():
        network = masked_lm.make_network(6, width=8, heads=2, blocks=1)
    tokens = np.array([[5, 9, 4, 0, 0, 0]])
    logits = network(tokens).numpy()
    padding = network.layers[1].get_weights()[0]
    padding[masked_lm.PADDING] += 1.0
    network.layers[1].set_weights([padding])
    changed = network(tokens).numpy()
    np.testing.assert_allclose(changed[:, :3], logits[:, :3], atol=1e-6)
    assert not np.allclose(changed[:, 3:], logits[:, 3:])


def test_about_the_given_share_of_tokens_is_hidden_and_no_padding():
    model = masked_lm.build(configure("masked_lm"))
    (tokens,) = load("masked_lm", rows=2000)
    hidden = model.choose(tf.constant(tokens)).numpy()
    assert not hidden[tokens == masked_lm.PADDING].any()
    assert np.mean(hidden[tokens != masked_lm.PADDING]) == pytest.approx(0.15, abs=0.01)


def test_digits_become_tokens_of_place_and_shade():
    image = np.zeros((1, 28, 28, 1), "float32")
    image[0, 0:4, 4:8] = 1.0  # The second cell, in the darkest of three shades,
    image[0, 24:28, 24:28] = 0.3  # and the last of 49, in the lightest.
    tokens = masked_lm.digits_to_tokens(image)
    assert tokens[0, :3].tolist() == [2 + 3 * 1 + 2, 2 + 3 * 48, 0]


def test_majority_accuracy_ignores_padding():
    train = np.array([[5, 5, 7, 0], [5, 0, 0, 0]])
    test = np.array([[5, 7, 7, 0], [7, 0, 0, 0]])
    assert masked_lm.majority_accuracy(train, test) == 0.25
