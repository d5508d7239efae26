"""Sums and gathers over replicas: all exchanges of a step are in this file."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from distfit._keras import graphs


class Replicas:
    """The replicas of this process, and their exchanges.

    Args:
        strategy: The strategy; None if there is a single replica.
        devices: The devices of the replicas of this process.
        num_replicas: Number of replicas of all processes.
        first: The index of the first replica of this process among all.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy | None,
        devices: Sequence[str],
        num_replicas: int,
        first: int = 0,
    ):
        self.strategy = strategy
        self.devices = list(devices)
        self.num_replicas = num_replicas
        self.first = first

    @property
    def count(self) -> int:
        """Number of replicas of this process."""
        return len(self.devices)

    def only(self, index: int) -> "Replicas":
        """One of these replicas alone, where no exchange is needed."""
        return Replicas(None, [self.devices[index]], 1)

    def sum(self, parts: Sequence[list]) -> list[list]:
        """All-reduces tensors by sum; those of one dtype are packed into one buffer.

        Args:
            parts: For each tensor, its parts on the replicas of this process.

        Returns:
            For each tensor, its sum, on every replica of this process.
        """
        if self.num_replicas == 1:
            return [list(part) for part in parts]
        sums: list[Any] = [None] * len(parts)
        by_dtype: dict[tf.DType, list[int]] = {}
        for i, part in enumerate(parts):
            by_dtype.setdefault(part[0].dtype, []).append(i)
        for places in by_dtype.values():
            if len(places) == 1:
                sums[places[0]] = self._sum(parts[places[0]])
                continue
            flat = self._each(_flattened, *(parts[i] for i in places))
            summed = self._sum(flat)
            apart = self._each(_split_like, summed, *(parts[i] for i in places))
            for k, i in enumerate(places):
                sums[i] = [tensors[k] for tensors in apart]
        return sums

    def gather(self, parts: list, layout: Any, *, total, start, count) -> list:
        """Gathers the rows of all replicas.

        Args:
            parts: The parts on the replicas of this process.
            layout: A layout by rows.
            total, start, count: For each of these replicas, the rows of the global
                batch, its first row and its number of rows.

        Returns:
            The whole tensor, on every replica of this process.
        """
        if self.num_replicas == 1:
            return list(parts)
        if self.count == self.num_replicas:
            if _all_on_cpu(self.devices):
                joined = self._joined(parts, layout, count, self.devices[0])
                return [joined] * self.count
            return [self._joined(parts, layout, count, d) for d in self.devices]
        own = self._joined(parts, layout, count, self.devices[0])
        whole = self._gather_workers(own, layout, total[0], start[0], count)
        return self._each(lambda t, like: _unwired(t, like.dtype), whole, parts)

    def _joined(self, parts: list, layout: Any, count, device: str) -> tf.Tensor:
        dim = layout.dim
        with tf.device(device):
            if layout.blocks == 1:
                return tf.concat(parts, dim)
            # Blocks of rows: [blocks, rows, inner] on each replica.
            opened = [
                _opened(part, dim, rows, layout)
                for part, rows in zip(parts, count, strict=True)
            ]
            joined = tf.concat(opened, dim + 1)
            return _closed(joined, dim)

    def _gather_workers(self, own, layout, total, start, count) -> list:
        """Gathers by an all-reduce of each worker's rows, padded with zeros."""
        dim = layout.dim
        rows = tf.add_n(list(count))
        with tf.device(self.devices[0]):
            opened = _wired(_opened(own, dim, rows, layout))
            padding = [[0, 0]] * len(opened.shape)
            padding[dim + 1] = [start, total - start - rows]
            padded = tf.pad(opened, padding)
        parts = [padded]
        for device in self.devices[1:]:
            with tf.device(device):
                parts.append(tf.zeros_like(padded))
        return self._each(lambda t: _closed(t, dim), self._sum(parts))

    def _sum(self, parts: list) -> list:
        dtype = parts[0].dtype
        if self.count == self.num_replicas and _all_on_cpu(self.devices):
            with tf.device(self.devices[0]):
                total = _unwired(tf.add_n([_wired(t) for t in parts]), dtype)
            return [total] * self.count
        wired = self._each(_wired, parts)
        summed = graphs.sum_over_replicas(self.strategy, wired)
        return self._each(lambda t: _unwired(t, dtype), summed)

    def _each(self, function, *lists: list) -> list:
        results = []
        for device, *values in zip(self.devices, *lists, strict=True):
            with tf.device(device):
                results.append(function(*values))
        return results


