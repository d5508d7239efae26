"""Private names of TensorFlow for reading and building graphs.

| names | why |
|---|---|
| `FuncGraph` | the graph of a stage, which reports accidental captures |
| `_functions`, `_add_function_recursive` | bodies of branches and loops, by name |
| `function_def_to_graph` | the graph of a body that exists only as a definition |
| `kernels` | which types have kernels |
| `UpdateContext` | variables act as their first copy while a step is traced |
| `_distributed_container` | the variable whose copy a handle belongs to |
| `op_callbacks` | TensorFlow's own way to see the operations that run eagerly |
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute import distribute_lib
from tensorflow.python.framework import kernels, op_callbacks
from tensorflow.python.framework.func_graph import FuncGraph, func_graph_from_py_func
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

from distfit._keras import generators
from distfit._keras.alive import instances_of
from distfit._keras.shadows import shadowed

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
BRANCHING = {"If", "StatelessIf", "Case", "StatelessCase"}
EMISSION_ERRORS = (
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    AssertionError,
    tf.errors.OpError,
)


def new_graph(name: str) -> Any:
    """A graph to build a stage in."""
    return FuncGraph(name)


def trace(function: Callable, spec: Any) -> Any:
    """The graph of `function(batch)`; `spec` is the structure of specs of a batch.

    Unlike with `tf.function`, variables are created at once.
    """
    return func_graph_from_py_func("step", function, (spec,), {})


def copy_operation(
    graph: Any, op: tf.Operation, inputs: Sequence[tf.Tensor], **changed: Any
) -> list[tf.Tensor]:
    """Adds an operation like `op` with other inputs, and returns its outputs.

    The copy keeps the name, so that errors can be traced back to the user's line.

    Args:
        graph: The graph to add it to.
        op: The operation.
        inputs: The inputs of the copy.
        **changed: Attributes to set: integers, types or lists of types.
    """
    definition = op.node_def
    attributes = {k: v for k, v in definition.attr.items() if not k.startswith("_")}
    for value in attributes.values():
        functions = [value.func] if value.HasField("func") else value.list.func
        for function in functions:
            graph._add_function_recursive(_function(op.graph, function.name))
    for name, value in changed.items():
        attributes[name] = _attribute(value)
    made = graph.create_op(op.type, list(inputs), attrs=attributes, name=op.name)
    return list(made.outputs)


def _attribute(value: Any) -> Any:
    if isinstance(value, tf.DType):
        return tf.compat.v1.AttrValue(type=value.as_datatype_enum)
    if isinstance(value, list):
        types = [dtype.as_datatype_enum for dtype in value]
        return tf.compat.v1.AttrValue(list=tf.compat.v1.AttrValue.ListValue(type=types))
    return tf.compat.v1.AttrValue(i=value)


def has_kernel(op: tf.Operation, types: dict[str, Any]) -> bool:
    """Whether there is a CPU kernel for an operation with these type attributes."""

    def does(kernel: Any) -> bool:
        return kernel.device_type == "CPU" and all(
            types[c.name].as_datatype_enum in c.allowed_values.list.type
            for c in kernel.constraint
            if isinstance(types.get(c.name), tf.DType)
        )

    return any(map(does, kernels.get_registered_kernels_for_op(op.type).kernel))


def body_of(op: tf.Operation, attribute: str) -> Any:
    """The graph of a function that an operation calls."""
    return _graph_of(op, op.graph, op.get_attr(attribute).name)


def called(op: tf.Operation) -> Any:
    """The graph of the function that an operation calls; None if it calls none."""
    if op.type in _CALLS:
        return _graph_of(op, op.graph, op.get_attr("f").name)
    graph = op.graph
    while graph is not None:
        if op.type in graph._functions:
            return _graph_of(op, graph, op.type)
        graph = getattr(graph, "outer_graph", None)
    return None


def branches_of(op: tf.Operation) -> list[Any]:
    """The graphs of an operation's branches, by index; False comes before True."""
    if "branches" not in op.node_def.attr:
        return [body_of(op, f"{name}_branch") for name in ("else", "then")]
    functions = op.node_def.attr["branches"].list.func
    return [_graph_of(op, op.graph, function.name) for function in functions]


