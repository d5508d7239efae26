"""From deviations to their causes, with advice and the line in the user's code.

What was seen in the traced step (`Facts`) tells what could be wrong; the deviations
tell what is. A few mistakes are certain without any deviation, such as a number that
Python counts once; everything else is named only where the numbers differ.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import keras

from distfit import _keras
from distfit.verification import sources
from distfit.verification.comparison import CHECKS, Deviation
from distfit.verification.inspection import Facts

# In place of a mode: the run on one device that replicas are compared with.
REFERENCE = "one device"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A mistake.

    Attributes:
        kind: A short name for it, the same for all mistakes of its kind.
        message: What is wrong, with the numbers that show it.
        advice: What to do.
        place: `file:line` in the user's code, or None.
    """

    kind: str
    message: str
    advice: str
    place: str | None = None

    def __str__(self) -> str:
        place = f"\n    {self.place}" if self.place else ""
        return f"{self.kind}: {self.message}\n    {self.advice}{place}"


@dataclasses.dataclass
class Evidence:
    """All that is known of a model.

    Attributes:
        model: The model, as a `distfit.Model`.
        facts: What the inspection of its step found.
        deviations: Every deviation on every number of replicas.
        errors: `(replicas, mode, exception)` where one device ended without.
    """

    model: keras.Model
    facts: Facts
    deviations: Sequence[Deviation]
    errors: Sequence[tuple[int, str, Exception]] = ()

    def failed(self, *checks: str) -> list[Deviation]:
        """The deviations of some checks, or of all, that exceed the tolerance."""
        return [
            d for d in self.deviations if not d.ok and (not checks or d.check in checks)
        ]


def diagnose(evidence: Evidence) -> list[Finding]:
    """Names the mistakes; empty if there is nothing wrong."""
    findings = list(_certain(evidence.facts))
    findings += _of_errors(evidence)
    if evidence.failed():
        drawn = any(finding.kind in _NOISE for finding in findings)
        causes = [*_of_gradients(evidence), *_of_state(evidence)]
        causes += _of_logs(evidence, explained=bool(causes) or drawn)
        findings += causes
        if not (causes or drawn or evidence.errors):
            findings.append(_unexplained(evidence))
    return list(dict.fromkeys(findings))


_NOISE = ("identical noise", "unseeded noise")


def _certain(facts: Facts) -> Iterator[Finding]:
    """Mistakes that do not show in the numbers, or not for sure."""
    for name, place in facts.python_state:
        yield Finding(
            "Python value in the step",
            f"{name} is changed by Python code in the step. The step is traced once "
            "and then runs as a graph: the value stays what it was at that time.",
            "Keep it in a variable made in `__init__`, e.g. with `self.add_weight(..., "
            "trainable=False)`, and use its `assign_add`.",
            place,
        )
    for what, place in facts.created:
        yield Finding(
            "made inside the step",
            f"The step makes an object ({what}) each time it is traced: a new one, "
            "with new values.",
            "Make it once, in `__init__` or `compile()`, and keep it as an attribute.",
            place,
        )
    for name in facts.unlisted_metrics:
        yield Finding(
            "metric that is never reset",
            f"The metric {name!r} is an attribute of the model but not in its "
            "`metrics`, so it mixes epochs.",
            "Add it to the list that the `metrics` property returns.",
        )
    for draw in facts.draws:
        if draw.stream == "same" and draw.by_row:
            yield Finding(
                "identical noise",
                "Every replica draws the same random numbers for its rows: the seed is "
                "the same on all.",
                "Draw with `distfit.random` or `keras.random` and a `SeedGenerator` "
                "that is an attribute of the model.",
                draw.place,
            )
        elif draw.stream == "unseeded":
            yield Finding(
                "unseeded noise",
                "The step draws from TensorFlow's own generators: neither one device "
                "nor many can draw these numbers again, so nothing can be compared.",
                "Draw with `distfit.random` or `keras.random` and a `SeedGenerator` "
                "that is an attribute of the model.",
                draw.place,
            )


