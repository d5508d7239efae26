"""Convolution, pooling and images: by rows, forward and backward."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import examples
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rules import check, splits

generated = [Phase.explicit, Phase.generate]
quick = settings(deadline=None, max_examples=examples(8, 15), phases=generated)
few = settings(deadline=None, max_examples=examples(2, 4), phases=generated)
paddings = st.sampled_from(["SAME", "VALID"])


def images(counts, *shape, seed=0):
    rows = (sum(counts), *shape)
    return np.random.default_rng(seed).normal(size=rows).astype("float32")


def constant(*shape, seed=1):
    values = np.random.default_rng(seed).normal(size=shape)
    return tf.constant(values, tf.float32)


def with_gradients(function, *others):
    """`function(x, *others)` and the gradients of the sum of its squares."""

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch([x, *others])
            y = function(x, *others)
            loss = tf.reduce_sum(tf.square(y))
        return y, tape.gradient(loss, [x, *others])

    return run


# --- Convolution.


@quick
@given(splits(4), paddings, st.sampled_from([(1, 1), (2, 1), (1, 2)]))
def test_conv2d(counts, padding, steps):
    stride, dilation = steps

    def convolved(x, w):
        return tf.nn.convolution(x, w, stride, padding, dilations=dilation)

    run = with_gradients(convolved, constant(3, 2, 2, 3))
    outcome = check(run, [images(counts, 7, 6, 2)], counts)
    assert outcome.layouts == ["rows", "rows", "partial"]
    assert outcome.exchanges == 0


@few
@given(splits(3))
def test_as_many_filters_as_rows(counts):
    """The images of a batch as filters of the others."""

    def convolved(x):
        filters = tf.transpose(x[:, :2, :2], [1, 2, 3, 0])
        pairs = tf.nn.conv2d(x, filters, 1, "SAME")
        weights = tf.range(tf.size(pairs)) % 7
        flat = tf.reshape(pairs, [-1]) * tf.cast(weights, tf.float32)
        single = tf.nn.depthwise_conv2d(x[..., :1], filters[:, :, :1], [1] * 4, "SAME")
        return tf.reshape(flat, tf.shape(pairs)) + single

    check(with_gradients(convolved), [images(counts, 4, 4, 2)], counts, rtol=1e-4)


@few
@given(splits(3), paddings, st.integers(1, 2))
def test_conv1d_and_conv3d(counts, padding, stride):
    run = with_gradients(
        lambda x, w: tf.nn.conv1d(x, w, stride, padding), constant(3, 2, 4)
    )
    check(run, [images(counts, 8, 2)], counts)
    strides = [1, stride, stride, stride, 1]
    run = with_gradients(
        lambda x, w: tf.nn.conv3d(x, w, strides, padding), constant(2, 3, 2, 2, 3)
    )
    outcome = check(run, [images(counts, 5, 4, 4, 2)], counts)
    assert outcome.layouts == ["rows", "rows", "partial"]


@few
@given(splits(3), paddings, st.integers(1, 2), st.integers(1, 2))
def test_depthwise(counts, padding, stride, dilation):
    if stride > 1:
        dilation = 1

    def convolved(x, w):
        strides = [1, stride, stride, 1]
        rates = [dilation, dilation]
        return tf.nn.depthwise_conv2d(x, w, strides, padding, dilations=rates)

    run = with_gradients(convolved, constant(3, 3, 2, 2))
    outcome = check(run, [images(counts, 8, 8, 2)], counts)
    assert outcome.layouts == ["rows", "rows", "partial"]


def test_filter_gradients_of_no_rows_are_zeros():
    x = images([2, 0, 0], 5, 5, 2)
    for _ in range(5):  # Uninitialised memory may be zeros by chance.
        for convolved, shape in [
            (lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"), (3, 3, 2, 3)),
            (
                lambda x, w: tf.nn.depthwise_conv2d(x, w, [1] * 4, "SAME"),
                (3, 3, 2, 3),
            ),
        ]:
            run = with_gradients(convolved, constant(*shape))
            check(run, [x], [2, 0, 0])
            check(run, [x], [0, 2, 0])


@few
@given(splits(3))
def test_groups_have_no_kernel_of_their_own_on_cpus(counts):
    layer = keras.layers.Conv2D(6, 3, groups=3, use_bias=False)
    layer.build((None, 6, 6, 3))
    run = with_gradients(
        lambda x, w: layer.stateless_call([w], [], x)[0], constant(3, 3, 1, 6)
    )
    outcome = check(run, [images(counts, 6, 6, 3)], counts)
    assert outcome.layouts == ["rows", "rows", "partial"]


@few
@given(splits(3), st.integers(1, 3))
def test_blocks_and_inner_rows(counts, inner):
    """Fake and real images together; the frames of videos as images."""

    def both(x, w):
        return tf.nn.conv2d(tf.concat([x, -2 * x], 0), w, 1, "SAME")

    x, w = images(counts, 4, 4, 2), constant(3, 3, 2, 2)
    check(lambda x: both(x, w), [x], counts)
    check(with_gradients(both, w), [x], counts, falls_back=None)

    def frames(x, w):
        flat = tf.reshape(x, [-1, 4, 4, 2])
        flat = tf.nn.max_pool2d(tf.nn.conv2d(flat, w, 1, "SAME"), 2, 2, "SAME")
        return tf.reshape(flat, [-1, inner, 2, 2, 3])

    run = with_gradients(frames, constant(3, 3, 2, 3))
    check(run, [images(counts, inner, 4, 4, 2)], counts)


@few
@given(splits(3))
def test_filters_and_images_of_other_layouts(counts):
    x = images(counts, 4, 4, 2)
    w = constant(3, 3, 2, 2)

    def filter_from_rows(x):
        return tf.nn.conv2d(x, w * tf.reduce_mean(x), 1, "SAME")

    check(filter_from_rows, [x], counts)

    def one_image(x):
        return tf.nn.conv2d(tf.reduce_sum(x, 0, keepdims=True), w, 1, "SAME")

    check(one_image, [x], counts)
    check(lambda x: x + tf.nn.conv2d(constant(1, 4, 4, 2), w, 1, "SAME"), [x], counts)

    def along_rows(x):
        return tf.nn.conv2d(tf.transpose(x, [1, 0, 2, 3]), w, 1, "SAME")

    check(along_rows, [x], counts, falls_back=True)


@few
@given(splits(3))
def test_second_derivatives(counts):
    """A gradient penalty: the gradient of a gradient of convolution and pooling."""

    def penalized(x, w):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.nn.conv2d(x, w, 1, "SAME")
            y = tf.nn.avg_pool2d(y, 2, 2, "SAME") + tf.nn.max_pool2d(y, 2, 2, "SAME")
            score = tf.reduce_sum(tf.square(y))
        return tape.gradient(score, x)

    run = with_gradients(penalized, constant(3, 3, 2, 3))
    check(run, [images(counts, 6, 6, 2)], counts, rtol=1e-4, atol=1e-3)


@few
@given(splits(3), st.booleans())
def test_images_of_a_size_that_is_not_known(counts, strided):
    """A fully convolutional network with shortcuts."""
    w, v = constant(3, 3, 3, 3), constant(1, 1, 3, 3, seed=2)
    stride = 2 if strided else 1

    def network(x, w, v):
        crop = tf.cast(tf.reduce_max(tf.abs(x)) * 0, tf.int32) + 6
        x = x[:, :crop, :crop]
        assert x.shape[1] is None
        x = x + tf.nn.conv2d(x, w, 1, "SAME")
        short = tf.nn.conv2d(x, v, stride, "SAME")
        x = tf.nn.conv2d(x, w, stride, "SAME") + short
        large = tf.nn.conv2d_transpose(
            x, w, tf.concat([tf.shape(x)[:1], tf.shape(x)[1:3] * 2, [3]], 0), 2, "SAME"
        )
        return tf.nn.max_pool2d(large, 2, 2, "VALID") + x

    function = with_gradients(network, w, v)
    check(function, [images(counts, 7, 7, 3)], counts, eagerly=False)


# --- Pooling.


@quick
@given(splits(4), paddings, st.integers(1, 3), st.integers(1, 2))
def test_pool2d(counts, padding, size, stride):
    def pooled(x):
        most = tf.nn.max_pool2d(x, size, stride, padding)
        return most + 2 * tf.nn.avg_pool2d(x, size, stride, padding)

    outcome = check(with_gradients(pooled), [images(counts, 6, 5, 2)], counts)
    assert outcome.layouts == ["rows", "rows"]
    assert outcome.exchanges == 0


@few
@given(splits(3), paddings)
def test_pool3d(counts, padding):
    def pooled(x):
        return tf.nn.max_pool3d(x, 2, 2, padding) + tf.nn.avg_pool3d(x, 2, 2, padding)

    check(with_gradients(pooled), [images(counts, 4, 5, 4, 2)], counts)


def test_second_derivatives_of_pool3d_of_no_rows():
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = with_gradients(lambda x: tf.nn.max_pool3d(x, 2, 2, "SAME"))(x)[1][0]
            total = tf.reduce_sum(tf.square(y))
        return tape.gradient(total, x)

    check(run, [images([2, 0, 1], 4, 4, 4, 1)], [2, 0, 1])


# --- Layers.

LAYERS = [
    (lambda n: n.Conv1D(3, 3, strides=2), (8, 2)),
    (lambda n: n.Conv2D(3, 3, dilation_rate=2, padding="same"), (8, 8, 2)),
    (lambda n: n.Conv3D(3, 2, dilation_rate=2), (5, 5, 5, 2)),
    (lambda n: n.Conv1DTranspose(3, 3, strides=2), (5, 2)),
    (lambda n: n.Conv2DTranspose(3, 3, strides=2, padding="same"), (4, 5, 2)),
    (lambda n: n.Conv3DTranspose(3, 2, strides=2), (3, 3, 3, 2)),
    (lambda n: n.DepthwiseConv1D(3), (8, 2)),
    (lambda n: n.DepthwiseConv2D(3, dilation_rate=2), (8, 8, 2)),
    (lambda n: n.SeparableConv1D(3, 3), (8, 2)),
    (lambda n: n.SeparableConv2D(3, 3, dilation_rate=2), (8, 8, 2)),
    (lambda n: n.MaxPooling1D(2), (7, 2)),
    (lambda n: n.AveragePooling1D(2, padding="same"), (7, 2)),
    (lambda n: n.GlobalMaxPooling2D(), (4, 5, 2)),
    (lambda n: n.GlobalAveragePooling3D(), (3, 4, 5, 2)),
    (lambda n: n.UpSampling2D(2, interpolation="bilinear"), (4, 5, 2)),
    (lambda n: n.UpSampling2D(2, interpolation="bicubic"), (4, 5, 2)),
    (lambda n: n.UpSampling2D(2, interpolation="lanczos3"), (4, 5, 2)),
    (lambda n: n.Resizing(5, 3), (4, 5, 2)),
    (lambda n: n.Resizing(5, 3, interpolation="nearest"), (4, 5, 2)),
    (lambda n: n.Resizing(5, 3, crop_to_aspect_ratio=True), (4, 6, 2)),
    (lambda n: n.CenterCrop(3, 3), (6, 5, 2)),
    (lambda n: n.Cropping2D(1), (5, 5, 2)),
    (lambda n: n.Cropping3D(1), (4, 4, 4, 2)),
    (lambda n: n.SpatialDropout2D(0.0), (4, 4, 2)),
]


def of_layer(make, shape):
    layer = make(keras.layers)
    layer.build((None, *shape))
    weights = [tf.constant(v.numpy()) for v in layer.trainable_variables]
    return with_gradients(lambda x, *w: layer.stateless_call(w, [], x)[0], *weights)


@pytest.mark.parametrize("make, shape", LAYERS)
def test_layers(make, shape):
    run = of_layer(make, shape)
    counts = [2, 0, 1]
    outcome = check(run, [images(counts, *shape)], counts)
    assert outcome.layouts[:2] == ["rows", "rows"]
    assert outcome.exchanges == 0


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda n: n.ZeroPadding2D(1), (4, 4, 2)),
        (lambda n: n.Conv1D(3, 3, padding="causal", dilation_rate=2), (8, 2)),
        (lambda n: n.UpSampling1D(2), (4, 2)),
        (lambda n: n.UpSampling2D(2), (4, 4, 2)),
        (lambda n: n.UpSampling3D(2), (2, 2, 2, 2)),
        (lambda n: n.AdaptiveMaxPooling2D(2), (5, 4, 2)),
        (lambda n: n.AdaptiveAveragePooling3D(2), (3, 4, 5, 2)),
    ],
)
def test_layers_of_other_operations(make, shape):
    counts = [2, 0, 1]
    run = of_layer(make, shape)
    check(run, [images(counts, *shape)], counts, falls_back=None)


RANDOM = [
    (lambda n: n.RandomFlip(seed=1), True),
    (lambda n: n.RandomRotation(0.2, seed=1), None),
    (lambda n: n.RandomZoom(0.2, seed=1), None),
    (lambda n: n.RandomTranslation(0.2, 0.2, seed=1), None),
    (lambda n: n.RandomShear(0.2, 0.2, seed=1), None),
    (lambda n: n.RandomPerspective(0.3, seed=1), None),
    (lambda n: n.RandomContrast(0.2, value_range=(0, 1), seed=1), True),
    (lambda n: n.RandomBrightness(0.2, value_range=(0, 1), seed=1), True),
    (lambda n: n.RandomCrop(4, 4, seed=1), True),
    (lambda n: n.RandomHue(0.3, value_range=(0, 1), seed=1), True),
    (lambda n: n.RandomSaturation(0.3, value_range=(0, 1), seed=1), True),
    (lambda n: n.RandomSharpness(0.3, value_range=(0, 1), seed=1), True),
    (lambda n: n.RandomGaussianBlur(0.9, value_range=(0, 1), seed=1), True),
    (lambda n: n.RandomErasing(0.9, value_range=(0, 1), seed=1), True),
    (lambda n: n.RandomGrayscale(0.5, seed=1), True),
]


@pytest.mark.parametrize("make, partitioned", RANDOM)
def test_random_layers(make, partitioned):
    layer = make(keras.layers)
    layer.build((None, 6, 5, 3))
    state = [tf.constant(v.numpy()) for v in layer.non_trainable_variables]

    def augmented(x):
        return layer.stateless_call([], state, tf.sigmoid(x), training=True)[0]

    counts = [2, 1, 3]
    falls_back = False if partitioned else None
    check(augmented, [images(counts, 6, 5, 3)], counts, falls_back=falls_back)


# --- Images.


@quick
@given(
    splits(4),
    st.sampled_from(["bilinear", "nearest", "bicubic", "area", "gaussian"]),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_resize(counts, method, size):
    def resized(x):
        return tf.image.resize(x, size, method)

    x = images(counts, 4, 5, 2)
    differentiable = method != "area"
    check(with_gradients(resized) if differentiable else resized, [x], counts)


@few
@given(splits(3), st.booleans())
def test_one_transform_or_one_for_each_image(counts, one):
    shift = constant(1, 8) * [[0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]]
    shift += [[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]

    def transformed(x):
        own = shift if one else shift * (1 + x[:, :1, 0, 0] / 10)
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=x,
            transforms=own,
            output_shape=[4, 6],
            fill_value=0.5,
            interpolation="BILINEAR",
        )

    outcome = check(transformed, [images(counts, 5, 5, 2)], counts)
    assert outcome.layouts == ["rows"]


@quick
@given(splits(4))
def test_colors(counts):
    def adjusted(x):
        x = tf.image.adjust_contrast(tf.sigmoid(x), 0.5)
        x = tf.image.adjust_saturation(tf.image.adjust_hue(x, 0.2), 0.7)
        hsv = tf.image.rgb_to_hsv(tf.clip_by_value(x, 0.0, 1.0))
        return hsv, tf.image.hsv_to_rgb(hsv)

    x = images(counts, 3, 4, 3)
    assert check(adjusted, [x], counts).layouts == ["rows", "rows"]


@quick
@given(splits(4), st.integers(1, 2))
def test_space_and_depth(counts, size):
    def both_ways(x):
        if size == 1:
            return tf.nn.depth_to_space(x, 2)
        return tf.nn.space_to_depth(x, 2)

    check(with_gradients(both_ways), [images(counts, 4, 6, 4)], counts)


@quick
@given(splits(4), st.tuples(st.integers(1, 3), st.integers(1, 2)))
def test_space_and_images(counts, block):
    def there(x):
        return tf.space_to_batch(x, block, [[0, 0], [1, 1]])

    x = images(counts, 6, 4, 2)
    check(there, [x], counts)

    def and_back(x):
        y = there(x)
        y = y + tf.nn.conv2d(y, constant(2, 2, 2, 2), 1, "SAME")
        return tf.raw_ops.BatchToSpaceND(
            input=y, block_shape=block, crops=[[0, 0], [0, 1]]
        )

    outcome = check(with_gradients(and_back), [x], counts)
    assert outcome.layouts == ["rows", "rows"]
    blocks = int(np.prod(block))
    if blocks > 1:

        def of_rows(x):
            return tf.raw_ops.BatchToSpaceND(
                input=tf.repeat(x, blocks, 0), block_shape=block, crops=[[0, 0]] * 2
            )

        check(of_rows, [x], counts, falls_back=None)


@few
@given(splits(3))
def test_patches_and_normalization(counts):
    x = images(counts, 5, 6, 3)

    def patches(x):
        sizes = [1, 2, 2, 1]
        return tf.image.extract_patches(x, sizes, sizes, [1] * 4, "SAME")

    check(patches, [x], counts)
    check(with_gradients(tf.nn.local_response_normalization), [x], counts)
    run = with_gradients(
        lambda x, w: tf.nn.dilation2d(x, w, [1] * 4, "SAME", "NHWC", [1] * 4),
        constant(2, 2, 3),
    )
    outcome = check(run, [x], counts)
    assert outcome.layouts == ["rows", "rows", "partial"]


@few
@given(splits(3))
def test_argmax_of_the_whole_batch_falls_back(counts):
    def pooled(x):
        return tf.nn.max_pool_with_argmax(x, 2, 2, "SAME", include_batch_in_index=True)

    check(pooled, [images(counts, 4, 4, 2)], counts, falls_back=True)


@few
@given(splits(3))
def test_boxes(counts):
    boxes = np.abs(images(counts, 4, 1, 4))

    def kept(x):
        scores = tf.sigmoid(tf.reduce_sum(x, [2, 3]))[..., tf.newaxis]
        return tf.image.combined_non_max_suppression(
            x, scores, 2, 3, 0.5, 0.1, clip_boxes=False
        )

    check(kept, [boxes], counts)