def _graph_of(op: tf.Operation, graph: Any, name: str) -> Any:
    found = _function(graph, name)
    traced = getattr(found, "graph", None)
    # For gradients, TensorFlow extends the graph of a function after it was called.
    taken = len(op.inputs) - (op.type in BRANCHING)
    if traced is not None and len(traced.inputs) == taken:
        if len(traced.outputs) in (1, len(op.outputs)):  # A condition has one.
            return traced
    with graph.as_default():  # A `Defun`, as in CTC, has only a definition.
        return function_def_to_graph(found.definition)


def functions_of(graph: Any) -> list[Any]:
    """The graphs of all functions that a graph calls, including nested calls."""
    functions = [getattr(f, "graph", None) for f in graph._functions.values()]
    return [function for function in functions if function is not None]


def _function(graph: Any, name: str) -> Any:
    while graph is not None:
        found = graph._functions.get(name)
        if found is not None:
            return found
        graph = getattr(graph, "outer_graph", None)
    raise ValueError(f"The graph calls an unknown function. Received: {name!r}.")


@contextlib.contextmanager
def eager_use_noted(handles: dict[int, tf.Tensor], draws: list[Any]) -> Iterator[None]:
    """Notes what operations use that run eagerly in this thread.

    Args:
        handles: Receives the resources, in the order of their use.
        draws: Receives the kind and the seeds of each draw of random numbers. One with
            the seeds of another goes on where that has ended.
    """

    def note(op_type, inputs, attrs, outputs, op_name=None, graph=None):
        if graph is not None:
            return
        for tensor in inputs:
            if tensor.dtype == tf.resource:
                handles.setdefault(id(tensor), tensor)
        named = dict(zip(attrs[::2], attrs[1::2], strict=True)) if attrs else {}
        if "seed2" in named:
            draws.append((op_type, named["seed"], named["seed2"]))

    op_callbacks.add_op_callback(note)
    try:
        yield
    finally:
        op_callbacks.remove_op_callback(note)


def variables_with(handles: dict[int, tf.Tensor]) -> list[tf.Variable]:
    """The variables that have these handles, in their order."""
    living = instances_of(tf.Variable) if handles else []
    owners = {id(v.handle): v for v in living if _has_handle(v)}
    found = [variable_of(h) or owners.get(key) for key, h in handles.items()]
    return [variable for variable in found if variable is not None]


def _has_handle(variable: tf.Variable) -> bool:
    return not isinstance(variable, tf.distribute.DistributedValues) and hasattr(
        variable, "handle"
    )


def variable_of(handle: tf.Tensor) -> Any:
    """The distributed variable whose copy has this handle, or None."""
    return getattr(handle, "_distributed_container", lambda: None)()


