"""One symbolic run of a step, before it is compiled.

Nothing is computed: the step is traced once, as the first replica, on a batch with a
number of rows that nothing else has. The run builds what the step builds (layers,
metrics, optimizers), since no variable can be created inside the compiled loop, and it
finds out what the compiled step may leave out or must add: the `Plan`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from distfit import _keras, data, metrics
from distfit.collectives import Share

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
        state: The non-trainable variables that the step computes from local rows;
            their replicas are brought together after each step.
        tracked: Logs that are just results of metrics.
        derived: Logs computed from results of metrics, and these metrics.
        shapes: The shape of each log.
        optimizers: Optimizers that the step applies, each with its variables.
        seeds: The generator of the step's unseeded draws, if it has any.
    """

    proportional: list[bool] = dataclasses.field(default_factory=list)
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


class _Probe(Share):
    """The share of a replica in a step that is only looked at."""

    def __init__(self, model, num_replicas: int, plan: Plan):
        bounds = (0, ROWS, ROWS * num_replicas, False)
        super().__init__(0, num_replicas, bounds, model=model)
        self.plan = self
        self.found = plan
        self.summed: list[tf.Tensor] = []
        self.offsets: list[tf.Tensor] = []
        self.graph = tf.compat.v1.get_default_graph()

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

    def defers(self, optimizer, variables) -> bool:
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

    def traced(batch):
        batch = data.without_optionals(batch)
        share = _Probe(model, num_replicas, plan)
        with share, _recorded_results(model) as results:
            logs = metrics.flat_logs(step(batch))
        _describe_logs(plan, logs, results)
        if num_replicas > 1:
            plan.state = _state_from_local_rows(model, scope, batch, share)

    with strategy.scope(), draws, keras.StatelessScope(collect_losses=True) as scope:
        with tf.distribute.ReplicaContext(strategy, 0), keras.SymbolicScope():
            tf.function(traced, autograph=False).get_concrete_function(batch_spec)
    plan.seeds = generators[0] if generators else None
    return plan


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
    parts = value.items() if isinstance(value, dict) else [(None, value)]
    results += [(part, metric, key) for key, part in parts]
    return value


def _describe_logs(plan: Plan, logs: dict, results: list[tuple]) -> None:
    for name, value in logs.items():
        source = next(((m, key) for part, m, key in results if part is value), None)
        if source is not None:
            plan.tracked[name] = source
            continue
        value = tf.convert_to_tensor(value)
        plan.shapes[name] = tuple(value.shape)
        reached = _ancestors(value)
        used = [m for part, m, _ in results if _key(part) in reached]
        if used:
            plan.derived[name] = list(dict.fromkeys(used))


def _state_from_local_rows(model, scope, batch, share: _Probe) -> list:
    """Non-trainable variables whose new value differs from replica to replica."""
    local = [*tf.nest.flatten(batch, expand_composites=True), *share.offsets]
    sources = {_key(t) for t in local if tf.is_tensor(t)}
    stops = {_key(t) for t in share.summed}
    found = []
    for variable in model.non_trainable_weights:
        value = scope.get_current_value(variable)
        if value is not None and sources & _ancestors(value, stops):
            found.append(variable)
    return found


def _ancestors(tensor: tf.Tensor, stops=frozenset()) -> set[str]:
    """Names of all tensors that a symbolic tensor is computed from, and its own."""
    seen: set[str] = set()
    pending = [tensor]
    while pending:
        tensor = pending.pop()
        if _key(tensor) in seen or _key(tensor) in stops:
            continue
        seen.add(_key(tensor))
        pending += _inputs_of(tensor)
    return seen


def _inputs_of(tensor: tf.Tensor) -> list[tf.Tensor]:
    if tensor.op.type == "IdentityN":  # Each output is one input; custom gradients
        return [tensor.op.inputs[tensor.value_index]]  # lead all arguments past it.
    return list(tensor.op.inputs)


def _key(tensor: Any) -> Any:
    return getattr(tensor, "name", id(tensor))