def _all_on_cpu(devices: Sequence[str]) -> bool:
    return all("CPU" in device.upper() for device in devices)


def _flattened(*tensors: tf.Tensor) -> tf.Tensor:
    # No needless reshapes: with fewer operations, a step prepares faster.
    flat = [t if t.shape.rank == 1 else tf.reshape(t, [-1]) for t in tensors]
    return tf.concat(flat, 0)


def _split_like(flat: tf.Tensor, *tensors: tf.Tensor) -> list[tf.Tensor]:
    static = all(t.shape.is_fully_defined() for t in tensors)
    if static:
        sizes: Any = [t.shape.num_elements() for t in tensors]
    else:
        sizes = tf.stack([tf.size(t) for t in tensors])
    pieces = tf.split(flat, sizes, num=len(tensors))
    return [
        piece
        if static and t.shape.rank == 1
        else tf.reshape(piece, t.shape if t.shape.is_fully_defined() else tf.shape(t))
        for piece, t in zip(pieces, tensors, strict=True)
    ]


def _opened(tensor: tf.Tensor, dim: int, rows: Any, layout: Any) -> tf.Tensor:
    """Splits dimension `dim` into three: blocks, rows and inner."""
    blocks = layout.blocks
    if not isinstance(blocks, int):
        raise NotImplementedError("an unknown number of blocks of rows")
    inner = layout.inner if isinstance(layout.inner, int) else -1
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    if inner > 0 and _all_known(before, after):
        return tf.reshape(tensor, [*before, blocks, -1, inner, *after])
    shape = tf.shape(tensor)
    if inner == -1:
        inner = tf.math.floordiv(shape[dim], tf.maximum(rows * blocks, 1))
    return tf.reshape(
        tensor, tf.concat([shape[:dim], [blocks, rows, inner], shape[dim + 1 :]], 0)
    )


def _closed(tensor: tf.Tensor, dim: int) -> tf.Tensor:
    before, after = tensor.shape[:dim], tensor.shape[dim + 3 :]
    if _all_known(before, after):
        return tf.reshape(tensor, [*before, -1, *after])
    shape = tf.shape(tensor)
    size = tf.reduce_prod(shape[dim : dim + 3])
    return tf.reshape(tensor, tf.concat([shape[:dim], [size], shape[dim + 3 :]], 0))


def _all_known(*shapes: tf.TensorShape) -> bool:
    """Whether a reshape can infer one more size from the number of elements."""
    return all(shape.is_fully_defined() and 0 not in shape for shape in shapes)


def _wired(tensor: tf.Tensor) -> tf.Tensor:
    """Casts a tensor, without loss, to a dtype that collectives can sum."""
    if tensor.dtype in (tf.bool, tf.int8, tf.uint8, tf.int16, tf.uint16):
        return tf.cast(tensor, tf.int32)
    if tensor.dtype in (tf.uint32, tf.uint64):
        return tf.cast(tensor, tf.int64)
    if tensor.dtype.is_complex:
        return tf.stack([tf.math.real(tensor), tf.math.imag(tensor)], -1)
    return tensor


def _unwired(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    if dtype.is_complex:
        return tf.complex(tensor[..., 0], tensor[..., 1])
    return tf.cast(tensor, dtype)
