"""Contrastive learning without labels: each digit against all others of the batch.

    python -m launch --model=contrastive

The loss is a matrix of similarities between all pairs of the global batch, so N
replicas have the negatives that one device has. After each epoch `knn_accuracy`
measures the representations with 500 labels: a test digit gets the majority label of
the 5 labelled digits whose representations are nearest to its own.

Measured on the shipped sample, 12 epochs over 10,000 digits: 92.2 % of the 2,000 test
digits right on 1 replica and 91.9 % on 2, in one to two minutes on 2 CPU cores. With
raw pixels in place of representations it is 84.5 %.
"""

import keras
import ml_collections
import numpy as np
import tensorflow as tf
from keras import layers
from ml_collections import config_dict

import distfit
from distfit import datasets

NEIGHBOURS = 5  # that vote on the label of a digit


@keras.saving.register_keras_serializable(package="distfit")
class SimCLR(distfit.Model):
    """Learns representations in which two views of a digit are near each other.

    Each digit is distorted twice, and for each view the model has to find the other one
    of the same digit among all views in the batch: Chen et al., "A Simple Framework for
    Contrastive Learning of Visual Representations" (2020). More views teach it more.

    Args:
        encoder: A network from images (rows, 28, 28, 1) to representations.
        projector: A network from these to the points (rows, dimension) that the loss
            compares; not used after training.
        temperature: The divisor of similarities.
        seed: The seed of the distortions.
    """

    def __init__(self, encoder, projector, temperature=0.5, seed=1337):
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.temperature = temperature
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.found_tracker = keras.metrics.Mean(name="pairs_found")
        self.built = True  # The only weights are those of the two networks.

    @property
    def metrics(self):
        return [self.loss_tracker, self.found_tracker]

    def call(self, images, training=False):
        return self.encoder(images, training=training)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss, found = self.compare_views(data, training=True)
        weights = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return self.tracked(loss, found)

    def test_step(self, data):
        return self.tracked(*self.compare_views(data, training=False))

    def compare_views(self, data, training):
        """The loss of a batch, and the share of views nearest to their partner.

        Both are scalars.
        """
        images = data[0] if isinstance(data, tuple) else data
        views = [distort(images, self.seed_generator) for _ in range(2)]
        # BatchNormalization sees both views at once.
        features = self(tf.concat(views, axis=0), training=training)
        points = self.projector(features, training=training)
        first, second = tf.split(tf.math.l2_normalize(points, axis=-1), 2)
        losses, found = nt_xent(first, second, self.temperature)
        return tf.reduce_mean(losses), tf.reduce_mean(found)

    def tracked(self, loss, found):
        self.loss_tracker.update_state(loss)
        self.found_tracker.update_state(found)
        return {metric.name: metric.result() for metric in self.metrics}

    def get_config(self):
        return {
            "encoder": keras.saving.serialize_keras_object(self.encoder),
            "projector": keras.saving.serialize_keras_object(self.projector),
            "temperature": self.temperature,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**keras.saving.deserialize_keras_object(config, custom_objects))


def nt_xent(first, second, temperature):
    """The normalised temperature-scaled cross entropy of pairs of points.

    Each of the 2 n points has to find its partner among all others (Chen et al., 2020,
    equation 1):

        -log(exp(s(i, partner) / t) / sum over k != i of exp(s(i, k) / t))

    A batch of one pair has no negatives, and a loss of 0.

    Args:
        first, second: Tensors of shape (n, dimension), of points of length 1; rows with
            the same index are a pair.
        temperature: The t of the formula.

    Returns:
        `(losses, found)`, both of shape (2 n,): the cross entropies, and 1.0 where the
        most similar other point is the partner, else 0.0.
    """
    pairs = tf.shape(first)[0]
    points = tf.concat([first, second], axis=0)
    similarities = tf.matmul(points, points, transpose_b=True) / temperature
    # No point is compared with itself: exp(-1e9) is 0.
    itself = tf.fill([2 * pairs], tf.constant(-1e9, similarities.dtype))
    similarities = tf.linalg.set_diag(similarities, itself)
    partners = tf.concat([tf.range(pairs) + pairs, tf.range(pairs)], axis=0)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(partners, similarities)
    nearest = tf.argmax(similarities, axis=-1, output_type=partners.dtype)
    return losses, tf.cast(tf.equal(nearest, partners), losses.dtype)


