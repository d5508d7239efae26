"""Reads PyDatasets and generators: Python code, which may draw numbers as it runs.

They are read a part at a time, that of an epoch, and no batch beyond it. So what runs
between epochs, such as an `on_epoch_end` that shuffles, runs after the same batches
every time, however far TensorFlow reads ahead.
"""

import dataclasses
import itertools
import random
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import keras

from distfit import _keras
from distfit.training import randomness
from distfit.training.batch import fingerprint


@dataclasses.dataclass
class _Note:
    """What is known of a batch that was read.

    The random generators before and after it are None if threads or processes read.
    """

    fingerprint: list
    before: dict[str, Any] | None
    after: dict[str, Any] | None


@dataclasses.dataclass
class _Pass:
    """A pass through the data.

    Attributes:
        order: The indices of its batches; None if there are none.
        count: How many of its batches were read.
        first: The fingerprint of the first of them, once noted.
        notes: What is known of the latest of them, by their numbers from 1.
    """

    order: Sequence[int] | None = None
    count: int = 0
    first: list | None = None
    notes: dict[int, _Note] = dataclasses.field(default_factory=dict)


class Reader:
    """Reads a PyDataset or a generator.

    Args:
        source: The PyDataset, or an iterator over the batches of a generator.
        shuffle: Whether each pass through a PyDataset has an order of its own.

    Attributes:
        limit: How many batches of the pass may be read; None if all.
        can_skip: Whether batches can be left out: those of a PyDataset have numbers.
        generators: The random generators that the PyDataset holds, by name.
    """

    def __init__(self, source: Any, shuffle: bool):
        self.limit: int | None = None
        self.can_skip = isinstance(source, keras.utils.PyDataset)
        self.generators = randomness.generators_of(source) if self.can_skip else {}
        self._source = source
        self._shuffle = shuffle
        self._in_parallel = self.can_skip and _is_parallel(source)
        self._takes_notes = False
        self._drawn: set[str] = set()  # Generators that reading draws from.
        self._pass = _Pass()

    @property
    def count(self) -> int:
        """How many batches of the pass were read."""
        return self._pass.count

    @property
    def can_start_again(self) -> bool:
        """Whether the source is as it was at first: nothing in it changes."""
        if not self.can_skip:
            return False
        hooks = (type(self._source).on_epoch_begin, type(self._source).on_epoch_end)
        stock = keras.utils.PyDataset
        return hooks == (stock.on_epoch_begin, stock.on_epoch_end) and not (
            self.generators
        )

    def begin(self) -> None:
        """Begins a pass."""
        self._pass = _Pass(self._new_order())

    def _new_order(self) -> Sequence[int]:
        if not self.can_skip:
            return ()
        length = self._source.num_batches
        if length is None:
            return range(sys.maxsize)
        if not self._shuffle:
            return range(length)
        order = list(range(length))
        random.shuffle(order)  # As Keras does.
        return order

    def read(self) -> Iterator[Any]:
        """Yields the next batches of the pass, up to the limit."""
        if self._pass.order is None:
            self.begin()
        current = self._pass  # A thread may still be reading when the next one begins.
        batches = self._part(current)
        try:
            while True:
                before = self._random_state()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                current.count += 1
                self._note(current, batch, before)
                yield batch
        finally:
            batches.close()

    def _part(self, current: _Pass) -> Generator[Any, None, None]:
        if not self.can_skip:
            left = None if self.limit is None else self.limit - current.count
            yield from itertools.islice(self._source, left)
            return
        indices = (current.order or ())[current.count : self.limit]
        if self._in_parallel:
            yield from _read_in_parallel(self._source, indices)
        else:
            yield from map(self._source.__getitem__, indices)

    def skip_to(self, count: int | None, first: list | None = None) -> None:
        """Goes on after so many batches of the pass.

        Args:
            count: The number of batches; None for all.
            first: The fingerprint of the first of them, which may not be read again.
        """
        if not self.can_skip:
            self.limit = count
            for _ in self.read():
                pass
        elif count:  # What else their reading does is in the random generators.
            self._pass.count, self._pass.first = count, first

    # Notes.

    def take_notes(self) -> None:
        """Notes from now on what is known of each batch."""
        self._takes_notes = True

    def _random_state(self) -> dict[str, Any] | None:
        if not self._takes_notes or self._in_parallel:
            return None
        return randomness.state(self.generators)

    def _note(self, current: _Pass, batch: Any, before: dict[str, Any] | None) -> None:
        if not self._takes_notes:
            return
        after = self._random_state()
        if before is not None and after is not None:
            self._drawn |= randomness.changed(before, after).keys()
        note = _Note(fingerprint(batch, rows=4), before, after)
        if current.count == 1:
            current.first = note.fingerprint
        current.notes[current.count] = note

    def forget_before(self, count: int) -> None:
        """Drops the notes of the batches of the pass before this one."""
        notes = self._pass.notes
        for number in [number for number in list(notes) if number < count]:
            del notes[number]

    def fingerprints(self, count: int) -> list:
        """Those of the first batch of the pass and of this one, as far as noted."""
        note = self._pass.notes.get(count)
        return [self._pass.first, note and note.fingerprint]

    def before(self, count: int) -> dict[str, Any]:
        """The generators that reading draws from, as they were before a batch."""
        note = self._pass.notes.get(count)
        return self._those_drawn(note.before if note else None)

    def after(self, count: int) -> dict[str, Any]:
        """The generators that reading draws from, as a batch has left them."""
        note = self._pass.notes.get(count)
        return self._those_drawn(note.after if note else None)

    def _those_drawn(self, states: dict[str, Any] | None) -> dict[str, Any]:
        return {k: v for k, v in (states or {}).items() if k in self._drawn}


def reader_of(adapter: Any, shuffle: bool) -> Reader | None:
    """A reader that gives an adapter of Keras its batches; None for other data."""
    if isinstance(adapter, _keras.PyDatasetAdapter):
        reader = Reader(adapter.py_dataset, shuffle)
    elif isinstance(adapter, _keras.GeneratorDataAdapter):
        reader = Reader(adapter.generator(), False)
    else:
        return None
    _keras.read_with(adapter, reader.read)
    return reader


def _is_parallel(source: keras.utils.PyDataset) -> bool:
    """Whether threads or processes read, by the rule of Keras."""
    return source.workers > 1 or (source.workers > 0 and source.use_multiprocessing)


class _Part(keras.utils.PyDataset):
    """The batches of a PyDataset at some indices, in their order."""

    def __init__(self, source: keras.utils.PyDataset, indices: Sequence[int]):
        super().__init__()
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._source[self._indices[index]]


def _read_in_parallel(
    source: keras.utils.PyDataset, indices: Sequence[int]
) -> Iterator[Any]:
    """The batches at some indices, in their order, as Keras reads them."""
    if not indices:
        return
    enqueuer = _keras.OrderedEnqueuer(
        _Part(source, indices),
        workers=source.workers,
        use_multiprocessing=source.use_multiprocessing,
        max_queue_size=source.max_queue_size,
    )
    enqueuer.start()
    try:
        yield from itertools.islice(enqueuer.get(), len(indices))
    finally:
        enqueuer.stop()
