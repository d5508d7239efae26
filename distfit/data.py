"""Any input -> global batches -> the rows of each replica, on every worker alike.

Every worker reads the same sequence of global batches and takes its own rows of each,
so all know the number of steps and none can run out of data alone. Keras's own adapters
turn arrays, datasets, PyDatasets and generators into a `tf.data.Dataset`; it is read by
a plain iterator on the host, and each replica cuts its rows inside the compiled step.
"""

import functools
import itertools
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from distfit import _keras, workers
from distfit.partition.exchanges import Replicas
from distfit.shares import Layout, checks_of_rows, replicas_of, tensors_of


class GlobalBatches:
    """The global batches of an input, epoch by epoch.

    Args:
        x, y, sample_weight, batch_size, shuffle, class_weight: As in `Model.fit`.
        steps_per_epoch: As in `Model.fit`; the data then continue from one epoch to
            the next.

    Attributes:
        dataset: A `tf.data.Dataset` of global batches.
        layout: The specs of a global batch, and what of it has rows.
        num_batches: Number of batches in the data; None if unknown or infinite.
        epoch_steps: Number of steps of an epoch; None if unknown.
        first_batch: The fingerprint of the first batch that was read of the data in
            this epoch, once `note_first_batch()` is called; else None.

    Raises:
        ValueError: if there are no data, or they are not batches of tensors or of
            `(x, y[, sample_weight])`.
    """

    others_may_have_rows = False
    first_batch: list | None = None

    def __init__(
        self,
        x,
        y=None,
        sample_weight=None,
        *,
        batch_size=None,
        steps_per_epoch=None,
        shuffle=False,
        class_weight=None,
    ):
        check_positive("batch_size", batch_size)
        check_positive("steps_per_epoch", steps_per_epoch)
        check_not_distributed(x)
        steps_per_epoch = _capped_steps(steps_per_epoch)
        first, x = _look_at(x)
        self._adapter = _keras.get_data_adapter(
            x=x,
            y=y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            shuffle=shuffle,
            class_weight=class_weight,
        )
        self.dataset = self._adapter.get_tf_dataset()
        if isinstance(self._adapter, _keras.ArrayDataAdapter):
            self.dataset = without_autotune(self.dataset)
        self.num_batches = self._adapter.num_batches
        self.steps_per_epoch = steps_per_epoch
        self._one_pass = isinstance(x, types.GeneratorType)
        self._last_length = None
        self._never_ends = self.dataset.cardinality() == tf.data.INFINITE_CARDINALITY
        self._iterator: Any = None
        self._next: Any = None
        self._seen = 0
        self._arrays = (x, y, sample_weight)
        check_element_spec(self.dataset.element_spec)
        self.layout = Layout(self.dataset.element_spec, *first)
        if self.num_batches == 0 and not self.others_may_have_rows:
            raise ValueError(_EMPTY)

    @property
    def epoch_steps(self) -> int | None:
        return self.steps_per_epoch or self.num_batches or self._last_length

    @property
    def length_is_known(self) -> bool:
        """Whether it is known beforehand how many steps the data are good for."""
        return self.num_batches is not None or self._never_ends

    def facts(self, name: str) -> dict[str, Any]:
        """What must be the same on every worker, of data that are called `name`."""
        facts = {
            "batch size": getattr(self._adapter, "batch_size", None),
            "number of batches": self.num_batches,
            "steps per epoch": self.steps_per_epoch,
            "element spec": self.layout.spec,
            "tensors with rows": self.layout.has_rows,
            "sample": fingerprint(self._arrays),
        }
        return {f"{fact} of {name}": value for fact, value in facts.items()}

    def note_first_batch(self) -> None:
        """Has `first_batch` noted, where the order of rows is not known beforehand."""
        if isinstance(self._adapter, _keras.ArrayDataAdapter):
            return
        self.first_batch = []

        def note(*arrays):
            self.first_batch = fingerprint(list(arrays))

        self.dataset = with_first_noted(self.dataset, note)

    def start_epoch(self) -> int | None:
        """Starts an epoch and returns how many steps it has, None if unknown.

        With `steps_per_epoch`, an epoch goes on where the last one stopped.
        """
        self._adapter.on_epoch_begin()
        goes_on = self.steps_per_epoch is not None or self._one_pass
        if self._iterator is None or not goes_on:
            self._release_iterator()
            self._iterator = iter(self.dataset)
            self._seen = 0
        if self.num_batches is None:
            return self.steps_per_epoch
        left = self.num_batches - self._seen
        return min(left, self.steps_per_epoch or left)

    def restart(self) -> None:
        """Goes back to the first batch, unless the data can be read only once.

        As stock Keras does before a run, this calls the `on_epoch_end` of a PyDataset.
        """
        if not self._one_pass:
            self._release_iterator()
        self._adapter.on_epoch_end()

    def _release_iterator(self) -> None:
        """Lets go of the iterator, without waiting for it to end.

        The tuning thread of a tf.data pipeline ends at its next tick, which may take
        twice the time of an epoch.
        """
        held, self._iterator, self._next = [self._iterator, self._next], None, None
        if held[0] is not None:
            threading.Thread(target=held.clear, daemon=True).start()

    def _skip_an_order(self) -> None:
        """Makes an iterator in vain, as stock Keras does at the end of counted batches.

        A shuffle with a seed takes another order for each.
        """
        if isinstance(self._arrays[0], tf.data.Dataset):
            iter(self.dataset)

    def has_next(self) -> bool:
        """Whether there is another batch, as far as one has to look to know."""
        return self.length_is_known or bool(self.take_next().has_value())

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing left for another epoch."""
        return self._one_pass and not self.has_next()

    def iterator(self) -> Any:
        """The iterator of the current epoch."""
        return self._iterator

    def take_next(self) -> tf.experimental.Optional:
        """The batch that comes next, for data of unknown length."""
        if self._next is None:
            self._next = self._iterator.get_next_as_optional()
        return self._next

    def put_next(self, batch: tf.experimental.Optional) -> None:
        """Keeps a batch that was read but not yet trained on."""
        self._next = batch

    def end_epoch(self, steps: int) -> None:
        """Ends an epoch of which `steps` steps were run.

        Raises:
            ValueError: if the data turn out to be empty.
        """
        self._seen += steps
        ran_out = not self.length_is_known and not self.has_next()
        if ran_out and self._seen == 0:
            raise ValueError(_EMPTY)
        exhausted = ran_out or self._seen == self.num_batches
        if exhausted and steps < (self.steps_per_epoch or 1):
            _warn_of_missing_data()
        if ran_out:
            self._last_length = steps
        if exhausted and not self._one_pass:
            self._release_iterator()
            if not ran_out and self.steps_per_epoch is None:
                self._skip_an_order()
        self._adapter.on_epoch_end()


class Shards(GlobalBatches):
    """Batches that each worker reads itself: its shard of data too large for all.

    A global batch is then what the replicas bring, in their order. The epoch ends when
    nobody brings rows any more; until then who has none stands in with rows that count
    for nothing, since no replica can sit out an exchange.

    Args:
        dataset_fn: `dataset_fn(input_context)` returns the `tf.data.Dataset` of this
            worker, with the batches of a replica.
        strategy: The strategy of the model.
        steps_per_epoch, class_weight: As in `Model.fit`.
    """

    others_may_have_rows = True

    def __init__(
        self, dataset_fn, strategy, *, steps_per_epoch=None, class_weight=None
    ):
        super().__init__(
            shard(dataset_fn, strategy),
            steps_per_epoch=steps_per_epoch,
            class_weight=class_weight,
        )
        self.strategy = strategy
        leaves = zip(
            tf.nest.flatten(self.layout.spec),
            tf.nest.flatten(self.layout.cut),
            strict=True,
        )
        for leaf, is_cut in leaves:
            if not is_cut and leaf is not None:
                raise ValueError(
                    "Where each replica brings rows of its own, all that it brings "
                    "must be dense tensors with as many rows. Received: a `dataset_fn` "
                    f"whose elements have {leaf}. Make them so in a `map`, or give "
                    "`fit()` a dataset of global batches instead."
                )
        self.dataset = with_stand_ins(self.dataset)
        self.layout = Layout(self.dataset.element_spec[0])
        self.num_batches = None  # Those of other workers are not known.
        self._never_ends = False

    def has_next(self) -> bool:
        """Whether any replica brings rows to the next step."""
        return bool(np.any(self.take_next()[1]))

    def take_next(self) -> tuple:
        """`(batches of this worker's replicas, rows of all replicas)`, for a step."""
        if self._next is None:
            self._next = _first_shards(self._iterator, replicas_of(self.strategy))
        return self._next


_LOOKED_AT = 2  # Batches.
_EMPTY = (
    "The data have no batch at all. Received: an empty dataset. Give at least one row, "
    "and check filters, shards and `drop_remainder`."
)


def make_batches(strategy, x, y=None, sample_weight=None, **arguments) -> GlobalBatches:
    """The batches of what `fit()` takes, which may be a `dataset_fn`."""
    is_function = callable(x) and not isinstance(x, tf.data.Dataset)
    if not is_function:
        batches = GlobalBatches(x, y, sample_weight, **arguments)
        if workers.of(strategy).count > 1:
            batches.note_first_batch()
        return batches
    if y is not None or sample_weight is not None:
        raise ValueError(
            "The dataset of a `dataset_fn(input_context)` gives targets and weights "
            f"itself. Received: x={x}, with y or sample_weight. Give x alone."
        )
    kept = {k: arguments.get(k) for k in ("steps_per_epoch", "class_weight")}
    if strategy.num_replicas_in_sync == 1:
        return GlobalBatches(shard(x, strategy), **kept)
    return Shards(x, strategy, **kept)


def shard(dataset_fn, strategy) -> tf.data.Dataset:
    """The dataset of this worker.

    Raises:
        ValueError: if the function returns something else.
    """
    own = workers.of(strategy)
    context = tf.distribute.InputContext(
        num_input_pipelines=own.count,
        input_pipeline_id=own.index,
        num_replicas_in_sync=strategy.num_replicas_in_sync,
    )
    dataset = dataset_fn(context)
    if not isinstance(dataset, tf.data.Dataset):
        raise ValueError(
            "A function given as x must return the `tf.data.Dataset` of a worker's "
            f"batches. Received: {type(dataset).__name__} from {dataset_fn}."
        )
    return dataset


def with_stand_ins(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Batches and their numbers of rows, and then one row without end, counted as 0.

    That row is the first of the data, with which a step can do what it does with any;
    zeros where there are no data at all.
    """
    several = isinstance(dataset.element_spec, tuple)

    def counted(*batch):
        batch = batch if several else batch[0]
        rows = num_rows(batch)
        each = [checks_of_rows(tensor, rows) for tensor in tensors_of(batch)]
        with tf.control_dependencies(itertools.chain(*each)):
            return batch, tf.identity(rows)

    def stand_in(batch, rows):
        return tree.map_structure(lambda tensor: tensor[:1], batch), 0

    own = dataset.map(counted).filter(lambda batch, rows: rows > 0)
    first = own.take(1).map(stand_in).cache().repeat()  # The source is read no more.
    blank = tree.map_structure(_blank_row, dataset.element_spec)
    return own.concatenate(first).concatenate(
        tf.data.Dataset.from_tensors((blank, 0)).repeat()
    )