def distort(images, seed):
    """Randomly rotates, scales, shears and shifts each image.

    Args:
        images: A tensor of shape (rows, height, width, 1).
        seed: A `keras.random.SeedGenerator`.

    Returns:
        A tensor of the same shape.
    """
    chance = keras.random.uniform((tf.shape(images)[0], 6), -1.0, 1.0, seed=seed)
    turn, slant, stretch_x, stretch_y, shift_x, shift_y = tf.unstack(chance, axis=1)
    cos, sin = tf.cos(0.4 * turn), tf.sin(0.4 * turn)
    # A pixel (x, y) of the result, seen from the centre, comes from
    # (a x + b y + shift_x, c x + d y + shift_y) of the image.
    width, height = tf.exp(0.3 * stretch_x), tf.exp(0.3 * stretch_y)
    a, b = width * cos, height * (0.3 * slant * cos - sin)
    c, d = width * sin, height * (0.3 * slant * sin + cos)
    x, y = (images.shape[2] - 1) / 2, (images.shape[1] - 1) / 2
    from_x = x - a * x - b * y + 3 * shift_x
    from_y = y - c * x - d * y + 3 * shift_y
    zero = tf.zeros_like(a)
    transform = tf.stack([a, b, from_x, c, d, from_y, zero, zero], axis=1)
    return keras.ops.image.affine_transform(images, transform)


class NearestNeighbours(keras.callbacks.Callback):
    """Logs `knn_accuracy`, which measures the representations with a few labels.

    Args:
        labelled, test: `(images, labels)`. A test digit gets the majority label of the
            labelled digits that are nearest to it.
    """

    def __init__(self, labelled, test):
        super().__init__()
        self.x, self.y = labelled
        self.x_test, self.y_test = test

    def on_epoch_end(self, epoch, logs=None):
        features, test_features = (
            self.model.predict(x, batch_size=500, verbose=0)
            for x in (self.x, self.x_test)
        )
        logs["knn_accuracy"] = knn_accuracy(
            features, self.y, test_features, self.y_test
        )


def knn_accuracy(
    features, labels, test_features, test_labels, neighbours=NEIGHBOURS
) -> float:
    """The share of test rows whose label is the majority of their nearest rows.

    Args:
        features, test_features: Arrays of shape (rows, ...), compared by their angles.
        labels, test_labels: Arrays of shape (rows,), of ints from 0.
        neighbours: How many of the nearest rows vote.
    """
    similarities = _directions(test_features) @ _directions(features).T
    nearest = np.argpartition(-similarities, neighbours, axis=1)[:, :neighbours]
    votes = np.eye(labels.max() + 1)[labels[nearest]].sum(axis=1)
    return float(np.mean(votes.argmax(axis=1) == test_labels))


def _directions(rows):
    vectors = rows.reshape(len(rows), -1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_encoder() -> keras.Sequential:
    """Returns a network from images (28, 28, 1) to representations (1024,)."""
    stack = [keras.Input(shape=(28, 28, 1))]
    for filters in (32, 64, 64):
        stack += [
            layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        ]
    return keras.Sequential([*stack, layers.Flatten()], name="encoder")


def make_projector() -> keras.Sequential:
    """Returns a network from representations (1024,) to points (64,)."""
    return keras.Sequential(
        [
            keras.Input(shape=(4 * 4 * 64,)),
            layers.Dense(128, activation="relu"),
            # Inputs of the loss are float32 under mixed precision too.
            layers.Dense(64, dtype="float32"),
        ],
        name="projector",
    )


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.dataset = "mnist"
    config.batch_size = 256
    config.epochs = 12
    config.steps_per_epoch = config_dict.placeholder(int)
    config.learning_rate = 0.002
    config.temperature = 0.5
    config.labelled = 500  # digits with labels, to measure the representations
    config.seed = 1337
    return config


def build(config: ml_collections.ConfigDict) -> distfit.Model:
    if config.temperature <= 0:
        raise ValueError(
            "The temperature must be positive: similarities are divided by it. "
            f"Received: temperature={config.temperature}. Pass a positive number."
        )
    if config.labelled < NEIGHBOURS:
        raise ValueError(
            f"A digit is compared with the {NEIGHBOURS} nearest labelled digits. "
            f"Received: labelled={config.labelled}. Pass {NEIGHBOURS} or more."
        )
    keras.utils.set_random_seed(config.seed)
    model = SimCLR(
        encoder=make_encoder(),
        projector=make_projector(),
        temperature=config.temperature,
        seed=config.seed,
    )
    model.compile(optimizer=keras.optimizers.Adam(config.learning_rate))
    return model


def data(config: ml_collections.ConfigDict):
    """Returns the images of both splits: training sees no labels."""
    (x_train, _), (x_test, _) = datasets.load(config.dataset, config)
    return x_train, x_test


def callbacks(config: ml_collections.ConfigDict, workdir: str) -> list:
    del workdir  # nothing is written
    if config.dataset not in datasets.NAMES:  # Other data may have no labels.
        return []
    (x, y), test = datasets.load(config.dataset, config)
    return [NearestNeighbours((x[: config.labelled], y[: config.labelled]), test)]
