"""A GAN that draws digits: two networks, two optimizers and its own `compile()`.

    python -m launch --model=gan

Trains on 100 batches of 64 digits by default. After each epoch
`<workdir>/samples/epoch-001.png`, `epoch-002.png`, ... show 64 drawings.

Measured after the 100 batches: d_loss 0.472, g_loss 0.874, on 1 and on 2 replicas, in
about a minute on 2 CPU cores. By then the drawings are patterns of strokes, not yet
digits: for those the guide suggests 20 epochs over all of MNIST.
"""

import pathlib

import keras
import ml_collections
import numpy as np
import tensorflow as tf
from keras import layers

import distfit
from distfit import datasets


@keras.saving.register_keras_serializable(package="distfit")
class GAN(distfit.Model):
    """A discriminator learns to tell digits from drawings, a generator to fool it."""

    def __init__(self, discriminator, generator, latent_dim, seed=1337):
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator
        self.latent_dim = latent_dim
        self.seed = seed
        self.d_loss_tracker = keras.metrics.Mean(name="d_loss")
        self.g_loss_tracker = keras.metrics.Mean(name="g_loss")
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.built = True  # The only weights are those of the two networks.

    @property
    def metrics(self):
        return [self.d_loss_tracker, self.g_loss_tracker]

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.loss_fn = loss_fn

    def train_step(self, real_images):
        if isinstance(real_images, tuple):
            real_images = real_images[0]
        batch_size = tf.shape(real_images)[0]

        # Draw fakes and put them before the real digits.
        random_latent_vectors = keras.random.normal(
            shape=(batch_size, self.latent_dim), seed=self.seed_generator
        )
        generated_images = self.generator(random_latent_vectors)
        combined_images = tf.concat([generated_images, real_images], axis=0)

        # Fakes are labelled 1, digits 0, with a little noise to keep the discriminator
        # unsure.
        labels = tf.concat(
            [tf.ones((batch_size, 1)), tf.zeros((batch_size, 1))], axis=0
        )
        labels += 0.05 * keras.random.uniform(
            tf.shape(labels), seed=self.seed_generator
        )

        # Train the discriminator.
        with tf.GradientTape() as tape:
            predictions = self.discriminator(combined_images)
            d_loss = self.loss_fn(labels, predictions)
        grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply(grads, self.discriminator.trainable_weights)

        random_latent_vectors = keras.random.normal(
            shape=(batch_size, self.latent_dim), seed=self.seed_generator
        )
        misleading_labels = tf.zeros((batch_size, 1))  # "these are all digits"

        # Train only the generator: the discriminator's weights do not change.
        with tf.GradientTape() as tape:
            predictions = self.discriminator(self.generator(random_latent_vectors))
            g_loss = self.loss_fn(misleading_labels, predictions)
        grads = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply(grads, self.generator.trainable_weights)

        self.d_loss_tracker.update_state(d_loss)
        self.g_loss_tracker.update_state(g_loss)
        return {
            "d_loss": self.d_loss_tracker.result(),
            "g_loss": self.g_loss_tracker.result(),
        }

    def get_config(self):
        return {
            "discriminator": keras.saving.serialize_keras_object(self.discriminator),
            "generator": keras.saving.serialize_keras_object(self.generator),
            "latent_dim": self.latent_dim,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        networks = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects)
            for name in ("discriminator", "generator")
        }
        return cls(**{**config, **networks})


class SampleImages(keras.callbacks.Callback):
    """Writes an 8 x 8 grid of drawings from fixed latent points after each epoch.

    Args:
        folder: Where to write `epoch-001.png`, `epoch-002.png`, ...
        latent_dim: The dimension of the latent points.
        seed: Their seed.
        network: The attribute of the model that draws: from points (64, latent_dim) to
            images (64, height, width, 1) in [0, 1].
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        *,
        latent_dim: int,
        seed: int,
        network: str = "generator",
    ):
        super().__init__()
        self.folder = pathlib.Path(folder)
        self.network = network
        self.latent_points = keras.random.normal((64, latent_dim), seed=seed)

    def on_epoch_end(self, epoch, logs=None):
        images = getattr(self.model, self.network)(self.latent_points, training=False)
        path = self.folder / f"epoch-{epoch + 1:03d}.png"
        draft = path.with_name(f".unfinished-{path.name}")  # It is there as a whole.
        tf.io.write_file(str(draft), tf.io.encode_png(image_grid(images, columns=8)))
        draft.replace(path)


def image_grid(images, *, columns: int):
    """Lays images of shape (n, height, width, 1) in [0, 1] out as one uint8 image."""
    rows, (height, width) = len(images) // columns, images.shape[1:3]
    grid = tf.reshape(images, (rows, columns, height, width))
    grid = tf.transpose(grid, (0, 2, 1, 3))
    grid = tf.reshape(grid, (rows * height, columns * width, 1))
    return tf.image.convert_image_dtype(grid, tf.uint8, saturate=True)


def make_discriminator() -> keras.Sequential:
    """Returns a network from images (28, 28, 1) to one logit: is it a fake?"""
    return keras.Sequential(
        [
            keras.Input(shape=(28, 28, 1)),
            layers.Conv2D(64, (3, 3), strides=(2, 2), padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2D(128, (3, 3), strides=(2, 2), padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.GlobalMaxPooling2D(),
            # Logits and images are float32 under mixed precision too.
            layers.Dense(1, dtype="float32"),
        ],
        name="discriminator",
    )


def make_generator(latent_dim: int) -> keras.Sequential:
    """Returns a network from latent vectors to images (28, 28, 1) in [0, 1]."""
    return keras.Sequential(
        [
            keras.Input(shape=(latent_dim,)),
            layers.Dense(7 * 7 * 128),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Reshape((7, 7, 128)),
            layers.Conv2DTranspose(128, (4, 4), strides=(2, 2), padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2DTranspose(128, (4, 4), strides=(2, 2), padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2D(
                1, (7, 7), padding="same", activation="sigmoid", dtype="float32"
            ),
        ],
        name="generator",
    )


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.dataset = "mnist"
    config.batch_size = 64
    config.epochs = 1
    config.steps_per_epoch = 100
    config.learning_rate = 0.0003
    config.latent_dim = 128
    config.seed = 1337
    return config


def build(config: ml_collections.ConfigDict) -> distfit.Model:
    keras.utils.set_random_seed(config.seed)
    model = GAN(
        discriminator=make_discriminator(),
        generator=make_generator(config.latent_dim),
        latent_dim=config.latent_dim,
        seed=config.seed,
    )
    model.compile(
        d_optimizer=keras.optimizers.Adam(config.learning_rate),
        g_optimizer=keras.optimizers.Adam(config.learning_rate),
        loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
    )
    return model


def data(config: ml_collections.ConfigDict):
    """Returns the images of both splits for training, and no validation data."""
    (x_train, _), (x_test, _) = datasets.load(config.dataset, config)
    return np.concatenate([x_train, x_test]), None


def callbacks(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> list:
    folder = pathlib.Path(workdir) / "samples"
    samples = SampleImages(folder, latent_dim=config.latent_dim, seed=config.seed)
    return [distfit.callbacks.ChiefOnly(samples)]
