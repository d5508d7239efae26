"""Tells when Keras or TensorFlow moves something that distfit relies on."""

import inspect

import keras
import pytest
import tensorflow as tf
from keras import layers
from keras.src.backend.tensorflow.optimizer import TFOptimizer
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
    overridden = {
        name
        for name, method in vars(TFOptimizer).items()
        if callable(method) and hasattr(base_optimizer.BaseOptimizer, name)
    }
    known = set(_keras._PLAIN) | {"_clip_by_norm", "_var_key", "stateless_apply"}
    known |= {"assign", "assign_add", "assign_sub", "add_variable_from_reference"}
    assert overridden - {"__init__", "__doc__", "__module__"} <= known


def test_updates_are_plain_only_where_asked_for():
    for name in _keras._PLAIN:
        stock = getattr(base_optimizer.BaseOptimizer, name)
        assert getattr(TFOptimizer, name).__wrapped__ is not stock
    for name in ("_tf_apply", "_common_apply"):
        assert hasattr(keras.optimizers.LossScaleOptimizer, name)
    assert not _keras.in_plain_updates()
    with _keras.plain_updates():
        assert _keras.in_plain_updates()
    assert not _keras.in_plain_updates()


def test_optimizers_say_which_are_inside_of_them():
    sgd, adam = keras.optimizers.SGD(), keras.optimizers.Adam()
    parts = keras.optimizers.OptimizerMap(sgd, {"a": adam})
    multi = keras.optimizers.MultiOptimizer(parts)
    outer = keras.optimizers.LossScaleOptimizer(multi)
    assert _keras.with_inner(outer) == [outer, multi, *multi.optimizers]
    assert set(multi.optimizers) == {sgd, adam}


def test_accumulators_are_summed_on_read_and_counted_by_iterations(make_strategy):
    with make_strategy(2).scope():
        variable, other = keras.Variable([1.0]), keras.Variable([2.0])
        optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
        optimizer.build([other, variable])
    assert _keras.variables_of(optimizer) == [other, variable]
    accumulators = _keras.accumulators(optimizer, [variable])
    assert accumulators == {0: optimizer._accumulated_gradients[1]}
    value = accumulators[0].value
    assert value.aggregation == tf.VariableAggregation.SUM
    assert value.synchronization == tf.VariableSynchronization.ON_READ
    assert not _keras.is_update_step(optimizer)
    optimizer.variables[0].assign_add(1)  # The iterations come first.
    assert _keras.is_update_step(optimizer)
    assert not _keras.accumulators(keras.optimizers.SGD(), [variable])


def test_layers_are_called_through_one_method():
    assert keras.layers.Layer.__call__.__wrapped__
    for kind in (layers.LSTM, layers.GRU, layers.SimpleRNN, layers.ConvLSTM2D):
        assert issubclass(kind, layers.RNN)  # What loops, as far as Keras goes.


def test_masks_are_attributes_of_tensors():
    outputs = layers.Embedding(3, 2, mask_zero=True)(tf.constant([[1, 0]]))
    mask = _keras.mask_of(outputs)
    assert mask.numpy().tolist() == [[True, False]]
    other = tf.zeros((1, 2, 2))
    _keras.set_mask(other, None)
    assert _keras.mask_of(other) is None
    _keras.set_mask(other, mask)
    assert _keras.mask_of(layers.Dense(1)(other)) is mask


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


def test_scalars_of_replicas_are_numbers(make_strategy):
    """Stock Keras: float() argument must be a string or a real number."""
    with make_strategy(2).scope():
        rate = keras.Variable(0.5)
        steps = keras.Variable(3, dtype="int64")
        total = keras.metrics.Sum()
        vector = keras.Variable([1.0])
    total.update_state(4.0)
    assert float(rate) == 0.5 and int(steps) == 3 and float(total.variables[0]) == 4.0
    with pytest.raises(TypeError, match="Only scalar arrays"):
        float(vector)
    assert float(keras.Variable(0.25)) == 0.25


def test_initial_values_are_exchanged_in_a_method_that_can_be_set_aside():
    from tensorflow.python.distribute import collective_all_reduce_strategy as workers

    name = "_get_variable_creator_initial_value"
    extended = workers.CollectiveAllReduceExtended
    assert name in vars(extended)
    assert any(name in vars(base) for base in extended.__mro__[1:])


def test_random_state_of_tensorflow_follows_seeds_and_draws():
    from tensorflow.python.eager import context

    before = context.global_seed()
    try:
        states = []
        for seed in (3, 3, 4):
            tf.random.set_seed(seed)
            states.append(_keras.tensorflow_random_state())
            tf.random.normal(())
            states.append(_keras.tensorflow_random_state())
        assert states[:2] == states[2:4]
        assert len(set(states)) == 4
        context.context()._seed = None
        assert _keras.tensorflow_random_state() is None
    finally:
        tf.random.set_seed(before)


def test_backups_are_written_to_the_paths_that_are_known(tmp_path):
    callback = keras.callbacks.BackupAndRestore(str(tmp_path))
    paths = [v for v in vars(callback).values() if str(tmp_path) in str(v)]
    known = [getattr(callback, n) for n in ("backup_dir", *_keras.BACKUP_PATHS)]
    assert sorted(paths) == sorted(known)


def test_values_of_replicas_are_told_from_sums_over_them(make_strategy):
    with make_strategy(2).scope():
        metric = keras.metrics.Mean()
        weight = keras.Variable([1.0, 2.0])
        seed = keras.random.SeedGenerator(3).state
    assert _keras.is_summed_on_read(metric.total)
    assert not _keras.is_summed_on_read(weight) and not _keras.is_summed_on_read(seed)
    assert _keras.local_value(weight).tolist() == [1.0, 2.0]
    assert _keras.local_value(seed).shape == (2,)
