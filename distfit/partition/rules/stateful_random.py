"""Stateful random draws: done once, on the first replica, for all."""

import itertools
from typing import Any

import numpy as np

from distfit.partition.emission import Emitter
from distfit.partition.layouts import (
    Layout,
)
from distfit.partition.registry import rule
from distfit.partition.rules.random import drawn_shape, rows_of, with_parameters
from distfit.partition.tracing import Node
from distfit.partition.values import Value


@rule("StatefulRandomBinomial")
def _binomial_of_generator(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value]:
    resource = inputs[0].resource
    if resource is None or resource.kind != "mirrored":
        return _once(emitter, node, inputs, drawn_shape(emitter, node, inputs[2]))
    return with_parameters(emitter, node, inputs, 2, [3, 4])


_UNSEEDED = itertools.count()


@rule(
    *("RandomStandardNormal", "RandomUniform", "RandomUniformInt", "TruncatedNormal"),
    *("ParameterizedTruncatedNormal",),
)
def _stateful(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    return _once(emitter, node, inputs, drawn_shape(emitter, node, inputs[0]))


@rule("RandomGamma", "RandomPoisson", "RandomPoissonV2")
def _stateful_of_one(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    """The given shape precedes that of the parameter."""
    dims = drawn_shape(emitter, node, inputs[0], inputs[1])
    return _once(emitter, node, inputs, dims, inputs[1])


@rule("Multinomial")
def _stateful_multinomial(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value]:
    logits = inputs[0]
    dims = emitter.static_dims(node.outputs[0])
    if logits.dims is not None:
        dims = [logits.dims[0], dims[1]]
    return _once(emitter, node, inputs, dims, logits)


@rule("RandomShuffle")
def _stateful_shuffle(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    return _once(emitter, node, inputs, inputs[0].dims, inputs[0])


def _once(
    emitter: Emitter,
    node: Node,
    inputs: list[Value],
    dims: Any,
    like: Value | None = None,
) -> list[Value]:
    """A draw by the first replica for all, of which each replica takes its rows.

    Args:
        emitter: The emitter.
        node: The node.
        inputs: Its inputs.
        dims: The shape of the draw.
        like: An input whose dimensions the shape begins or ends with.
    """
    if any(v.has_rows and v.whole is None for v in inputs):
        emitter.report(node)
    seeds = _seeds() if _is_unseeded(node) else {}
    (whole,) = emitter.once(node, inputs, dims, **seeds)
    if dims is None:
        return [whole]
    layout = _layout_like(emitter, whole, like) or rows_of(emitter, inputs[0], dims)
    return [whole if layout is None else emitter.cut(whole, layout)]


def _layout_like(emitter: Emitter, whole: Value, like: Value | None) -> Layout | None:
    if like is None or not like.has_rows or whole.dims is None:
        return None
    for dim in (like.layout.dim, like.layout.dim + len(whole.dims) - like.rank):
        if emitter.sizes.same(whole.dims[dim], like.layout.size):
            return like.layout.moved(dim)
    return None


def _is_unseeded(node: Node) -> bool:
    names = node.op.node_def.attr
    return "seed" in names and not (node.attr("seed") or node.attr("seed2"))


def _seeds() -> dict[str, int]:
    """Seeds for an unseeded operation: each worker draws, and all must draw the same.

    They are derived from the state of NumPy's generator, which is the same on all
    workers and is not changed.
    """
    state: Any = np.random.get_state()
    generator = np.random.default_rng([*state[1], state[2], next(_UNSEEDED)])
    seed, seed2 = generator.integers(1, 2**31 - 1, 2)
    return {"seed": int(seed), "seed2": int(seed2)}
