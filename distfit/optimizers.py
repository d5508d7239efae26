"""Optimizers: the gradients of all replicas are summed once, then everything is local.

Every replica then holds the gradient of the global batch, and applies it to its own
copies of the variables exactly as one device would: finite check, unscaling, clipping,
accumulation, weight decay, update, moving averages, constraints.
"""

import functools
import types
from typing import Any

import keras
import tensorflow as tf

from distfit import _keras
from distfit.collectives import current_share


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
    share = current_share()
    if share is None:
        _check_in_replica_context()
    if trainable_variables is not None:
        trainable_variables = list(trainable_variables)
    if share is not None and share.defers(self, trainable_variables):
        return
    if share is None or share.alone:
        return type(self).apply(self, grads, trainable_variables)
    grads = [_once(grad, share) for grad in grads]
    present = [i for i, grad in enumerate(grads) if grad is not None]
    summed = share.all_reduce([grads[i] for i in present])
    for i, grad in zip(present, summed, strict=True):
        grads[i] = grad

    def apply_on_every_device(strategy, grads):
        anchor = self.variables[0].value
        update = functools.partial(_update_local_copies, self, trainable_variables)
        strategy.extended.update(anchor, update, args=(grads,), group=True)

    tf.distribute.get_replica_context().merge_call(apply_on_every_device, args=(grads,))


def _check_in_replica_context() -> None:
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1 and tf.distribute.in_cross_replica_context():
        raise ValueError(
            "An optimizer is applied by each replica, to the gradients of its rows. "
            f"Received: a call outside of a step, in the scope of a strategy of "
            f"{replicas} replicas. Call `apply()` in `train_step`."
        )


def _update_local_copies(optimizer, variables, _, grads):
    """Runs the stock `apply` on one device.

    Inside `strategy.extended.update` a variable is its local copy and nothing is
    aggregated any more, so whatever an optimizer does, branches included, just runs.
    """
    with _keras.plain_updates(optimizer):
        type(optimizer).apply(optimizer, grads, variables)


def _once(grad, share):
    """Keeps one copy of a sparse gradient whose rows every replica has.

    Copies of dense gradients add up. Those of sparse ones are lined up, and optimizers
    treat rows that occur twice as two updates.
    """
    if share.whole is False or not isinstance(grad, tf.IndexedSlices):
        return grad
    is_other = tf.logical_and(share.whole, share.replica != 0)
    rows = tf.where(is_other, 0, tf.shape(grad.indices)[0])
    weight = tf.cast(tf.where(share.whole, share.num_replicas, 1), grad.values.dtype)
    return tf.IndexedSlices(
        grad.values[:rows] * weight, grad.indices[:rows], grad.dense_shape
    )