def _of_errors(evidence: Evidence) -> Iterator[Finding]:
    for mode, (replicas, error) in _first_by_mode(evidence.errors).items():
        if mode == REFERENCE:
            yield Finding(
                "cannot be compared",
                f"One device cannot draw what {replicas} replicas draw: "
                f"{type(error).__name__}: {_first_sentences(error)}",
                "Draw with `distfit.random`, which gives one device's numbers.",
                sources.place_of_error(error),
            )
        elif "outside the scope" in str(error):
            yield Finding(
                "made outside the scope",
                _first_sentences(error),
                "Make everything that has variables in the function that makes the "
                "model: it is called in the scope of the strategy.",
            )
        else:
            yield Finding(
                "fails on replicas",
                f"`{mode}` works on one device and fails on {replicas} replicas with "
                f"{type(error).__name__}: {_first_sentences(error)}",
                "See the traceback in the report.",
                sources.place_of_error(error),
            )


def _of_gradients(evidence: Evidence) -> Iterator[Finding]:
    """Why the update is not that of one device."""
    facts = evidence.facts
    failed = evidence.failed("gradient") or evidence.failed("update", "slot")
    if not failed:
        return
    what = _describe(failed)
    for place in facts.exchanges:
        yield Finding(
            "summed twice",
            f"{what} The step sums over replicas by hand, and the optimizer sums the "
            "gradients once more.",
            "Leave the `all_reduce` out: `optimizer.apply()` takes the gradients of "
            "this replica's rows and sums them.",
            place,
        )
    for place in facts.pairs:
        yield Finding(
            "pairs of local rows",
            f"{what} The loss pairs rows of the batch with one another, but sees only "
            "those of its own replica.",
            "Pair with the rows of all replicas: `distfit.all_gather(x)` gives them in "
            "order.",
            place,
        )
    layers = _normalizations(evidence.model)
    local = layers and evidence.model.batch_statistics == "local"
    if local:
        yield Finding(
            "local batch statistics",
            f"{what} BatchNormalization takes the statistics of a replica's rows "
            f"({', '.join(layer.path for layer in layers[:3])}).",
            'Set `model.batch_statistics = "global"`, the default, unless it is '
            "wanted so.",
        )
    if not local and not facts.pairs:
        for place in facts.local_statistics:
            yield Finding(
                "statistic of local rows",
                f"{what} The forward pass uses a sum or mean over the rows of its own "
                "replica.",
                "Take it over all rows: `distfit.global_mean`, `distfit.global_sum`.",
                place,
            )
    if not facts.exchanges:
        for place in facts.local_means:
            yield Finding(
                "mean of local rows",
                f"{what} The loss is reduced over the rows of its own replica only, "
                "and the gradients of all replicas are summed.",
                "Take the mean over the global batch: `distfit.global_mean(values)`, "
                "or a `keras.losses.Loss`.",
                place,
            )
    for place in facts.penalties:
        yield Finding(
            "penalty that every replica counts",
            f"{what} The loss has a part that depends on the weights alone, and the "
            "gradients of all replicas are summed.",
            "Let it count once: `distfit.global_mean(penalty)`, or use a regularizer "
            "or `add_loss` of Keras, and `self.losses`.",
            place,
        )
    for draw in facts.draws:
        if draw.stream == "replica" and not draw.by_row:
            yield Finding(
                "noise that is not by row",
                f"{what} Every replica draws a number of its own for something that is "
                "one on one device.",
                "Draw it with `distfit.random`: all replicas then draw the same.",
                draw.place,
            )
    yield from _of_replica_ids(facts)


def _of_replica_ids(facts: Facts) -> Iterator[Finding]:
    for place in facts.replica_ids:
        yield Finding(
            "depends on the replica",
            "The step asks which replica it is: what it does then depends on how many "
            "there are.",
            "Compute from the rows of the batch alone; for random numbers use "
            "`distfit.random`.",
            place,
        )


