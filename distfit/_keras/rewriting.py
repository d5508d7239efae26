"""How TensorFlow rewrites the graph of a step before it runs.

| names | why |
|---|---|
| `context.function_call_options`, `FunctionCallOptions` | options of function calls \
in this thread; the public ones apply to the whole process |
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.python.eager import context

# These reorder sums and products, depending on the names of operations and on their
# other readers.
_BY_NAME = ("arithmetic_optimization", "constant_folding", "remapping")


def alike_on_replicas(function: Callable) -> Callable:
    """Wraps a compiled function so that all replicas round alike.

    What replicas compute in full must be bitwise equal, or their copies of the
    variables drift apart. By default, TensorFlow may add the terms of a sum in a
    different order on each replica.
    """
    options = functools.cache(_options)  # Read at the first call.

    def call(*args, **kwargs):
        with _as_options(options()):
            return function(*args, **kwargs)

    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def _options() -> Any:
    of_thread = context.context().function_call_options
    config = config_pb2.ConfigProto.FromString(of_thread.config_proto_serialized)
    rewriting = config.graph_options.rewrite_options
    for name in _BY_NAME:
        setattr(rewriting, name, rewriter_config_pb2.RewriterConfig.OFF)
    return context.FunctionCallOptions(of_thread.executor_type, config)


@contextlib.contextmanager
def _as_options(options: Any) -> Iterator[None]:
    current = context.context()
    before = current.function_call_options
    current.function_call_options = options
    try:
        yield
    finally:
        current.function_call_options = before
