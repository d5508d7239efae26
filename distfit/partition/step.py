"""A step written for one device, on all replicas of this process.

This is where the parts come together: the step is traced, its graph is laid out and
emitted for all replicas, and placed where a compiled function needs it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from distfit._keras import graphs
from distfit._keras.templates import Template
from distfit.partition import (
    rules,  # noqa: F401  # Registers them.
    tracing,
)
from distfit.partition.emission import Emitter
from distfit.partition.exchanges import Replicas
from distfit.partition.findings import Finding, elements_of
from distfit.partition.layouts import REPLICATED, ROWS, Sizes, by_rows, unknown
from distfit.partition.program import Program
from distfit.partition.tracing import Edge, Flat, Node
from distfit.partition.values import Resource, Value


@dataclasses.dataclass
class Share:
    """The share of a global batch that the replicas of this process get.

    Attributes:
        parts: For each tensor of the batch, the part of each replica: its rows, or the
            full tensor if that has no rows.
        wholes: The full tensors; None for those of which this process has only a part.
        total, start, count: int32 scalars for each replica: the rows of the global
            batch, the first row of the replica and its number of rows.
        index: The index of each replica among all.
    """

    parts: list[list]
    wholes: list[Any]
    total: list
    start: list
    count: list
    index: list


class Step:
    """`function(batch)`, written for one device, on N replicas.

    Args:
        function: Takes a batch, returns a structure of tensors.
        spec: The structure of specs of a global batch.
        has_rows: For each tensor of the batch, whether its first dimension is the rows.
        rows: The number of rows of every batch, or None if it may change.
        replicas: The replicas of this process.
        scope: Returns the context in which variables are created.
        jit: Whether XLA compiles the stages between exchanges.
        shared_wholes: Whether every process has the whole batch.
        keep_rows: Whether outputs by rows keep only the rows of this process.
        does_the_same_again: As in `tracing.trace`.
        may_wait: Returns, once the step is traced, the variables whose values, if the
            step returns them, may be read after it. Others are read in the step, as
            they may change after it.

    Attributes:
        outputs: The structure that `function` returns, of tensors of the traced graph.
        layouts: The layout of each output.
        lasting: For each output, whether it depends only on the values of `may_wait`
            variables after the step, so that it can be computed on demand.
        findings: The operations that every replica computes in full.
        needs_rows: Whether each replica must have a row of a batch, unless the step is
            placed with `few_rows`.
    """

    def __init__(
        self,
        function: Callable,
        spec: Any,
        *,
        has_rows: Sequence[bool],
        rows: int | None,
        replicas: Replicas,
        scope: Callable,
        jit: bool = False,
        shared_wholes: bool = True,
        keep_rows: bool = False,
        does_the_same_again: Callable[[list], bool] = lambda made: False,
        may_wait: Callable[[], list[tf.Variable]] = list,
    ):
        self.replicas = replicas
        self.jit = jit
        self.has_rows = list(has_rows)
        self._rows = rows
        self._shared_wholes = shared_wholes
        self._keep_rows = keep_rows
        self._graph = tracing.trace(function, spec, scope, does_the_same_again)
        self.outputs = self._graph.structured_outputs
        self._flat = Flat(self._graph)
        self._num_leaves = len(self._flat.inputs) - len(self._graph.captures)
        self._handles = [
            graphs.copies_of(outer, replicas.strategy, replicas.count)
            for outer, _ in self._graph.captures
        ]
        self.findings: list[Finding] = []
        self.needs_rows = False
        self.lasting = self._lasting(may_wait())
        self._plan()

    # --- Looking at the traced graph.

    @property
    def elements(self) -> int:
        """The elements of all operations, to which `findings` are compared."""
        return sum(map(elements_of, self._flat.nodes))

    def lines_of(self, error: tf.errors.OpError) -> list[str]:
        """Where the user's code creates the operations that a runtime error names."""
        return tracing.lines_of(error, self._graph)

    def _lasting(self, may_wait: list[tf.Variable]) -> list[bool]:
        order = {node: i for i, node in enumerate(self._flat.nodes)}
        written: dict[Node, int] = {}
        for node in self._flat.nodes:
            if node.has_effect:
                for given in node.inputs:
                    written[given.node] = order[node]
        patient = set(map(id, may_wait))
        waiting = set()
        captured = zip(self._flat.inputs[self._num_leaves :], self._taken, strict=True)
        for node, variable in captured:
            if id(variable) in patient:
                waiting.add(node)

        def lasts(edge: Edge) -> bool:
            """Whether it depends only on values of variables after the step."""
            reached = tracing.reached([edge.node])
            reads = [n for n in reached if n.type == "ReadVariableOp"]
            others = reached.difference(reads, waiting)
            if not reads or any(
                n.type == "Input" or n.op.op_def.is_stateful for n in others
            ):
                return False
            return all(order[n] > written.get(n.inputs[0].node, -1) for n in reads)

        return [lasts(edge) for edge in self._flat.outputs]

    # --- Building the programs.

    def _plan(self) -> None:
        last = [i for i, lasts in enumerate(self.lasting) if lasts]
        now = [i for i, lasts in enumerate(self.lasting) if not lasts]
        outputs = self._flat.outputs
        self.layouts = [REPLICATED] * len(outputs)
        self._now, self._last = now, last
        if self.replicas.num_replicas == 1:
            return
        sizes = Sizes(self._rows)
        self._program = self._emitted_step(sizes, self.findings)
        self.needs_rows = sizes.needs_rows
        reached = tracing.reached([outputs[i].node for i in last])
        nodes = [n for n in self._flat.nodes if n in reached]
        self._read_program = self._emitted(nodes, last, False, sizes, self.findings)

    @functools.cached_property
    def _program_of_few_rows(self) -> Program:
        """The program for batches that leave replicas without rows: rarely needed."""
        with tf.init_scope():
            return self._emitted_step(Sizes(self._rows, few_rows=True), [])

    def _emitted_step(self, sizes: Sizes, findings: list[Finding]) -> Program:
        needed = self._flat.needed([self._flat.outputs[i] for i in self._now])
        return self._emitted(needed, self._now, True, sizes, findings)

    def _emitted(
        self,
        nodes: list[Node],
        outputs: list[int],
        keep: bool,
        sizes: Sizes,
        findings: list[Finding],
    ) -> Program:
        """The program of some nodes.

        Args:
            nodes: The nodes, in order.
            outputs: Which outputs of the step it returns.
            keep: Whether partial outputs are returned as parts, not summed.
            sizes: What is known about the number of rows.
            findings: Receives the operations that every replica computes in full.
        """
        emitter = Emitter(sizes, self.replicas.num_replicas, findings, self.jit)
        self._feed(emitter)
        emitter.run(nodes)
        values = []
        for i in outputs:
            value = emitter.values[self._flat.outputs[i]]
            if sizes.few_rows:
                value = emitter.to(value, self.layouts[i])
            elif not (keep and (value.is_partial or self._stays_cut(value))):
                value = emitter.whole(value)
            self.layouts[i] = value.layout
            values.append(value)
        return emitter.program(values)

    def _stays_cut(self, value: Value) -> bool:
        return self._keep_rows and value.layout == by_rows(0)

    def _feed(self, emitter: Emitter) -> None:
        leaves = self._flat.inputs[: self._num_leaves]
        for node, has_rows in zip(leaves, self.has_rows, strict=True):
            (traced,) = node.outputs
            rank = traced.shape.rank
            dims = None
            if rank is not None:
                dims = [unknown() if d is None else d for d in traced.shape]
            if not has_rows:
                emitter.values[Edge(node, 0)] = emitter.input(
                    traced.dtype, REPLICATED, dims
                )
                emitter.input(tf.int32)  # Unused; tensors with rows have two inputs.
                continue
            assert_dims: Any = dims
            dims = [ROWS, *assert_dims[1:]]
            part = emitter.input(traced.dtype, by_rows(0), dims)
            whole = emitter.input(traced.dtype, REPLICATED, dims)
            if self._shared_wholes:
                part.whole = whole
            emitter.values[Edge(node, 0)] = part
        captured = self._flat.inputs[self._num_leaves :]
        resources: dict[int, Resource] = {}
        for node, (kind, copies) in zip(captured, self._handles, strict=True):
            (traced,) = node.outputs
            resource = None
            if traced.dtype == tf.resource:
                resource = resources.setdefault(id(copies[0]), Resource(kind))
            dims = emitter.static_dims(traced)
            value = emitter.input(traced.dtype, REPLICATED, dims, resource=resource)
            value.node = node
            emitter.values[Edge(node, 0)] = value

    @property
    def has_fixed_exchanges(self) -> bool:
        """Whether replicas exchange the same number of elements at each step."""
        if self.replicas.num_replicas == 1:
            return True
        return all(exchange.has_fixed_size for exchange in self._program.exchanges)

    @property
    def counted_draws(self) -> list[str]:
        """The lines of draws that count themselves, in no variable."""
        drawing = tracing.drawing_operations(self._graph)
        lines = dict.fromkeys(map(tracing.line_of, drawing))
        return [line for line in lines if line is not None]

    @property
    def variables(self) -> list:
        """The variables that the step captures, in the order of their use.

        That order is the same on all workers.
        """
        return [v for v in self._taken if v is not None]

    @property
    def _taken(self) -> list[tf.Variable | None]:
        """For each capture of the step, its variable; None if it is no variable."""
        read = {id(v.handle): v for v in self._graph.variables}
        return [
            graphs.variable_of(handle) or read.get(id(handle))
            for handle, _ in self._graph.captures
        ]

    # --- Placing the programs.

    def place(self, share: Share, few_rows: bool = False) -> list[list]:
        """Adds the step to the current graph.

        Args:
            share: The share of the batch that the replicas of this process get.
            few_rows: Whether a replica may have no row, if `needs_rows`.

        Returns:
            For each output that is not lasting, its tensor on each replica.
        """
        if self.replicas.num_replicas == 1:
            return self._place_alone(share)
        given = []
        for part, whole in zip(share.parts, share.wholes, strict=True):
            given.append(part)
            alike = part if whole is None else [whole] * self.replicas.count
            given.append(alike)
        given += [copies for _, copies in self._handles]
        rows = [share.total, share.start, share.count, share.index]
        program = self._program_of_few_rows if few_rows else self._program
        return program.place(given, rows, self.replicas, self.jit)

    def _place_alone(self, share: Share) -> list[list]:
        device = self.replicas.devices[0]
        given = [part[0] for part in share.parts]
        given += [copies[0] for _, copies in self._handles]
        wanted = [self._graph.outputs[i] for i in self._now]
        template = Template(self._graph, self._graph.inputs, wanted)
        if self.jit:
            return [[t] for t in template.place_compiled(given, device)]
        return [[t] for t in template.place([given], [device])[0]]

    @property
    def returned(self) -> list[tuple]:
        """The static shape and dtype of each output of `place`."""
        found = []
        for i in self._now:
            tensor = self._flat.outputs[i].node.outputs[self._flat.outputs[i].index]
            shape = tensor.shape.as_list() if tensor.shape.rank is not None else []
            if self.layouts[i].kind == "rows":
                shape[self.layouts[i].dim] = None
            found.append((shape, tensor.dtype))
        return found

    @property
    def is_cut(self) -> Any:
        """For each output, whether this process has only its own rows of it."""
        tensors = iter(self.layouts)

        def cut(output: Any) -> bool:
            parts = tf.nest.flatten(output, expand_composites=True)
            lies = [next(tensors) for part in parts if tf.is_tensor(part)]
            return len(lies) == 1 and lies[0].kind == "rows"

        return tf.nest.map_structure(cut, self.outputs)

    def results(self, placed: list[list]) -> Any:
        """Adds the outputs of the step to the current graph.

        Args:
            placed: The result of `place` for the latest step.

        Returns:
            The structure that the step returns.
        """
        flat: list[Any] = [None] * len(self.layouts)
        for i, value in zip(self._last, self._read(), strict=True):
            flat[i] = value
        sums = [
            (i, parts)
            for i, parts in zip(self._now, placed, strict=True)
            if self.layouts[i].kind == "partial"
        ]
        summed = self.replicas.sum([parts for _, parts in sums])
        totals = {i: s[0] for (i, _), s in zip(sums, summed, strict=True)}
        for i, parts in zip(self._now, placed, strict=True):
            if self.layouts[i].kind == "rows":
                with tf.device("CPU:0"):
                    flat[i] = tf.concat(parts, 0) if len(parts) > 1 else parts[0]
            else:
                flat[i] = totals.get(i, parts[0])
        return tracing.filled(self.outputs, flat)

    def _read(self) -> list[Any]:
        """Adds the lasting outputs to the current graph; returns them in order."""
        handles = [copies for _, copies in self._handles]
        if self.replicas.num_replicas == 1:
            captured = self._graph.inputs[self._num_leaves :]
            wanted = [self._graph.outputs[i] for i in self._last]
            reads = Template(self._graph, captured, wanted, reads_only=True)
            given = [copies[0] for copies in handles]
            return reads.place([given], self.replicas.devices[:1])[0]
        nothing = [tf.constant(0)] * self.replicas.count
        given = [nothing] * (2 * self._num_leaves) + handles
        first = self.replicas.first
        index = [tf.constant(first + r) for r in range(self.replicas.count)]
        rows = [nothing, nothing, nothing, index]
        results = self._read_program.place(given, rows, self.replicas)
        return [parts[0] for parts in results]