def _blank_row(spec: tf.TensorSpec) -> tf.Tensor:
    """Empty texts where it holds text."""
    return tf.zeros([1, *(size or 1 for size in spec.shape[1:])], spec.dtype)


def next_shards(iterator, replicas: Replicas) -> tuple:
    """Reads a step's batches of this worker's replicas and learns all row counts.

    Returns:
        An optional with a tuple of batches, and int32 of shape (num_replicas,).
    """
    batches, rows = zip(*(next(iterator) for _ in range(replicas.count)), strict=True)
    own = tf.stack(rows)
    if replicas.count < replicas.num_replicas:
        before = replicas.first
        after = replicas.num_replicas - before - replicas.count
        mine = tf.pad(own, [[before, after]])
        parts = [mine] + [tf.zeros_like(mine)] * (replicas.count - 1)
        own = replicas.sum([parts])[0][0]
    return tf.experimental.Optional.from_value(batches), own


@functools.partial(tf.function, autograph=False, reduce_retracing=True)
def _first_shards(iterator, replicas):
    return next_shards(iterator, replicas)


def fingerprint(arrays: Any) -> list:
    """For each array or tensor, its shape and what tells some of its rows from others.

    Of anything else, None.
    """
    return [_fingerprint(array) for array in tree.flatten(arrays)]


