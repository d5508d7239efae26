"""The batches to compare on: even, uneven, and smaller than the number of replicas."""

import dataclasses
import itertools
from typing import Any

import tensorflow as tf
from keras import tree

from distfit.training.batch import num_rows, with_rows, without_optionals
from distfit.training.global_batches import GlobalBatches
from distfit.training.inputs import without_autotune
from distfit.training.shares import Layout

KINDS = ("even", "uneven", "few rows")
_COMPOSITE = tf.RaggedTensorSpec | tf.SparseTensorSpec


@dataclasses.dataclass(frozen=True)
class Batch:
    """A global batch.

    Attributes:
        kind: One of `KINDS`: it divides evenly among the replicas, or unevenly, or has
            fewer rows than there are replicas.
        rows: Number of rows.
        tensors: The argument of a step.
    """

    kind: str
    rows: int
    tensors: Any = dataclasses.field(repr=False)


class Source:
    """Global batches of the user's data, cut to any number of rows.

    Args:
        data_given: What `fit()` takes: arrays `x` or `(x, y[, sample_weight])`, or a
            dataset, PyDataset or generator of global batches.
        batch_size: Rows of a global batch.
        steps: Number of batches to read. If there are fewer, they are reused.

    Attributes:
        spec: The specs of a batch.
        fixed_rows: The number of rows that the specs give for every batch, or None.

    Raises:
        ValueError: for data that cannot be trained on.
    """

    def __init__(self, data_given: Any, batch_size: int, steps: int):
        named = data_given if isinstance(data_given, tuple) else (data_given,)
        arrays = not isinstance(data_given, tf.data.Dataset) and len(named) <= 3
        batches = GlobalBatches(
            *(named if arrays else (data_given,)),
            batch_size=batch_size if _takes_batch_size(named[0]) else None,
        )
        taken = list(batches.dataset.take(steps))
        self._batches = [_unpadded(without_optionals(batch)) for batch in taken]
        self._steps = steps
        self._is_fixed = False
        self._given_spec = _unpadded(batches.layout.spec)
        layout = Layout(self._given_spec, *self._batches)
        self.fixed_rows = layout.rows
        self._has_rows = tree.map_structure(
            lambda spec, is_cut: is_cut or isinstance(spec, _COMPOSITE),
            self._given_spec,
            layout.cut,
        )
        self.spec = tree.map_structure(
            _spec_like, self._given_spec, self._has_rows, *self._batches
        )

    def fix_rows(self) -> None:
        """Uses only batches of the fixed size, and gives the step their full shape."""
        self._is_fixed = True
        self.spec = self._given_spec

    def batches(self, num_replicas: int) -> list[Batch]:
        """One batch for each step, of the three kinds in turn.

        Raises:
            ValueError: if a batch has fewer rows than there are replicas.
        """
        kinds = KINDS if num_replicas > 1 else KINDS[:2]
        # Skip a small last batch if other batches have enough rows.
        large = [b for b in self._batches if self._rows(b) >= num_replicas]
        given = large or self._batches
        return [
            self._cut(given[step % len(given)], kind, num_replicas)
            for step, kind in zip(
                range(self._steps), itertools.cycle(kinds), strict=False
            )
        ]

    def _rows(self, tensors: Any) -> int:
        flat = zip(tree.flatten(tensors), tree.flatten(self._has_rows), strict=True)
        return next(int(num_rows(t)) for t, has_rows in flat if has_rows)

    def _cut(self, tensors: Any, kind: str, num_replicas: int) -> Batch:
        given = self._rows(tensors)
        if given < num_replicas:
            raise ValueError(
                "A batch must have at least as many rows as there are replicas, to cut "
                f"even and uneven ones from it. Received: a batch of {given} rows for "
                f"{num_replicas} replicas. Raise `batch_size`, or compare fewer "
                "replicas."
            )
        if self._is_fixed:
            kind = "uneven" if given % num_replicas else "even"
            return Batch(kind, given, tensors)
        rows = _rows_of_kind(kind, given, num_replicas)

        def first(tensor, has_rows):
            return _first_rows(tensor, rows) if has_rows else tensor

        return Batch(kind, rows, tree.map_structure(first, tensors, self._has_rows))

    def dataset(self, batches: list[Batch]) -> tf.data.Dataset:
        """The batches as `fit()` takes them."""
        tensors = [batch.tensors for batch in batches]

        def generate():
            # Copies: TensorFlow would share the memory, and overwrite it in a step.
            return (tree.map_structure(_copy, batch) for batch in tensors)

        dataset = tf.data.Dataset.from_generator(generate, output_signature=self.spec)
        dataset = without_autotune(dataset)
        return dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))


def _copy(tensor: Any) -> Any:
    return tensor.numpy().copy() if isinstance(tensor, tf.Tensor) else tensor


def _first_rows(tensor: Any, rows: int) -> Any:
    if isinstance(tensor, tf.SparseTensor):
        size = tf.concat([[rows], tensor.dense_shape[1:]], 0)
        return tf.sparse.slice(tensor, tf.zeros_like(size), size)
    return tensor[:rows]


def _rows_of_kind(kind: str, given: int, num_replicas: int) -> int:
    if kind == "even":
        return given - given % num_replicas
    if kind == "few rows":
        return num_replicas - 1
    if num_replicas == 1:
        return max(given - 1, 1)
    uneven = (n for n in range(given, num_replicas, -1) if n % num_replicas)
    return next(uneven, num_replicas)


def _takes_batch_size(x: Any) -> bool:
    """Whether an input is arrays; all others are batched already."""
    return all(hasattr(leaf, "shape") for leaf in tree.flatten(x)) and not hasattr(
        x, "element_spec"
    )


def _unpadded(batch: Any) -> Any:
    """The batch without trailing None for absent targets or weights."""
    if isinstance(batch, tuple):
        kept = list(batch)
        while len(kept) > 1 and _is_none(kept[-1]):
            kept.pop()
        return tuple(kept)
    return batch


def _is_none(part: Any) -> bool:
    return part is None or isinstance(part, tf.OptionalSpec | tf.NoneTensorSpec)


def _spec_like(spec: Any, has_rows: bool, *tensors: Any) -> Any:
    """A spec for any number of rows; without rows, for the size that was seen."""
    if spec is None:
        return None
    sizes = {None} if has_rows else {tensor.shape[0] for tensor in tensors}
    if len(sizes) > 1:
        return spec
    return with_rows(spec, sizes.pop())
