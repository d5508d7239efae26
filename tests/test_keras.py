"""Fails when Keras or TensorFlow changes something that distfit relies on."""

import itertools
import threading
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.losses import loss as loss_module
from keras.src.optimizers import base_optimizer

from distfit import _keras
from distfit._keras import generators, graphs, optimizers, rewriting, scalars
from distfit._keras.alive import instances_of
from distfit._keras.calls import IteratorCalls


def test_every_exported_name_is_there():
    for name in _keras.__all__:
        assert hasattr(_keras, name), name


def test_the_tensors_of_a_dataset_are_found():
    held = tf.data.Dataset.from_tensor_slices((np.zeros((6, 5), "int16"), [0.0] * 6))
    other = tf.data.Dataset.from_tensors(np.zeros(50, "uint8"))
    joined = tf.data.Dataset.zip(held.shuffle(3), other.repeat()).batch(2).prefetch(1)
    assert _keras.held_bytes(joined) == 60 + 24 + 50
    assert _keras.held_bytes(tf.data.Dataset.range(9).map(lambda x: x)) == 0


def test_the_parts_that_two_datasets_share_are_found():
    one, base = tf.data.Dataset.range(5), tf.data.Dataset.range(9).shuffle(9)
    joined = tf.data.Dataset.zip(base.take(3), one).batch(2)
    (part,) = _keras.shared_parts(joined, base.skip(3))
    assert part is base
    assert _keras.shared_parts(joined, joined) == [joined]
    assert _keras.shared_parts(joined, tf.data.Dataset.range(5)) == []


def test_a_compilation_is_another_after_compile():
    model = keras.Sequential([layers.Dense(1)])
    model.compile("sgd", "mse")
    first = _keras.compilation(model)
    assert _keras.compilation(model) is first
    model.compile("sgd", "mse")
    assert _keras.compilation(model) is not first


def test_only_these_optimizer_methods_are_aware_of_distribution():
    """Any other override would aggregate in a step that is traced as for one device."""
    overridden = {
        name
        for name, method in vars(TFOptimizer).items()
        if callable(method) and hasattr(base_optimizer.BaseOptimizer, name)
    }
    known = set(optimizers._PLAIN) | {"_clip_by_norm", "_var_key", "stateless_apply"}
    known |= {"assign", "assign_add", "assign_sub", "add_variable_from_reference"}
    assert overridden - {"__init__", "__doc__", "__module__"} <= known
    for name in ("_tf_apply", "_common_apply"):
        assert hasattr(keras.optimizers.LossScaleOptimizer, name)


def _in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_optimizers_are_those_of_one_device_in_one_thread_and_block(make_strategy):
    strategy = make_strategy(2)
    with strategy.scope():
        variable = keras.Variable([1.0])
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([variable])
    stock = dict(vars(optimizer))

    def update():
        optimizer.apply([tf.constant([1.0])], [variable])
        return [float(copy[0]) for copy in variable.value.values]

    with optimizers.of_one_device(strategy.scope):
        assert vars(optimizer).keys() > stock.keys()
        with graphs.as_first_replica():
            optimizer._backend_update_step(
                [tf.constant([1.0])], [variable], tf.constant(1.0)
            )
        assert [float(copy[0]) for copy in variable.value.values] == [0.0, 1.0]
        variable.assign([1.0])
        assert _in_another_thread(update) == [0.0, 0.0]
    assert vars(optimizer).keys() == stock.keys()


def test_accumulators_made_in_a_step_are_summed_on_read(make_strategy):
    strategy = make_strategy(2)
    with strategy.scope():
        variable = keras.Variable([1.0])
        optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
    with optimizers.of_one_device(strategy.scope):
        optimizer.build([variable])
    (value,) = [a.value for a in optimizer._accumulated_gradients]
    assert value.aggregation == tf.VariableAggregation.SUM
    assert value.synchronization == tf.VariableSynchronization.ON_READ


