"""Exchanges between workers outside of steps.

Every worker runs the same program, so all make each exchange at the same place. It
carries the name of that place: workers that called different methods find out at their
next exchange, instead of waiting for each other forever.

With a single worker every function here returns at once.
"""

import contextlib
import functools
import json
import random
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from distfit import _keras

_CHUNK = 1 << 26  # Bytes of one exchange: gRPC messages are limited to 2 GB.
_local = threading.local()


class Workers:
    """The workers of a strategy, seen from one of them. Made by `of(strategy)`.

    Attributes:
        count: Number of workers.
        index: Index of this process among them; the chief is 0.
        first_replica: Index of the first replica of this worker among all replicas.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        resolver = strategy.cluster_resolver
        cluster = resolver.cluster_spec() if resolver else tf.train.ClusterSpec({})
        jobs = {"chief", "worker"} & set(cluster.jobs)  # An evaluator is not a worker.
        tasks = {job: cluster.num_tasks(job) for job in jobs}
        self.count = max(sum(tasks.values()), 1)
        self.index = 0
        if self.count > 1:
            before = tasks.get("chief", 0) if resolver.task_type == "worker" else 0
            self.index = before + resolver.task_id
        self.first_replica = self.index * (strategy.num_replicas_in_sync // self.count)
        self._gather = _compiled_gather(strategy, self.first_replica)

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.index == 0

    def tell(self, place: str, message: Any = None) -> list:
        """Exchanges values that JSON can hold.

        Args:
            place: Name of the place in the program, such as the method.
            message: This worker's value.

        Returns:
            The values of all workers, in order.

        Raises:
            RuntimeError: if the others are at another place.
        """
        if self.count == 1:
            return [message]
        texts = self.gather(place, json.dumps(message).encode())
        return [json.loads(text) for text in texts]

    def gather(self, place: str, data: bytes) -> list[bytes]:
        """As `tell`, for bytes."""
        if self.count == 1:
            return [data]
        check_not_alone(place)
        start = f"{place}\0{len(data)}\0".encode()
        told = [m.split(b"\0", 2) for m in self._exchange(start + data[:_CHUNK])]
        places = [name.decode() for name, _, _ in told]
        if len(set(places)) > 1:
            where = ", ".join(f"worker {i}: {name}" for i, name in enumerate(places))
            raise RuntimeError(
                "Workers called different methods: all must call the same ones in the "
                f"same order. Received: {where}. Do not call fit(), evaluate() or "
                "predict() on one worker alone; put what only writes or reports into "
                "`distfit.callbacks.ChiefOnly`."
            )
        parts = [[part] for _, _, part in told]
        longest = max(int(length) for _, length, _ in told)
        for first in range(_CHUNK, longest, _CHUNK):
            chunks = self._exchange(data[first : first + _CHUNK])
            for of_worker, chunk in zip(parts, chunks, strict=True):
                of_worker.append(chunk)
        return [b"".join(of_worker) for of_worker in parts]

    def _exchange(self, data: bytes) -> list[bytes]:
        return _unpacked(self._gather(_packed(data)))

    def from_chief(self, place: str, message: Any = None) -> Any:
        """The chief's message; those of other workers are ignored."""
        return self.tell(place, message if self.is_chief else None)[0]

    def any(self, place: str, flag: bool) -> bool:
        """Whether the flag is set on at least one worker."""
        return any(self.tell(place, bool(flag)))

    def check_alike(
        self,
        place: str,
        facts: dict[str, Any],
        advice: str = "Start every worker with the same code, settings and data.",
    ) -> None:
        """Checks what must be the same on every worker.

        Args:
            place: As for `tell`.
            facts: The values to compare, by name.
            advice: What to do if they differ.

        Raises:
            ValueError: on every worker, naming the first fact that differs.
        """
        own = {name: str(value) for name, value in facts.items()}
        digests = self.tell(place, checksum(repr(own).encode()))
        if len(set(digests)) == 1:  # Nearly always so: the facts need not be sent.
            return
        told = self.tell(f"{place}, which differs", own)
        for name in dict.fromkeys(name for facts_of in told for name in facts_of):
            values = [facts_of.get(name, "nothing") for facts_of in told]
            if len(set(values)) > 1:
                shown = ", ".join(f"{v} on worker {i}" for i, v in enumerate(values))
                raise ValueError(
                    f"Workers must run the same program on the same data. Received: "
                    f"{name}: {shown}. {advice}"
                )


def of(strategy: tf.distribute.Strategy) -> Workers:
    """The workers of a strategy."""
    if not hasattr(strategy, "_distfit_workers"):
        strategy._distfit_workers = Workers(strategy)
    return strategy._distfit_workers


