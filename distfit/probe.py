"""One symbolic run of a step, before it is compiled.

Nothing is computed: the step is traced once, as the first replica, on a batch with a
number of rows that nothing else has. The run builds what the step builds (layers,
metrics, optimizers), since no variable can be created inside the compiled loop, and it
finds out what the compiled step may leave out or must add: the `Plan`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from distfit import _keras, data, metrics, workers
from distfit.collectives import Rows, Share, current_share

# A dimension that is a multiple of this comes from the rows of the batch: no layer has
# such a size. It can be divided by 2 to 8, as a step may do with its rows. The primes
# stand for other dimensions left open.
ROWS = 1009 * 840
_OPEN_DIMENSIONS = (1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063)


@dataclasses.dataclass
class Plan:
    """What the compiled step needs to know of the user's step.

    Attributes:
        proportional: For each mean loss in the order of the calls, whether its number
            of values is a fixed multiple of the rows, so that each replica knows the
            divisor of the global batch without an exchange.
        unread: The sums over replicas, in the order of the calls, of which the step
            uses the gradient but not the value.
        by_rows: For each metric that was fed with a loss and a weight, whether the
            weight was the number of rows each time.
        state: The non-trainable variables that the step computes from local rows;
            their replicas are brought together after each step.
        tracked: Logs that are just results of metrics.
        derived: Logs computed from results of metrics, and these metrics.
        shapes: The shape of each log.
        optimizers: Optimizers that the step applies, each with its variables.
        seeds: The generator of the step's unseeded draws, if it has any.
    """

    proportional: list[bool] = dataclasses.field(default_factory=list)
    unread: set[int] = dataclasses.field(default_factory=set)
    by_rows: dict[keras.metrics.Metric, bool] = dataclasses.field(default_factory=dict)
    state: list[Any] = dataclasses.field(default_factory=list)
    tracked: dict[str, tuple[keras.metrics.Metric, str | None]] = dataclasses.field(
        default_factory=dict
    )
    derived: dict[str, list[keras.metrics.Metric]] = dataclasses.field(
        default_factory=dict
    )
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    optimizers: list[tuple[Any, list]] = dataclasses.field(default_factory=list)
    seeds: keras.random.SeedGenerator | None = None

    def follows_rows(self, call: int, values) -> bool:
        """Whether the mean loss of the given number has a size known from the rows."""
        return call < len(self.proportional) and self.proportional[call]

    def reads_sum(self, call: int) -> bool:
        """Whether the step reads the value of the sum of the given number."""
        return call not in self.unread

    def weighs_rows(self, metric: keras.metrics.Metric, weight) -> bool:
        """Whether a metric is given numbers of rows as the weights of a loss."""
        return self.by_rows.get(metric, False)


class SymbolicShare(Share):
    """The share of a replica in a step that is only looked at."""

    def __init__(self, model, num_replicas: int, plan: Plan):
        rows = Rows(0, ROWS, ROWS * num_replicas, num_counted=num_replicas)
        super().__init__(0, num_replicas, rows, model=model)
        self.plan = self
        self.found = plan
        self.summed: list[tf.Tensor] = []
        self.sums: list[tf.Tensor] = []
        self.applied: list[tf.Tensor] = []
        self.offsets: list[tf.Tensor] = []

    def stream_offset(self, distance):
        self.offsets.append(tf.zeros((), tf.int64))
        return self.offsets[-1]

    def all_reduce(self, tensors):
        if self.alone:
            return list(tensors)
        if tf.compat.v1.get_default_graph() is not self.graph:
            raise ValueError(
                "Replicas cannot exchange numbers inside a nested `tf.function`, "
                "`tf.cond` or `tf.while_loop`. Received: a loss or a collective called "
                "in one by a step. Remove the decorator, or move the call out of it."
            )
        summed = [tf.identity(t) for t in tensors]
        self.summed += summed
        return summed

    def sum_if_read(self, local):
        (summed,) = self.all_reduce([local])
        self.sums.append(summed)
        return summed

    def defers(self, optimizer, grads, variables) -> bool:
        self.applied += tf.nest.flatten(grads, expand_composites=True)
        if variables is not None:  # Else it must be built already, as Keras has it.
            self.found.optimizers.append((optimizer, variables))
        return True

    def follows_rows(self, call, values) -> bool:
        first, *others = values.shape.as_list()
        follows = (
            first is not None
            and first % ROWS == 0
            and all(n is not None and n % ROWS != 0 for n in others)
        )
        self.found.proportional.append(follows)
        return follows

    def weighs_rows(self, metric, weight) -> bool:
        follows = _static_scalar(tf.convert_to_tensor(weight)) == ROWS
        self.found.by_rows[metric] = follows and self.found.by_rows.get(metric, True)
        return follows


def probe(model: keras.Model, step: Callable, spec: Any, strategy) -> Plan:
    """Runs `step(data)` symbolically.

    Args:
        model: The model; its layers must be built.
        step: `model.train_step` or `model.test_step`.
        spec: Structure of `tf.TypeSpec` of a batch.
        strategy: The strategy of the model.
    """
    before = _parts(model)
    fixed = fixed_rows(spec) if strategy.num_replicas_in_sync > 1 else spec
    try:
        plan = _probe(model, step, fixed, strategy)
    except Exception:
        # Either layers that only the step calls were built by it, a moment too late for
        # its gradients, or it cannot take that many rows. Else its error comes again.
        if _parts(model) == before:
            return _probe(model, step, spec, strategy)
        return _probe(model, step, fixed, strategy)
    if len(metrics.all_of(model)) == before[1]:
        return plan
    # Metrics that the step made, one for each output's loss, were not yet watched.
    return _probe(model, step, fixed, strategy)


def _parts(model: keras.Model) -> tuple[int, int]:
    return len(model.variables), len(metrics.all_of(model))


def _probe(model: keras.Model, step: Callable, batch_spec: Any, strategy) -> Plan:
    num_replicas = strategy.num_replicas_in_sync
    plan = Plan()
    generators: list = []
    draws: contextlib.AbstractContextManager = contextlib.nullcontext()
    if num_replicas > 1:
        draws = _keras.new_global_seed_generator(generators)

    def describe(run: SymbolicRun) -> None:
        _describe_logs(plan, run.logs, run.results)
        if num_replicas > 1:
            plan.state = _state_from_local_rows(model, run)
            plan.unread = _unread_sums(plan, run)

    with draws:
        run_symbolically(
            model, step, batch_spec, strategy, num_replicas, describe, plan
        )
    plan.seeds = generators[0] if generators else None
    return plan


@dataclasses.dataclass
class SymbolicRun:
    """What a symbolic run of a step had in its hands; all tensors are symbolic.

    Attributes:
        batch: The batch.
        logs: What the step returned, without nesting.
        results: `(tensor, metric, key)` for each result of a metric.
        share: The share of the replica, with what it exchanged.
        scope: Holds the new values of variables.
    """

    batch: Any
    logs: dict
    results: list[tuple[Any, keras.metrics.Metric, str | None]]
    share: "SymbolicShare"
    scope: keras.StatelessScope

    def local_sources(self) -> set[str]:
        """Keys of what differs from replica to replica: rows, and random streams."""
        batch = tf.nest.flatten(self.batch, expand_composites=True)
        counts = [
            operation.outputs[0]
            for operation in tf.compat.v1.get_default_graph().get_operations()
            if operation.type == "Const" and _is_row_count(operation.outputs[0])
        ]
        tensors = [*batch, *self.share.offsets, *counts]
        return {key_of(t) for t in tensors if tf.is_tensor(t)}

    def exchanged(self) -> set[str]:
        """Keys of the tensors that are sums over replicas."""
        return {key_of(t) for t in self.share.summed}


@contextlib.contextmanager
def _gradients_of_assigned_weights() -> Iterator[None]:
    """Lets a tape differentiate weights that the step has assigned.

    Their new values are in the scope, not in the variables: the gradient is taken for
    nothing but its shape.
    """
    stock = tf.GradientTape.gradient

    def gradient(tape, target, sources, *args, **kwargs):
        if not any(_is_assigned(source) for source in tf.nest.flatten(sources)):
            return stock(tape, target, sources, *args, **kwargs)
        sources = tf.nest.map_structure(_keras.underlying, sources)
        zero = tf.UnconnectedGradients.ZERO
        return stock(tape, target, sources, unconnected_gradients=zero)

    tf.GradientTape.gradient = gradient
    try:
        yield
    finally:
        tf.GradientTape.gradient = stock


def _is_assigned(source: Any) -> bool:
    return isinstance(source, keras.Variable) and not hasattr(source.value, "handle")


class SymbolicContext(tf.distribute.ReplicaContext):
    """The context of a replica that has no others, for steps that exchange by hand."""

    def all_reduce(self, reduce_op, value, options=None):
        summed = tf.nest.map_structure(tf.identity, value)
        share = current_share()
        if isinstance(share, SymbolicShare):
            share.summed += tf.nest.flatten(summed)
        return summed


def run_symbolically(
    model: keras.Model,
    step: Callable,
    spec: Any,
    strategy,
    num_replicas: int,
    look: Callable[[SymbolicRun], None],
    plan: Plan,
) -> Any:
    """Traces `step` as the first of `num_replicas`, then calls `look` in its graph.

    No variable changes. Returns the concrete function.
    """

    def traced(batch):
        batch = data.without_optionals(batch)
        share = SymbolicShare(model, num_replicas, plan)
        with share, _recorded_results(model) as results:
            logs = metrics.flat_logs(step(batch))
            look(SymbolicRun(batch, logs, results, share, scope))

    with strategy.scope(), keras.StatelessScope(collect_losses=True) as scope:
        # A replica of this worker: variables have values of its own replicas alone.
        context = SymbolicContext(strategy, workers.of(strategy).first_replica)
        with context, keras.SymbolicScope(), _gradients_of_assigned_weights():
            function = tf.function(traced, autograph=False)
            return function.get_concrete_function(spec)


def fixed_rows(spec: Any) -> Any:
    """The spec of a batch with `ROWS` rows and no other open dimension."""
    open_dimensions = iter(_OPEN_DIMENSIONS * 100)

    def fix(leaf):
        if not isinstance(leaf, tf.TensorSpec) or leaf.shape.rank is None:
            return leaf
        others = [next(open_dimensions) if n is None else n for n in leaf.shape[1:]]
        return tf.TensorSpec([ROWS, *others], leaf.dtype)

    return tree.map_structure(fix, spec)


@contextlib.contextmanager
def _recorded_results(model: keras.Model) -> Iterator[list[tuple]]:
    """Notes which metric each tensor that a `result()` returns belongs to."""
    results: list[tuple[Any, keras.metrics.Metric, str | None]] = []
    adapted = {
        metric: metric.__dict__.get("result") for metric in metrics.all_of(model)
    }
    for metric in adapted:
        metric.__dict__["result"] = functools.partial(_record_result, metric, results)
    try:
        yield results
    finally:
        for metric, result in adapted.items():
            del metric.__dict__["result"]
            if result is not None:
                metric.__dict__["result"] = result


def _record_result(metric: keras.metrics.Metric, results: list[tuple]) -> Any:
    value = type(metric).result(metric)
    is_dict = isinstance(value, dict)
    parts = metrics.flat_logs(value).items() if is_dict else [(None, value)]
    results += [(part, metric, key) for key, part in parts]
    return value


def _is_row_count(constant: tf.Tensor) -> bool:
    """Whether a constant is what `tf.shape(x)` gave for the rows of the batch."""
    if constant.shape.num_elements() > 16 or not (
        constant.dtype.is_integer or constant.dtype.is_floating
    ):
        return False
    values = tf.get_static_value(constant)
    values = values[np.isfinite(values)]
    return bool(np.any((values != 0) & (values % ROWS == 0)))


def _static_scalar(tensor: tf.Tensor) -> Any:
    """The value of a scalar that is known while tracing; None if it is not.

    TensorFlow knows `tf.shape(x)`, but not `tf.shape(x)[0]`.
    """
    value = tf.get_static_value(tensor)
    if value is None and tensor.op.type == "Cast":
        return _static_scalar(tensor.op.inputs[0])
    if value is None and tensor.op.type == "StridedSlice" and tensor.shape.rank == 0:
        sliced, begin = map(tf.get_static_value, tensor.op.inputs[:2])
        is_known = np.ndim(sliced) == 1 and np.shape(begin) == (1,)
        return sliced[begin[0]] if is_known else None
    return value


def _describe_logs(plan: Plan, logs: dict, results: list[tuple]) -> None:
    for name, value in logs.items():
        source = next(((m, key) for part, m, key in results if part is value), None)
        if source is not None:
            plan.tracked[name] = source
            continue
        value = tf.convert_to_tensor(value)
        plan.shapes[name] = tuple(value.shape)
        reached = ancestors([value])
        used = [m for part, m, _ in results if key_of(part) in reached]
        if used:
            plan.derived[name] = list(dict.fromkeys(used))


def _state_from_local_rows(model, run: SymbolicRun) -> list:
    """Non-trainable variables whose new value differs from replica to replica."""
    sources, stops = run.local_sources(), run.exchanged()
    found = []
    for variable in model.non_trainable_weights:
        value = run.scope.get_current_value(variable)
        if value is not None and sources & ancestors([value], stops):
            found.append(variable)
    return found


def _unread_sums(plan: Plan, run: SymbolicRun) -> set[int]:
    """The numbers of the sums over replicas on whose values nothing depends."""
    if not all(plan.by_rows.values()):  # A metric is fed now one way, now the other.
        return set()
    logs = [
        value
        for name, value in run.logs.items()
        if name in plan.derived or run.share.local_part(value) is None
    ]
    graph = tf.compat.v1.get_default_graph()
    effects = [
        tensor
        for operation in graph.get_operations()
        if operation.op_def is not None and operation.op_def.is_stateful
        for tensor in operation.inputs
    ]
    states = run.scope.state_mapping.values()
    used = [t for t in (*run.share.applied, *states, *logs) if t is not None]
    reached = ancestors(
        [*effects, *map(tf.convert_to_tensor, used)], not_through=_SHAPE_OF
    )
    sums = enumerate(run.share.sums)
    return {call for call, tensor in sums if key_of(tensor) not in reached}


# Operations that look at the shape of a tensor, not at its values.
_SHAPE_OF = frozenset({"OnesLike", "ZerosLike", "Shape", "ShapeN", "Size", "Rank"})


def ancestors(
    tensors: Iterable[tf.Tensor], stops=frozenset(), not_through=frozenset()
) -> set[str]:
    """Keys of all tensors that some are computed from; theirs too.

    Args:
        tensors: Tensors of one graph.
        stops: Keys of tensors past which not to look.
        not_through: Types of operations past which not to look.
    """
    seen: set[str] = set()
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if key_of(tensor) in seen or key_of(tensor) in stops:
            continue
        seen.add(key_of(tensor))
        if tensor.op.type not in not_through:
            pending += _inputs_of(tensor)
    return seen


def _inputs_of(tensor: tf.Tensor) -> list[tf.Tensor]:
    if tensor.op.type == "IdentityN":  # Each output is one input; custom gradients
        return [tensor.op.inputs[tensor.value_index]]  # lead all arguments past it.
    return list(tensor.op.inputs)


def key_of(tensor: Any) -> Any:
    """What identifies a tensor of the graph of a symbolic run."""
    return getattr(tensor, "name", id(tensor))
