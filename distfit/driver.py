"""The compiled step driver: k steps of all replicas in one call.

A step reads a global batch on the host; each replica takes its rows and runs the user's
step on them. Metrics hold the results, so nothing is returned per step.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from distfit import _keras, build, data, metrics, normalization, probe, workers
from distfit.collectives import (
    Rows,
    Share,
    distributed_share,
    replica_index,
    rows_of_replica,
    rows_of_shard,
)
from distfit.finite import FiniteWatch


class StepDriver:
    """Runs one kind of step, `train_step` or `test_step`, of a model.

    Everything that can be done once is done here: building, the symbolic run that makes
    the plan, compiling.

    Args:
        model: A compiled `distfit.Model`.
        step: The bound `train_step` or `test_step`.
        spec: Structure of the specs of a global batch.
        may_be_few: Whether a batch may have fewer rows than there are replicas.
    """

    def __init__(self, model: keras.Model, step: Callable, spec: Any, may_be_few: bool):
        self.model = model
        self.step = step
        self.strategy = model.distribute_strategy
        self.workers = workers.of(self.strategy)
        self.num_replicas = self.strategy.num_replicas_in_sync
        self.may_be_few = may_be_few
        self._exchanges_vary: bool | None = None  # Unknown until a step is traced.
        self._step_of_replica: Callable = self._replica_step
        build.check_in_scope(model)
        build.build_layers(model, spec)
        normalization.adapt(model)
        self._adapt_metrics()  # For the symbolic run; a step may also make some.
        self.plan = probe.probe(model, step, spec, self.strategy)
        self._build()
        if not model.run_eagerly:
            self._compile()

    def run(self, batches: data.GlobalBatches, steps: int) -> int:
        """Runs up to `steps` steps and returns how many the data were good for."""
        if steps > 1 and self._takes_single_steps():
            taken = (self._run(batches, 1) for _ in range(steps) if batches.has_next())
            return sum(taken)
        return self._run(batches, steps)

    def _takes_single_steps(self) -> bool:
        """Whether steps cannot be fused.

        In a loop TensorFlow takes the exchanges of all steps for one and the same: on
        several workers they fail when their size changes.
        """
        return self.workers.count > 1 and self._exchanges_vary is not False

    def _run(self, batches: data.GlobalBatches, steps: int) -> int:
        if isinstance(batches, data.Shards):
            return self._run_on_shards(batches, steps)
        if not batches.length_is_known:
            return self._run_until_end(batches, steps)
        if steps == 1 or self.model.run_eagerly:
            for _ in range(steps):
                self._run_next(batches.iterator())
        else:
            self._run_many(batches.iterator(), tf.constant(steps))
        return steps

    def run_on(self, batch: Any) -> None:
        """Runs a step on one global batch of tensors."""
        self._run_batch(batch)

    def reset(self) -> None:
        """Resets the model's metrics and the logs that no metric tracks."""
        self.model.reset_metrics()
        for log in self.logs.values():
            log.reset_state()
        if self.watch:
            self.watch.reset()

    def results(self) -> dict[str, float]:
        """Reads the logs: a sum over replicas and, on several workers, an exchange."""
        return _keras.pythonify_logs(self._read())

    @property
    def own_variables(self) -> list[keras.Variable]:
        """What a step needs and the model does not hold."""
        seeds = self.plan.seeds
        optimizers = [optimizer for optimizer, _ in self.plan.optimizers]
        variables = [v for optimizer in optimizers for v in optimizer.variables]
        return variables + ([] if seeds is None else [seeds.state])

    # Building.

    def _build(self) -> None:
        with self.strategy.scope():
            for optimizer, variables in self.plan.optimizers:
                if not optimizer.built:
                    optimizer.build(variables)
            self.logs = {name: self._log_metric(name) for name in self.plan.shapes}
            watched = self.model.check_finite
            self.watch = FiniteWatch(self.strategy) if watched else None
        build.check_in_scope(self.model)
        build.check_metrics(self.model)
        self._adapt_metrics()
        for used in self.plan.derived.values():
            for metric in used:
                metrics.adapt_result(metric)
        normalization.adapt(self.model)  # Also layers that the step has made.

    def _adapt_metrics(self) -> None:
        for metric in metrics.all_of(self.model):
            metrics.adapt(metric)

    def _log_metric(self, name: str) -> metrics.RowMean:
        shape = self.plan.shapes[name]
        if None in shape:
            raise ValueError(
                "A log that a step returns must have a fixed shape. Received: "
                f"{name!r} of shape {shape}. Return a scalar, such as its mean."
            )
        kind = metrics.LastValue if name in self.plan.derived else metrics.RowMean
        return kind(shape, name)

    def _compile(self) -> None:
        if self.model.jit_compile and self.num_replicas == 1:
            step = functools.partial(self._replica_step)
            self._step_of_replica = tf.function(step, autograph=False, jit_compile=True)
        for name in (
            *("_run_next", "_run_many", "_run_ahead", "_run_shards"),
            *("_run_batch", "_read"),
        ):
            setattr(self, name, compiled(getattr(self, name)))

    # What is compiled.

    def _run_next(self, iterator) -> None:
        self._run_batch(next(iterator))

    def _run_many(self, iterator, steps) -> None:
        def body(step):
            self._run_batch(next(iterator))
            return [step + 1]

        tf.while_loop(lambda step: step < steps, body, [tf.constant(0)])

    def _run_ahead(self, iterator, batch, steps):
        """Runs steps while there are data, always one batch ahead of the step."""

        def body(step, batch):
            self._run_batch(batch.get_value())
            return step + 1, iterator.get_next_as_optional()

        def more(step, batch):
            return tf.logical_and(step < steps, batch.has_value())

        return tf.while_loop(more, body, [tf.constant(0), batch])

    def _run_batch(self, batch) -> None:
        self.strategy.run(self._step_of_replica, args=(batch,))

    def _run_until_end(self, batches: data.GlobalBatches, steps: int) -> int:
        batch = batches.take_next()
        if self.model.run_eagerly:
            done = 0
            while done < steps and batch.has_value():
                self._run_batch(batch.get_value())
                batch = batches.iterator().get_next_as_optional()
                done += 1
        else:
            done, batch = self._run_ahead(batches.iterator(), batch, tf.constant(steps))
        batches.put_next(batch)
        return int(done)

    def _run_on_shards(self, batches: data.Shards, steps: int) -> int:
        shards, counts = batches.take_next()
        done, *ahead = self._run_shards(
            batches.iterator(), shards, counts, tf.constant(steps)
        )
        batches.put_next(tuple(ahead))
        return int(done)

    def _run_shards(self, iterator, shards, counts, steps):
        """Runs steps while one replica has rows. Counts are exchanged a step ahead."""

        def body(step, shards, counts):
            self.strategy.run(self._step_of_replica, args=(shards.get_value(), counts))
            return step + 1, *data.next_shards(iterator, self.strategy)

        def more(step, shards, counts):
            return tf.logical_and(step < steps, tf.reduce_any(counts > 0))

        return tf.while_loop(more, body, [tf.constant(0), shards, counts])

    def _replica_step(self, batch, counts=None) -> None:
        """One step of one replica."""
        batch = data.without_optionals(batch)
        if counts is None:
            share, rows = replica_rows(
                batch, self.num_replicas, self.may_be_few, self.model, self.plan
            )
        else:
            share, rows = shard_rows(batch, counts, self.model, self.plan)
        with share, self._unseeded_draws():
            logs = metrics.flat_logs(self.step(rows))
            self._keep_logs(share, logs)
            self._agree_on_state(share)
            if self.watch:
                self.watch.look(share, logs)
        self._exchanges_vary = bool(self._exchanges_vary) or share.exchanges_vary

    def _unseeded_draws(self) -> contextlib.AbstractContextManager:
        """Where unseeded draws come from; on one replica that is Keras's business."""
        if self.plan.seeds is None:
            return contextlib.nullcontext()
        return _keras.global_seed_generator(self.plan.seeds)

    def _keep_logs(self, share: Share, logs: dict) -> None:
        for name, log in self.logs.items():
            log.keep(logs[name], share)

    def _agree_on_state(self, share: Share) -> None:
        """Makes state that was computed from local rows the mean over all rows.

        Integers have no mean: they become those of the first replica with rows.
        """
        if share.alone or not self.plan.state:
            return
        first = share.is_first
        parts = []
        for variable in self.plan.state:
            part = share.fraction if tf.as_dtype(variable.dtype).is_floating else first
            own = share.counted(variable.value)
            parts.append(own * tf.cast(part, variable.dtype))
        agreed = share.all_reduce(parts)
        for variable, value in zip(self.plan.state, agreed, strict=True):
            variable.assign(value)

    def _read(self) -> dict:
        if self.workers.count == 1:
            return self._results()
        read = self.strategy.run(self._read_together)
        return tree.map_structure(
            lambda t: self.strategy.experimental_local_results(t)[0], read
        )

    def _read_together(self) -> dict:
        """The logs on one replica of several workers, after a single exchange."""
        replica, total = replica_index(), self.num_replicas
        share = Share(replica, total, Rows(0, 1, total, num_counted=total))
        read = [*self.logs.values(), *(m for m, _ in self.plan.tracked.values())]
        with metrics.read(dict.fromkeys(read), share):
            return self._results()

    def _results(self) -> dict:
        found = {name: log.result() for name, log in self.logs.items()}
        for name, (metric, key) in self.plan.tracked.items():
            result = metric.result()
            found[name] = result if key is None else metrics.flat_logs(result)[key]
        return found


