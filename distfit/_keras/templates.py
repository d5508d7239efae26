"""A graph that is placed many times: once for each replica of each step.

| names | why |
|---|---|
| `_functions`, `_add_function_recursive` | copy the functions that the graph calls |
| `capture` | tensors of outer graphs as inputs |
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

_REPLICA = re.compile(r"\bstage\d+(?:_\d+)?/r(\d+)/")


class Template:
    """A graph as a definition that is imported into other graphs.

    Duplicate nodes, mostly constants, are merged, and unused ones are dropped: the time
    that TensorFlow takes to prepare a step grows with the number of operations.

    Args:
        graph: A `FuncGraph`.
        inputs: Its tensors that are fed; all others must be computed in it.
        outputs: Its tensors that are returned.
        reads_only: Whether to keep only the data dependencies of the outputs, without
            effects and control dependencies.

    Raises:
        AssertionError: if the graph captures tensors that are not fed.
    """

    def __init__(
        self,
        graph: Any,
        inputs: Sequence[tf.Tensor],
        outputs: Sequence[tf.Tensor],
        reads_only: bool = False,
    ):
        self._functions = list(graph._functions.values())
        given = {tensor.op.name for tensor in inputs}
        whole = graph.as_graph_def()
        self._versions = whole.versions
        nodes = {node.name: node for node in whole.node}
        kept = _needed(graph, [t.op for t in outputs], reads_only)
        for name in given.union(nodes.keys() - kept):
            # XLA cannot compile placeholders, not even unused ones.
            nodes.pop(name, None)
        missing = {t.op.name for _, t in graph.captures if t.op.name in kept} - given
        if missing:
            raise AssertionError(
                f"A graph captures unfed tensors. Received: {sorted(missing)}."
            )
        if reads_only:
            for node in nodes.values():
                node.input[:] = [n for n in node.input if not n.startswith("^")]
        first = _merged(graph, nodes.values())
        self._nodes = [node for name, node in nodes.items() if name not in first]
        for node in self._nodes:
            node.input[:] = [_renamed(name, first) for name in node.input]
            node.attr.pop("_class", None)  # All are on one device, with or without it.
        used = {_tensor_name(name) for node in self._nodes for name in node.input}
        self._inputs = [tensor.name for tensor in inputs]
        self._used = used.intersection(self._inputs)
        self._outputs = [_renamed(tensor.name, first) for tensor in outputs]
        self._computed = [n for n in self._outputs if n not in set(self._inputs)]

    def place(
        self, given: Sequence[Sequence[Any]], devices: Sequence[str]
    ) -> list[list[tf.Tensor]]:
        """Adds the graph to the current one, once for each device.

        Args:
            given: For each device, the tensors to feed as inputs.
            devices: The devices.

        Returns:
            For each device, the outputs.
        """
        current = tf.compat.v1.get_default_graph()
        for function in self._functions:
            current._add_function_recursive(function)
        # All at once: the time of an import grows with the size of the current graph.
        definition = tf.compat.v1.GraphDef()
        definition.versions.CopyFrom(self._versions)
        feeds: dict[str, tf.Tensor] = {}
        wanted: list[str] = []
        for index, tensors in enumerate(given):
            prefix = f"r{index}/"
            for node in self._nodes:
                copy = definition.node.add()
                copy.CopyFrom(node)
                copy.name = prefix + node.name
                copy.input[:] = [_prefixed(name, prefix) for name in node.input]
            for name, tensor in zip(self._inputs, tensors, strict=True):
                if name in self._used:
                    feeds[prefix + name] = current.capture(tensor)
            wanted += [prefix + name for name in self._computed]

        full = [tf.DeviceSpec.from_string(device).to_string() for device in devices]

        def device_of(op: tf.Operation) -> str:
            replica = _REPLICA.search(op.name)[1]  # type: ignore[index]
            return op.device or full[int(replica)]

        # A device function: TensorFlow makes a context for each device in a definition.
        with tf.compat.v1.device(device_of):
            found = tf.graph_util.import_graph_def(
                definition,
                input_map=feeds,
                return_elements=wanted,
                name=f"stage{_depth(current)}",
            )
        results = iter(found or ())
        placed = []
        for tensors in given:
            by_name = dict(zip(self._inputs, tensors, strict=True))
            placed.append(
                [
                    current.capture(by_name[name]) if name in by_name else next(results)
                    for name in self._outputs
                ]
            )
        return placed

    def place_compiled(self, given: Sequence[Any], device: str) -> list[tf.Tensor]:
        """Like `place`, for one device and compiled by XLA."""

        def computation(*tensors):
            return self.place([tensors], [device])[0]

        with tf.device(device):
            compiled = tf.function(computation, autograph=False, jit_compile=True)
            return list(compiled(*given))


def value_of(tensor: tf.Tensor) -> tf.Tensor | None:
    """The value of a tensor that depends on no inputs, such as zeros.

    Returns:
        An eager tensor; None if the value depends on inputs of the graph.
    """
    kept = _needed(tensor.graph, [tensor.op], reads_only=True)
    if any(tensor.graph.get_operation_by_name(n).type == "Placeholder" for n in kept):
        return None
    template = Template(tensor.graph, [], [tensor], reads_only=True)
    with tf.init_scope():
        ((value,),) = tf.function(lambda: template.place([[]], [""]))()
    return value


def _depth(graph: Any) -> int:
    """How many graphs surround a graph.

    A body's captures have the names of the outer tensors. Operations imported under
    such a name would be duplicates, which TensorFlow does not notice.
    """
    outer = getattr(graph, "outer_graph", None)
    return 0 if outer is None else 1 + _depth(outer)


def _merged(graph: Any, nodes: Iterable[Any]) -> dict[str, str]:
    """Maps each duplicate node to the first node that computes the same."""
    first: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for node in nodes:
        if graph.get_operation_by_name(node.name).op_def.is_stateful:
            continue
        key = (
            node.op,
            node.device,
            tuple(_renamed(name, first) for name in node.input),
            tuple((k, node.attr[k].SerializeToString()) for k in sorted(node.attr)),
        )
        if key in seen:
            first[node.name] = seen[key]
        else:
            seen[key] = node.name
    return first


def _needed(graph: Any, ops: Sequence[tf.Operation], reads_only: bool) -> set[str]:
    """The names of the given operations, those with effects, and all dependencies."""
    stack = list(ops)
    if not reads_only:
        stack += [op for op in graph.get_operations() if op.op_def.is_stateful]
    kept: set[str] = set()
    while stack:
        op = stack.pop()
        if op.name not in kept:
            kept.add(op.name)
            stack += [tensor.op for tensor in op.inputs]
            stack += [] if reads_only else op.control_inputs
    return kept


def _renamed(name: str, first: dict[str, str]) -> str:
    """The name of an input or of a tensor, with its node's name replaced."""
    control = "^" if name.startswith("^") else ""
    node, colon, index = name.removeprefix("^").partition(":")
    return control + first.get(node, node) + colon + index


def _tensor_name(name: str) -> str:
    return name if ":" in name else f"{name}:0"


def _prefixed(name: str, prefix: str) -> str:
    return f"^{prefix}{name[1:]}" if name.startswith("^") else prefix + name
