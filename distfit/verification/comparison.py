"""How far N replicas are from one device, quantity by quantity and step by step.

Rounding differs between the two even in correct code, and an optimizer can amplify it:
Adam moves a weight by a whole step even if its gradient is nothing but rounding errors.
So each step is compared by itself: the reference starts it from the values that the
replicas had before it. The effect of rounding is measured: the reference runs again,
from weights that are each off by a few rounding errors.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from distfit.verification.batches import Batch
from distfit.verification.recording import Recording, Step

# In the order in which a mistake spreads.
CHECKS = (
    "log",
    "gradient",
    "update",
    "state",
    "slot",
    "replicas agree",
    "evaluate",
    "predict",
)
# The largest of some random errors may be a few times that of others.
_ROUNDING_FACTOR = 8
# Below these, a deviation is gone in float64. Variables and results are float32 there,
# too, so their last bit may still differ.
_SHRUNK = 1e-3
_SHRUNK_TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Deviation:
    """The deviation of one quantity in one step.

    Attributes:
        replicas: Number of replicas.
        check: One of `CHECKS`.
        label: What was compared: a log, or a variable by its path.
        step: Index of the step, from 0.
        batch: The global batch of the step; None if the check covers all of them.
        value: The largest difference over the largest magnitude, allowing for rounding;
            compared with the tolerance.
        difference: The largest difference; infinite if values cannot be compared.
        ratio: The common factor by which N replicas are off, if there is one; else
            None.
        ok: Whether the deviation is within the tolerance.
    """

    replicas: int
    check: str
    label: str
    step: int
    batch: Batch | None
    value: float
    difference: float
    ratio: float | None
    ok: bool


class Comparison:
    """Compares a recording on N replicas with one on one device.

    Args:
        replicas: Number of replicas.
        one: The reference.
        off: The reference, run from weights that are off by rounding errors.
        many: The recording on N replicas.
        tolerance: The largest deviation that passes.
    """

    def __init__(
        self,
        replicas: int,
        one: Recording,
        off: Sequence[Recording],
        many: Recording,
        tolerance: float,
    ):
        self._replicas = replicas
        self._one, self._off, self._many = one, off, many
        self._tolerance = tolerance

    def deviations(self) -> list[Deviation]:
        """Every deviation, within the tolerance or not."""
        return [*self._fit(), *self._evaluate(), *self._predict()]

    def _fit(self) -> Iterator[Deviation]:
        runs = [self._one, self._many, *self._off]
        for index, steps in enumerate(zip(*(run.fit for run in runs), strict=False)):
            one = steps[0]
            place = {"step": index, "batch": one.batch}
            yield from self._logs("log", steps, place)
            for key, value in one.values.items():
                check, label = key
                arrays = [step.values.get(key) for step in steps]
                floor = 0.0
                if check == "weight":
                    check, floor = "update", _rounding_of(value)
                    arrays = [
                        None if a is None else _difference(a, s.before[key])
                        for a, s in zip(arrays, steps, strict=True)
                    ]
                yield self._deviation(check, label, arrays, floor, **place)
            yield from self._spread(steps[1], place)

    def _logs(self, check, steps: Sequence[Step], place) -> Iterator[Deviation]:
        for name, value in steps[0].logs.items():
            arrays = [step.logs.get(name) for step in steps]
            yield self._deviation(check, name, arrays, _rounding_of(value), **place)

    def _spread(self, many: Step, place) -> Iterator[Deviation]:
        """How far the copies of a variable on the replicas are from one another."""
        for (_, label), copies in many.copies.items():
            if len(copies) == 1:  # One replica, or the sum of their parts.
                continue
            worst = max(_largest(_difference(copy, copies[0])) for copy in copies)
            value = worst / (_largest(copies[0]) or 1.0)
            yield Deviation(
                self._replicas,
                "replicas agree",
                label,
                value=value,
                difference=worst,
                ratio=None,
                ok=worst == 0,
                **place,
            )

    def _evaluate(self) -> Iterator[Deviation]:
        runs = [self._one, self._many, *self._off]
        all_steps = zip(*(run.evaluate for run in runs), strict=False)
        for index, steps in enumerate(all_steps):
            place = {"step": index, "batch": steps[0].batch}
            yield from self._logs("evaluate", steps, place)

    def _predict(self) -> Iterator[Deviation]:
        runs = [self._one, self._many, *self._off]
        outputs = zip(*(run.predict or [] for run in runs), strict=False)
        for index, arrays in enumerate(outputs):
            label = f"output {index + 1}"
            floor = _rounding_of(arrays[0])
            yield self._deviation("predict", label, arrays, floor, step=0, batch=None)

    def _deviation(self, check, label, arrays, floor, **place) -> Deviation:
        one, many, *off = arrays
        value, worst, ratio = np.inf, np.inf, None
        if many is not None and np.shape(one) == np.shape(many):
            worst = _largest(_difference(many, one))
            measured = [
                _largest(_difference(other, one))
                for other in off
                if other is not None and np.shape(other) == np.shape(one)
            ]
            explained = floor + _ROUNDING_FACTOR * max(measured, default=0.0)
            value = _relative(worst, _largest(one), explained / self._tolerance)
            ratio = _common_ratio(one, many)
        return Deviation(
            self._replicas,
            check,
            label,
            value=value,
            difference=worst,
            ratio=ratio,
            ok=value <= self._tolerance,
            **place,
        )


def unrepeated(one: Recording, again: Recording, tolerance: float) -> str | None:
    """What differs in a second run on the same device, e.g. "log of loss", or None.

    Gradients and weights count as a whole: a single one may consist of rounding alone,
    which on a GPU may differ from run to run.
    """
    for deviation in Comparison(1, one, [], again, tolerance).deviations():
        single = deviation.check in ("log", "state", "evaluate", "predict")
        if single and not deviation.ok:
            return f"{deviation.check} of {deviation.label}"
    for a, b in zip(one.fit, again.fit, strict=False):
        for check, name in (("gradient", "gradients"), ("weight", "weights")):
            keys = [key for key in a.values if key[0] == check]
            scale = max((_largest(a.values[key]) for key in keys), default=0.0)
            if any(
                _largest(_difference(b.values[key], a.values[key])) > tolerance * scale
                for key in keys
            ):
                return name
    return None


def settle(
    deviations: Sequence[Deviation], exact: Sequence[Deviation], tolerance: float
) -> list[Deviation]:
    """The deviations, with those caused by rounding replaced.

    In float64, rounding is smaller by a factor of 2**29; a mistake is not.

    Args:
        deviations: The deviations in float32.
        exact: The deviations in float64.
        tolerance: The largest deviation that passes.
    """
    found = {(d.check, d.label, d.step): d for d in exact}

    def settled(deviation: Deviation) -> Deviation:
        other = found.get((deviation.check, deviation.label, deviation.step))
        if deviation.ok or other is None or deviation.check == "replicas agree":
            return deviation
        if not np.isfinite(deviation.difference):
            return deviation
        small = other.difference <= _SHRUNK * deviation.difference
        if not (small or other.value <= _SHRUNK_TOLERANCE * tolerance):
            return deviation
        value = min(other.value, tolerance)
        return dataclasses.replace(deviation, value=value, ratio=None, ok=True)

    return [settled(deviation) for deviation in deviations]


def describe(deviations: Sequence[Deviation]) -> str:
    """One sentence on where N replicas first differ from one device.

    It describes the first step that differs: later ones start from other weights.
    """
    failed = [d for d in deviations if not d.ok]
    first = min(failed, key=lambda d: (d.step, CHECKS.index(d.check)))
    alike = [d for d in failed if (d.step, d.check) == (first.step, first.check)]
    worst = max(alike, key=lambda d: d.value)
    by_number = {d.replicas: d for d in alike if d.label == worst.label}
    what = f"{worst.check} of {worst.label}"
    if worst.check == "replicas agree":
        numbers = " and ".join(map(str, by_number))
        return f"The copies of {worst.label} differ on {numbers} replicas."
    amounts = " and ".join(map(_amount, by_number.values()))
    rows = "" if worst.batch is None else f" ({worst.batch.rows} rows)"
    step = f"step {worst.step + 1}{rows}"
    return f"First to differ: the {what}, in {step}. It is {amounts}."


def _amount(deviation: Deviation) -> str:
    on = f"on {deviation.replicas} replica{'s' if deviation.replicas > 1 else ''}"
    if deviation.ratio is not None:
        return f"{deviation.ratio:.3g} times that of one device {on}"
    if not np.isfinite(deviation.value):
        return f"of another shape, or not finite, {on}"
    return f"off by {deviation.value:.2g} of its size {on}"


def _relative(worst: float, scale: float, explained: float) -> float:
    """`worst / (scale + explained)`, and 0 for 0 / 0.

    `explained` is what rounding explains, divided by the tolerance: a deviation passes
    if `worst <= tolerance * scale + rounding`.
    """
    if not np.isfinite(worst):
        return np.inf
    if worst == 0:
        return 0.0
    whole = scale + explained
    return worst / whole if whole > 0 else np.inf


def _difference(a, b) -> np.ndarray:
    """`a - b`, where two NaNs or two equal infinities differ by 0."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind not in "fiub":
        a, b = (a != b).astype("float64"), np.zeros(a.shape)
    a, b = a.astype("float64"), b.astype("float64")
    with np.errstate(invalid="ignore"):
        return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, a - b)


def _largest(array) -> float:
    array = np.asarray(array)
    if array.dtype.kind not in "fiub" or array.size == 0:
        return 0.0
    magnitudes = np.abs(array.astype("float64"))
    if np.isnan(magnitudes).any():
        return np.inf
    return float(magnitudes.max())


def _rounding_of(value: np.ndarray) -> float:
    """The least rounding in a difference of such values: all are float32 somewhere.

    An update is the difference of two weights, and no more exact than they are.
    """
    value = np.asarray(value)
    precise = value.dtype == np.float64 and value.ndim > 0
    return 4 * (2.0**-52 if precise else 2.0**-23) * _largest(value)


def _common_ratio(one, many) -> float | None:
    """The factor c for which `many` is `c * one`, within a thousandth; else None."""
    if np.asarray(one).dtype.kind not in "fiu":
        return None
    a, b = (np.asarray(x, "float64").ravel() for x in (one, many))
    square = float(a @ a)
    if not np.isfinite(square) or square == 0 or not np.isfinite(b).all():
        return None
    ratio = float(a @ b) / square
    if np.abs(b - ratio * a).max() > 1e-3 * abs(ratio) * np.abs(a).max():
        return None
    return ratio