def replica_rows(batch, num_replicas, may_be_few, model=None, plan=None):
    """Cuts a replica's rows out of a global batch: `(share, rows)`."""
    if num_replicas == 1:
        rows = data.num_rows(batch)
        return Share(0, 1, Rows(0, rows, rows), model=model, plan=plan), batch
    replica = replica_index()
    with tf.device("CPU:0"):  # The batch is on the host: only these rows travel.
        total = data.num_rows(batch)
        rows = rows_of_replica(total, replica, num_replicas, may_be_few)
        batch = data.take_rows(batch, rows.start, rows.stop)
    return _share(replica, num_replicas, rows, model, plan), batch


def shard_rows(shards, counts, model, plan=None):
    """What this replica brings to a step itself: `(share, rows)`.

    Args:
        shards: The batches of this worker's replicas.
        counts: The rows of all replicas, int32 of shape (num_replicas,).
        model, plan: As for `Share`.
    """
    replica = replica_index()
    own = shards[replica - workers.of(model.distribute_strategy).first_replica]
    with tf.device("CPU:0"):
        rows = rows_of_shard(counts, replica)
    return _share(replica, counts.shape[0], rows, model, plan), own


def _share(replica: int, num_replicas: int, rows: Rows, model, plan) -> Share:
    share = Share(replica, num_replicas, rows, model=model, plan=plan)
    share.compiles = bool(model and model.jit_compile)
    return share