def _of_state(evidence: Evidence) -> Iterator[Finding]:
    """State of layers that replicas keep apart, or that is no mean of rows."""
    facts = evidence.facts
    failed = evidence.failed("state", "replicas agree")
    trainable = {v.path for v in evidence.model.trainable_variables}
    parted = [d for d in failed if d.check == "replicas agree" and d.label in trainable]
    if parted:
        yield Finding(
            "weights of one replica",
            f"{_describe(parted)} Each replica changes its own by hand.",
            "Change weights through an optimizer, or from values that "
            "`distfit.global_sum` and `distfit.global_mean` make the same everywhere.",
        )
        return
    normalizations = {
        v.path for layer in _normalizations(evidence.model) for v in layer.variables
    }
    labels = dict.fromkeys(d.label for d in failed if d.label not in normalizations)
    for label in labels:
        own = [d for d in failed if d.label == label]
        apart = any(d.check == "replicas agree" for d in own)
        if not apart and label not in facts.local_state:
            continue
        yield Finding(
            "state of one replica",
            f"{_describe(own)} A step computes it from the rows of one replica.",
            "Compute it from `distfit.global_sum` or `distfit.global_mean`, which are "
            "the same on every replica, and make it with `add_weight`.",
            facts.local_state.get(label),
        )


def _of_logs(evidence: Evidence, explained: bool) -> Iterator[Finding]:
    """Why a log is not that of one device, where the training itself is."""
    facts = evidence.facts
    failed = evidence.failed("log", "evaluate")
    updates = dict(facts.scalar_updates)
    for label in dict.fromkeys(d.label for d in failed):
        own = [d for d in failed if d.label == label]
        if label in updates:
            yield Finding(
                "metric of local numbers",
                f"{_describe(own)} The metric is fed with a number that each replica "
                "computes from its own rows, and that is no mean of them.",
                "Feed it the values of the rows, or `distfit.global_mean(values)`.",
                updates[label],
            )
        elif label in facts.local_logs and not explained:
            yield Finding(
                "log that is no mean of rows",
                f"{_describe(own)} A log is averaged over replicas by rows; this one "
                "is computed from local rows and is no mean of them.",
                "Compute it from `distfit.global_sum` or `distfit.global_mean`, or "
                "keep it in a metric.",
                facts.local_logs[label],
            )


def _unexplained(evidence: Evidence) -> Finding:
    failed = evidence.failed()
    first = min(failed, key=lambda d: (d.step, CHECKS.index(d.check)))
    alike = [d for d in failed if (d.step, d.check) == (first.step, first.check)]
    return Finding(
        "differs from one device",
        f"{_describe(alike)} No known mistake explains it.",
        "Look at what the step computes from the rows of its replica: the first "
        f"deviation is in step {first.step + 1}.",
    )


def _describe(failed: Sequence[Deviation]) -> str:
    """One sentence on some deviations of a kind.

    It speaks of the first step that deviates: later ones start from other weights.
    """
    first = min(d.step for d in failed)
    early = [d for d in failed if d.step == first]
    worst = max(early, key=lambda d: d.value)
    what = f"{worst.check} of {worst.label}"
    if worst.check == "replicas agree":
        return f"The copies of {worst.label} on {worst.replicas} replicas differ."
    common = _common_factors(early)
    if common and worst.check == "gradient" and _concerns_most(common, early):
        return (
            f"The gradient is {common[0]} that of one device on {common[1]} replicas."
        )
    if common:
        return f"The {what} is {common[0]} that of one device on {common[1]} replicas."
    kinds = {d.batch.kind for d in failed if d.batch is not None}
    where = (
        f" in batches that are {_or(kinds)}" if kinds and "even" not in kinds else ""
    )
    size = (
        f"off by {worst.value:.2g} of its size"
        if math.isfinite(worst.value)
        else "not a finite number"
    )
    return f"The {what} is {size} on {worst.replicas} replicas{where}."


def _common_factors(failed: Sequence[Deviation]) -> tuple[str, str] | None:
    """`("2 times and 4 times", "2 and 4")`, if all are off by the replica count."""
    for power, word in ((1, "{} times"), (-1, "1/{} of")):
        fitting = {
            d.replicas
            for d in failed
            if d.ratio is not None and _is(d.ratio, d.replicas**power)
        }
        if fitting and fitting == {d.replicas for d in failed}:
            counts = sorted(fitting)
            times = " and ".join(word.format(n) for n in counts)
            return times, " and ".join(map(str, counts))
    return None


def _concerns_most(common, failed: Sequence[Deviation]) -> bool:
    """Whether most of the failed ones have the factor of their replica count."""
    fitting = [
        d
        for d in failed
        if d.ratio is not None
        and (_is(d.ratio, d.replicas) or _is(d.ratio, 1 / d.replicas))
    ]
    return 2 * len(fitting) > len(failed)


