"""Traces a step for one device and flattens its graph: calls inlined, nodes in order.

The result is a list of `Node`s. Inputs and captures of the graph are nodes of type
"Input"; every other node is an operation of the traced graph.
"""

import contextlib
import contextvars
import linecache
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from distfit._keras import graphs, templates

# Operations that are marked as stateful, but can be dropped if their result is unused.
_READS = {
    *("ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape"),
    *("VarHandleOp", "VarIsInitializedOp", "Placeholder", "PlaceholderWithDefault"),
    *("HashTableV2", "MutableHashTableV2", "AnonymousHashTable"),
    *("LookupTableFindV2", "LookupTableSizeV2", "LookupTableExportV2"),
    *("StatelessIf", "StatelessWhile", "StatelessCase"),
    *("EmptyTensorList", "TensorListReserve"),
}


class Edge(NamedTuple):
    """The output `index` of a node."""

    node: "Node"
    index: int  # type: ignore[assignment]


class Node:
    """An operation of the traced graph, with its inputs after calls were inlined.

    Attributes:
        op: The `tf.Operation`.
        type: Its type, or "Input".
        inputs: Its input edges.
        outputs: Its output tensors in the traced graph.
    """

    __slots__ = ("op", "type", "inputs", "outputs")

    def __init__(self, op: tf.Operation, inputs: Sequence[Edge], type: str = ""):
        self.op = op
        self.type = type or op.type
        self.inputs = tuple(inputs)
        self.outputs = tuple(op.outputs)

    def attr(self, name: str) -> Any:
        """An attribute of the operation; bytes are decoded."""
        value = self.op.get_attr(name)
        return value.decode() if isinstance(value, bytes) else value

    @property
    def has_effect(self) -> bool:
        """Whether it must run even if nothing uses its result."""
        return self.op.op_def.is_stateful and self.type not in _READS

    def line(self) -> str:
        """Where the user's code creates it, as `file:line  source`; else its name."""
        return line_of(self.op) or self.op.name

    def __repr__(self) -> str:
        return f"<{self.type} {self.op.name}>"


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARIES = (
    sysconfig.get_paths()["purelib"] + os.sep,
    sysconfig.get_paths()["stdlib"] + os.sep,
    _PACKAGE,
    "<",
)
_EXAMPLES = (_PACKAGE + "models" + os.sep,)


def _is_of_user(filename: str) -> bool:
    """Whether a file belongs to no library; reference models count as the user's."""
    return filename.startswith(_EXAMPLES) or not filename.startswith(_LIBRARIES)


def place_of(frames: Iterable[Any]) -> str | None:
    """The innermost line of the user's code in some frames, as `file:line`."""
    frame = _users_frame(frames)
    return None if frame is None else f"{frame.filename}:{frame.lineno}"


def line_of(op: tf.Operation) -> str | None:
    """Where the user's code creates an operation, as `file:line  source`."""
    frame = _users_frame(op.traceback or ())
    if frame is None:
        return None
    source = linecache.getline(frame.filename, frame.lineno).strip()
    return f"{frame.filename}:{frame.lineno}  {source}".rstrip()


def _users_frame(frames: Iterable[Any]) -> Any:
    users = (frame for frame in reversed(list(frames)) if _is_of_user(frame.filename))
    return next(users, None)


def operations(graph: Any) -> list[tf.Operation]:
    """The operations of a graph and of the functions that it calls."""
    every = [graph, *graphs.functions_of(graph)]
    return [op for each in every for op in each.get_operations()]


def drawing_operations(graph: Any) -> list[tf.Operation]:
    """The operations that draw random numbers and keep count of their draws."""
    return [
        op
        for op in operations(graph)
        if op.op_def.is_stateful and {"seed", "seed2"} <= set(op.node_def.attr)
    ]


def lines_of(error: tf.errors.OpError, graph: Any) -> list[str]:
    """Where the user's code creates the operations that an error names.

    Args:
        error: An error of a program that was emitted from the graph.
        graph: A traced graph.
    """
    if _OF_DATA.search(error.message):
        return []  # Operations of the pipeline may have the names of the step's.
    named = {_PREFIX.sub("", name) for name in _NAMED.findall(error.message)}
    found = [line_of(op) for op in operations(graph) if op.name in named]
    return [line for line in dict.fromkeys(found) if line is not None]


# How an error names an operation, and the prefix of operations emitted for a replica.
_NAMED = re.compile(r"\{\{node ([^}]+)\}\}")
_OF_DATA = re.compile(r"\[\[(?:.*/)?IteratorGetNext(?:AsOptional)?\]\]")
_PREFIX = re.compile(r"^.*\bstage\d+(?:_\d+)?/r\d+/")


class Flat:
    """A graph with its calls inlined.

    Args:
        graph: A `FuncGraph`.

    Attributes:
        inputs: The nodes of the graph's inputs, in order.
        nodes: All nodes that are not inputs, each after those that it depends on, and
            operations with effects in the order of their creation.
        outputs: The edges that the graph returns.
    """

    def __init__(self, graph: Any):
        self.graph = graph
        self.inputs = [Node(t.op, (), "Input") for t in graph.inputs]
        self.nodes: list[Node] = []
        self.outputs = self._inline(graph, [Edge(n, 0) for n in self.inputs])

    def _inline(self, graph: Any, feeds: Sequence[Edge]) -> list[Edge]:
        edges = {t.ref(): edge for t, edge in zip(graph.inputs, feeds, strict=True)}
        for op in in_order(graph):
            if op.outputs and op.outputs[0].ref() in edges:
                continue
            inputs = [edges[t.ref()] for t in op.inputs]
            if (body := graphs.called(op)) is not None:
                outputs = self._inline(body, inputs)
            else:
                node = Node(op, inputs)
                self.nodes.append(node)
                outputs = [Edge(node, i) for i in range(len(op.outputs))]
            edges.update(
                (t.ref(), edge) for t, edge in zip(op.outputs, outputs, strict=True)
            )
        return [edges[t.ref()] for t in graph.outputs]

    def needed(self, outputs: Iterable[Edge]) -> list[Node]:
        """The nodes that effects and the given outputs depend on, in order."""
        wanted = [edge.node for edge in outputs]
        wanted += [node for node in self.nodes if node.has_effect]
        found = reached(wanted)
        return [node for node in self.nodes if node in found]