def agree_on_randomness(workers: Workers, place: str) -> None:
    """Puts the random generators of all workers into the same state.

    Shuffling depends on them. Those that the program seeded alike are left alone; only
    those that differ or were never seeded get a seed from the chief.
    """
    if workers.count == 1:
        return
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    states = {name: state() for name, (state, _) in _GENERATORS.items()}
    told = workers.tell(place, {"seed": seed, "states": states})
    for name, (_, set_seed) in _GENERATORS.items():
        if None in (found := {t["states"][name] for t in told}) or len(found) > 1:
            set_seed(told[0]["seed"])


def _python_random_state() -> int:
    return checksum(repr(random.getstate()).encode())


def _numpy_random_state() -> int:
    return checksum(repr(np.random.get_state()).encode())


_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[int], None]]] = {
    "Python": (_python_random_state, random.seed),
    "NumPy": (_numpy_random_state, np.random.seed),
    "TensorFlow": (_keras.tensorflow_random_state, tf.random.set_seed),
}


def agree_on_values(workers: Workers, place: str, variables: Iterable[Any]) -> None:
    """Gives every worker the chief's value of each variable that differs.

    Variables of which each replica has its own part, such as the state of metrics, are
    left alone.
    """
    if workers.count == 1:
        return
    mirrored = [v for v in variables if not _keras.is_summed_on_read(v)]
    values = [_keras.local_value(v) for v in mirrored]
    checksums = [checksum(value.tobytes()) for value in values]
    told = workers.tell(place, checksums)
    differ = [
        i for i, found in enumerate(zip(*told, strict=True)) if len(set(found)) > 1
    ]
    if not differ:
        return
    own = b"".join(values[i].tobytes() for i in differ) if workers.is_chief else b""
    data = workers.gather(f"{place}, for the values of the chief", own)[0]
    for i in differ:
        size = values[i].nbytes
        value = np.frombuffer(data[:size], values[i].dtype).reshape(values[i].shape)
        mirrored[i].assign(value)
        data = data[size:]


@contextlib.contextmanager
def alone(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Marks a block that this worker runs alone, in this thread.

    In it, a call that needs all workers raises an error. Variables that are sums over
    replicas, such as those of metrics, read as this worker's part. The random
    generators are restored afterwards, because all workers shuffle by them.
    """
    stock = strategy.reduce

    def own_part(reduce_op, value, axis):
        parts = strategy.experimental_local_results(value)
        is_sum = reduce_op == tf.distribute.ReduceOp.SUM
        return sum(parts) if is_sum else sum(parts) / len(parts)

    before, _local.alone = is_alone(), True
    strategy.reduce = own_part
    try:
        with _random_numbers_kept():
            yield
    finally:
        strategy.reduce = stock
        _local.alone = before


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Restores the state of the random generators after the block."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    of_tensorflow = _keras.tensorflow_generator()
    state = of_tensorflow.getstate() if of_tensorflow else ()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        if of_tensorflow and of_tensorflow is _keras.tensorflow_generator():
            of_tensorflow.setstate(state)


def is_alone() -> bool:
    """Whether this thread is in an `alone()` block."""
    return getattr(_local, "alone", False)


def check_not_alone(place: str) -> None:
    """Raises a `RuntimeError` in an `alone()` block: what follows needs all workers."""
    if is_alone():
        raise RuntimeError(
            "The chief alone cannot make a call that needs all workers. Received: a "
            f"call in a `distfit.callbacks.ChiefOnly` callback ({place}). Make it in a "
            "callback that every worker has, or pass its result to this one."
        )


def _compiled_gather(strategy: tf.distribute.Strategy, first_replica: int) -> Callable:
    """Returns a function that joins what each worker gives it.

    It exchanges float32, for which every device has a collective.
    """

    def on_replica(words):
        own = tf.identity(words)  # all_gather requires a tensor of this device.
        own = own if replica_index() == first_replica else own[:0]
        return tf.distribute.get_replica_context().all_gather(own, 0)

    @functools.partial(
        tf.function,
        autograph=False,
        input_signature=[tf.TensorSpec([None], tf.float32)],
    )
    def gather(words):
        gathered = strategy.run(on_replica, args=(words,))
        return strategy.experimental_local_results(gathered)[0]

    return gather


def replica_index() -> int:
    """Index of the replica that this thread runs, among those of all workers."""
    context = tf.distribute.get_replica_context()
    return int(tf.get_static_value(context.replica_id_in_sync_group))


def _packed(data: bytes) -> np.ndarray:
    """Bytes as float32, two bytes in each, after their length in the first three."""
    length = len(data).to_bytes(6, "little")
    padded = length + data + b"\0" * (len(data) % 2)
    return np.frombuffer(padded, np.uint16).astype(np.float32)


def _unpacked(words: tf.Tensor) -> list[bytes]:
    data = np.asarray(words).astype(np.uint16).tobytes()
    messages = []
    while data:
        length = int.from_bytes(data[:6], "little")
        messages.append(data[6 : 6 + length])
        data = data[6 + length + length % 2 :]
    return messages


def checksum(data: bytes) -> int:
    """CRC-32 of the data."""
    return zlib.crc32(data)
