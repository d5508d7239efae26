"""A step run operation by operation."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from distfit import _keras
from distfit._keras import graphs, optimizers
from distfit.cluster import workers
from distfit.partition.exchanges import Replicas
from distfit.training import checks
from distfit.training.batch import without_optionals


class EagerStep:
    """A step run operation by operation, on the first device, with the whole batch.

    Every worker does the same. The state of a metric is a sum over replicas: within a
    step the first replica of each worker holds the whole sum, between steps only the
    chief does.

    Args:
        model: The model.
        step: The bound step.
        replicas: The replicas of this process.
    """

    def __init__(self, model: keras.Model, step: Callable, replicas: Replicas):
        self._model = model
        self._step = step
        self._replicas = replicas
        self._takes_notes = False
        self._handles: dict[int, tf.Tensor] = {}
        self._draws: list[Any] = []  # Those of the latest step.
        self._counted: set[str] = set()

    def take_notes(self) -> None:
        """Notes from now on which variables the steps use, and where they draw."""
        self._takes_notes = True
        self._handles = {}

    def forget_draws(self) -> None:
        """Forgets the draws of the latest step, whose seeds will be used again."""
        self._draws = []

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that the steps have used, in the order of their use."""
        return graphs.variables_with(self._handles)

    @property
    def counted_draws(self) -> list[str]:
        """Draws with a seed of their own: each counts them, in no variable."""
        return [f"{kind} in an eager step" for kind in sorted(self._counted)]

    def __call__(self, batch: Any) -> Any:
        strategy = self._model.distribute_strategy
        summed = self._summed() if strategy.num_replicas_in_sync > 1 else []
        graphs.gather_parts(strategy, summed)
        is_chief = workers.of(strategy).is_chief
        kept = {} if is_chief else graphs.own_parts(strategy, all_but=summed)
        with optimizers.of_one_device(strategy.scope, accumulate_parts=False):
            device = tf.device(self._replicas.devices[0] or None)
            with device, self._created_in_scope():
                with graphs.as_first_replica(), self._noting():
                    outputs = self._step(without_optionals(batch))
        graphs.copy_from_first_replica(strategy)
        if not is_chief:
            graphs.set_own_parts(strategy, kept)
        return outputs

    def _created_in_scope(self) -> contextlib.AbstractContextManager:
        """Creates variables for all replicas, as where the model was made."""
        in_scope = False

        def create(next_creator: Callable, **kwargs: Any) -> Any:
            nonlocal in_scope
            if in_scope or tf.distribute.has_strategy():
                return next_creator(**kwargs)
            given = {name: v for name, v in kwargs.items() if v is not None}
            in_scope = True
            try:
                scope = self._model.distribute_strategy.scope()
                with scope, graphs.as_all_replicas():
                    return tf.Variable(**given)
            finally:
                in_scope = False

        return tf.variable_creator_scope(create)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        if not self._takes_notes:
            yield
            return
        before, self._draws = set(self._draws), []
        with graphs.eager_use_noted(self._handles, self._draws):
            yield
        # Without one, TensorFlow's generator gives each draw another seed.
        self._counted |= {kind for kind, *seeds in before.intersection(self._draws)}

    def _summed(self) -> list[tf.Variable]:
        """The summed variables of the model, in an order that all workers share."""
        held = [v for m in checks.metrics_of(self._model) for v in m.variables]
        attributes = tf.train.TrackableView(self._model).descendants()
        return graphs.summed_among([*map(_keras.underlying, held), *attributes])
