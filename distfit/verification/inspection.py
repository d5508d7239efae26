"""What can be seen of a step by tracing it once, without running it.

The step is traced as the first of many replicas, on a number of rows that no other
dimension has. In the graph one can tell what is computed from the rows of one replica
alone, which random numbers differ between replicas, and each operation knows the line
that made it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from distfit import _keras, metrics, probe
from distfit.verification import sources
from distfit.verification.streams import inlined_functions

# A prime, and more than a step puts batches side by side: `k * ROWS` rows are local.
_REPLICAS = 101


@dataclasses.dataclass
class Draw:
    """A random operation.

    Attributes:
        place: `file:line` in the user's code.
        by_row: Whether it draws for rows of the batch.
        stream: "replica": replicas draw different numbers. "same": all draw the same.
            "unseeded": from TensorFlow's own generators, which nothing reproduces.
    """

    place: str | None
    by_row: bool
    stream: str


@dataclasses.dataclass
class Facts:
    """What the inspection of a `train_step` found; places are `file:line`.

    Attributes:
        draws: The random operations, but for those in a nested function.
        draws_by_replica: Whether replicas draw different numbers anywhere.
        local_means: Sums, means and the like over the rows of this replica alone that
            an optimizer minimises.
        local_logs: By log, such a place if its value is computed so.
        local_statistics: Such places where rows are reduced and the result is used for
            rows again.
        pairs: Operations that pair rows of this replica with one another.
        penalties: Where something computed from weights alone is added up for what an
            optimizer minimises.
        loss_reads: Where the step reads `losses` itself.
        exchanges: Where the step exchanges something by hand.
        replica_ids: Where the step asks which replica it is.
        created: `(what, place)` for each object made inside the step.
        python_state: `(name, place)` for each Python value that the step changes.
        unlisted_metrics: Metrics that the model's `metrics` lacks.
        scalar_updates: `(metric, place)` for each update with a local scalar.
        local_state: By the path of a variable that the step computes from local rows,
            the place.
    """

    draws: list[Draw] = dataclasses.field(default_factory=list)
    draws_by_replica: bool = False
    local_means: list[str | None] = dataclasses.field(default_factory=list)
    local_logs: dict[str, str | None] = dataclasses.field(default_factory=dict)
    local_statistics: list[str | None] = dataclasses.field(default_factory=list)
    pairs: list[str | None] = dataclasses.field(default_factory=list)
    penalties: list[str | None] = dataclasses.field(default_factory=list)
    loss_reads: list[str | None] = dataclasses.field(default_factory=list)
    exchanges: list[str | None] = dataclasses.field(default_factory=list)
    replica_ids: list[str | None] = dataclasses.field(default_factory=list)
    created: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    python_state: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    unlisted_metrics: list[str] = dataclasses.field(default_factory=list)
    scalar_updates: list[tuple[str, str | None]] = dataclasses.field(
        default_factory=list
    )
    local_state: dict[str, str | None] = dataclasses.field(default_factory=dict)


def inspect_step(model: keras.Model, spec: Any) -> Facts:
    """Looks at `model.train_step`.

    Args:
        model: A compiled `distfit.Model` on one device, its layers built.
        spec: Structure of the `tf.TypeSpec`s of a batch.

    Returns:
        What was found; what a step has done before it failed, if it cannot be traced.
    """
    before = _python_values(model)
    fixed = probe.fixed_rows(spec)
    # Nested functions may need what only their own tracing gives them, and the step may
    # not be able to take so many rows.
    for attempt in ((fixed, inlined_functions), (fixed, None), (spec, None)):
        facts, traced = _look(model, *attempt)
        if traced:
            break
    facts.python_state = _changed(model, before)
    facts.local_state |= _raw_state(model)
    listed = set(model.metrics)
    facts.unlisted_metrics = [
        metric.name for metric in metrics.all_of(model) if metric not in listed
    ]
    return facts


def _look(model: keras.Model, spec: Any, within: Callable | None) -> tuple[Facts, bool]:
    """Traces the step; returns what was found, and whether it could be traced."""
    facts = Facts()
    targets: list = []
    created: list = []

    def step(batch):
        with within() if within else contextlib.nullcontext():
            return model.train_step(batch)

    def look(run: probe.SymbolicRun) -> None:
        graph = _Graph(run)
        facts.draws = graph.draws()
        facts.draws_by_replica = bool(run.share.offsets)
        facts.local_means = graph.local_reductions(targets)
        facts.local_statistics = graph.local_statistics(targets)
        facts.pairs = graph.pairs(targets)
        facts.penalties = graph.penalties(targets)
        facts.local_logs = graph.local_logs()
        facts.local_state = graph.local_state(model)
        facts.scalar_updates = [
            (name, place)
            for name, place, value in updates
            if graph.is_local(value) and run.share.local_part(value) is None
        ]

    with contextlib.ExitStack() as stack:
        generator = keras.random.SeedGenerator(0)
        stack.enter_context(_keras.global_seed_generator(generator))
        stack.callback(lambda: facts.created.extend(_with_state(created)))
        stack.enter_context(_recording_calls(facts, targets, created))
        updates = stack.enter_context(_recording_updates(model))
        strategy = model.distribute_strategy
        try:
            probe.run_symbolically(
                model, step, spec, strategy, _REPLICAS, look, probe.Plan()
            )
        except Exception:  # Whoever runs the step will see what it fails with.
            return facts, False
    return facts, True


def _raw_state(model: keras.Model) -> dict[str, str | None]:
    """Where layers change variables that Keras does not know."""
    return {
        f"{layer.name}/{name}": sources.place_of_attribute(type(layer), name)
        for layer in _keras.layers_of(model)
        for name, value in vars(layer).items()
        if isinstance(value, tf.Variable)
    }


class _Graph:
    """The graph of a step, asked about."""

    def __init__(self, run: probe.SymbolicRun):
        self.run = run
        self.sources = run.local_sources()
        self.stops = run.exchanged()
        self.operations = tf.compat.v1.get_default_graph().get_operations()

    def is_local(self, tensor: Any) -> bool:
        """Whether a value is computed from local rows, and not a sum over replicas."""
        if not tf.is_tensor(tensor):
            return False
        return bool(self.sources & probe.ancestors([tensor], self.stops))

    def draws(self) -> list[Draw]:
        offsets = {probe.key_of(t) for t in self.run.share.offsets}
        found = []
        for operation in self.operations:
            stream = _random_kind(operation)
            if stream is None or "distfit/random.py" in _files_of(operation):
                continue
            by_row = any(_has_rows(output) for output in operation.outputs)
            if stream == "seeded":
                inputs = probe.ancestors(operation.inputs)
                stream = "replica" if inputs & offsets else "same"
            found.append(Draw(_place(operation), by_row, stream))
        return found

    def local_reductions(self, tensors) -> list[str | None]:
        """Where rows are reduced for `tensors`, without an exchange afterwards."""
        reached = probe.ancestors(tensors, self.stops)
        return _unique(
            _place(o)
            for o in self.operations
            if _reduces_rows(o) and any(probe.key_of(t) in reached for t in o.outputs)
        )

    def local_statistics(self, targets) -> list[str | None]:
        """Where rows are reduced for something that has rows again."""
        reached = self._before_the_loss(targets)
        with_rows = [
            output
            for operation in self.operations
            for output in operation.outputs
            if probe.key_of(output) in reached and _row_dimensions(output)
        ]
        return self.local_reductions(with_rows)

    def pairs(self, targets) -> list[str | None]:
        """Where values with two dimensions of local rows are made."""
        reached = self._before_the_loss(targets)
        return _unique(
            _place(operation)
            for operation in self.operations
            for output in operation.outputs
            if probe.key_of(output) in reached
            and _row_dimensions(output) > 1
            # The first of them: what is computed from it says nothing new.
            and all(_row_dimensions(t) < 2 for t in operation.inputs)
        )

    def penalties(self, targets) -> list[str | None]:
        """Where numbers that have nothing to do with rows become one number."""
        stops = self.stops | self.run.share.remembered_keys(probe.key_of)
        reached = probe.ancestors(targets, stops)
        return _unique(
            _place(operation)
            for operation in self.operations
            for output in operation.outputs
            if operation.type in ("Sum", "Mean", "L2Loss", "EuclideanNorm")
            and output.shape.rank == 0
            and probe.key_of(output) in reached
            and self._depends_on_weights_alone(output)
        )

    def _depends_on_weights_alone(self, tensor: tf.Tensor) -> bool:
        keys = probe.ancestors([tensor])
        return not keys & self.sources and any("ReadVariable" in key for key in keys)

    def _before_the_loss(self, targets) -> set[str]:
        """What the summands of this replica are computed from, without an exchange."""
        return probe.ancestors([*targets, *self.run.share.local_parts], self.stops)

    def local_logs(self) -> dict[str, str | None]:
        results = {probe.key_of(part) for part, _, _ in self.run.results}
        found = {}
        for name, value in self.run.logs.items():
            if self.is_local(value) and not results & probe.ancestors([value]):
                places = self.local_reductions([value])
                known = [place for place in places if place is not None]
                found[name] = known[-1] if known else _place(value.op)
        return found

    def local_state(self, model: keras.Model) -> dict[str, str | None]:
        found = {}
        for variable in model.non_trainable_weights:
            value = self.run.scope.get_current_value(variable)
            if self.is_local(value):
                found[variable.path] = _place(value.op)
        return found


_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "EuclideanNorm", "Einsum", "MatMul")
_UNSEEDED = (
    "RandomStandardNormal",
    "RandomUniform",
    "RandomUniformInt",
    "TruncatedNormal",
    "ParameterizedTruncatedNormal",
    "RandomGamma",
    "RandomPoissonV2",
    "RandomShuffle",
    "Multinomial",
)


def _random_kind(operation: tf.Operation) -> str | None:
    name = operation.type
    if name in _UNSEEDED or name.startswith("Stateful"):
        is_call = name == "StatefulPartitionedCall"
        return None if is_call else "unseeded"
    words = ("Random", "Normal", "Multinomial", "Shuffle", "Gamma", "Poisson", "Binom")
    is_draw = name.startswith("Stateless") and any(word in name for word in words)
    return "seeded" if is_draw and "Get" not in name else None


def _reduces_rows(operation: tf.Operation) -> bool:
    return (
        operation.type in _REDUCTIONS
        and any(_row_dimensions(t) for t in operation.inputs)
        and not any(_row_dimensions(t) for t in operation.outputs)
    )


def _row_dimensions(tensor: tf.Tensor) -> int:
    """How many dimensions are multiples of the local rows, but not of all rows."""
    if tensor.shape.rank is None:
        return 0
    return sum(
        n is not None and n > 0 and n % probe.ROWS == 0 and n % _REPLICAS != 0
        for n in tensor.shape
    )


def _has_rows(tensor: tf.Tensor) -> bool:
    return tensor.shape.rank is not None and _row_dimensions(tensor) > 0


def _place(operation: tf.Operation) -> str | None:
    return sources.place_in(operation.traceback)


def _files_of(operation: tf.Operation) -> str:
    return "\n".join(frame.filename for frame in operation.traceback)


def _unique(items) -> list:
    return list(dict.fromkeys(items))


# What leaves no trace in a graph is caught while it happens.


@contextlib.contextmanager
def _recording_calls(facts: Facts, targets: list, created: list) -> Iterator[None]:
    context = probe.SymbolicContext
    gradient = tf.GradientTape.gradient
    all_reduce = context.all_reduce
    replica_id = context.replica_id_in_sync_group
    losses = keras.layers.Layer.losses

    def recording_gradient(tape, target, *args, **kwargs):
        targets.extend(t for t in tree.flatten(target) if tf.is_tensor(t))
        return gradient(tape, target, *args, **kwargs)

    def recording_all_reduce(context, *args, **kwargs):
        _keep(facts.exchanges, sources.direct_caller())
        return all_reduce(context, *args, **kwargs)

    def recording_replica_id(context):
        _keep(facts.replica_ids, sources.direct_caller())
        return replica_id.fget(context)

    def recording_losses(layer):
        _keep(facts.loss_reads, sources.direct_caller())
        return losses.fget(layer)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (tf.GradientTape, "gradient", recording_gradient),
            (context, "all_reduce", recording_all_reduce),
            (context, "replica_id_in_sync_group", property(recording_replica_id)),
            (keras.layers.Layer, "losses", property(recording_losses)),
        ):
            stack.enter_context(_replaced(owner, name, value))
        for kind in (
            keras.optimizers.Optimizer,
            keras.layers.Layer,
            keras.metrics.Metric,
            keras.Variable,
        ):
            init = _recording_init(kind.__init__, created)
            stack.enter_context(_replaced(kind, "__init__", init))
        creator = _recording_creator(created)
        stack.enter_context(tf.variable_creator_scope(creator))
        yield


def _recording_init(init: Callable, created: list) -> Callable:
    @functools.wraps(init)
    def recording(self, *args, **kwargs):
        _keep_created(created, self, type(self).__name__)
        init(self, *args, **kwargs)

    return recording


def _recording_creator(created: list) -> Callable:
    def creator(next_creator, **kwargs):
        _keep_created(created, None, "tf.Variable")
        return next_creator(**kwargs)

    return creator


def _keep_created(created: list, made: Any, what: str) -> None:
    """Notes an object that the step made, unless it belongs to a part being built."""
    if sources.called_by("build"):
        return
    place = sources.calling_place(skip="__init__")
    if place is not None:
        created.append((made, what, place))


def _with_state(created: list) -> list[tuple[str, str | None]]:
    """The objects made in a step, but for layers that hold nothing."""
    found: dict[str | None, str] = {}
    for made, what, place in created:
        if isinstance(made, keras.layers.Layer) and not made.variables:
            continue
        found.setdefault(place, what)
    return [(what, place) for place, what in found.items()]


def _keep(places: list, place: str | None) -> None:
    if place is not None and place not in places:
        places.append(place)


@contextlib.contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextlib.contextmanager
def _recording_updates(model: keras.Model) -> Iterator[list]:
    """Yields `(metric, place, value)` for each update with nothing but a scalar."""
    updates: list[tuple[str, str | None, Any]] = []
    own = {m: m.__dict__.get("update_state") for m in metrics.all_of(model)}

    def recording(metric, update):
        def update_state(*args, **kwargs):
            if metrics.counts_steps(args, kwargs) and args:
                updates.append((metric.name, sources.calling_place(), args[0]))
            return update(*args, **kwargs)

        return update_state

    for metric in own:
        metric.__dict__["update_state"] = recording(metric, metric.update_state)
    try:
        yield updates
    finally:
        for metric, update in own.items():
            del metric.__dict__["update_state"]
            if update is not None:
                metric.__dict__["update_state"] = update


# Python values that the step changes: it is traced once, and they change no more.


def _python_values(model: keras.Model) -> dict[tuple[Any, str], Any]:
    """Numbers, texts and lengths that are attributes of the model and its layers."""
    return {
        (layer, name): len(value) if isinstance(value, list) else value
        for layer in _keras.layers_of(model)
        for name, value in vars(layer).items()
        if isinstance(value, int | float | str | list)
    }


def _changed(model: keras.Model, before: dict) -> list[tuple[str, str | None]]:
    after = _python_values(model)
    found: list[tuple[str, str | None]] = []
    for (layer, name), value in after.items():
        # What a class declares becomes an attribute of the object when it changes.
        known = before.get((layer, name), getattr(type(layer), name, value))
        if repr(known) != repr(value):  # A NaN is no other NaN.
            place = sources.place_of_attribute(type(layer), name)
            if place is not None:  # Else Keras itself keeps something there.
                found.append((f"{type(layer).__name__}.{name}", place))
    return found
