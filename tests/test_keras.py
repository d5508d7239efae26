"""Tells when Keras or TensorFlow moves something that distfit relies on."""

import inspect

import keras
import tensorflow as tf
from keras import layers
from keras.src.losses import loss as loss_module
from keras.src.optimizers import base_optimizer
from keras.src.trainers import compile_utils, trainer

from distfit import _keras


def test_every_exported_name_is_there():
    for name in _keras.__all__:
        assert hasattr(_keras, name), name


def test_keras_scales_losses_by_functions_of_its_loss_module():
    source = inspect.getsource(compile_utils.CompileLoss.call)
    assert "loss_module.unscale_loss_for_distribution" in source
    source = inspect.getsource(loss_module.reduce_values)
    assert "scale_loss_for_distribution" in source
    assert loss_module.scale_loss_for_distribution.__wrapped__  # What distfit put there
    assert loss_module.unscale_loss_for_distribution.__wrapped__


def test_only_these_optimizer_methods_are_aware_of_distribution():
    """Any other override would aggregate behind distfit's back."""
    from keras.src.backend.tensorflow.optimizer import TFOptimizer

    overridden = {
        name
        for name, method in vars(TFOptimizer).items()
        if callable(method) and hasattr(base_optimizer.BaseOptimizer, name)
    }
    known = set(_keras._PLAIN) | {"_clip_by_norm", "_var_key", "stateless_apply"}
    known |= {"assign", "assign_add", "assign_sub", "add_variable_from_reference"}
    assert overridden - {"__init__", "__doc__", "__module__"} <= known


def test_variables_under_a_strategy_are_assigned_locally(make_strategy):
    """A step updates its replica's copy; nothing is aggregated on the way."""
    strategy = make_strategy(2)
    with strategy.scope():
        layer = layers.BatchNormalization()
        layer.build((None, 3))
        metric = keras.metrics.Mean()
    for variable in layer.variables:
        assert variable.value.aggregation == tf.VariableAggregation.NONE
    for variable in metric.variables:
        assert variable.value.aggregation == tf.VariableAggregation.SUM
        assert variable.value.synchronization == tf.VariableSynchronization.ON_READ


def test_layers_keep_their_losses_in_a_list():
    class Adds(layers.Layer):
        def call(self, x):
            self.add_loss(tf.reduce_sum(x))
            return x

    model = keras.Sequential([Adds()])
    model(tf.ones((1, 2)))
    (losses,) = [taken for layer, taken in _keras.layer_losses(model) if taken]
    assert [float(loss) for loss in losses] == [2.0]
    snapshot = _keras.layer_losses(model)
    model(tf.ones((1, 3)))
    _keras.set_layer_losses(snapshot)
    assert float(model.losses[0]) == 2.0


def test_activity_penalties_are_means_over_rows():
    layer = layers.Dense(2, activity_regularizer="l2", kernel_initializer="ones")
    layer(tf.ones((1, 1)))
    one = float(layer.losses[0])
    layer(tf.ones((5, 1)))
    assert float(layer.losses[0]) == one


def test_batch_normalization_takes_its_moments_from_one_method():
    source = inspect.getsource(layers.BatchNormalization.call)
    assert "self._moments(inputs, mask)" in source


def test_compile_resets_the_compiled_functions():
    source = inspect.getsource(trainer.Trainer.compile)
    for kind in ("train", "test", "predict"):
        assert f"self.{kind}_function = None" in source


def test_seed_generators_hand_out_a_seed_and_a_counter():
    generator = keras.random.SeedGenerator(5)
    first, second = generator.next(), generator.next()
    assert first.shape == (2,) and int(first[0]) == int(second[0]) == 5
    assert int(second[1]) == int(first[1]) + 1


def test_unseeded_draws_come_from_a_generator_of_the_thread():
    made = []
    with _keras.new_global_seed_generator(made):
        keras.random.normal((1,))
    assert isinstance(made[0], keras.random.SeedGenerator)
    with _keras.global_seed_generator(made[0]):
        before = int(made[0].state.numpy()[0])
        keras.random.normal((1,))
        assert int(made[0].state.numpy()[0]) != before


def test_layers_say_when_a_call_is_under_way():
    seen = []

    class Looks(layers.Layer):
        def call(self, x):
            seen.append(_keras._in_layer_call())
            return x

    Looks()(tf.ones((1, 2)))
    assert seen == [True] and not _keras._in_layer_call()