def test_a_trace_sees_one_replica_and_its_copies(make_strategy):
    """So losses are not scaled, and handles lead back to the variables."""
    strategy = make_strategy(2)
    with strategy.scope():
        variable = keras.Variable([1.0])
    with graphs.as_first_replica():
        assert tf.distribute.get_strategy().num_replicas_in_sync == 1
        assert loss_module.scale_loss_for_distribution(3.0) == 3.0
        assert loss_module.unscale_loss_for_distribution(3.0) == 3.0
        variable.value.assign([2.0])
    first, second = variable.value.values
    assert (float(first[0]), float(second[0])) == (2.0, 1.0)
    assert graphs.variable_of(first.handle) is variable.value
    kind, copies = graphs.copies_of(first.handle, strategy, 2)
    assert kind == "mirrored" and copies == [first.handle, second.handle]
    with pytest.raises(RuntimeError, match="traced as for one device"):
        graphs.copies_of(second.handle, strategy, 2)


def test_a_block_leaves_the_scopes_of_strategies(make_strategy):
    strategy = make_strategy(2)

    with strategy.scope():
        with _keras.outside_of_scopes():
            assert tf.executing_eagerly() and not tf.distribute.has_strategy()
            has_strategy = tf.function(tf.distribute.has_strategy)()
            alone = tf.Variable(1.0)
            with make_strategy(3).scope():
                inner = tf.Variable(1.0)
        assert tf.distribute.get_strategy() is strategy
        several = tf.Variable(1.0)
    assert not has_strategy
    sizes = [len(_keras.local_copies(each)) for each in (alone, inner, several)]
    assert sizes == [1, 3, 2]


def test_generators_draw_as_on_one_device_in_one_thread_and_block(make_strategy):
    expected = tf.random.Generator.from_seed(5).normal((3,)).numpy()
    with make_strategy(2).scope():
        generator = tf.random.Generator.from_seed(5)
    before = set(vars(generator))
    with graphs.as_first_replica():
        assert set(vars(generator)) > before
        np.testing.assert_array_equal(generator.normal((3,)), expected)
    assert set(vars(generator)) == before
    assert callable(generator._skip_single_var) and generator._distribution_strategy
    assert generators.methods_of_one_device(generator).keys() <= set(dir(generator))


def test_scalars_of_replicas_are_made_numbers_one_by_one(make_strategy):
    """Stock Keras: float() argument must be a string or a real number."""
    with make_strategy(2).scope():
        rate, vector = keras.Variable(0.5), keras.Variable([1.0])
        steps = keras.Variable(3, dtype="int64")
        other = keras.Variable(0.25)
    scalars.make_convertible([rate, vector, steps])
    assert float(rate) == 0.5 and int(steps) == 3
    assert type(vector) is keras.Variable is type(other)


def test_optimizers_say_which_are_inside_of_them():
    sgd, adam = keras.optimizers.SGD(), keras.optimizers.Adam()
    parts = keras.optimizers.OptimizerMap(sgd, {"a": adam})
    multi = keras.optimizers.MultiOptimizer(parts)
    outer = keras.optimizers.LossScaleOptimizer(multi)
    assert _keras.with_inner(outer) == [outer, multi, *multi.optimizers]
    assert set(multi.optimizers) == {sgd, adam}


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


def test_initial_values_are_exchanged_in_a_method_that_can_be_set_aside():
    from tensorflow.python.distribute import collective_all_reduce_strategy as workers

    name = "_get_variable_creator_initial_value"
    extended = workers.CollectiveAllReduceExtended
    assert name in vars(extended)
    assert any(name in vars(base) for base in extended.__mro__[1:])


def test_sums_are_left_in_their_order_where_replicas_must_round_alike():
    """TensorFlow still reorders them elsewhere, and later in this thread."""

    @tf.function
    def total(a, b, c):
        return a + (b + c)

    terms = [tf.fill([4], value) for value in (1e8, -1e8, 1.0)]
    assert total(*terms).numpy().tolist() == [1] * 4
    alike = rewriting.alike_on_replicas(total)
    assert alike(*terms).numpy().tolist() == [0] * 4
    assert total(*terms).numpy().tolist() == [1] * 4


