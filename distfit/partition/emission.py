"""Turns the graph of one device into a program for all replicas.

`Emitter` goes through the nodes of a traced graph in order. A rule gives each of them
its layout; an operation to which no rule applies is computed in full on every replica,
which is always correct.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distfit._keras import graphs
from distfit.partition.findings import Finding, elements_of
from distfit.partition.layouts import (
    BATCH,
    PARTIAL,
    REPLICATED,
    ROWS,
    Dim,
    Layout,
    Size,
    Sizes,
    by_rows,
    product,
    quotient,
    unknown,
)
from distfit.partition.program import Exchange, Level, Port, Program, RowPorts, Stage
from distfit.partition.registry import CUT_RULES, RULES, SIZE_RULES, VIEWS
from distfit.partition.tracing import Edge, Flat, Node
from distfit.partition.values import Element, Resource, Value, may_be_size, measured


class Emitter:
    """Builds a program from a traced graph.

    Args:
        sizes: What is known about the number of rows.
        num_replicas: Number of replicas of all workers.
        findings: Receives a `Finding` for each operation that is not partitioned.
        jit: Whether stages are compiled by XLA.
    """

    def __init__(
        self,
        sizes: Sizes,
        num_replicas: int,
        findings: list[Finding],
        jit: bool = False,
    ):
        self.sizes = sizes
        self.num_replicas = num_replicas
        self.findings = findings
        self.jit = jit
        self.levels = [Level()]
        self.exchanges: dict[int, Exchange] = {}
        self.rows = RowPorts.new()
        self.inputs: list[Port] = []
        self.values: dict[Edge, Value] = {}
        self.symbols: dict[str, tuple[Value, int]] = {}
        self._lain: dict[Dim, Layout] = {}  # The latest layout of each size.
        self._effects = 0  # The level of the latest ordered effect.

    def all_have_rows(self) -> bool:
        """Whether each replica has a row; if unknown, this is assumed and noted.

        A rule whose operation fails without rows checks this, and returns None if not.
        """
        if self.sizes.rows is not None or self.sizes.few_rows:
            return (self.sizes.rows or 0) >= self.num_replicas
        self.sizes.needs_rows = True
        return True

    # --- Inputs and outputs of the program.

    def input(
        self,
        dtype: tf.DType,
        layout: Layout = REPLICATED,
        dims: Sequence[Dim] | None = None,
        **known: Any,
    ) -> Value:
        """A new input of the program."""
        value = Value(layout, dims, dtype, **known)
        value.tensor = Port(dtype, value.local_shape())
        self.inputs.append(value.tensor)
        self._bind_symbols(value)
        return value

    def like(self, other: Value, **changed: Any) -> Value:
        """A new input of the program, with the layout of another program's value."""
        known = dict(
            layout=other.layout,
            dims=other.dims,
            sizes=other.sizes,
            element=other.element,
            resource=other.resource,
        )
        return self.input(other.dtype, **(known | changed))

    def program(self, outputs: Sequence[Value]) -> Program:
        """The program that returns the given values."""
        keys = [self._exported(value) for value in outputs]
        return Program(self.inputs, self.rows, self.levels, keys)

    def _exported(self, value: Value) -> Any:
        """The key of a value for uses outside of its stage."""
        if value.tensor is None:
            self._materialize(value)
        if value.home is not None:
            value.home.export(value.tensor)
        return value.tensor

    def _materialize(self, value: Value) -> None:
        """Computes a value that any stage could build in the stage of its level."""
        stage = self.levels[value.level].stage
        value.home, value.tensor = stage, self._rebuilt(value, stage)
        value.ready = value.level + 1

    # --- Running nodes.

    def run(self, nodes: Iterable[Node]) -> None:
        """Emits nodes, which are given in the order of their dependencies."""
        for node in nodes:
            inputs = [self._settled(self.values[edge]) for edge in node.inputs]
            try:
                outputs = self.emit(node, inputs)
            except graphs.EMISSION_ERRORS as error:
                raise RuntimeError(
                    f"{node.type} could not be partitioned. Received: {inputs} at "
                    f"{node.line()}. {type(error).__name__}: {error}"
                ) from error
            for i, value in enumerate(outputs):
                value.node = value.node or node
                self.values[Edge(node, i)] = value
            self._note_source(node, inputs, outputs)

    def _note_source(self, node: Node, inputs: list[Value], outputs: list[Value]):
        """Notes that a partial sum is a view of another: only that one is exchanged."""
        if node.type not in VIEWS or not inputs[0].is_partial:
            return
        (value,) = outputs
        others_known = all(v.sizes is not None or v.constant for v in inputs[1:])
        if value.is_partial and value is not inputs[0] and others_known:
            value.source = (node, inputs)

    def _settled(self, value: Value) -> Value:
        """The sum in place of a partial value, if it has already been exchanged."""
        is_summed = value.is_partial and value.whole is not None
        return value.whole if is_summed else value  # type: ignore[return-value]

    def emit(self, node: Node, inputs: list[Value]) -> list[Value]:
        """The values of a node's outputs."""
        sizes = self._sizes(node, inputs)
        if sizes and all(s is not None and self.can_compute(s.flat) for s in sizes):
            return [
                self.known(s, t.dtype) for s, t in zip(sizes, node.outputs, strict=True)
            ]
        found = RULES.get(node.type)
        outputs = self._by_rule(found, node, inputs) if found else None
        if outputs is None:
            outputs = self.in_full(node, inputs)
        for value, known in zip(outputs, sizes, strict=True):
            if known is not None and value.sizes is None and value.is_replicated:
                value.sizes = known
        return outputs

    def _by_rule(
        self, found: Callable, node: Node, inputs: list[Value]
    ) -> list[Value] | None:
        try:
            return found(self, node, inputs)
        except NotImplementedError:
            # E.g. branches whose results have different layouts. If all inputs are
            # replicated, everything is as on one device.
            if all(v.is_replicated for v in inputs):
                raise
            self.report(node)
            return found(self, node, [self.whole(v) for v in inputs])

    def _sizes(self, node: Node, inputs: list[Value]) -> list[Any]:
        """For each output, its elements as sizes; None if they are not sizes."""
        evaluate = SIZE_RULES.get(node.type)
        nothing = [None] * len(node.outputs)
        if evaluate is None or not all(map(may_be_size, node.outputs)):
            return nothing
        found = evaluate(self, node, inputs)
        return nothing if found is None else [np.asarray(s, object) for s in found]

    def in_full(self, node: Node, inputs: list[Value]) -> list[Value]:
        """Computes a node in full on every replica, from replicated inputs."""
        if self.must_happen_once(node, inputs):
            return self.once(node, inputs)
        if any(v.resource is not None and v.resource.kind == "summed" for v in inputs):
            raise NotImplementedError("a variable that is summed on read")
        if not all(v.is_replicated for v in inputs):
            self.report(node)
        outputs = self.op(node, [self.whole(v) for v in inputs])
        for value in outputs:
            if value.dtype == tf.variant:  # None would leave the layout open.
                value.element = Element(REPLICATED, None)
        return outputs

    def must_happen_once(self, node: Node, inputs: Sequence[Value]) -> bool:
        """Whether an operation has an effect, or a state, that replicas share."""
        resources = [v.resource for v in inputs if v.resource is not None]
        if any(r.kind == "single" for r in resources):
            return True
        return node.has_effect and not resources

    def report(self, node: Node) -> None:
        """Notes that a node is computed in full on every replica."""
        self.findings.append(Finding(node.type, node.line(), elements_of(node)))

    # --- Building blocks of rules.

    def value(
        self,
        layout: Layout,
        dims: Sequence[Dim] | None,
        tensor: tf.Tensor,
        stage: Stage,
        level: int,
    ) -> Value:
        """The value of a tensor that a stage computes."""
        if layout.kind == "rows" and dims is not None:
            self._lain[layout.size] = layout
            # Symbolic, even if the number is known: a replica has fewer rows.
            dims = [*dims[: layout.dim], layout.size, *dims[layout.dim + 1 :]]
        value = Value(
            layout,
            dims,
            tensor.dtype,
            level=level,
            ready=level + 1,
            home=stage,
            tensor=tensor,
        )
        self._bind_symbols(value)
        return value

    def usual(self, size: Dim) -> Layout:
        """The layout to choose for a dimension that is a multiple of the rows.

        It is that of other dimensions of this size, which it will probably meet.
        """
        return self._lain.get(size) or by_rows(0, 1, quotient(size, ROWS) or 1)

    def op(
        self,
        node: Node,
        inputs: Sequence[Value],
        layout: Layout | Sequence[Layout] = REPLICATED,
        dims: Any = None,
    ) -> list[Value]:
        """Emits the operation of a node on each replica's part of the inputs.

        Args:
            node: The node.
            inputs: The inputs, used in their present layout.
            layout: The layout of the outputs, one for all or one for each.
            dims: The shape of the only output or, in a tuple, those of all; None for
                the static shape in the traced graph.
        """
        level = self.level_of(inputs)
        stage = self.levels[level].stage
        tensors = stage.create(node, [self.tensor(v, stage) for v in inputs])
        self._touch(inputs, level)
        count = len(tensors)
        each = [layout] * count if isinstance(layout, Layout) else list(layout)
        shapes = list(dims) if isinstance(dims, tuple) else [dims] * count
        outputs = []
        for traced, tensor, lies, shape in zip(
            node.outputs, tensors, each, shapes, strict=True
        ):
            if shape is None:
                shape = self.static_dims(traced, lies)
            value = self.value(lies, shape, tensor, stage, level)
            if lies.kind != "rows" and tensor.dtype not in (tf.resource, tf.variant):
                static = [d if isinstance(d, int) else None for d in value.dims or ()]
                if value.dims is not None:
                    tensor.set_shape(static)
            outputs.append(value)
        return outputs

    def call(
        self,
        function: Callable,
        inputs: Sequence[Value],
        layout: Layout,
        dims: Sequence[Dim] | None,
        level: int = 0,
    ) -> Value:
        """Emits `function(*tensors)`, a TensorFlow function with a single result."""
        level = max(level, self.level_of(inputs))
        stage = self.levels[level].stage
        tensors = [self.tensor(v, stage) for v in inputs]
        with stage.graph.as_default():
            result = function(*tensors)
        return self.value(layout, dims, result, stage, level)

    def level_of(self, values: Sequence[Value]) -> int:
        """The first level that can use all values and keeps effects in order."""
        level = 0
        for value in values:
            level = max(level, value.level)
            if value.resource is not None:
                level = max(level, value.resource.level)
        return level

    def _touch(self, values: Sequence[Value], level: int) -> None:
        for value in values:
            if value.resource is not None:
                value.resource.level = max(value.resource.level, level)
                value.resource.read = None

    def static_dims(self, tensor: tf.Tensor, layout: Layout = REPLICATED) -> Any:
        """The static shape of a traced tensor, with unknown sizes where it has None."""
        if tensor.shape.rank is None:
            return None
        dims: list[Dim] = [unknown() if d is None else d for d in tensor.shape]
        if layout.kind == "rows":
            dims[layout.dim] = layout.size
        return dims

    def tensor(self, value: Value, stage: Stage) -> tf.Tensor:
        """A replica's part of a value, as a tensor of a stage."""
        if value.home is stage:
            return value.tensor
        if value.constant is not None or value.tensor is None:
            return self._rebuilt(value, stage)
        if value.home is not None:
            value.home.export(value.tensor)
        return stage.input(value.tensor, value.dtype, value.local_shape())

    def _rebuilt(self, value: Value, stage: Stage) -> tf.Tensor:
        if value.constant is not None:
            key: Any = value.constant
            if key not in stage.cache:
                (stage.cache[key],) = stage.create(value.constant, [])
            return stage.cache[key]
        return self.tensor_of_sizes(value.sizes, value.dtype, stage)

    def tensor_of_sizes(self, sizes: Any, dtype: tf.DType, stage: Stage) -> tf.Tensor:
        """Known sizes as a tensor, for the global batch."""
        key = (sizes.shape, tuple(sizes.flat), dtype)
        if key not in stage.cache:
            stage.cache[key] = self._built_sizes(sizes, dtype, stage)
        return stage.cache[key]

    def _built_sizes(self, sizes: Any, dtype: tf.DType, stage: Stage) -> tf.Tensor:
        numbers: Any = [self.sizes.number(s) for s in sizes.flat]
        with stage.graph.as_default():
            if all(isinstance(n, int | np.integer) for n in numbers):
                return tf.constant(np.reshape(numbers, sizes.shape), dtype)
            built = [self._scalar(n, dtype, stage) for n in numbers]
            if sizes.shape == ():
                return built[0]
            return tf.reshape(tf.stack(built), sizes.shape)

    def _scalar(self, dim: Dim, dtype: tf.DType, stage: Stage, local=False) -> Any:
        """A dimension as a scalar; with `local`, for the rows of the replica."""
        if not isinstance(dim, Size):
            return tf.constant(dim, dtype)
        base = self.levels[self.level_of_sizes([dim])].stage
        if stage is not base and not stage.once:
            # Computed once, not in each stage that uses it.
            with base.graph.as_default():
                scalar = self._scalar(dim, dtype, base, local)
            base.export(scalar)
            return stage.input(scalar, dtype, ())
        key = (dim, dtype, local)
        if key not in stage.cache:
            result = None
            for symbol in dim.symbols:
                factor = self._symbol(symbol, stage, local)
                factor = factor if dtype == tf.int32 else tf.cast(factor, dtype)
                result = factor if result is None else result * factor
            if dim.factor != 1:
                result = result * tf.constant(dim.factor, dtype)
            stage.cache[key] = result
        return stage.cache[key]

    def _symbol(self, symbol: str, stage: Stage, local: bool) -> tf.Tensor:
        if symbol == BATCH:
            port = self.rows.count if local else self.rows.total
            return stage.input(port, tf.int32, ())
        key = ("symbol", symbol)
        if key not in stage.cache:
            value, dim = self.symbols[symbol]
            home = value.home or self.levels[value.level].stage
            with home.graph.as_default():
                size = tf.shape(self.tensor(value, home))[dim]
            if home is not stage:
                home.export(size)
                size = stage.input(size, tf.int32, ())
            stage.cache[key] = size
        return stage.cache[key]

    def level_of_sizes(self, dims: Iterable[Dim]) -> int:
        """The first level at which dimensions can be computed."""
        return max((self.symbols[s][0].level for s in measured(dims)), default=0)

    def can_compute(self, dims: Iterable[Dim | None]) -> bool:
        """Whether dimensions can be computed in this program."""
        dims = list(dims)
        if any(dim is None for dim in dims):
            return False
        return all(symbol in self.symbols for symbol in measured(dims))

    def local_shape(self, dims: Sequence[Dim], layout: Layout, dtype=tf.int32) -> Value:
        """The shape of a replica's part of a tensor, as a vector."""
        cut_at = layout.dim if layout.kind == "rows" else None
        others = [d for i, d in enumerate(dims) if i != cut_at]
        level = self.level_of_sizes([*others, layout.blocks, layout.inner])
        stage = self.levels[level].stage
        key = ("local shape", tuple(dims), layout, dtype)
        if key not in stage.cache:
            with stage.graph.as_default():
                stage.cache[key] = tf.stack(
                    [
                        self._local_size(layout, dtype, stage)
                        if i == cut_at
                        else self._scalar(dim, dtype, stage)
                        for i, dim in enumerate(dims)
                    ]
                )
        return self.value(REPLICATED, [len(dims)], stage.cache[key], stage, level)

    def _local_size(self, layout: Layout, dtype: tf.DType, stage: Stage) -> Any:
        """The local size of the split dimension; its inner size may depend on rows."""
        size = self._scalar(ROWS, dtype, stage, local=True)
        rest = product([layout.blocks, layout.inner])
        return size if rest == 1 else size * self._scalar(rest, dtype, stage)

    def start(self) -> Value:
        """The first row of a replica, an int32 scalar."""
        stage = self.levels[0].stage
        start = stage.input(self.rows.start, tf.int32, ())
        with stage.graph.as_default():
            return self.value(REPLICATED, [], tf.identity(start), stage, 0)

    def known(self, sizes: Any, dtype: tf.DType) -> Value:
        """A value of known sizes, which is computed only where it is used."""
        sizes = np.asarray(sizes, object)
        level = self.level_of_sizes(sizes.flat)
        # Measured sizes exist only after a stage.
        ready = level + any(True for _ in measured(sizes.flat))
        return Value(
            REPLICATED, sizes.shape, dtype, sizes=sizes, level=level, ready=ready
        )

    def known_local_count(
        self, value: Value, axes: Iterable[int], dtype: tf.DType
    ) -> Value:
        """The number of elements along axes in a replica's part, a scalar."""
        cut_at = value.layout.dim if value.has_rows else None
        sizes = [value.dims[a] for a in axes if a != cut_at]
        if not value.has_rows:
            return self.known(product(sizes), dtype)
        rest = product([value.layout.blocks, value.layout.inner, *sizes])
        level = self.level_of_sizes([rest])
        stage = self.levels[level].stage
        key = ("local count", rest, dtype)
        if key not in stage.cache:
            with stage.graph.as_default():
                rows = self._scalar(ROWS, dtype, stage, local=True)
                stage.cache[key] = rows * self._scalar(rest, dtype, stage)
        return self.value(REPLICATED, [], stage.cache[key], stage, level)

    def _bind_symbols(self, value: Value) -> None:
        """Notes where the sizes of a value can be measured, if not known yet."""
        for i, dim in enumerate(value.dims or ()):
            if (
                isinstance(dim, Size)
                and dim.factor == 1
                and len(dim.symbols) == 1
                and dim.symbols[0] != BATCH
                and not (value.has_rows and value.layout.dim == i)
            ):
                self.symbols.setdefault(dim.symbols[0], (value, i))

    # --- Changing layouts.

    def whole(self, value: Value) -> Value:
        """The value, replicated; unless it already is, that takes an exchange."""
        if value.element is not None and not value.element.layout == REPLICATED:
            raise NotImplementedError("a list of rows that must be replicated")
        if value.is_replicated:
            return value
        if value.whole is None and value.source is not None:
            node, (source, *others) = value.source
            (value.whole,) = self.emit(node, [self.whole(source), *others])
            value.whole.node = value.node
        elif value.whole is None:
            value.whole = self._exchanged(value)
        return value.whole

    def _exchanged(self, value: Value) -> Value:
        if value.has_rows and not isinstance(value.layout.inner, int):
            return self._exchanged_open(value)
        source = self._exported(value)
        level = value.level + 1
        self.reach(level)
        if level not in self.exchanges:
            self.exchanges[level] = Exchange(self.rows)
            self.levels[level].meetings.insert(0, self.exchanges[level])
        whole = Value(REPLICATED, value.dims, value.dtype, level=level, ready=level)
        whole.tensor = Port(value.dtype, whole.local_shape())
        whole.node = value.node
        self._bind_symbols(whole)
        if value.is_partial:
            self.exchanges[level].sums.append((source, whole.tensor))
        else:
            self.exchanges[level].gathers.append((source, value.layout, whole.tensor))
        return whole

    def _exchanged_open(self, value: Value) -> Value:
        """Like `_exchanged`, for an inner size that is not a number: the rows are
        gathered as a dimension of their own."""
        lies, dims = value.layout, list(value.dims or ())
        dims[lies.dim : lies.dim + 1] = [lies.blocks, ROWS, lies.inner]
        layout = by_rows(lies.dim + 1)
        shape = self.local_shape(dims, layout)
        opened = self.whole(self.call(tf.reshape, [value, shape], layout, dims))
        closed = self.known(value.dims, tf.int32)
        whole = self.call(tf.reshape, [opened, closed], REPLICATED, value.dims)
        whole.node = value.node
        return whole

    def reach(self, level: int) -> None:
        """Creates levels up to the given one."""
        while len(self.levels) <= level:
            self.levels.append(Level())

    def cut(self, value: Value, layout: Layout) -> Value:
        """Each replica's rows of a replicated value."""
        cut = self.cut_before(value, layout)
        if cut is None:
            cut = self._sliced(value, layout)
        cut.whole = value
        return cut

    def cut_before(self, value: Value, layout: Layout) -> Value | None:
        """Like `cut`, but computes only these rows; None if no rule does that."""
        found = CUT_RULES.get(value.node.type) if value.node is not None else None
        return found(self, value, layout) if found else None

    def _sliced(self, value: Value, layout: Layout) -> Value:
        dims = list(value.dims or ())
        dims[layout.dim] = layout.size
        stage_level = max(value.level, self.level_of_sizes([layout.size]))

        def rows_of(tensor):
            stage = self.levels[stage_level].stage
            start = stage.input(self.rows.start, tf.int32, ())
            count = stage.input(self.rows.count, tf.int32, ())
            d, rank = layout.dim, len(dims)
            if layout.blocks == 1 and layout.inner == 1:
                begin, size = [0] * rank, [-1] * rank
                begin[d], size[d] = start, count
                return tf.slice(tensor, tf.stack(begin), tf.stack(size))
            total = stage.input(self.rows.total, tf.int32, ())
            blocks = self._scalar(layout.blocks, tf.int32, stage)
            inner = self._scalar(layout.inner, tf.int32, stage)
            shape = tf.shape(tensor)
            opened = tf.reshape(
                tensor,
                tf.concat([shape[:d], [blocks, total, inner], shape[d + 1 :]], 0),
            )
            begin, size = [0] * (rank + 2), [-1] * (rank + 2)
            begin[d + 1], size[d + 1] = start, count
            opened = tf.slice(opened, tf.stack(begin), tf.stack(size))
            closed = tf.concat([shape[:d], [blocks * count * inner], shape[d + 1 :]], 0)
            result = tf.reshape(opened, closed)
            return result

        cut = self.call(rows_of, [value], layout, dims, stage_level)
        cut.tensor.set_shape(cut.local_shape())
        return cut

    def as_partial(self, value: Value) -> Value:
        """A value as a partial sum: the first replica has it, the others zeros."""
        if value.is_partial:
            return value
        value = self.whole(value)

        def of_first(tensor):
            stage = self.levels[level].stage
            index = stage.input(self.rows.index, tf.int32, ())
            return tf.where(tf.equal(index, 0), tensor, tf.zeros_like(tensor))

        level = value.level
        return self.call(of_first, [value], PARTIAL, value.dims)

    def to(self, value: Value, layout: Layout) -> Value:
        """A value in another layout."""
        if value.layout == layout:
            return value
        if layout.kind == "replicated":
            return self.whole(value)
        if layout.kind == "partial":
            return self.as_partial(value)
        return self.cut(self.whole(value), layout)

    def stacked(self, value: Value) -> Value:
        """The replicas' tensors of a value, stacked along a new first dimension.

        Args:
            value: A value in any layout, whose tensors have the same shape on all
                replicas.
        """
        count = self.num_replicas
        own = self._own_slot(1 + value.rank)

        def slotted(tensor, own):
            # Each replica's tensor among zeros, so that it is exchanged with the sums.
            if tensor.dtype == tf.bool:
                tensor = tf.cast(tensor, tf.int32)
            return tf.where(own, tf.expand_dims(tensor, 0), tf.zeros((), tensor.dtype))

        return self.call(slotted, [value, own], PARTIAL, [count, *value.dims])

    def _own_slot(self, rank: int) -> Value:
        """The index of a replica among all, as a mask along the first dimension."""
        stage, shape = self.levels[0].stage, [self.num_replicas] + [1] * (rank - 1)
        key = ("slot", rank)
        if key not in stage.cache:
            index = stage.input(self.rows.index, tf.int32, ())
            with stage.graph.as_default():
                own = tf.equal(tf.range(self.num_replicas), index)
                stage.cache[key] = tf.reshape(own, shape)
        return self.value(REPLICATED, shape, stage.cache[key], stage, 0)

    # --- Operations that one replica runs for all.

    def once(
        self, node: Node, inputs: Sequence[Value], dims: Any = None, **attributes: int
    ) -> list[Value]:
        """Emits a node on the first replica only; its results go to all.

        Args:
            node: The node.
            inputs: Its inputs, in any layout; they are replicated first.
            dims: The shape of the only output, if more is known than its static shape.
            **attributes: Attributes that replace those of the operation.
        """
        inputs = [self.whole(v) for v in inputs]
        level = 0
        for value in inputs:
            level = max(level, value.ready)
            if value.resource is not None:
                level = max(level, value.resource.level)
        if node.has_effect:
            level = max(level, self._effects)
        self.reach(level)
        stage = self._once_stage(level)
        given = [self.tensor(v, stage) for v in inputs]
        tensors = stage.create(node, given, **attributes)
        self._touch(inputs, level)
        if node.has_effect:
            self._effects = level
        outputs = []
        for traced, tensor in zip(node.outputs, tensors, strict=True):
            value = Value(
                REPLICATED,
                self.static_dims(traced) if dims is None else dims,
                tensor.dtype,
                level=level,
                ready=level,
                home=stage,
                tensor=tensor,
            )
            self._bind_symbols(value)
            outputs.append(value)
        return outputs

    def _once_stage(self, level: int) -> Stage:
        meetings = self.levels[level].meetings
        if not meetings or not isinstance(meetings[-1], Stage):
            meetings.append(Stage(once=True))
        last: Any = meetings[-1]
        return last

    # --- Branches and loops.

    def body(
        self, graph: Any, inputs: Sequence[Value]
    ) -> "tuple[Emitter, list[Value]]":
        """Emits the body of a branch or a loop; returns its emitter and its outputs."""
        flat = Flat(graph)
        inner = Emitter(self.sizes, self.num_replicas, [], self.jit)
        resources: dict[int, Resource] = {}
        for node, value in zip(flat.inputs, inputs, strict=True):
            resource = value.resource
            if resource is not None:
                resource = resources.setdefault(id(resource), Resource(resource.kind))
            given = inner.like(value, resource=resource)
            given.node = node
            inner.values[Edge(node, 0)] = given
        inner.run(flat.needed(flat.outputs))
        return inner, [inner.values[edge] for edge in flat.outputs]

    def meeting(
        self, inputs: Sequence[Value], has_effect: bool
    ) -> tuple[int, list[Any]]:
        """The level of a meeting with these inputs, and their keys."""
        level = self._effects if has_effect else 0
        keys = []
        for value in inputs:
            keys.append(self._exported(value))
            level = max(level, value.ready)
            if value.resource is not None:
                level = max(level, value.resource.level + 1)
        if has_effect:
            self._effects = level
        self.reach(level)
        self._touch(inputs, level)
        return level, keys

    def arrived(self, level: int, like: Any) -> Value:
        """An output of a meeting, with the layout that its programs return."""
        value = Value(
            like.layout,
            like.dims,
            like.dtype,
            level=level,
            ready=level,
            element=like.element,
        )
        value.tensor = Port(value.dtype, value.local_shape())
        self._bind_symbols(value)
        return value
