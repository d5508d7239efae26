"""Each layer of Keras in a training step: replicas give the numbers of one device.

`python -m pytest tests/test_keras_layers.py -s -k table` prints what fell back, after
the others have run in the same process.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import steps
import tensorflow as tf
from breadth import pick
from keras import layers

ROWS = sum(steps.BATCHES)


class Case(NamedTuple):
    """A layer and the arguments of its call.

    Attributes:
        make: Makes the layer.
        inputs: Arrays of rows, as the layer takes them: an array, a list or a dict.
        call: Calls the layer; None: with the inputs as its first argument.
    """

    make: Callable[[], Any]
    inputs: Any
    call: Callable | None = None


def _numbers(*shape: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(ROWS, *shape)).astype("float32")


def _integers(limit: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, limit, (ROWS, *shape), "int32")


FEATURES = _numbers(4)
SERIES = _numbers(6, 3)
IMAGES = _numbers(6, 6, 3)
VOLUMES = _numbers(4, 4, 4, 2)
FILMS = {1: _numbers(3, 5, 2), 2: _numbers(3, 4, 4, 2), 3: _numbers(3, 4, 4, 4, 1)}
TOKENS = _integers(5, 6)
WORDS = np.array(["red", "green", "blue"])[_integers(3, 4)]
PIXELS = np.random.default_rng(2).uniform(0, 255, (ROWS, 8, 8, 3)).astype("float32")
PAIR = [FEATURES, _numbers(4, seed=3)]
LABELLED = {
    "images": PIXELS,
    "labels": np.eye(3, dtype="float32")[_integers(3)],
}
BOXES = {
    "bounding_boxes": {
        "boxes": np.abs(_numbers(3, 4)),
        "labels": _integers(3, 3),
    },
    "images": PIXELS,
}
PLACES = {1: SERIES, 2: IMAGES, 3: VOLUMES}


def _of_places(pattern: str, make: Callable, dims: Sequence[int] = (1, 2, 3)) -> dict:
    """Cases of layers that exist for several numbers of dimensions."""
    return {
        pattern.format(n): Case(lambda n=n: make(pattern.format(n), n), PLACES[n])
        for n in dims
    }


def _named(**options) -> Callable:
    return lambda name, n: getattr(layers, name)(**options)


def _simple(inputs, *names: str, **options) -> dict:
    return {
        name: Case(lambda name=name: getattr(layers, name)(**options), inputs)
        for name in names
    }


def _recurrent(cell: Callable) -> Case:
    return Case(lambda: layers.RNN(cell(), return_sequences=True), SERIES)


def _normalization():
    layer = layers.Normalization(mean=[0.5] * 4, variance=[2.0] * 4)
    layer.build((None, 4))  # Not in a step: it keeps tensors.
    return layer


def _attention(layer, x):
    return layer([x, x[:, 1:]])


CORE = {
    "Dense": Case(lambda: layers.Dense(3, "relu"), FEATURES),
    "EinsumDense": Case(
        lambda: layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d"), SERIES
    ),
    "Embedding": Case(lambda: layers.Embedding(5, 3, mask_zero=True), TOKENS),
    "ReversibleEmbedding": Case(
        lambda: layers.ReversibleEmbedding(5, 3),
        TOKENS,
        lambda layer, x: layer(layer(x), reverse=True),
    ),
    "Lambda": Case(lambda: layers.Lambda(lambda x: x * x), FEATURES),
    "Masking": Case(lambda: layers.Masking(), SERIES),
    "Identity": Case(layers.Identity, FEATURES),
    "Bidirectional": Case(
        lambda: layers.Bidirectional(layers.LSTM(2, return_sequences=True)), SERIES
    ),
    "TimeDistributed": Case(lambda: layers.TimeDistributed(layers.Dense(2)), SERIES),
    "SpectralNormalization": Case(
        lambda: layers.SpectralNormalization(layers.Dense(3)), FEATURES
    ),
    "Pipeline": Case(
        lambda: layers.Pipeline([layers.Rescaling(0.1), layers.RandomFlip()]), PIXELS
    ),
}
CONVOLUTIONS = {
    **_of_places("Conv{}D", _named(filters=3, kernel_size=3, strides=2)),
    **_of_places(
        "Conv{}DTranspose", _named(filters=2, kernel_size=3, strides=2, padding="same")
    ),
    **_of_places("DepthwiseConv{}D", _named(kernel_size=3, depth_multiplier=2), (1, 2)),
    **_of_places("SeparableConv{}D", _named(filters=3, kernel_size=3), (1, 2)),
    **{
        f"ConvLSTM{n}D": Case(
            lambda n=n: getattr(layers, f"ConvLSTM{n}D")(2, 3, padding="same"),
            FILMS[n],
        )
        for n in FILMS
    },
}
POOLING = {
    **_of_places("MaxPooling{}D", _named()),
    **_of_places("AveragePooling{}D", _named(padding="same", pool_size=3)),
    **_of_places("GlobalMaxPooling{}D", _named()),
    **_of_places("GlobalAveragePooling{}D", _named()),
    **_of_places("AdaptiveMaxPooling{}D", _named(output_size=2)),
    **_of_places("AdaptiveAveragePooling{}D", _named(output_size=2)),
}
NORMALIZATION = {
    **_simple(IMAGES, "BatchNormalization", "LayerNormalization"),
    **_simple(IMAGES, "RMSNormalization", "UnitNormalization"),
    "GroupNormalization": Case(lambda: layers.GroupNormalization(3), IMAGES),
    "Normalization": Case(_normalization, FEATURES),
}
ATTENTION = {
    "Attention": Case(lambda: layers.Attention(use_scale=True), SERIES, _attention),
    "AdditiveAttention": Case(layers.AdditiveAttention, SERIES, _attention),
    "MultiHeadAttention": Case(
        lambda: layers.MultiHeadAttention(2, 3, dropout=0.2),
        SERIES,
        lambda layer, x: layer(x, x, use_causal_mask=True),
    ),
    "GroupedQueryAttention": Case(
        lambda: layers.GroupQueryAttention(2, 4, 2),
        SERIES,
        lambda layer, x: layer(x, x),
    ),
}
RECURRENT = {
    "LSTM": Case(lambda: layers.LSTM(3, return_sequences=True), SERIES),
    "GRU": Case(lambda: layers.GRU(3, return_sequences=True), SERIES),
    "SimpleRNN": Case(lambda: layers.SimpleRNN(3), SERIES),
    "RNN": _recurrent(lambda: layers.SimpleRNNCell(3)),
    "LSTMCell": _recurrent(lambda: layers.LSTMCell(3)),
    "GRUCell": _recurrent(lambda: layers.GRUCell(3)),
    "SimpleRNNCell": _recurrent(lambda: layers.SimpleRNNCell(3, dropout=0.3)),
    "StackedRNNCells": _recurrent(
        lambda: layers.StackedRNNCells([layers.GRUCell(3), layers.LSTMCell(2)])
    ),
}
MERGING = {
    **_simple(PAIR, "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"),
    "Concatenate": Case(layers.Concatenate, PAIR),
    "Dot": Case(lambda: layers.Dot(1, normalize=True), PAIR),
}
SHAPES = {
    "Flatten": Case(layers.Flatten, IMAGES),
    "Reshape": Case(lambda: layers.Reshape((-1, 2)), IMAGES),
    "Permute": Case(lambda: layers.Permute((2, 1)), SERIES),
    "RepeatVector": Case(lambda: layers.RepeatVector(3), FEATURES),
    **_of_places("UpSampling{}D", _named()),
    **_of_places("ZeroPadding{}D", _named()),
    **_of_places("Cropping{}D", _named()),
    "Resizing": Case(lambda: layers.Resizing(4, 5), PIXELS),
    "CenterCrop": Case(lambda: layers.CenterCrop(4, 5), PIXELS),
    "Rescaling": Case(lambda: layers.Rescaling(0.1, 1.0), PIXELS),
}
ACTIVATIONS = {
    **_simple(FEATURES, "ReLU", "LeakyReLU", "ELU", "Softmax", "PReLU"),
    "Activation": Case(lambda: layers.Activation("gelu"), FEATURES),
}
NOISE = {
    **_simple(SERIES, "Dropout", "AlphaDropout", "GaussianDropout", rate=0.3),
    "GaussianNoise": Case(lambda: layers.GaussianNoise(0.3), FEATURES),
    "ActivityRegularization": Case(
        lambda: layers.ActivityRegularization(0.1, 0.1), FEATURES
    ),
    **_of_places("SpatialDropout{}D", _named(rate=0.4)),
}
AUGMENTATION = {
    **_simple(PIXELS, "RandomFlip", "RandomGrayscale"),
    **_simple(PIXELS, "RandomBrightness", "RandomContrast", factor=0.3),
    **_simple(PIXELS, "RandomColorDegeneration", "RandomHue", factor=0.3),
    **_simple(PIXELS, "RandomRotation", "RandomSharpness", factor=0.3),
    **_simple(PIXELS, "RandomInvert", "RandomPerspective", factor=0.4),
    **_simple(PIXELS, "RandomSaturation", factor=0.4),
    "RandomPosterization": Case(lambda: layers.RandomPosterization(4), PIXELS),
    "RandomCrop": Case(lambda: layers.RandomCrop(5, 4), PIXELS),
    "RandomZoom": Case(lambda: layers.RandomZoom(0.3), PIXELS),
    "RandomTranslation": Case(lambda: layers.RandomTranslation(0.3, 0.3), PIXELS),
    "RandomShear": Case(lambda: layers.RandomShear(0.3, 0.3), PIXELS),
    "RandomColorJitter": Case(
        lambda: layers.RandomColorJitter(
            brightness_factor=0.3,
            contrast_factor=0.3,
            saturation_factor=0.3,
            hue_factor=0.3,
        ),
        PIXELS,
    ),
    "RandomElasticTransform": Case(layers.RandomElasticTransform, PIXELS),
    "RandomErasing": Case(lambda: layers.RandomErasing(1.0), PIXELS),
    "RandomGaussianBlur": Case(layers.RandomGaussianBlur, PIXELS),
    "RandAugment": Case(lambda: layers.RandAugment(num_ops=1), PIXELS),
    "AugMix": Case(lambda: layers.AugMix(num_chains=2, chain_depth=2), PIXELS),
    "MixUp": Case(layers.MixUp, LABELLED),
    "CutMix": Case(layers.CutMix, LABELLED),
    "AutoContrast": Case(layers.AutoContrast, PIXELS),
    "Equalization": Case(layers.Equalization, PIXELS),
    "ContrastLimitedAdaptiveHistogramEqualization": Case(
        lambda: layers.ContrastLimitedAdaptiveHistogramEqualization(
            tile_grid_size=(2, 2)
        ),
        PIXELS,
    ),
    "Solarization": Case(lambda: layers.Solarization(0.3), PIXELS),
    "MaxNumBoundingBoxes": Case(
        lambda: layers.MaxNumBoundingBoxes(2, bounding_box_format="xyxy"), BOXES
    ),
}
PREPROCESSING = {
    "CategoryEncoding": Case(lambda: layers.CategoryEncoding(5), TOKENS),
    "Discretization": Case(lambda: layers.Discretization([-0.5, 0.5]), FEATURES),
    "Hashing": Case(lambda: layers.Hashing(4), WORDS),
    "HashedCrossing": Case(
        lambda: layers.HashedCrossing(5),
        [WORDS[:, 0], TOKENS[:, 0]],
        lambda layer, pair: layer(tuple(pair)),
    ),
    "IntegerLookup": Case(lambda: layers.IntegerLookup(vocabulary=[1, 2, 4]), TOKENS),
    "StringLookup": Case(
        lambda: layers.StringLookup(vocabulary=["red", "blue"]), WORDS
    ),
    "TextVectorization": Case(
        lambda: layers.TextVectorization(vocabulary=["red", "blue"]), WORDS[:, :1]
    ),
    "STFTSpectrogram": Case(
        lambda: layers.STFTSpectrogram(
            frame_length=8, frame_step=4, fft_length=8, window=None
        ),
        _numbers(32, 1),
    ),
    "MelSpectrogram": Case(
        lambda: layers.MelSpectrogram(
            fft_length=16, sequence_stride=8, num_mel_bins=4, sampling_rate=100
        ),
        _numbers(64),
    ),
}
CASES = {
    **CORE,
    **CONVOLUTIONS,
    **POOLING,
    **NORMALIZATION,
    **ATTENTION,
    **RECURRENT,
    **MERGING,
    **SHAPES,
    **ACTIVATIONS,
    **NOISE,
    **AUGMENTATION,
    **PREPROCESSING,
}

NOT_TRAINED = {
    "InputLayer": "a place for an input: every functional model has it",
    "Layer": "abstract",
    "Wrapper": "abstract",
    "FlaxLayer": "for JAX",
    "JaxLayer": "for JAX",
    "TorchModuleWrapper": "for PyTorch",
    "TFSMLayer": "a SavedModel, whose operations are a function of their own",
}

# What falls back, and why it must.
FALLS_BACK: dict[str, str] = {
    "HashedCrossing": "SparseCross, whose result has as many elements as it finds",
    "TextVectorization": "StringSplitV2, whose result has as many words as it finds",
    "MelSpectrogram": "the signal is flipped and joined with itself along time",
    "RandomElasticTransform": "Keras goes through the images one by one",
}

# What they draw depends on how often they are traced.
DRAWN_IN_TRACES = ("AugMix", "RandomElasticTransform")

_fallen: dict[str, list[str]] = {}


class Around(keras.Model):
    """A layer between weights that scale its inputs and a loss of its outputs."""

    def __init__(self, case: Case):
        super().__init__()
        self.layer, self.call_layer = case.make(), case.call
        self.scales = [
            self.add_weight(shape=x.shape[1:], initializer="ones", name=f"scale{i}")
            for i, x in enumerate(keras.tree.flatten(case.inputs))
            if x.dtype == np.float32
        ]
        self.size = self.add_weight(shape=(), initializer="ones", name="size")

    def call(self, inputs, training=None):
        scales = iter(self.scales)

        def scaled(x):
            return x * next(scales) if x.dtype == tf.float32 else x

        inputs = keras.tree.map_structure(scaled, inputs)
        if self.call_layer is not None:
            return self.call_layer(self.layer, inputs)
        return self.layer(inputs)

    def train_step(self, data):
        inputs, y = data
        with tf.GradientTape() as tape:
            outputs = keras.tree.flatten(self(inputs, training=True))
            loss = tf.add_n([self.of_output(part, y) for part in outputs])
            loss += tf.add_n([tf.zeros(()), *self.losses])
        weights = self.trainable_variables
        self.optimizer.apply(
            [
                tf.zeros_like(w) if g is None else g
                for w, g in zip(weights, tape.gradient(loss, weights), strict=True)
            ],
            weights,
        )
        return {"raw": loss}

    def of_output(self, output, y):
        """A mean with a different weight for each row."""
        output = tf.cast(output, tf.float32)
        output = tf.tanh(0.1 * output * self.size)
        ones = [1] * (len(output.shape) - 1)
        return tf.reduce_mean(output * tf.reshape(y, [-1, *ones]))


# Layers that consist of what others test: "Bidirectional" of cells, and "AugMix" of the
# layers that change colours and places.
_IN_OTHERS = {
    "StackedRNNCells",
    "LSTM",
    "LSTMCell",
    "GRUCell",
    "RNN",
    "SimpleRNN",
    "RandAugment",
}
# "RandomColorJitter" consists of the first, and "RandomRotation" moves pixels like the
# next; "Add" stands for what merges elements.
_IN_OTHERS |= {"RandomBrightness", "RandomContrast", "RandomSaturation", "RandomHue"}
_IN_OTHERS |= {"RandomShear", "RandomTranslation", "RandomZoom"}
_IN_OTHERS |= {"Subtract", "Average", "Minimum"}
# Parts of "AugMix", and activations, which test_keras_functions.py has.
_IN_OTHERS |= {"AutoContrast", "Equalization", "RandomPosterization", "Solarization"}
_IN_OTHERS |= {"RandomRotation", "ReLU", "LeakyReLU", "ELU"}
# The same operations as "GRU", "MultiHeadAttention", "Dropout", "RandomPerspective",
# "RandomGrayscale", "Add", or as pooling and lookups of the other kind.
_IN_OTHERS |= {"SimpleRNNCell", "ConvLSTM2D", "GroupedQueryAttention"}
_IN_OTHERS |= {"GaussianDropout", "SpatialDropout2D", "AlphaDropout"}
_IN_OTHERS |= {"AugMix", "RandomElasticTransform", "RandomColorJitter"}
_IN_OTHERS |= {"RandomInvert", "RandomColorDegeneration", "RandomSharpness"}
_IN_OTHERS |= {"Multiply", "Maximum", "AdaptiveMaxPooling2D", "HashedCrossing"}
# Rules know no number of dimensions: images stand for series and volumes.
FEW = [n for n in CASES if "1D" not in n and "3D" not in n and n not in _IN_OTHERS]


@pytest.mark.parametrize("name", pick(FEW, list(CASES)))
def test_step(make_strategy, name):
    case = CASES[name]

    batches = steps.batches_of((case.inputs, 1 + np.abs(_numbers(seed=9))))

    def build():
        model = Around(case)
        # A step that creates weights is traced twice.
        model(batches[0][0], training=False)
        model.compile(keras.optimizers.SGD(0.1))
        return model

    eagerly = name not in DRAWN_IN_TRACES
    fallen = steps.assert_same(make_strategy, build, batches, eagerly=eagerly)
    _fallen[name] = fallen
    assert bool(fallen) == (name in FALLS_BACK), fallen


def test_all_layers_are_here():
    found = {
        thing.__name__
        for thing in vars(layers).values()
        if isinstance(thing, type) and issubclass(thing, keras.Layer)
    }
    assert found == {*CASES, *NOT_TRAINED}


def test_table_of_what_fell_back():
    for name, fallen in _fallen.items():
        if fallen:
            print(f"{name:45} {', '.join(fallen)}: {FALLS_BACK.get(name)}")
    assert set(FALLS_BACK) <= set(CASES)
