"""The global batches of an input, epoch by epoch.

Every worker reads the same sequence of global batches and takes its own rows of each,
so all know the number of steps and none can run out of data alone. Keras's own adapters
turn arrays, datasets, PyDatasets and generators into a `tf.data.Dataset`; it is read by
a plain iterator on the host, and each replica cuts its rows inside the compiled step.
"""

import functools
import json
import logging
import sys
import types
import warnings
from typing import Any

import keras
import tensorflow as tf

from distfit import _keras
from distfit.training import iterators, randomness
from distfit.training.batch import fingerprint
from distfit.training.data_clock import DataClock
from distfit.training.inputs import (
    check_element_spec,
    check_not_distributed,
    check_positive,
    look_at,
    with_first_noted,
    without_autotune,
)
from distfit.training.passes import Passes, passes_of
from distfit.training.reading import Reader, reader_of
from distfit.training.shares import Layout

_LOGGER = logging.getLogger("distfit")
_LARGEST_PLACE = 64 << 20  # Bytes: each checkpoint would have them.


class GlobalBatches:
    """The global batches of an input, epoch by epoch.

    Args:
        x, y, sample_weight, batch_size, shuffle, class_weight: As in `Model.fit`.
        steps_per_epoch: As in `Model.fit`; the data then continue from one epoch to
            the next.

    Attributes:
        dataset: A `tf.data.Dataset` of global batches.
        layout: The specs of a global batch, and which of its tensors have rows.
        num_batches: Number of batches in the data; None if unknown or infinite.
        epoch_steps: Number of steps of an epoch; None if unknown.
        first_batch: The fingerprint of the first batch read in this epoch, after
            `note_first_batch()` was called; else None.
        sample: After `move_to()`, a batch that they have passed, as an optional.
        elements_of_batch: How many elements of the dataset a step takes.
        clock: Measures the wait for data, once set.

    Raises:
        ValueError: if there are no data, or they are not batches of tensors or of
            `(x, y[, sample_weight])`.
    """

    others_may_have_rows = False
    first_batch: list | None = None
    sample: Any = None
    elements_of_batch = 1
    clock: DataClock | None = None

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
        first, x = look_at(x)
        self._adapter = _keras.get_data_adapter(
            x=x,
            y=y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            shuffle=shuffle,
            class_weight=class_weight,
        )
        self._shuffle = shuffle
        self._reader = reader_of(self._adapter, shuffle)
        self.dataset = self._adapter.get_tf_dataset()
        _keras.without_own_threads(self._adapter)
        if isinstance(self._adapter, _keras.ArrayDataAdapter):
            self.dataset = without_autotune(self.dataset)
        self.num_batches = self._adapter.num_batches
        self.steps_per_epoch = steps_per_epoch
        self._one_pass = isinstance(x, types.GeneratorType)
        self._last_length = None
        self._never_ends = self.dataset.cardinality() == tf.data.INFINITE_CARDINALITY
        self._iterator: Any = None
        self._next: Any = None
        self._seen = 0  # The batches of the pass in earlier epochs.
        self._step = 0  # Those in this epoch.
        self._takes_notes = False
        self._keeps_beginning = False
        self._beginning = b""  # The place at which the first pass begins.
        self._has_warned = False
        self._events: list = []  # What has moved the data, see `_move`.
        self._arrays = (x, y, sample_weight)
        check_element_spec(self.dataset.element_spec)
        self.layout = Layout(self.dataset.element_spec, *first)
        if self.num_batches == 0 and not self.others_may_have_rows:
            raise ValueError(_EMPTY)
        self._randomness = self._random_state()  # After the latest event.

    @property
    def epoch_steps(self) -> int | None:
        return self.steps_per_epoch or self.num_batches or self._last_length

    @property
    def length_is_known(self) -> bool:
        """Whether the number of steps in the data is known in advance."""
        return self.num_batches is not None or self._never_ends

    def facts(self, name: str) -> dict[str, Any]:
        """What must be the same on every worker, for data called `name`."""
        facts = {
            "batch size": getattr(self._adapter, "batch_size", None),
            "number of batches": self.num_batches,
            "steps per epoch": self.steps_per_epoch,
            "element spec": self.layout.spec,
            "tensors with rows": self.layout.has_rows,
            "content": self._content,
            "shuffle": self._shuffle,
        }
        return {f"{fact} of {name}": value for fact, value in facts.items()}

    @functools.cached_property
    def _content(self) -> list:
        return fingerprint(self._arrays, rows=None)

    def note_first_batch(self) -> None:
        """Records `first_batch` from now on, unless the order is known in advance."""
        known = isinstance(self._adapter, _keras.ArrayDataAdapter)
        if known or self.first_batch is not None:
            return
        self.first_batch = []

        def note(*arrays):
            self.first_batch = fingerprint(list(arrays))

        self.dataset = with_first_noted(self.dataset, note)

    def take_notes(self) -> None:
        """Records from now on what a `position()` needs.

        Raises:
            ValueError: for data of another library, whose order it keeps to itself.
        """
        self._takes_notes = True
        if self._reader is not None:
            self._reader.take_notes()
            return
        x = self._arrays[0]
        in_order = isinstance(self._adapter, _keras.ArrayDataAdapter)
        if not in_order and not isinstance(x, tf.data.Dataset):
            raise ValueError(
                "A checkpoint cannot hold the place in the data of another library. "
                f"Received: {type(x).__name__} with a Checkpoint. Give arrays, a "
                "`tf.data.Dataset`, a PyDataset or a generator."
            )
        self.note_first_batch()

    def keep_beginning(self) -> None:
        """Keeps the place at which the first pass begins, for `begin_as`."""
        self._keeps_beginning = self._passes is not None and not self._passes.alike

    def begin_as(self, other: "GlobalBatches") -> None:
        """Makes the passes those of `other`, which has read the same dataset.

        Iterators draw the seeds of shuffles one after another. The place of the first
        one, where `other` has kept it, sets the seeds back.
        """
        self._beginning = other._beginning
        self._keeps_beginning = other._keeps_beginning or bool(other._beginning)

    def start_epoch(self) -> int | None:
        """Starts an epoch and returns how many steps it has, None if unknown.

        With `steps_per_epoch`, an epoch continues where the last one stopped.
        """
        self._move("b")
        goes_on = self.steps_per_epoch is not None or self._one_pass
        if self._iterator is None or not goes_on:
            self._seen = 0
            self._move("i", self._limit())
        elif self._reader is not None:
            self._move("c", self._limit())
        return self.steps_of_epoch()

    def go_on_with_epoch(self) -> int | None:
        """As `start_epoch`, for an epoch in which `move_to` has ended."""
        if self._reader is not None:
            self._reader.limit = self._limit()
            self._read_on()
        return self.steps_of_epoch()

    def steps_of_epoch(self) -> int | None:
        """How many steps the epoch that was started has, None if unknown."""
        if self.num_batches is None:
            return self.steps_per_epoch
        left = self.num_batches - self._seen
        return min(left, self.steps_per_epoch or left)

    def _limit(self) -> int | None:
        """How many batches of the pass Python code may have read in this epoch."""
        if self.steps_per_epoch is None:
            return None
        # One more is read where only that tells whether there is one.
        return self._seen + self.steps_per_epoch + (not self.length_is_known)

    def ran(self, step: int) -> None:
        """Notes that so many steps of the epoch were run."""
        self._step = step
        if self._reader is not None:
            self._reader.forget_before(self._seen + step)

    def _move(self, event: str, limit: int | None = None) -> None:
        """Does one of what can change the order of the data, and records it.

        They are the start ("b") and the end ("e") of an epoch, the start ("i") and the
        end ("r") of a pass, its continuation ("c") up to another limit, and a pass of
        which nothing is read ("v"). The record has the random generators as well that
        are not as the event before has left them.
        """
        if self._takes_notes:
            states = randomness.changed(self._randomness, self._random_state())
            self._events.append([event, limit, states])
        if event == "b":
            self._adapter.on_epoch_begin()
        elif event == "e":
            self._adapter.on_epoch_end()
        elif event == "v":
            iter(self.dataset)
        elif event == "r":
            self.release()
            self._next = None
        else:
            self._start_reading(event == "i", limit)
        if self._takes_notes:
            self._randomness = self._random_state()

    def _start_reading(self, is_new: bool, limit: int | None) -> None:
        if is_new:
            self._next = None
        if self._reader is not None:
            self._reader.limit = limit
            if is_new:
                self._reader.begin()
        self._read_on()
        if self._keeps_beginning and is_new:
            self._begin()

    def _begin(self) -> None:
        """Keeps the beginning of the first pass, or goes to one that was kept."""
        self._keeps_beginning = False
        if self._beginning:
            iterators.go_to(self._iterator, self._beginning, self._spec_of_next)
        else:
            self._beginning = iterators.place_of(self._iterator, None)

    def _read_on(self) -> None:
        self.release()
        self._iterator = iter(self.dataset)
        if self._next is not None and not self._next.has_value():
            self._next = None  # There may be more, beyond the limit.

    def position(self) -> dict[str, Any]:
        """Where the data stand, as JSON can hold it."""
        batches, reader = self._seen + self._step, self._reader
        states = self._random_state()
        if reader is not None and self._step:  # It may be further by now.
            states |= reader.after(batches + self._is_ahead)
        return {
            "events": list(self._events),
            "batches of the pass": batches,
            "steps of the epoch": self._step,
            "is ahead": self._is_ahead,
            "first and last batch": self._fingerprints(batches),
            "randomness before the last": reader.before(batches) if reader else {},
            "randomness": states,
            "last length": self._last_length,
        }

    def iterator_place(self) -> bytes:
        """The place of the iterator, which saves reading up to it; b"" if unknown.

        It has the buffers of the pipeline. They can be large, such as one that shuffles
        whole images: then the data are read.
        """
        if not self._tells_place or self._iterator is None:
            return b""
        try:
            place = iterators.place_of(self._iterator, self._next)
        except tf.errors.OpError:
            place, self._tells_place = b"", False
        if len(place) > _LARGEST_PLACE:
            _LOGGER.warning(
                "The buffers of the data are too large for a checkpoint, %d MiB: a "
                "training that goes on reads the data again up to its place.",
                len(place) >> 20,
            )
            place, self._tells_place = b"", False
        return place

    def move_to(self, position: dict[str, Any], iterator_place: bytes = b"") -> None:
        """Moves new data to where others stood: does the same, and reads as much.

        Args:
            position: What `position()` has returned.
            iterator_place: What `iterator_place()` has returned: spares the reading.

        Raises:
            ValueError: they are not the same data, or come in another order.
        """
        if self._reader is not None and not self._reader.can_skip:
            _LOGGER.warning(
                "The generator is read again up to its place, %s batches.",
                position["batches of the pass"],
            )
        self._set_random_state(self._randomness)
        events = position["events"]
        kinds = "".join(event for event, *_ in events)
        latest = kinds.rfind("i")
        for index, (event, limit, states) in enumerate(events):
            if event == "r" and limit and self._passes and not self._passes.independent:
                self._read_rest_of_pass(limit, compared=index > latest)
            self._set_random_state(states)
            self._move(event, limit)
            if event in "ic" and index >= latest:
                if self._reader is not None:
                    self._read_part_again(self._reader, position, limit)
                else:
                    has_ended = "r" in kinds[latest:]
                    batches = 1 if has_ended else position["batches of the pass"]
                    self._read_up_to(batches, b"" if has_ended else iterator_place)
        found = json.loads(
            json.dumps(self._fingerprints(position["batches of the pass"]))
        )
        if found != position["first and last batch"]:
            raise ValueError(
                "The data come in another order than before. Received: a batch that "
                "differs from that of the checkpoint. Seed what shuffles them, or "
                "start anew."
            )
        self._events = list(events)
        self._last_length = position["last length"]
        self._step = position["steps of the epoch"]
        self._seen = position["batches of the pass"] - self._step
        self._set_random_state(position["randomness"])

    def _read_part_again(
        self, reader: Reader, position: dict[str, Any], limit: int | None
    ) -> None:
        """Moves on in a part of the latest pass; its last batch is read, to compare."""
        batches = position["batches of the pass"]
        first, _ = position["first and last batch"]
        end = min(batches + position["is ahead"], limit or sys.maxsize)
        if end < batches:
            reader.skip_to(end, first)
        elif reader.count < batches:
            reader.skip_to(batches - 1, first)
            self._set_random_state(position["randomness before the last"])
            reader.limit = end
            self._read_on()
            self._read(1)
        if end > batches and self._next is None:
            reader.limit = end
            self._next = self._iterator.get_next_as_optional()

    def _read_up_to(self, batches: int, place: bytes) -> None:
        """Reads so many batches of a new iterator, or one if it can go to its place."""
        start = iterators.place_of(self._iterator, None) if place else b""
        self._read(min(batches, 1))  # To compare.
        if not (place and self._went_to(place, start)):
            self._read(max(batches - 1, 0))

    def _went_to(self, place: bytes, start: bytes) -> bool:
        """Moves the iterator to a place, unless its pipeline does not know that."""
        spec = self._spec_of_next
        try:
            self._next = iterators.go_to(self._iterator, place, spec)
        except tf.errors.OpError:  # Another version of TensorFlow fuses other parts.
            _LOGGER.warning(
                "The data are read again up to their place: the checkpoint has that of "
                "another pipeline."
            )
            return False
        finally:
            # A shuffle that has read all of its input draws the seed of the next pass
            # as it goes to a place (2.21). Going to the start sets the seeds right.
            iterators.go_to(iter(self.dataset), start, spec)
        return True

    @property
    def _spec_of_next(self) -> Any:
        """The specs of what `take_next()` returns."""
        return tf.OptionalSpec(self._iterator.element_spec)

    def _read(self, batches: int) -> None:
        for _ in range(batches * self.elements_of_batch):
            self.sample = self._iterator.get_next_as_optional()
            if not self.sample.has_value():
                raise ValueError(
                    "The data are shorter than before. Received: fewer batches than "
                    "the checkpoint has seen. Give the same data, or start anew."
                )

    @functools.cached_property
    def _tells_place(self) -> bool:
        x = self._arrays[0]
        if not isinstance(x, tf.data.Dataset) or _keras.held_bytes(x) > _LARGEST_PLACE:
            return False  # To find out would take long, too.
        passes = self._passes
        return passes is not None and passes.tellable

    @functools.cached_property
    def _passes(self) -> Passes | None:
        """How the passes are related, for a `tf.data.Dataset` of the program."""
        x = self._arrays[0]
        return passes_of(x) if isinstance(x, tf.data.Dataset) else None

    def _read_rest_of_pass(self, batches: int, compared: bool) -> None:
        """Reads a pass that has ended, on which a later one may depend."""
        if not self._has_warned:
            self._has_warned = True
            _LOGGER.warning(
                "The data are read again from their beginning: a later pass may depend "
                "on how far the ones before it were read."
            )
        self._read(batches - compared)
        if not self._never_ends:
            self._iterator.get_next_as_optional()  # Their end, which fills a cache.

    def _fingerprints(self, batches: int) -> list:
        """Those of the first and the latest batch of the pass, as far as noted."""
        if self._reader is None:
            return [self.first_batch, None]
        return self._reader.fingerprints(batches)

    @property
    def _is_ahead(self) -> bool:
        """Whether Python code has read a batch that no step was run on."""
        if self._reader is None or self._next is None:
            return False
        return bool(self._next.has_value())

    def _random_state(self) -> dict[str, Any]:
        return randomness.state(self._reader.generators if self._reader else {})

    def _set_random_state(self, states: dict[str, Any]) -> None:
        randomness.set_state(states, self._reader.generators if self._reader else {})

    def restart(self) -> None:
        """Goes back to the first batch, unless the data can be read only once.

        As stock Keras does before a run, this calls the `on_epoch_end` of a PyDataset.
        """
        if not self._one_pass:
            self._move("r")
        self._move("e")

    def release(self) -> None:
        """Releases the iterator without waiting for it to end.

        The tuning thread of a tf.data pipeline ends at its next tick, which may take
        twice the time of an epoch.
        """
        held, self._iterator = [self._iterator], None
        if held[0] is not None:
            _keras.clear_beside(held)

    def _skip_an_order(self) -> None:
        """Creates an unused iterator, as stock Keras does after counted batches.

        A seeded shuffle uses another order for each iterator.
        """
        if isinstance(self._arrays[0], tf.data.Dataset):
            self._move("v")

    def has_next(self) -> bool:
        """Whether another batch exists; reads ahead only if the length is unknown."""
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
            read = self._read_next
            self._next = self.clock.timed(read) if self.clock else read()
        return self._next

    def _read_next(self) -> Any:
        return self._iterator.get_next_as_optional()

    def put_next(self, batch: tf.experimental.Optional) -> None:
        """Keeps a batch that was read but not yet trained on."""
        self._next = batch

    def skip_next(self) -> None:
        """Leaves out the batch that comes next, which counts as a step."""
        self.take_next()
        self.put_next(None)

    def shares_a_shuffle_with(self, other: "GlobalBatches") -> bool:
        """Whether passes of both draw the seeds of one shuffle."""
        if any(each is None or each.alike for each in (self._passes, other._passes)):
            return False  # A part that shuffles makes all that is made of it differ.
        parts = _keras.shared_parts(self._arrays[0], other._arrays[0])
        return any(not passes_of(part).alike for part in parts)

    @property
    def can_start_again(self) -> bool:
        """Whether the data can be read from their beginning again, in this process."""
        if self._passes is not None:
            return self._passes.alike or self._passes.tellable
        return self._reader is None or self._reader.can_start_again

    def end_epoch(self, steps: int) -> None:
        """Ends an epoch that ran `steps` steps.

        Raises:
            ValueError: if the data turn out to be empty.
        """
        self._seen, self._step = self._seen + steps, 0
        ran_out = not self.length_is_known and not self.has_next()
        if ran_out and self._seen == 0:
            raise ValueError(_EMPTY)
        exhausted = ran_out or self._seen == self.num_batches
        if exhausted and steps < (self.steps_per_epoch or 1):
            _warn_of_missing_data()
        if ran_out:
            self._last_length = steps
        if exhausted and not self._one_pass:
            self._move("r", self._seen)
            if not ran_out and self.steps_per_epoch is None:
                self._skip_an_order()
        self._move("e")


_EMPTY = (
    "The data have no batch at all. Received: an empty dataset. Give at least one row, "
    "and check filters, shards and `drop_remainder`."
)


def _capped_steps(steps: int | None) -> int | None:
    """Steps of an epoch, which `keras.config.set_max_steps_per_epoch` may limit."""
    most = keras.config.max_steps_per_epoch()
    if not most or (steps and most >= steps):
        return steps
    warnings.warn(f"Limiting steps_per_epoch to {most}", stacklevel=6)
    return most


def _warn_of_missing_data() -> None:
    warnings.warn(
        "Your input ran out of data; interrupting training. Make sure that your "
        "dataset or generator can generate at least `steps_per_epoch * epochs` "
        "batches. You may need to use the `.repeat()` function when building your "
        "dataset.",
        stacklevel=2,
    )