def copies_of(handle: tf.Tensor, strategy: Any, count: int) -> tuple[str, list]:
    """The counterparts of a captured tensor on the replicas of this process.

    Returns:
        The kind of resource, as in `values.Resource`, and the tensors.

    Raises:
        RuntimeError: for a copy of a variable other than the first (the step was not
            traced for one device), or one that is aggregated on read, but not summed.
    """
    container = getattr(handle, "_distributed_container", lambda: None)()
    if container is None:
        return "single", [handle] * count
    copies = list(container.values)
    if copies[0].handle is not handle:
        raise RuntimeError(
            "A step must be traced as for one device. Received: an operation on "
            f"another replica's copy of the variable {container.name!r}. Remove the "
            "code in the step that uses tf.distribute."
        )
    summed = container.synchronization == tf.VariableSynchronization.ON_READ
    if summed and container.aggregation != tf.VariableAggregation.SUM:
        raise RuntimeError(
            "A variable that is aggregated on read must be summed. Received: "
            f"{container.name!r} with {container.aggregation}. Create it with "
            "aggregation SUM, or without synchronization."
        )
    handles = [copy.handle for copy in copies]
    return "summed" if summed else "mirrored", handles * (count // len(handles))


@contextlib.contextmanager
def as_first_replica() -> Iterator[None]:
    """Makes distributed variables act as their first copy, in this thread.

    Random generators then draw as on one device.
    """
    with shadowed(_of_strategies, _methods), distribute_lib.UpdateContext(0):
        yield


# Methods of variables that TensorFlow has not implemented for mirrored ones.
_OF_ONE_DEVICE = (
    *("scatter_nd_add", "scatter_nd_sub", "scatter_nd_update"),
    *("scatter_nd_max", "scatter_nd_min", "batch_scatter_update"),
)


def _of_strategies() -> list[Any]:
    found = instances_of(tf.random.Generator, tf.distribute.DistributedValues)
    return [f for f in found if isinstance(f, tf.random.Generator) or _is_mirrored(f)]


def _methods(found: Any) -> dict[str, Callable]:
    """The methods that replace those of a generator or a variable."""
    if isinstance(found, tf.random.Generator):
        is_of_strategy = generators.is_of_strategy(found)
        return generators.methods_of_one_device(found) if is_of_strategy else {}
    first = found.values[0]
    methods = {name: getattr(first, name, None) for name in _OF_ONE_DEVICE}
    return {name: method for name, method in methods.items() if method is not None}


@contextlib.contextmanager
def as_all_replicas() -> Iterator[None]:
    """Undoes `as_first_replica`: assignments reach all copies."""
    with distribute_lib.UpdateContext(None):
        yield


def sum_over_replicas(strategy: Any, parts: list) -> list:
    """All-reduces a tensor over all replicas, by sum; `parts` are this process's."""
    mine = iter(parts)
    value = strategy.experimental_distribute_values_from_function(lambda _: next(mine))
    (summed,) = strategy.extended.batch_reduce_to(
        tf.distribute.ReduceOp.SUM, [(value, value)]
    )
    return list(strategy.experimental_local_results(summed))


def copy_from_first_replica(strategy: Any) -> None:
    """Copies the value of each mirrored variable from its first copy to the others.

    For steps that run eagerly, on the first copies only.
    """
    for variable in filter(_is_mirrored, _values_of(strategy)):
        first, *others = variable.values
        for other in others:
            other.assign(first.value())


def summed_among(things: list) -> list[tf.Variable]:
    """The variables among some objects that are summed on read, without duplicates."""
    found = {id(thing): thing for thing in things if _is_read_as_one(thing)}
    return [v for v in found.values() if v.aggregation == tf.VariableAggregation.SUM]


def gather_parts(strategy: Any, variables: list[tf.Variable]) -> None:
    """Puts the sum over all replicas on the first replica of each worker.

    A collective: all workers must call it with the same variables in the same order.
    """
    for variable in variables:
        parts = [tf.identity(part.value()) for part in variable.values]
        total, *_ = sum_over_replicas(strategy, parts)
        first, *others = variable.values
        first.assign(total)
        for other in others:
            other.assign(tf.zeros_like(other))


def own_parts(strategy: Any, all_but: list[tf.Variable]) -> dict[int, tf.Tensor]:
    """The parts of variables summed on read on the first replica of this process."""
    left_out = {id(variable) for variable in all_but}
    return {
        id(variable): tf.identity(variable.values[0].value())
        for variable in _summed(strategy)
        if id(variable) not in left_out
    }


def set_own_parts(strategy: Any, values: dict[int, tf.Tensor]) -> None:
    """Sets the parts that `own_parts` returned, and those of others to zero."""
    for variable in _summed(strategy):
        part = variable.values[0]
        part.assign(values.get(id(variable), tf.zeros_like(part)))


def _summed(strategy: Any) -> list[tf.Variable]:
    return summed_among(_values_of(strategy))


def _values_of(strategy: Any) -> list[Any]:
    found = filter(_is_variable, instances_of(tf.distribute.DistributedValues))
    return [variable for variable in found if variable.distribute_strategy is strategy]


def _is_variable(thing: Any) -> bool:
    return isinstance(thing, tf.distribute.DistributedValues) and isinstance(
        thing, tf.Variable
    )


def _is_mirrored(thing: Any) -> bool:
    return _is_variable(thing) and not _is_read_as_one(thing)


def _is_read_as_one(thing: Any) -> bool:
    """Whether it is a variable whose value is made of those of all replicas."""
    on_read = tf.VariableSynchronization.ON_READ
    return _is_variable(thing) and thing.synchronization == on_read
