"""Optimizers: the gradients of all replicas are summed once, then everything is local.

Every replica then holds the gradient of the global batch, and applies it to its own
copies of the variables exactly as one device would: finite check, unscaling, clipping,
accumulation, weight decay, update, moving averages, constraints.

An optimizer that accumulates gradients over k steps does so on each replica for the
gradients of its own rows. They are summed over the replicas in every k-th step alone.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distfit import _keras
from distfit.collectives import Share, current_share, stack_replicas


def adapt(value: Any) -> Any:
    """Gives an optimizer its global-batch form, in place, and returns it.

    The object and its class stay what they are, so that settings changed through any
    reference take effect and saved files hold the stock optimizer.
    """
    if isinstance(value, keras.optimizers.Optimizer) and "apply" not in value.__dict__:
        object.__setattr__(value, "apply", types.MethodType(_apply, value))
    return value


def _apply(self, grads, trainable_variables=None):
    """Updates the variables with the gradient of the global batch.

    Args:
        grads: This replica's share of each gradient; None for variables without one.
        trainable_variables: The variables, in the same order.

    Raises:
        ValueError: if called in the scope of a strategy but outside of a step.
    """
    if _keras.in_plain_updates():  # Another optimizer, around this one, was applied.
        return type(self).apply(self, grads, trainable_variables)
    share = current_share()
    if share is None:
        _check_in_replica_context()
    if trainable_variables is not None:
        trainable_variables = list(trainable_variables)
    grads = list(grads)
    if share is not None and share.defers(self, grads, trainable_variables):
        return
    variables = trainable_variables or _keras.variables_of(self)
    complete = variables and any(grad is not None for grad in grads)
    if share is None or share.alone or not complete:  # Keras says what is missing.
        return type(self).apply(self, grads, trainable_variables)
    grads = [None if grad is None else share.counted(grad) for grad in grads]
    later = _accumulations(self, grads, variables)
    finite = _finite_everywhere(self, grads, share) if later else True
    done = {at for part in later for at in part.accumulators}
    done |= _take_largest(grads, variables, share)
    _sum(grads, share, except_at=done)

    def apply_on_every_device(strategy, grads, finite):
        (finite, *_) = strategy.experimental_local_results(finite)
        due = [part.sum_if_due(strategy, grads, finite, share) for part in later]

        def update(_, grads):
            for part, is_due in zip(later, due, strict=True):
                part.leave_out_if(is_due, grads)
            share.compiled(
                lambda: _update_local_copies(self, grads, trainable_variables)
            )

        anchor = self.variables[0].value
        strategy.extended.update(anchor, update, args=(grads,), group=True)

    share.merge_call(apply_on_every_device, grads, finite)


def _check_in_replica_context() -> None:
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1 and tf.distribute.in_cross_replica_context():
        raise ValueError(
            "An optimizer is applied by each replica, to the gradients of its rows. "
            f"Received: a call outside of a step, in the scope of a strategy of "
            f"{replicas} replicas. Call `apply()` in `train_step`."
        )


def _update_local_copies(optimizer, grads, variables):
    """Runs the stock `apply` on one device.

    Inside `strategy.extended.update` a variable is its local copy and nothing is
    aggregated any more, so whatever an optimizer does, branches included, just runs.
    """
    with _keras.plain_updates():
        type(optimizer).apply(optimizer, grads, variables)


def _take_largest(grads: list, variables, share: Share) -> set[int]:
    """Replaces "gradients" that are new values of variables, and returns their places.

    Layers of 8 bits keep the largest numbers that they have seen so: those of the rows
    of a replica, of which the largest are those of the batch.
    """
    places = {
        at: tf.reshape(grad, [-1])
        for at, (grad, variable) in enumerate(zip(grads, variables, strict=True))
        if grad is not None and getattr(variable, "overwrite_with_gradient", False)
    }
    if places:
        values = stack_replicas(tf.concat(list(places.values()), axis=0))
        largest = tf.reduce_max(values, axis=0)
        sizes = [value.shape[0] for value in places.values()]
        for at, value in zip(places, tf.split(largest, sizes), strict=True):
            grads[at] = tf.reshape(value, grads[at].shape)
    return set(places)


def _sum(grads: list, share: Share, except_at: set[int]) -> None:
    """Replaces gradients by their sums over the replicas."""
    now = [i for i, g in enumerate(grads) if g is not None and i not in except_at]
    if not now:
        return
    summed = share.all_reduce([grads[i] for i in now])
    for i, grad in zip(now, summed, strict=True):
        grads[i] = grad


@dataclasses.dataclass
class _Accumulation:
    """The gradients that one optimizer accumulates.

    Attributes:
        optimizer: The optimizer, which may be inside another one.
        accumulators: Their accumulators, by the places of the gradients.
        scale: Returns what divides a gradient before it is accumulated.
    """

    optimizer: keras.optimizers.Optimizer
    accumulators: dict[int, keras.Variable]
    scale: Callable[[], Any]

    def sum_if_due(self, strategy, grads, finite, share: Share) -> tf.Tensor:
        """Sums what all replicas have accumulated, if an update is due, and says so.

        Replicas cannot exchange anything in a branch of theirs, but here, where there
        is one thread for all of them, the branch is taken by all or none.
        """
        due = tf.logical_and(_keras.is_update_step(self.optimizer), finite)

        def complete(grads):
            own = [
                accumulator + grads[at] / tf.cast(self.scale(), grads[at].dtype)
                for at, accumulator in self.accumulators.items()
            ]
            totals = zip(self.accumulators.values(), share.all_reduce(own), strict=True)
            for accumulator, total in totals:
                accumulator.assign(total)

        def on_every_replica():
            strategy.extended.call_for_each_replica(complete, args=(grads,))

        tf.cond(due, on_every_replica, lambda: None)
        return due

    def leave_out_if(self, due, grads: list) -> None:
        """Takes out the gradients that the sums have in them already."""
        for at in self.accumulators:
            grads[at] = tf.where(due, tf.zeros_like(grads[at]), grads[at])


def _accumulations(optimizer, grads: list, variables) -> list[_Accumulation]:
    """Who accumulates which gradients; these become dense, as accumulators are."""
    found = []
    for inner in _keras.with_inner(optimizer):
        accumulators = {
            at: accumulator
            for at, accumulator in _keras.accumulators(inner, variables).items()
            if grads[at] is not None
        }
        for at in accumulators:
            grads[at] = tf.convert_to_tensor(grads[at])
        if accumulators:
            scale = functools.partial(_scale, optimizer, inner)
            found.append(_Accumulation(inner, accumulators, scale))
    return found


def _scale(optimizer, inner) -> Any:
    """What the gradients that `inner` is to accumulate are too large by."""
    scale = inner.loss_scale_factor or 1.0
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        scale = scale * optimizer.dynamic_scale
    return scale


def _finite_everywhere(optimizer, grads: list, share: Share) -> Any:
    """Whether the gradients of all replicas are finite, where an optimizer asks.

    If not, they become NaN on all of them: everyone skips the step.
    """
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return True
    overflows = tf.logical_not(optimizer.check_finite(grads))
    finite = share.all_reduce([tf.cast(overflows, tf.float32)])[0] == 0
    for i, grad in enumerate(grads):
        if isinstance(grad, tf.Tensor):
            grads[i] = tf.where(finite, grad, np.nan)
    return finite


_keras.allow_plain_updates()
_keras.sum_accumulators_on_read()
