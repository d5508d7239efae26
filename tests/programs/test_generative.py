"""Models of data, as written for one device, on 2 and 3 replicas."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, optimizers
from pieces import Program, compiled, mlp, numbers


class Vae(keras.Model):
    """Computes the divergence by hand and tracks three losses."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(6, 4), mlp(2, 6)
        self.seeds = keras.random.SeedGenerator(3)
        self.total = keras.metrics.Mean(name="total")
        self.divergence = keras.metrics.Mean(name="divergence")

    @property
    def metrics(self):
        return [self.total, self.divergence]

    def train_step(self, x):
        with tf.GradientTape() as tape:
            mean, log_variance = tf.split(self.encoder(x), 2, axis=-1)
            noise = keras.random.normal(tf.shape(mean), seed=self.seeds)
            z = mean + tf.exp(0.5 * log_variance) * noise
            errors = tf.reduce_sum(tf.square(x - self.decoder(z)), axis=1)
            kl = 1 + log_variance - tf.square(mean) - tf.exp(log_variance)
            kl = tf.reduce_mean(tf.reduce_sum(-0.5 * kl, axis=1))
            total = tf.reduce_mean(errors) + kl
        weights = self.trainable_weights
        self.optimizer.apply_gradients(
            zip(tape.gradient(total, weights), weights, strict=True)
        )
        self.total.update_state(total)
        self.divergence.update_state(kl)
        return {m.name: m.result() for m in self.metrics}


def test_variational_autoencoder(assert_same):
    assert_same(compiled(Vae, "adam", 0.01), numbers(6))


class VectorQuantizer(keras.Model):
    """Each row is replaced by the nearest vector of a codebook."""

    def __init__(self, moving: bool):
        super().__init__()
        self.moving = moving
        self.encoder, self.decoder = mlp(6, 3), mlp(3, 6)
        self.codes = self.add_weight(
            shape=(5, 3), initializer="normal", trainable=not moving, name="codes"
        )
        self.counts = self.add_weight(
            shape=(5,), initializer="ones", trainable=False, name="counts"
        )
        self.sums = self.add_weight(
            shape=(5, 3), initializer="ones", trainable=False, name="sums"
        )

    def nearest(self, z):
        codes = tf.convert_to_tensor(self.codes)
        distances = (
            tf.reduce_sum(z**2, axis=1, keepdims=True)
            - 2 * tf.matmul(z, codes, transpose_b=True)
            + tf.reduce_sum(codes**2, axis=1)
        )
        return tf.argmin(distances, axis=1)

    def move(self, z, nearest):
        """Codes become moving averages of the rows nearest to them."""
        chosen = tf.one_hot(nearest, 5)
        counts = 0.9 * self.counts + 0.1 * tf.reduce_sum(chosen, 0)
        self.counts.assign(counts)
        self.sums.assign(0.9 * self.sums + 0.1 * tf.matmul(chosen, z, transpose_a=True))
        self.codes.assign(self.sums / (self.counts[:, None] + 1e-5))

    def train_step(self, x):
        with tf.GradientTape() as tape:
            z = self.encoder(x)
            nearest = self.nearest(z)
            quantized = tf.gather(tf.convert_to_tensor(self.codes), nearest)
            loss = 0.25 * tf.reduce_mean((tf.stop_gradient(quantized) - z) ** 2)
            if not self.moving:
                loss += tf.reduce_mean((quantized - tf.stop_gradient(z)) ** 2)
            straight = z + tf.stop_gradient(quantized - z)
            loss += tf.reduce_mean((x - self.decoder(straight)) ** 2)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        if self.moving:
            self.move(z, nearest)
        used = tf.unique(nearest)[0]
        return {"raw": loss, "raw_used": tf.size(used)}


def test_codebook_by_gradient(assert_same):
    assert_same(compiled(lambda: VectorQuantizer(False)), numbers(6))


def test_codebook_by_moving_average(assert_same):
    assert_same(compiled(lambda: VectorQuantizer(True)), numbers(6))