def _compiling_share() -> Share | None:
    share = distributed_share()
    return share if share is not None and share.compiles else None


def _call_compiled(share: Share, layer: keras.layers.Layer, call: Callable) -> Any:
    """Calls a layer as one XLA computation, of which its gradient is another one.

    A step of several replicas cannot be compiled as a whole, because of the exchanges.
    What lies between them can: the layers that the step calls, and the update. Where a
    layer has parts that cannot, its other parts are compiled one by one.
    """
    if isinstance(layer, keras.layers.RNN):
        # The gradient of its loop needs lists, which cannot leave an XLA computation.
        with share.not_compiled():
            return call()
    apart: tuple[type, ...] = (keras.layers.RNN,)
    if share.model.batch_statistics == "global":
        apart += (keras.layers.BatchNormalization,)
    if any(isinstance(part, apart) for part in _keras.layers_of(layer)):
        return call()

    def forward():
        """Also returns what tensors and layers would only have as attributes."""
        outputs = call()
        masks = [_keras.mask_of(output) for output in tree.flatten(outputs)]
        return outputs, masks, [taken for _, taken in _keras.layer_losses(share.model)]

    outputs, masks, losses = share.compiled(forward)
    for output, mask in zip(tree.flatten(outputs), masks, strict=True):
        _keras.set_mask(output, mask)
    layers = _keras.layers_of(share.model)
    _keras.set_layer_losses(zip(layers, losses, strict=True))
    return outputs


_keras.intercept_calls(_compiling_share, _call_compiled)


def compiled(method: Callable) -> Callable:
    """Compiles a method of one driver.

    As a partial it is a function of its own to TensorFlow, which would otherwise take
    the drivers of several models for one function that is traced again and again.
    """
    return tf.function(
        functools.partial(method), autograph=False, reduce_retracing=True
    )


class PredictDriver:
    """Runs `predict_step`.

    Args:
        model: The model.
        spec: Structure of the specs of a global batch.
    """

    def __init__(self, model: keras.Model, spec: Any):
        self.model = model
        self.strategy = model.distribute_strategy
        self.num_replicas = self.strategy.num_replicas_in_sync
        build.check_in_scope(model)
        build.build_layers(model, spec)
        if not model.run_eagerly:
            for name in ("_run_next", "_run_shards", "run_on"):
                setattr(self, name, compiled(getattr(self, name)))

    def run(self, batches: data.GlobalBatches) -> Any:
        """The predictions for this worker's rows of the next batch, in their order."""
        if isinstance(batches, data.Shards):
            outputs, *ahead = self._run_shards(batches.iterator(), *batches.take_next())
            batches.put_next(tuple(ahead))
            return outputs
        if batches.length_is_known:
            return self._run_next(batches.iterator())
        batch = batches.take_next().get_value()
        batches.put_next(None)
        return self.run_on(batch)

    def run_on(self, batch: Any, counts: Any = None) -> Any:
        """The predictions for this worker's rows of one global batch of tensors."""
        outputs = self.strategy.run(self._replica_step, args=(batch, counts))
        return tree.map_structure(self._join, outputs)

    def _run_next(self, iterator) -> Any:
        return self.run_on(next(iterator))

    def _run_shards(self, iterator, shards, counts) -> Any:
        outputs = self.run_on(shards.get_value(), counts)
        return outputs, *data.next_shards(iterator, self.strategy)

    def _replica_step(self, batch, counts) -> Any:
        batch = data.without_optionals(batch)
        if counts is None:
            share, rows = replica_rows(batch, self.num_replicas, True, self.model)
        else:
            share, rows = shard_rows(batch, counts, self.model)
        with share:
            outputs = self.model.predict_step(rows)
        if share.idle is False:
            return outputs
        return tree.map_structure(lambda t: _unless_idle(share, t), outputs)

    def _join(self, output) -> Any:
        parts = self.strategy.experimental_local_results(output)
        if len(parts) == 1:
            return parts[0]
        with tf.device("CPU:0"):
            return _keras.concat(list(parts))


def _unless_idle(share: Share, output):
    """The rows of an output, but none where they are those of other replicas."""
    if output.shape.rank == 0:
        return output
    rows = tf.where(share.idle, 0, data.num_rows(output))
    return data.take_rows(output, 0, rows)
