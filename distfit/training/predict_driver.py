"""The compiled `predict_step`: a batch of all replicas in one call."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distfit.partition.step import Share
from distfit.training import checks
from distfit.training.compiling import (
    compiled,
    compiled_for_iterators,
    is_for_few_rows,
    naming_lines,
    partitioned,
)
from distfit.training.eager import EagerStep
from distfit.training.global_batches import GlobalBatches
from distfit.training.shards import Shards, next_shards
from distfit.training.shares import Layout, replicas_of, shares, shares_of_shards


class PredictDriver:
    """Runs `predict_step`.

    Args:
        model: The model.
        layout: The specs of a global batch, and which of its tensors have rows.
        sharded: Whether each replica brings its own rows.
    """

    def __init__(self, model: keras.Model, layout: Layout, sharded: bool):
        self.model = model
        self.replicas = replicas_of(model.distribute_strategy)
        self.eagerly = checks.runs_eagerly(model)
        if self.eagerly:
            self._eager = EagerStep(model, model.predict_step, self.replicas)
            return
        self.step = partitioned(
            model,
            model.predict_step,
            layout,
            self.replicas,
            sharded,
            bool(model.jit_compile),
            keep_rows=True,
        )
        for name in ("_run_next", "_run_shards"):
            setattr(self, name, compiled_for_iterators(self, name))
        for name in ("_run_taken", "_run_batch"):
            setattr(self, name, compiled(getattr(self, name), self.replicas))

    @naming_lines
    def run(self, batches: GlobalBatches) -> Any:
        """The predictions for this worker's rows of the next batch, in their order."""
        if isinstance(batches, Shards):
            shards, counts = batches.take_next()
            few_rows = self.step.needs_rows and not np.all(counts)
            outputs, *ahead = self._run_shards(
                batches.iterator(), shards, counts, few_rows=few_rows
            )
            batches.put_next(tuple(ahead))
            return outputs
        if batches.length_is_known and not self.eagerly and not self.step.needs_rows:
            return self._run_next(batches.iterator())
        taken = batches.take_next()
        batches.put_next(None)
        batch = taken.get_value()
        if self.eagerly:
            return self._eager(batch)
        # Passed as the optional, whose spec is the same for all batches.
        return self._run_taken(taken, is_for_few_rows(self.step, batch))

    @naming_lines
    def run_on(self, batch: Any) -> Any:
        """The predictions for this worker's rows of one global batch of tensors."""
        if self.eagerly:
            return self._eager(batch)
        return self._run_batch(batch, is_for_few_rows(self.step, batch))

    def _run_batch(self, batch, few_rows=False) -> Any:
        share = shares(batch, self.step.has_rows, self.replicas)
        return self._outputs(share, few_rows)

    def _run_next(self, iterator) -> Any:
        return self._run_batch(next(iterator))

    def _run_taken(self, taken, few_rows) -> Any:
        return self._run_batch(taken.get_value(), few_rows)

    def _run_shards(self, iterator, shards, counts, few_rows) -> Any:
        share = shares_of_shards(
            shards.get_value(),
            counts,
            self.step.has_rows,
            self.replicas,
        )
        outputs = self._outputs(share, few_rows)
        return outputs, *next_shards(iterator, self.replicas)

    def _outputs(self, share: Share, few_rows: bool) -> Any:
        outputs = self.step.results(self.step.place(share, few_rows))
        if self.replicas.first == 0:
            return outputs
        # The first worker returns what every worker has in full.
        return tf.nest.map_structure(_unless_whole, outputs, self.step.is_cut)


def _unless_whole(output: Any, is_cut: bool) -> Any:
    """The output if it holds this worker's rows; else an output without rows."""
    if is_cut or not tf.is_tensor(output) or output.shape.rank == 0:
        return output
    if isinstance(output, tf.SparseTensor):
        none = tf.concat([[0], output.dense_shape[1:]], 0)
        return tf.sparse.slice(output, tf.zeros_like(none), none)
    return output[:0]