class WassersteinGan(keras.Model):
    """Has a penalty on the gradient and two steps of the critic."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = mlp(3, 6), mlp(6, 1)
        self.seeds = keras.random.SeedGenerator(5)

    def compile(self):
        super().compile()
        self.of_critic, self.of_generator = optimizers.Adam(0.01), optimizers.Adam(0.01)

    def penalty(self, real, fake):
        share = keras.random.uniform((tf.shape(real)[0], 1), seed=self.seeds)
        between = real + share * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(between)
            judged = self.critic(between, training=True)
        slopes = tape.gradient(judged, [between])[0]
        norm = tf.sqrt(tf.reduce_sum(tf.square(slopes), axis=1) + 1e-12)
        return tf.reduce_mean((norm - 1.0) ** 2)

    def train_step(self, real):
        count = tf.shape(real)[0]
        for _ in range(2):
            latent = keras.random.normal((count, 3), seed=self.seeds)
            with tf.GradientTape() as tape:
                fake = self.generator(latent, training=True)
                cost = tf.reduce_mean(self.critic(fake))
                cost -= tf.reduce_mean(self.critic(real))
                cost += 10.0 * self.penalty(real, fake)
            weights = self.critic.trainable_variables
            self.of_critic.apply(tape.gradient(cost, weights), weights)
        latent = keras.random.normal((count, 3), seed=self.seeds)
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(self.critic(self.generator(latent, training=True)))
        weights = self.generator.trainable_variables
        self.of_generator.apply(tape.gradient(loss, weights), weights)
        return {"raw_critic": cost, "raw_generator": loss}


def test_wasserstein_gan_with_gradient_penalty(assert_same):
    def build():
        model = WassersteinGan()
        model.compile()
        return model

    assert_same(build, numbers(6))


class Diffusion(keras.Model):
    """Predicts the noise at a random time, with a moving average of the network."""

    steps = 10

    def __init__(self):
        super().__init__()
        self.net, self.average = _denoiser(), _denoiser()
        self.average.set_weights(self.net.get_weights())
        self.average.trainable = False
        kept = np.cumprod(1 - np.linspace(1e-4, 0.2, self.steps)).astype("float32")
        self.kept = tf.constant(kept)
        self.seeds = keras.random.SeedGenerator(2)
        self.tracker = keras.metrics.Mean(name="loss")

    def train_step(self, images):
        count = tf.shape(images)[0]
        times = keras.random.randint((count,), 0, self.steps, seed=self.seeds)
        noise = keras.random.normal(tf.shape(images), seed=self.seeds)
        kept = tf.reshape(tf.gather(self.kept, times), (-1, 1, 1, 1))
        noisy = tf.sqrt(kept) * images + tf.sqrt(1 - kept) * noise
        with tf.GradientTape() as tape:
            predicted = self.net([noisy, times], training=True)
            loss = keras.ops.mean(keras.ops.square(noise - predicted))
        weights = self.net.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        for slow, fast in zip(self.average.weights, self.net.weights, strict=True):
            slow.assign(0.9 * slow + 0.1 * fast)
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}


def _denoiser():
    images = keras.Input((4, 4, 2))
    times = keras.Input((), dtype="int32")
    hidden = layers.Conv2D(4, 3, padding="same")(images)
    shift = layers.Dense(4)(layers.Embedding(Diffusion.steps, 3)(times))
    hidden = layers.Activation("swish")(hidden + shift[:, None, None, :])
    return keras.Model([images, times], layers.Conv2D(2, 3, padding="same")(hidden))


def test_diffusion_with_random_times(assert_same):
    assert_same(compiled(Diffusion, "adam", 0.01), numbers(4, 4, 2))


class Coupling(Program):
    """The log-likelihood of a flow of coupling layers."""

    def __init__(self):
        super().__init__(mlp(2, 4))
        self.other = mlp(2, 4)

    def loss_of(self, x):
        log_determinant = tf.zeros(tf.shape(x)[0])
        for i, net in enumerate((self.net, self.other)):
            mask = tf.constant([1.0, 0.0, 1.0, 0.0] if i else [0.0, 1.0, 0.0, 1.0])
            kept = tf.boolean_mask(x * mask, mask > 0, axis=1)
            scale, shift = tf.split(net(kept), 2, axis=1)
            scale = tf.tanh(scale)
            scale, shift = (tf.repeat(t, 2, axis=1) for t in (scale, shift))
            free = 1 - mask
            x = x * mask + free * (x * tf.exp(scale) + shift)
            log_determinant += tf.reduce_sum(scale * free, axis=1)
        log_density = -0.5 * tf.reduce_sum(x**2 + np.log(2 * np.pi), axis=1)
        return -tf.reduce_mean(log_density + log_determinant)


def test_log_likelihood_of_a_flow(assert_same):
    assert_same(compiled(Coupling, "adam", 0.01), numbers(4))
