"""The compiled step driver: k steps of all replicas in one call."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distfit import _keras
from distfit.cluster import workers
from distfit.partition.findings import not_partitioned
from distfit.partition.step import Share
from distfit.training import checks
from distfit.training.compiling import (
    compiled,
    compiled_for_iterators,
    has_few_rows,
    is_for_few_rows,
    naming_lines,
    partitioned,
)
from distfit.training.data_clock import DataClock
from distfit.training.eager import EagerStep
from distfit.training.finite import FiniteWatch
from distfit.training.global_batches import GlobalBatches
from distfit.training.logs import as_numbers
from distfit.training.shards import Shards, next_shards
from distfit.training.shares import Layout, replicas_of, shares, shares_of_shards


class StepDriver:
    """Runs one kind of step, `train_step` or `test_step`, of a model.

    Everything that can be done once is done here: tracing, partitioning, compiling.

    Args:
        model: A compiled `keras.Model`.
        step: The bound `train_step` or `test_step`.
        layout: The specs of a global batch, and which of its tensors have rows.
        sharded: Whether each replica brings its own rows.
        watch: Watches for non-finite losses; None to skip that.
        clock: Measures the wait for data; None to skip that.
    """

    def __init__(
        self,
        model: keras.Model,
        step: Callable,
        layout: Layout,
        sharded: bool,
        watch: FiniteWatch | None = None,
        clock: DataClock | None = None,
    ):
        self.model = model
        self.strategy = model.distribute_strategy
        self.workers = workers.of(self.strategy)
        self.replicas = replicas_of(self.strategy)
        self.watch = watch
        self.clock = clock
        step = watch.around(step) if watch else step
        self._latest: Any = None
        self._before: dict = {}  # The results at a checkpoint, until a step is run.
        self.eagerly = checks.runs_eagerly(model)
        if self.eagerly:
            self._eager = EagerStep(model, step, self.replicas)
            return
        self.step = partitioned(
            model, step, layout, self.replicas, sharded, bool(model.jit_compile)
        )
        checks.check_metrics(model)
        self._say_what_is_in_full()
        self._has_rows = self.step.has_rows
        self._sharded = sharded
        for name in ("_run_next", "_run_many", "_run_ahead"):
            setattr(self, name, compiled_for_iterators(self, name))
        self._run_batch_compiled = compiled(self._run_batch, self.replicas)
        self._read_compiled = compiled(self._read, self.replicas)

    def _say_what_is_in_full(self) -> None:
        found = not_partitioned(self.step.findings, self.step.elements)
        if found and self.workers.is_chief and self.replicas.num_replicas > 1:
            logging.getLogger("distfit").warning(found)

    @naming_lines
    def run(self, batches: GlobalBatches, steps: int) -> int:
        """Runs up to `steps` steps and returns how many there were data for."""
        if self.eagerly:
            return self._run_eagerly(batches, steps)
        if steps > 1 and self.takes_single_steps:
            taken = (self.run(batches, 1) for _ in range(steps) if batches.has_next())
            return sum(taken)
        if self.step.needs_rows or not batches.length_is_known:
            return self._run_until_end(batches, steps)
        if steps == 1:
            self._latest = self._run_next(batches.iterator())
        else:
            self._latest = self._run_many(batches.iterator(), tf.constant(steps))
        return steps

    @property
    def takes_single_steps(self) -> bool:
        """Whether steps cannot be fused.

        In a loop, TensorFlow treats the exchanges of all steps as one collective, which
        fails on several workers when its size changes.
        """
        return self.workers.count > 1 and not self.step.has_fixed_exchanges

    @naming_lines
    def run_on(self, batch: Any) -> None:
        """Runs a step on one global batch of tensors."""
        if self.eagerly:
            self._latest = self._eager(batch)
        else:
            few_rows = is_for_few_rows(self.step, batch)
            self._latest = self._run_batch_compiled(batch, few_rows)

    def reset(self) -> None:
        """Resets the model's metrics."""
        self.model.reset_metrics()
        if self.watch is not None:
            self.watch.reset()
        self._latest, self._before = None, {}

    def set_results(self, results: dict) -> None:
        """Sets the results of the latest step, for an epoch that goes on after it."""
        self._before = results

    def results(self) -> dict[str, float]:
        """The logs of the latest step: summed over replicas where needed."""
        if self._latest is None:
            return dict(self._before)
        if self.eagerly:
            return as_numbers(self._latest)
        logs = self._read_compiled(self._latest)
        return as_numbers(logs or {})

    def results_of_epoch(self) -> dict[str, float]:
        """The logs of an epoch.

        As in stock Keras these are the results of the model's metrics if the names are
        the same, even if the step returned other values. A metric that the step does
        not update keeps the value the step returned: stock Keras logs 0 for it.
        """
        logs = self.results()
        if not logs or not (self.eagerly or self.step.returned):
            return logs
        metrics = as_numbers(self.model.get_metrics_result())
        if metrics.keys() != logs.keys():
            return logs
        return {name: metrics[name] for name in metrics} | {
            name: logs[name] for name in self._names_not_updated()
        }

    def _names_not_updated(self) -> list[str]:
        """Names of metrics whose state is all zeros, as after a reset."""
        idle = [
            metric
            for metric in self.model.metrics
            if not any(np.any(np.asarray(v)) for v in metric.variables)
        ]
        return [metric.name for metric in idle if not _keras.is_compiled(metric)]

    @property
    def counted_draws(self) -> list[str]:
        """The lines of draws in the step whose state is in no variable."""
        return self._eager.counted_draws if self.eagerly else self.step.counted_draws

    @property
    def variables(self) -> list:
        """The variables that the step uses: if eagerly, those it was seen to use."""
        return self._eager.variables if self.eagerly else self.step.variables

    def take_notes(self) -> None:
        """Learns from now on what the step uses, if it runs eagerly."""
        if self.eagerly:
            self._eager.take_notes()

    def try_on(self, batch: Any) -> None:
        """Runs an eager step to learn what it uses; all else is to be undone."""
        self._eager(batch)
        self._eager.forget_draws()

    # Compiled methods.

    def _run_next(self, iterator):
        return self._run_batch(self._next_of(iterator))

    def _next_of(self, iterator) -> Any:
        return self._timed(lambda: next(iterator))

    def _timed(self, read: Callable, after: Sequence[tf.Tensor] = ()) -> Any:
        return self.clock.timed(read, after) if self.clock else read()

    def _run_many(self, iterator, steps):
        def body(step, *latest):
            return step + 1, *self._flat(self._run_batch(self._next_of(iterator)))

        def more(step, *latest):
            return step < steps

        _, *latest = tf.while_loop(more, body, [tf.constant(0), *self._nothing()])
        return self._packed(latest)

    def _run_ahead(self, iterator, ahead, steps, few_rows):
        """Runs steps while there are data, reading one batch ahead.

        Args:
            iterator: The iterator of the data.
            ahead: The latest result of `_read_ahead`.
            steps: The maximum number of steps.
            few_rows: Whether to run only batches that leave replicas without rows, or
                only batches that do not; ignored if the step does not need rows.

        Returns:
            The number of steps run, the batch ahead, and the outputs of the last step.
        """

        def body(step, ahead, *latest):
            outputs = self._flat(self.step.place(self._share_of(ahead), few_rows))
            ahead = self._timed(lambda: self._read_ahead(iterator), after=outputs)
            return step + 1, ahead, *outputs

        def more(step, ahead, *latest):
            return tf.logical_and(step < steps, self._is_next(ahead, few_rows))

        done, ahead, *latest = tf.while_loop(
            more, body, [tf.constant(0), ahead, *self._nothing()]
        )
        return done, ahead, self._packed(latest)

    def _read_ahead(self, iterator) -> Any:
        if self._sharded:  # Counts are exchanged a step ahead.
            return next_shards(iterator, self.replicas)
        return iterator.get_next_as_optional()

    def _is_next(self, ahead, few_rows: bool) -> tf.Tensor:
        """Whether a batch is ahead, and of the kind that `few_rows` selects."""
        if self._sharded:
            counts = ahead[1]
            every = self.step.needs_rows and not few_rows
            return tf.reduce_all(counts > 0) if every else tf.reduce_any(counts > 0)
        if not self.step.needs_rows:
            return ahead.has_value()
        return tf.cond(
            ahead.has_value(),
            lambda: tf.equal(has_few_rows(self.step, ahead.get_value()), few_rows),
            lambda: False,
        )

    def _share_of(self, ahead) -> Share:
        if not self._sharded:
            return shares(ahead.get_value(), self._has_rows, self.replicas)
        of_replicas, counts = ahead
        batches = of_replicas.get_value()
        return shares_of_shards(batches, counts, self._has_rows, self.replicas)

    def _run_batch(self, batch, few_rows=False):
        share = shares(batch, self._has_rows, self.replicas)
        return self.step.place(share, few_rows)

    def _run_until_end(self, batches: GlobalBatches, steps: int) -> int:
        done = 0
        few_rows = False
        while done < steps:
            ran, ahead, latest = self._run_ahead(
                batches.iterator(),
                batches.take_next(),
                tf.constant(1 if few_rows else steps - done),
                few_rows=few_rows,
            )
            batches.put_next(ahead)
            if ran:
                self._latest = latest
                done += int(ran)
            elif few_rows or not self.step.needs_rows:
                break
            few_rows = self.step.needs_rows and not few_rows
        if done < steps and batches.length_is_known:
            raise ValueError(
                "The data ended before their declared number of batches. "
                f"Received: {done} of {steps} more batches. Correct the length of the "
                "dataset."
            )
        return done

    def _nothing(self) -> list[tf.Tensor]:
        """Zeros in place of the outputs of a step, before the first step."""
        return [
            _zeros(shape, dtype)
            for shape, dtype in self.step.returned
            for _ in range(self.replicas.count)
        ]

    def _flat(self, placed: list[list]) -> list[tf.Tensor]:
        """The outputs of a step as flat loop variables."""
        flat = []
        for tensors, (shape, _) in zip(placed, self.step.returned, strict=True):
            for tensor in map(tf.identity, tensors):
                tensor.set_shape(shape)  # TensorFlow may not infer it.
                flat.append(tensor)
        return flat

    def _packed(self, flat: list) -> list[list]:
        count = self.replicas.count
        return [list(flat[i : i + count]) for i in range(0, len(flat), count)]

    def _read(self, latest: list[list]) -> Any:
        return self.step.results(latest)

    def _run_eagerly(self, batches: GlobalBatches, steps: int) -> int:
        done = 0
        while done < steps and batches.has_next():
            if isinstance(batches, Shards):
                raise ValueError(
                    "Shards cannot be run eagerly. Received: a dataset_fn and "
                    "run_eagerly=True. Pass a dataset of global batches."
                )
            if batches.length_is_known:
                batch = self._next_of(batches.iterator())
            else:
                batch = batches.take_next().get_value()
                batches.put_next(None)
            self._latest = self._eager(batch)
            done += 1
        return done


def _zeros(shape: list[int | None], dtype: tf.DType) -> tf.Tensor:
    """Zeros to start a loop variable of this shape, which may have open sizes."""
    zeros = tf.zeros([d or 0 for d in shape], dtype)
    if None not in shape:
        return zeros
    return tf.compat.v1.placeholder_with_default(zeros, shape)
