"""A partitioned graph: stages of each replica, and joint operations between them.

A stage is the graph of one replica up to the next exchange. It is built once and placed
once for each replica; its inputs are what differs between replicas (rows, handles of
variables). Between two stages come the *meetings*: exchanges, operations that one
replica runs for all, branches and loops.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from distfit._keras import graphs
from distfit._keras.templates import Template
from distfit.partition.exchanges import Replicas


class Port:
    """A tensor that no stage computes: a program's input or a meeting's result."""

    __slots__ = ("dtype", "shape")

    def __init__(self, dtype: tf.DType, shape: Any = None):
        self.dtype = dtype
        self.shape = shape


@dataclasses.dataclass(frozen=True)
class RowPorts:
    """The inputs of every program that describe a replica's rows: int32 scalars.

    `total` is the number of rows of the global batch, `start` the first row of this
    replica, `count` its number of rows, `index` its index among all replicas.
    """

    total: Port
    start: Port
    count: Port
    index: Port

    @classmethod
    def new(cls) -> "RowPorts":
        return cls(*(Port(tf.int32, ()) for _ in range(4)))

    def all(self) -> list[Port]:
        return [self.total, self.start, self.count, self.index]


# The tensors of a program on all replicas of this process, by port or by tensor of a
# stage.
Placed = dict[Any, list[Any]]


def key_of(tensor: Any) -> Any:
    """The key in `Placed` of a tensor of a stage, or of a port."""
    return tensor.ref() if isinstance(tensor, tf.Tensor) else tensor


class Stage:
    """The graph of one replica between two meetings."""

    def __init__(self, once: bool = False) -> None:
        self.graph = graphs.new_graph("stage")
        self.once = once  # Whether one replica runs it for all.
        self.inputs: dict[Any, tf.Tensor] = {}
        self.sources: dict[Any, Any] = {}
        self.exports: dict[Any, tf.Tensor] = {}
        self.cache: dict[Any, Any] = {}
        self._template: Template | None = None

    def input(self, source: Any, dtype: tf.DType, shape: Any) -> tf.Tensor:
        """The placeholder for a port or for a tensor of another stage."""
        key = key_of(source)
        if key not in self.inputs:
            if dtype == tf.resource:
                shape = None  # Or it would be taken for the shape of the variable.
            with self.graph.as_default():
                self.inputs[key] = tf.compat.v1.placeholder(dtype, shape)
            self.sources[key] = source
        return self.inputs[key]

    def export(self, tensor: tf.Tensor) -> None:
        """Notes that a tensor is used outside of the stage."""
        self.exports[tensor.ref()] = tensor

    def create(
        self, node: Any, inputs: Sequence[tf.Tensor], **attributes: int
    ) -> list[tf.Tensor]:
        """Adds the operation of a node, with other inputs and attributes."""
        with self.graph.as_default():
            return graphs.copy_operation(self.graph, node.op, inputs, **attributes)

    def place(self, placed: Placed, replicas: Replicas, jit: bool = False) -> None:
        """Adds the stage to the current graph, for every replica."""
        if not self.graph.get_operations():
            return
        if self._template is None:
            self._template = Template(
                self.graph, list(self.inputs.values()), list(self.exports.values())
            )
        given = [[placed[key][r] for key in self.inputs] for r in range(replicas.count)]
        if self.once:
            (results,) = self._template.place(given[:1], replicas.devices[:1])
            of_replicas = [results] * replicas.count
        elif jit and self._compiles():
            pairs = zip(given, replicas.devices, strict=True)
            of_replicas = [self._template.place_compiled(*pair) for pair in pairs]
        else:
            of_replicas = self._template.place(given, replicas.devices)
        for key, *tensors in zip(self.exports, *of_replicas, strict=True):
            placed[key] = tensors

    def _compiles(self) -> bool:
        """Whether XLA is useful; it cannot take or return lists of tensors."""
        crossing = [*self.inputs.values(), *self.exports.values()]
        if any(tensor.dtype in (tf.variant, tf.string) for tensor in crossing):
            return False
        return any(op.type not in _TRIVIAL for op in self.graph.get_operations())


_TRIVIAL = {"Placeholder", "Const", "Identity", "NoOp"}


class Meeting:
    """A joint operation of all replicas of this process, between two stages."""

    @property
    def programs(self) -> "list[Program]":
        """The programs inside it."""
        return []

    def place(self, placed: Placed, replicas: Replicas, jit: bool) -> None:
        raise NotImplementedError


class Level:
    """Meetings, and the stage that comes after them."""

    def __init__(self) -> None:
        self.meetings: list[Meeting | Stage] = []
        self.stage = Stage()


@dataclasses.dataclass
class Program:
    """A graph for all replicas.

    Attributes:
        inputs: The ports of its inputs.
        rows: The ports that describe the rows of the replicas.
        levels: Its meetings and stages, in order.
        outputs: Its outputs, as ports or tensors of stages.
    """

    inputs: list[Port]
    rows: RowPorts
    levels: list[Level]
    outputs: list[Any]

    @property
    def meets(self) -> bool:
        """Whether it has any meetings."""
        return len(self.levels) > 1 or any(level.meetings for level in self.levels)

    @property
    def exchanges(self) -> "list[Exchange]":
        """All exchanges, including those in branches and loops."""
        found: list[Exchange] = []
        for level in self.levels:
            for meeting in level.meetings:
                if isinstance(meeting, Exchange):
                    found.append(meeting)
                elif isinstance(meeting, Meeting):
                    found += [e for p in meeting.programs for e in p.exchanges]
        return found

    def place(
        self,
        inputs: Sequence[list],
        rows: Sequence[list],
        replicas: Replicas,
        jit: bool = False,
    ) -> list[list]:
        """Adds it to the current graph.

        Args:
            inputs, rows: For each port, the tensors of all replicas.
            replicas: The replicas of this process.
            jit: Whether stages are compiled by XLA.

        Returns:
            For each output, the tensors of all replicas.
        """
        placed: Placed = dict(zip(self.inputs, inputs, strict=True))
        placed |= dict(zip(self.rows.all(), rows, strict=True))
        for level in self.levels:
            for meeting in level.meetings:
                meeting.place(placed, replicas, jit)
            level.stage.place(placed, replicas, jit)
        return [placed[key_of(output)] for output in self.outputs]


@dataclasses.dataclass
class Exchange(Meeting):
    """The sums and gathers of a level; all sums travel together.

    Attributes:
        rows: The ports that describe the rows of the replicas.
        sums: Pairs of a partial tensor and the port of its sum.
        gathers: Triples of a tensor, its layout and the port of the result.
    """

    rows: RowPorts
    sums: list[tuple[Any, Port]] = dataclasses.field(default_factory=list)
    gathers: list[tuple[Any, Any, Port]] = dataclasses.field(default_factory=list)

    @property
    def has_fixed_size(self) -> bool:
        """Whether it exchanges the same number of elements at each step."""
        shapes = [port.shape for _, port in self.sums]
        return not self.gathers and all(s is not None and None not in s for s in shapes)

    def place(self, placed: Placed, replicas: Replicas, jit: bool) -> None:
        if self.sums:
            parts = [placed[key_of(source)] for source, _ in self.sums]
            for (_, port), total in zip(self.sums, replicas.sum(parts), strict=True):
                placed[port] = total
        for source, layout, port in self.gathers:
            placed[port] = replicas.gather(
                placed[key_of(source)],
                layout,
                total=placed[self.rows.total],
                start=placed[self.rows.start],
                count=placed[self.rows.count],
            )


@dataclasses.dataclass
class Nested(Meeting):
    """A meeting that runs programs: a branch or a loop.

    It is one operation for all replicas if its programs have meetings, else one each.

    Attributes:
        inputs: Its inputs.
        outputs: The ports of its outputs.
        rows: The ports that describe the rows of the replicas.
    """

    inputs: list[Any]
    outputs: list[Port]
    rows: RowPorts

    def place(self, placed: Placed, replicas: Replicas, jit: bool) -> None:
        inputs = [placed[key_of(source)] for source in self.inputs]
        rows = [placed[port] for port in self.rows.all()]
        if any(program.meets for program in self.programs):
            results = self._placed(inputs, rows, replicas, jit)
        else:
            each = []
            for r in range(replicas.count):
                one = replicas.only(r)
                with tf.device(one.devices[0]):
                    own = [[part[r]] for part in inputs]
                    own_rows = [[part[r]] for part in rows]
                    each.append(self._placed(own, own_rows, one, jit))
            results = [sum(parts, []) for parts in zip(*each, strict=True)]
        for port, tensors in zip(self.outputs, results, strict=True):
            placed[port] = tensors

    def _placed(self, inputs, rows, replicas: Replicas, jit: bool) -> list[list]:
        """The outputs on the given replicas."""
        raise NotImplementedError


@dataclasses.dataclass
class Branch(Nested):
    """A `tf.cond` (or a `tf.switch_case`) whose branches are programs with the same
    inputs and outputs.

    Attributes:
        inputs: The condition or index, then the inputs of the branches.
        outputs, rows: As in `Nested`.
        branches: For `tf.cond`, the branch for False, then the one for True.
    """

    branches: list[Program]

    @property
    def programs(self) -> list[Program]:
        return self.branches

    def _placed(self, inputs, rows, replicas, jit) -> list[list]:
        (index, *_), *given = inputs

        def branch(program: Program) -> Callable:
            def run():
                outputs = program.place(given, rows, replicas, jit)
                flat = [tensor for tensors in outputs for tensor in tensors]
                # TensorFlow requires a branch to return something.
                return [tf.identity(t) for t in flat] or [tf.constant(0)]

            return run

        if index.dtype == tf.bool:
            on_false, on_true = self.branches
            flat = tf.cond(index, branch(on_true), branch(on_false))
        else:
            flat = tf.switch_case(index, [branch(b) for b in self.branches])
        flat = list(flat) if isinstance(flat, list | tuple) else [flat]
        return _by_replica(flat[: len(self.outputs) * replicas.count], replicas.count)


@dataclasses.dataclass
class Loop(Nested):
    """A `tf.while_loop` whose condition and body are programs.

    Attributes:
        inputs: The initial values.
        outputs, rows: As in `Nested`.
        condition: A program that returns a bool.
        body: A program that returns the loop's variables.
        constant: For each variable, whether the body returns it unchanged.
        shapes: The shape invariants of the variables.
        parallel_iterations: As in `tf.while_loop`.
    """

    condition: Program
    body: Program
    constant: list[bool]
    shapes: list[Any]
    parallel_iterations: int

    @property
    def programs(self) -> list[Program]:
        return [self.condition, self.body]

    def _placed(self, inputs, rows, replicas, jit) -> list[list]:
        count = replicas.count
        moving = [i for i, constant in enumerate(self.constant) if not constant]

        def variables(flat: Sequence) -> list[list]:
            values = list(inputs)
            for i, tensors in zip(moving, _by_replica(list(flat), count), strict=True):
                values[i] = tensors
            return values

        def condition(*flat):
            return self.condition.place(variables(flat), rows, replicas, jit)[0][0]

        def body(*flat):
            outputs = self.body.place(variables(flat), rows, replicas, jit)
            kept = [(i, tf.identity(t)) for i in moving for t in outputs[i]]
            for i, tensor in kept:
                tensor.set_shape(self.shapes[i])  # TensorFlow may not infer it.
            return [tensor for _, tensor in kept]

        flat = tf.while_loop(
            condition,
            body,
            [t for i in moving for t in inputs[i]],
            shape_invariants=[
                tf.TensorShape(self.shapes[i]) for i in moving for _ in range(count)
            ],
            parallel_iterations=self.parallel_iterations,
        )
        return variables(flat)


def _by_replica(flat: list, count: int) -> list[list]:
    return [flat[i : i + count] for i in range(0, len(flat), count)]
