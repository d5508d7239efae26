"""What a replica holds of the global batch, and the sums over replicas.

Inside a step every replica runs the same code on its own rows. Two conventions make
the numbers those of one device, and every function here keeps them:

* a **value** is that of the global batch, the same on every replica;
* a **gradient** is this replica's share: summed over replicas it is the gradient.

This is the only file that calls `all_reduce`. Outside a step, and on one replica,
every function is what its name says of the tensor it is given.
"""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from distfit import _keras

_local = threading.local()


class Share:
    """A replica's part in the current step. Use as a context manager around the step.

    Attributes:
        replica: Index of this replica among all, an int.
        num_replicas: Number of replicas, an int.
        start, local_rows, global_rows: Where this replica's rows lie in the global
            batch; int32 scalars.
        idle: Whether the rows at hand are not this replica's own, since there are none
            for it. No replica can sit out a collective, so it processes the rows of
            others, and what it makes of them counts for nothing. A bool tensor, or
            False where it cannot happen.
        num_counted: The number of replicas that are not idle; an int or an int32.
        is_first: Whether this is the first replica that is not idle; a bool or a bool
            tensor.
        graph: The graph of the step. What these tensors are used for must be part of
            it: TensorFlow takes the trace of a nested function for other steps, too.
        plan: What a symbolic run of the step found out, or None.
        compiles: Whether XLA is to compile what needs no exchange.
        exchanges_vary: Whether something that was exchanged may have another size in
            another step, as rows have.
    """

    def __init__(self, replica, num_replicas, rows, *, model=None, plan=None):
        self.replica = replica
        self.num_replicas = num_replicas
        self.start, self.global_rows = rows.start, rows.total
        self.local_rows = rows.stop - rows.start
        self.idle, self.num_counted = rows.idle, rows.num_counted
        self.is_first = rows.is_first
        self.graph = tf.compat.v1.get_default_graph()
        self.model = model
        self.plan = plan
        self.loss_calls = self.sum_calls = 0
        self._local_values: list[tuple[Any, Any]] = []
        self.compiles = False
        self.exchanges_vary = False
        self._in_xla = False

    @property
    def alone(self) -> bool:
        """Whether there is nobody to exchange anything with."""
        return self.num_replicas == 1

    @property
    def rows_counted(self) -> Any:
        """The rows that this replica answers for."""
        return self.counted(self.local_rows)

    @property
    def fraction(self) -> Any:
        """The part of the global batch that this replica answers for, a float32."""
        rows = tf.cast(self.rows_counted, tf.float32)
        return rows / tf.cast(self.global_rows, tf.float32)

    def counted(self, tensor: Any) -> Any:
        """What this replica adds to a sum: nothing if it is idle.

        Rows of a sparse gradient are left out, not zero: optimizers treat a row that
        occurs twice as two updates.
        """
        if self.idle is False:
            return tensor
        if isinstance(tensor, tf.IndexedSlices):
            rows = tf.where(self.idle, 0, tf.shape(tensor.indices)[0])
            values, indices = tensor.values[:rows], tensor.indices[:rows]
            return tf.IndexedSlices(values, indices, tensor.dense_shape)
        tensor = tf.convert_to_tensor(tensor)
        return tf.where(self.idle, tf.zeros_like(tensor), tensor)

    def stream_offset(self, distance: int) -> Any:
        """What sets this replica's random stream apart; None if nothing does."""
        if self.replica == 0:
            return None
        return tf.constant(self.replica * distance, tf.int64)

    def all_reduce(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums every tensor over the replicas; the gradient is summed likewise."""
        if self.alone:
            return list(tensors)
        if self._in_xla:
            raise ValueError(
                "XLA cannot compile an exchange between replicas. Received: a model "
                "with jit_compile=True, and a layer other than BatchNormalization "
                "that calls a loss or a collective. Compile the model with "
                "`jit_compile=False`."
            )
        summed = list(tensors)
        self.exchanges_vary |= any(map(_may_vary, summed))
        with self._own_losses():
            for places in _by_dtype(tensors):
                parts = _all_reduce([tensors[i] for i in places])
                for i, part in zip(places, parts, strict=True):
                    summed[i] = part
        return summed

    def sum_if_read(self, local: tf.Tensor) -> tf.Tensor:
        """The sum of the local parts of a value.

        Most steps read a loss nowhere: they need its gradient, and metrics are fed with
        its local parts. An exchange cannot be pruned from a graph, so where the plan
        knows that nobody looks, none is made, and NaN stands in.
        """
        self.sum_calls += 1
        is_known = self.plan is not None and not tf.executing_eagerly()
        if is_known and not self.plan.reads_sum(self.sum_calls - 1):
            return tf.fill(tf.shape(local), tf.constant(math.nan, local.dtype))
        return _sum(local, self)

    def merge_call(self, function, *args) -> Any:
        """Calls `function(strategy, *args)` once for all replicas."""
        with self._own_losses():
            return tf.distribute.get_replica_context().merge_call(function, args)

    def compiled(self, function: Callable[[], Any]) -> Any:
        """Calls `function()`, as one XLA computation if the model is compiled so."""
        if not self.compiles:
            return function()
        self._in_xla = True
        try:
            with self.not_compiled():
                return tf.function(function, autograph=False, jit_compile=True)()
        finally:
            self._in_xla = False

    @contextlib.contextmanager
    def not_compiled(self) -> Iterator[None]:
        """Lets `compiled` just call its function."""
        compiles, self.compiles = self.compiles, False
        try:
            yield
        finally:
            self.compiles = compiles

    @contextlib.contextmanager
    def _own_losses(self) -> Iterator[None]:
        """The threads of other replicas run meanwhile, on the same layer objects."""
        losses = _keras.layer_losses(self.model) if self.model else []
        yield
        _keras.set_layer_losses(losses)

    def remember(self, value: tf.Tensor, local: tf.Tensor) -> tf.Tensor:
        """Notes that the global `value` is the sum over replicas of `local`."""
        self._local_values.append((value, local))
        return value

    def local_part(self, value: Any) -> tf.Tensor | None:
        """The summand that this replica gave to a global value, if `value` is one."""
        return next((part for v, part in self._local_values if v is value), None)

    def remembered_keys(self, key_of: Callable[[Any], Any]) -> set:
        """What identifies the global values so far."""
        return {key_of(value) for value, _ in self._local_values}

    @property
    def local_parts(self) -> list[tf.Tensor]:
        """This replica's summand of every global value so far."""
        return [part for _, part in self._local_values]

    def defers(self, optimizer, grads, variables) -> bool:
        """Whether an optimizer is not to be applied now, but only built later."""
        return False

    def __enter__(self):
        self._outer = current_share()
        _local.share = self
        return self

    def __exit__(self, *exc_info):
        _local.share = self._outer


def _all_reduce(tensors: list) -> list:
    """One exchange. On several workers the tensors travel as one flat buffer."""
    context = tf.distribute.get_replica_context()
    # TensorFlow asks each for its device, which one that was read or passed lacks.
    placed = [tensor if tensor.device else tf.identity(tensor) for tensor in tensors]
    return context.all_reduce(tf.distribute.ReduceOp.SUM, placed)


def _may_vary(tensor: Any) -> bool:
    """Whether the size of a tensor is known only when it is computed."""
    is_sparse = isinstance(tensor, tf.IndexedSlices)
    return is_sparse or not tensor.shape.is_fully_defined()


def _by_dtype(tensors: Sequence) -> Iterable[list[int]]:
    """The places of tensors that can share a buffer."""
    places: dict[tf.DType, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.dtype, []).append(place)
    return places.values()


def gather_counts(strategy, counts: tf.Tensor, first_replica: int) -> tf.Tensor:
    """What the replicas of this worker count, and those of all others.

    Args:
        strategy: The strategy; call this outside of its steps, on every worker.
        counts: int32 of shape (replicas of this worker,).
        first_replica: The index of the first of them.

    Returns:
        int32 of shape (num_replicas,).
    """
    local, total = counts.shape[0], strategy.num_replicas_in_sync
    if local == total:
        return counts
    # As float32, for which every device has a collective, and exact up to 2^24.
    own = tf.pad(
        tf.cast(counts, tf.float32), [[first_replica, total - first_replica - local]]
    )

    def add() -> list:
        is_first = replica_index() == first_replica
        return _all_reduce([own if is_first else tf.zeros_like(own)])

    (summed,) = strategy.run(add)
    return tf.cast(strategy.experimental_local_results(summed)[0], tf.int32)


def replica_index() -> int:
    """Which replica this thread runs, among those of all workers."""
    context = tf.distribute.get_replica_context()
    return int(tf.get_static_value(context.replica_id_in_sync_group))


def current_share() -> Share | None:
    """The share of the step that this thread is in, or None outside of a step."""
    return getattr(_local, "share", None)


def distributed_share() -> Share | None:
    """The current share if other replicas take part in the step, else None."""
    share = current_share()
    return None if share is None or share.alone else share


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows `[start, stop)` that a replica processes of a global batch of `total`.

    The other attributes are those of `Share`.
    """

    start: Any
    stop: Any
    total: Any
    idle: Any = False
    num_counted: Any = 1
    is_first: Any = True


def rows_of_replica(total, replica: int, num_replicas: int, may_be_few: bool = True):
    """The rows of a global batch of `total` rows that a replica processes.

    Replica r of N has rows `[total * r // N, total * (r + 1) // N)`. Of a batch with
    fewer rows than replicas, which `may_be_few` says may come, everyone processes all
    rows, and the first replica alone is not idle.

    Returns:
        The `Rows`.
    """
    start = total * replica // num_replicas
    stop = total * (replica + 1) // num_replicas
    first = replica == 0
    if not may_be_few or num_replicas == 1:
        return Rows(start, stop, total, False, num_replicas, first)
    few = tf.convert_to_tensor(total) < num_replicas
    return Rows(
        start=tf.where(few, 0, start),
        stop=tf.where(few, total, stop),
        total=total,
        idle=False if first else few,
        num_counted=tf.where(few, 1, num_replicas),
        is_first=first,
    )


def rows_of_shard(counts, replica: int) -> Rows:
    """The rows of a replica where each one brings its own, `counts[r]` for replica r.

    One without rows is idle and stands in with a single row, the first of the batch as
    far as its place is concerned.

    Args:
        counts: int32 of shape (num_replicas,).
        replica: The index of the replica.
    """
    own, brings = counts[replica], counts > 0
    idle = own == 0
    start = tf.where(idle, 0, tf.reduce_sum(counts[:replica]))
    return Rows(
        start=start,
        stop=start + tf.maximum(own, 1),
        total=tf.reduce_sum(counts),
        idle=idle,
        num_counted=tf.reduce_sum(tf.cast(brings, tf.int32)),
        is_first=tf.argmax(brings, output_type=tf.int32) == replica,
    )


def global_sum(x):
    """Sums a tensor over the replicas, element by element.

    Args:
        x: A tensor of the same shape on every replica, e.g. a sum over local rows.

    Returns:
        A tensor of that shape; its gradient is this replica's share.
    """
    share = distributed_share()
    if share is None:
        return tf.convert_to_tensor(x)
    local = tf.convert_to_tensor(x)
    return share.remember(_with_value(local, share.sum_if_read(local)), local)


def global_mean(values, sample_weight=None):
    """The mean over the global batch, as `tf.reduce_mean` takes it over local rows.

    Args:
        values: A tensor with a row for each row of the batch, or a scalar that is the
            mean of the local rows.
        sample_weight: Optional weights that broadcast against `values`. With them the
            result is `sum(values * sample_weight) / sum(sample_weight)`.

    Returns:
        A scalar; its gradient is this replica's share.
    """
    values = tf.convert_to_tensor(values)
    if values.shape.rank == 0:
        return mean_of_local_means(values)
    if sample_weight is None:
        return global_ratio(tf.reduce_sum(values), size_of(values))
    weights = tf.cast(sample_weight, values.dtype) * tf.ones_like(values)
    return global_ratio(tf.reduce_sum(values * weights), tf.reduce_sum(weights))


def all_gather(x):
    """The rows of all replicas, in the order of the global batch.

    Args:
        x: A tensor of shape `(k * local_rows, ...)`, for any whole number k.

    Returns:
        A tensor of shape `(k * global_rows, ...)`, the same on every replica. It is
        differentiable: a replica's rows receive the gradients of all replicas.
    """
    x = tf.convert_to_tensor(x)
    share = distributed_share()
    if share is None:
        return x
    per_row = tf.shape(x)[0] // share.local_rows
    before = per_row * share.start
    after = per_row * (share.global_rows - share.start - share.local_rows)
    padding = [[before, after]] + [[0, 0]] * (x.shape.rank - 1)
    return _sum_both_ways(tf.pad(x, padding))


def stack_replicas(x):
    """Stacks a small tensor of every replica: `(num_replicas, *x.shape)`.

    It is differentiable like `all_gather`, and needs one exchange.
    """
    share = distributed_share()
    if share is None:
        return x[tf.newaxis]
    slot = tf.one_hot(share.replica, share.num_replicas, dtype=x.dtype)
    return _sum_both_ways(tf.reshape(slot, [-1] + [1] * x.shape.rank) * x)


def global_ratio(numerator, divisor, *, divisor_is_global: bool = False):
    """`sum of numerators / sum of divisors` over the replicas; 0 where that is 0 / 0.

    Args:
        numerator: A scalar, with gradient.
        divisor: A scalar, without gradient.
        divisor_is_global: Whether `divisor` is the sum already, known to every replica
            without asking the others.
    """
    divisor = tf.cast(tf.stop_gradient(divisor), numerator.dtype)
    share = distributed_share()
    if share is None:
        return tf.math.divide_no_nan(numerator, divisor)
    if divisor_is_global:
        local = tf.math.divide_no_nan(numerator, divisor)
        return share.remember(_with_value(local, share.sum_if_read(local)), local)
    sums = _sum(tf.stack([numerator, divisor]), share)
    local = tf.math.divide_no_nan(numerator, sums[1])
    value = tf.math.divide_no_nan(sums[0], sums[1])
    return share.remember(_with_value(local, value), local)


def mean_of_local_means(scalar):
    """The mean over the global batch of a scalar that is the mean of local rows."""
    scalar = tf.convert_to_tensor(scalar)
    share = distributed_share()
    if share is None:
        return scalar
    local_rows = tf.cast(share.local_rows, scalar.dtype)
    return global_ratio(scalar * local_rows, share.global_rows, divisor_is_global=True)


def replicated(scalar):
    """A value that every replica computes alike, e.g. a penalty on the weights.

    Its value stays; each replica carries an equal share of its gradient.
    """
    share = distributed_share()
    if share is None:
        return scalar
    local = scalar / tf.cast(share.num_counted, scalar.dtype)
    return share.remember(_with_value(local, scalar), local)


def size_of(tensor):
    """The number of elements of a tensor, a scalar of its dtype."""
    return tf.cast(tf.size(tensor), tensor.dtype)


@tf.custom_gradient
def _with_value(local, value):
    """`value` going forward; going back, the gradient belongs to `local`."""
    return tf.identity(value), lambda upstream: (upstream, None)


@tf.custom_gradient
def _sum_both_ways(x):
    share = distributed_share()
    if share is None:
        return tf.identity(x), lambda upstream: upstream
    return _sum(x, share), _sum_both_ways


def _sum(x, share: Share):
    """The sum over replicas of what each computed from its rows."""
    return share.all_reduce([share.counted(x)])[0]
