"""Reasons why a model cannot be compared, or cannot run on replicas at all."""

import dataclasses
import traceback
from collections.abc import Sequence

from distfit.partition.tracing import place_of


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem other than a deviation.

    Attributes:
        kind: A short name for it.
        message: What is wrong.
        place: `file:line` in the user's code, or None.
        traceback: The traceback of the exception behind it, or "".
    """

    kind: str
    message: str
    place: str | None = None
    traceback: str = ""

    def __str__(self) -> str:
        place = f"\n    {self.place}" if self.place else ""
        return f"{self.kind}: {self.message}{place}"


def fails_on_one_device(error: Exception) -> Problem:
    """The model cannot be trained at all."""
    message = f"{_text(error)} Make the model train on one device first."
    return _of_error("fails on one device", message, error)


def fails_on_replicas(replicas: int, mode: str, error: Exception) -> Problem:
    """A mode works on one device only."""
    number = f"{replicas} replica{'s' if replicas > 1 else ''}"
    message = f"`{mode}` works on one device, but not here. {_text(error)}"
    return _of_error(f"fails on {number}", message, error)


def does_not_repeat(what: str, draws: Sequence[str]) -> Problem:
    """A second run on one device gives other results, so nothing can be compared.

    Args:
        what: What differed.
        draws: The lines that draw random numbers without a seed.
    """
    message = (
        f"The same steps on the same device gave another {what} the second time, so "
        "there is nothing to compare with. "
    )
    if draws:
        message += (
            "The step draws random numbers without a seed: draw them with "
            "`keras.random`, or give `tf.random` a seed."
        )
    else:
        message += (
            "The step depends on something that is not a variable of the model, "
            "such as the state of a Python function: keep it in a variable."
        )
    return Problem("does not repeat", message, "\n    ".join(draws) or None)


def _of_error(kind: str, message: str, error: Exception) -> Problem:
    text = "".join(traceback.format_exception(error))
    return Problem(kind, message, _place(error), text)


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())
    short = text if len(text) <= 400 else text[:400] + " …"
    return f"{type(error).__name__}: {short}"


def _place(error: Exception) -> str | None:
    """The innermost line of the user's code that an exception came through."""
    return place_of(traceback.extract_tb(error.__traceback__))