def test_functions_are_traced_once_for_iterators_of_a_kind():
    state = tf.Variable(0)
    traces = []

    @tf.function
    def add(iterator, factor, sign=1):
        traces.append(sign)
        state.assign_add(sign * factor * next(iterator))
        return {"state": [state.read_value()]}

    calls = IteratorCalls(add)
    for expected in ([2, 6], [5, 9]):
        iterator = iter(tf.data.Dataset.range(1, 5).map(lambda x: tf.cast(x, tf.int32)))
        for value in expected:
            assert calls(iterator, tf.constant(2))["state"][0] == value
        assert calls(iterator, tf.constant(1), sign=-1)["state"][0] == expected[1] - 3
    assert traces == [1, -1]
    (resource,) = tf.nest.flatten(iterator, expand_composites=True)
    kept = weakref.ref(resource)
    del iterator, resource
    assert kept() is None, "The garbage collector would have to wait for its release."


def test_what_a_function_captures_at_each_call_is_captured_anew():
    """As the keys of exchanges of several workers are."""
    keys = itertools.count()

    @tf.function
    def key(iterator):
        return tf.compat.v1.get_default_graph().capture_call_time_value(
            lambda: tf.constant(next(keys)), tf.TensorSpec([], tf.int32)
        )

    calls = IteratorCalls(key)
    iterator = iter(tf.data.Dataset.range(1))
    first, second = calls(iterator), calls(iterator)
    assert second == first + 1


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
    first, second = _keras.local_copies(metric.total)
    first.assign(3.0)
    second.assign(4.0)
    assert _keras.local_value(metric.total) == 3.0 and metric.total.numpy() == 7.0
    assert len(_keras.local_copies(tf.Variable(1.0))) == 1


class Held:
    pass


class HeldToo(Held):
    __slots__ = ("more",)


def test_objects_are_found_wherever_they_are_held():
    held = {"one": [Held()], "two": lambda own=HeldToo(): own}  # noqa: B008
    assert len(instances_of(Held)) == 2
    assert [type(thing) for thing in instances_of(HeldToo)] == [HeldToo]
    held.clear()
    assert instances_of(Held) == []


def test_looking_for_objects_waits_until_none_is_being_destroyed():
    destroyed = threading.Event()

    class Slow:
        def __del__(self):
            time.sleep(0.3)
            destroyed.set()

    _keras.clear_beside([Slow()])
    assert not destroyed.is_set()
    instances_of(Slow)
    assert destroyed.is_set()


def test_looking_for_objects_leaves_tuples_of_other_threads_alone():
    """A tuple cannot be completed while something else refers to it."""
    until = threading.Event()
    failures = []

    def make_tuples():
        try:
            while not until.is_set():
                tuple(object() for _ in range(20))
        except SystemError as error:
            failures.append(error)

    thread = threading.Thread(target=make_tuples)
    thread.start()
    for _ in range(12):
        instances_of(Held)
    until.set()
    thread.join()
    assert not failures


def test_what_runs_eagerly_tells_its_variables(make_strategy):
    with make_strategy(2).scope():
        mirrored = tf.Variable(1.0)
    single, other = tf.Variable(2.0), tf.Variable(3.0)
    compiled = tf.function(lambda: single.assign_add(1.0), autograph=False)
    handles, draws = {}, []
    with graphs.eager_use_noted(handles, draws), graphs.as_first_replica():
        mirrored.assign_add(1.0)
        compiled()
        for _ in range(2):
            tf.random.normal([2]), tf.random.uniform([2], seed=3)
    other.assign(1.0)
    found = graphs.variables_with(handles)
    assert [id(v) for v in found] == [id(mirrored), id(single)]
    one, seeded, other, again = draws
    assert seeded == again and len(set(draws)) == 3


class _Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return [np.full((2, 1), index)]


def _generated():
    yield (np.full((2, 1), 0),)


@pytest.mark.parametrize(
    "x", [_Batches(workers=2), _generated()], ids=["PyDataset", "generator"]
)
def test_adapters_take_the_batches_that_they_are_given(x):
    adapter = _keras.get_data_adapter(x)
    parts = iter([[7, 8], [9]])
    _keras.read_with(adapter, lambda: ((np.full((2, 1), i),) for i in next(parts)))
    dataset = adapter.get_tf_dataset()
    _keras.without_own_threads(adapter)
    adapter.on_epoch_begin()
    seen = [[int(batch[0][0, 0]) for batch in dataset] for _ in range(2)]
    assert seen == [[7, 8], [9]]