def _fingerprint(array: Any) -> Any:
    if not isinstance(array, np.ndarray | tf.Tensor):
        return None
    some = array[:: max(len(array) // 64, 1)] if array.ndim else array
    rows = np.asarray(some)
    # Of Python objects, such as texts, the bytes are but their addresses.
    content = repr(rows.tolist()).encode() if rows.dtype.hasobject else rows.tobytes()
    return tuple(array.shape), workers.checksum(content)


def with_first_noted(dataset: tf.data.Dataset, note: Callable) -> tf.data.Dataset:
    """The same dataset; `note(*arrays)` is called with each first batch of it."""

    def look(index, batch):
        leaves = tf.nest.flatten(batch, expand_composites=True)
        arrays = [tensor for tensor in leaves if tensor.dtype != tf.variant]
        tf.cond(
            index == 0,
            lambda: tf.group(tf.numpy_function(note, arrays, [])),
            tf.no_op,
        )
        return batch

    return dataset.enumerate().map(look)


def _look_at(x: Any) -> tuple[list, Any]:
    """The first two batches of a PyDataset or a generator, and the data with these.

    Keras, which looks at them as well, gives their batches specs that leave the first
    dimension open. Other data are not looked at: to fill a buffer twice may take long.
    """
    if isinstance(x, keras.utils.PyDataset):
        length = _LOOKED_AT if x.num_batches is None else min(x.num_batches, _LOOKED_AT)
        return [x[i] for i in range(length)], x
    if isinstance(x, types.GeneratorType):
        first = list(itertools.islice(x, _LOOKED_AT))
        return first, _chained(first, x)
    return [], x


def _chained(first: Iterable, rest: Iterable) -> Iterator:
    """A generator, as Keras wants one."""
    yield from first
    yield from rest


def _capped_steps(steps: int | None) -> int | None:
    """Steps of an epoch, which `keras.config.set_max_steps_per_epoch` may limit."""
    most = keras.config.max_steps_per_epoch()
    if not most or (steps and most >= steps):
        return steps
    warnings.warn(f"Limiting steps_per_epoch to {most}", stacklevel=5)
    return most


def check_positive(name: str, value: Any) -> None:
    """Raises a `ValueError` if a count is given but below 1."""
    if value is not None and value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}.")


def check_not_distributed(x: Any) -> None:
    """Raises a `ValueError` for a dataset that a strategy has cut up already."""
    if isinstance(x, tf.distribute.DistributedDataset):
        raise ValueError(
            "distfit cuts global batches itself. Received: a dataset that was already "
            "distributed by the strategy. Pass the `tf.data.Dataset` of global batches."
        )


def check_element_spec(spec: Any) -> None:
    """Raises a `ValueError` if elements are not batches that a step can take."""
    leaves = _given(spec)
    for leaf in leaves:
        if not isinstance(
            leaf, tf.TensorSpec | tf.RaggedTensorSpec | tf.SparseTensorSpec
        ):
            raise ValueError(
                "An element of the data must be a tensor or a structure of tensors. "
                f"Received: {leaf}."
            )
    targets = _given(spec[1]) if isinstance(spec, tuple) and len(spec) > 1 else []
    batched = any(leaf.shape.rank is None or None in leaf.shape[:1] for leaf in leaves)
    if _all_scalars(leaves) or (_all_scalars(targets) and not batched):
        raise ValueError(
            "Elements of the data must be batches, with rows first. Received: scalars "
            f"in place of rows, {spec}. Call `.batch(batch_size)` on the dataset; a "
            "number that is not of the rows goes into x, beside the tensors that are."
        )


def _given(spec: Any) -> list:
    """The leaves of a structure of specs, but for those of None."""
    absent = (tf.NoneTensorSpec, tf.OptionalSpec, type(None))
    return [leaf for leaf in tf.nest.flatten(spec) if not isinstance(leaf, absent)]


def _all_scalars(leaves: list) -> bool:
    return bool(leaves) and all(leaf.shape.rank == 0 for leaf in leaves)


def without_autotune(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Turns off the tuning of a pipeline that only slices arrays.

    There is nothing to tune, and the tuning thread of TensorFlow 2.21 now and then
    takes half a minute to end when an iterator is released.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def num_rows(batch: Any) -> Any:
    """The number of rows of a batch: of its first tensor with any. An int32 scalar."""
    first = next(t for t in tree.flatten(batch) if t is not None and t.shape.rank != 0)
    if isinstance(first, tf.SparseTensor):
        return tf.cast(first.dense_shape[0], tf.int32)
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return tf.shape(first)[0]


def without_optionals(batch: Any) -> Any:
    """Turns the empty optionals by which Keras's adapters say None into None."""
    return tree.map_structure(
        lambda t: None if isinstance(t, tf.experimental.Optional) else t, batch
    )


def _warn_of_missing_data() -> None:
    warnings.warn(
        "Your input ran out of data; interrupting training. Make sure that your "
        "dataset or generator can generate at least `steps_per_epoch * epochs` "
        "batches. You may need to use the `.repeat()` function when building your "
        "dataset.",
        stacklevel=2,
    )