def reached(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and all that they depend on."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [edge.node for edge in node.inputs]
    return found


def in_order(graph: Any) -> Iterator[tf.Operation]:
    """Operations in the order of their creation, and after their inputs.

    The first alone is not enough: the gradient of a loop adds inputs to the loop later.
    """
    seen: set[tf.Operation] = set()
    for first in graph.get_operations():
        stack = [first]
        while stack:
            op = stack[-1]
            if op in seen:
                stack.pop()
                continue
            missing = [t.op for t in op.inputs if t.op not in seen]
            if missing:
                stack += missing
            else:
                seen.add(stack.pop())
                yield op


_change: contextvars.ContextVar[Callable] = contextvars.ContextVar("change")


@contextlib.contextmanager
def changed(change: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Changes the graphs that are traced in the block, in this thread.

    Args:
        change: Takes the graph of a step and the structure of the specs of a batch, and
            returns another graph with the same inputs and outputs.
    """
    token = _change.set(change)
    try:
        yield
    finally:
        _change.reset(token)


def trace(
    function: Callable,
    spec: Any,
    scope: Callable,
    does_the_same_again: Callable[[list], bool] = lambda made: False,
) -> Any:
    """Traces `function(batch)` as for one device.

    As with `tf.function`, a function that creates variables is traced a second time,
    and that trace is used: the first may have branched on variables that were missing.

    Args:
        function: Takes a batch and returns a structure of tensors.
        spec: The structure of the specs of a batch.
        scope: Returns the context in which variables are created.
        does_the_same_again: Takes the variables that were created and returns whether
            a second trace is certain to be the same, so that one is enough.

    Returns:
        A `FuncGraph` with captures.

    Raises:
        ValueError: if the function initialises a variable from the batch or from other
            variables, or creates variables each time it is traced.
    """
    graph = _settled(function, spec, scope, does_the_same_again)
    return _change.get(lambda graph, spec: graph)(graph, spec)


def _settled(
    function: Callable, spec: Any, scope: Callable, does_the_same_again: Callable
) -> Any:
    """The graph of a function, once it creates no more variables."""
    made: list[tf.Variable] = []
    graph = _trace(function, spec, scope, made, made)
    if not made or does_the_same_again(made):
        return graph
    again: list[tf.Variable] = []
    graph = _trace(function, spec, scope, again, [])
    if again:
        raise ValueError(
            "A step may create variables only when it is traced for the first time. "
            f"Received: {again[0].name!r}, created again. Create it before the step, "
            "or only if it does not exist yet, and keep it."
        )
    return graph


def _trace(
    function: Callable, spec: Any, scope: Callable, made: list, lifted: list
) -> Any:
    """The graph of a function.

    Args:
        function, spec, scope: As in `trace`.
        made: Receives the variables that the function creates.
        lifted: Receives those that it creates in a `tf.init_scope`, or their copies.
    """

    def create(next_creator, **kwargs):
        if tf.executing_eagerly():  # Called from below, after the scope's creators.
            return next_creator(**kwargs)
        initial = kwargs.get("initial_value")
        if tf.is_tensor(initial) and not hasattr(initial, "numpy"):
            kwargs["initial_value"] = templates.value_of(initial)
            if kwargs["initial_value"] is None:
                raise ValueError(
                    "A variable created in a step cannot be initialised from the batch "
                    f"or from variables. Received: name={kwargs.get('name')!r}. "
                    "Create it before the step, or give it an initializer."
                )
        kwargs.pop("colocate_with", None)
        with tf.init_scope(), scope():
            new = tf.Variable(**{k: v for k, v in kwargs.items() if v is not None})
        made.append(new)
        return new

    in_scope = False

    def create_lifted(next_creator, **kwargs):
        """For variables created in `tf.init_scope`, as when layers are built."""
        nonlocal in_scope
        if in_scope or tf.distribute.has_strategy():
            new = next_creator(**kwargs)
            lifted.append(new)
            return new
        in_scope = True
        try:
            with scope():
                return tf.Variable(**{k: v for k, v in kwargs.items() if v is not None})
        finally:
            in_scope = False

    def traced(batch):
        with tf.variable_creator_scope(create), graphs.as_first_replica():
            # Inside, since the value of a variable depends on the context.
            return tf.nest.map_structure(_value, function(batch))

    with tf.variable_creator_scope(create_lifted):
        return graphs.trace(traced, spec)


def filled(structure: Any, tensors: Iterable[Any]) -> Any:
    """A structure that a step returns, with its tensors replaced."""
    new = iter(tensors)
    leaves = tf.nest.flatten(structure, expand_composites=True)
    flat = [next(new) if tf.is_tensor(leaf) else leaf for leaf in leaves]
    return tf.nest.pack_sequence_as(structure, flat, expand_composites=True)


def _value(output: Any) -> Any:
    is_variable = isinstance(output, keras.Variable | tf.Variable)
    return tf.convert_to_tensor(output) if is_variable else output