def _or(kinds) -> str:
    return " or ".join(sorted({"few rows": "small"}.get(kind, kind) for kind in kinds))


def _is(ratio: float, number: float) -> bool:
    return abs(ratio - number) <= 0.01 * number


def _normalizations(model: keras.Model) -> list[keras.layers.Layer]:
    kind = keras.layers.BatchNormalization
    return [layer for layer in _keras.layers_of(model) if isinstance(layer, kind)]


def _first_sentences(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " …"


def failure_on_one_device(error: Exception, facts: Facts) -> Finding:
    """What to say of a model that cannot be trained on one device."""
    for finding in _certain(facts):
        if finding.kind == "made inside the step":
            return finding
    return Finding(
        "fails on one device",
        f"The model cannot be trained on one device: {type(error).__name__}: "
        f"{_first_sentences(error)}",
        "Make it train there first.",
        sources.place_of_error(error),
    )


def diagnose_stock(evidence: Evidence, mended: Evidence) -> list[Finding]:
    """What Keras's own `fit` gets wrong for a model that is no `distfit.Model`.

    Args:
        evidence: Of the run by Keras.
        mended: Of the run as a `distfit.Model`.
    """
    findings = [
        Finding(
            "fails under Keras",
            f"Keras's `{mode}` works on one device and fails on {replicas} replicas "
            f"with {type(error).__name__}: {_first_sentences(error)}",
            _advice(all(mode != other for _, other, _ in mended.errors)),
            sources.place_of_error(error),
        )
        for mode, (replicas, error) in _first_by_mode(evidence.errors).items()
    ]
    checks = list(dict.fromkeys(d.check for d in evidence.failed()))
    if "gradient" in checks:  # The rest of the training follows from it.
        checks = [check for check in checks if check not in ("update", "slot")]
    # What has no cause of its own comes last: another may explain it.
    for check in sorted(checks, key=lambda check: check in ("log", "evaluate")):
        failed = evidence.failed(check)
        kind, cause, place = _cause_under_keras(check, failed, evidence)
        known = [finding.kind for finding in findings]
        if kind in known or (
            kind == "differs under Keras" and known and check == "log"
        ):
            continue
        message = f"By Keras's own fit: {_describe(failed)}{cause}"
        advice = _advice(not mended.failed(check))
        findings.append(Finding(kind, message, advice, place))
    return findings


def _cause_under_keras(
    check: str, failed: Sequence[Deviation], evidence: Evidence
) -> tuple[str, str, str | None]:
    """`(kind, sentence, place)` for a check that fails under stock Keras."""
    facts = evidence.facts
    kinds = {d.batch.kind for d in failed if d.batch is not None}
    if check == "gradient" and "even" in kinds:
        if facts.draws_by_replica:
            return (
                "identical noise under Keras",
                " All replicas draw the same random numbers.",
                next((d.place for d in facts.draws if d.stream == "replica"), None),
            )
        if facts.loss_reads:
            return (
                "losses that are not scaled",
                " The step adds `losses` itself, and every replica counts them all.",
                facts.loss_reads[0],
            )
    if check in ("state", "replicas agree") and _normalizations(evidence.model):
        return (
            "local batch statistics under Keras",
            " BatchNormalization keeps the statistics of each replica's rows.",
            None,
        )
    if check in ("gradient", "log", "evaluate") and kinds and "even" not in kinds:
        return (
            "partial batches under Keras",
            " Each replica counts alike, however many rows it has.",
            None,
        )
    if check in ("log", "evaluate") and any(
        d.ratio is not None and _is(d.ratio * d.replicas, 1) for d in failed
    ):
        return (
            "loss divided by the replicas",
            " A loss that a step tracks itself is divided by their number.",
            None,
        )
    return "differs under Keras", "", None


def _advice(mends: bool) -> str:
    if mends:
        return "Derive the class from `distfit.Model`: there it is that of one device."
    return "It is so as a `distfit.Model`, too: see the other findings."


def _first_by_mode(errors) -> dict[str, tuple[int, Exception]]:
    """By mode, the error on the fewest replicas."""
    return {mode: (replicas, error) for replicas, mode, error in reversed(errors)}
