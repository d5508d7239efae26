"""The contenders, a module each.

Each has a function

    prepare(workload, strategy, fused) -> train

that builds the model of a `Workload` on the replicas of a strategy and returns a
function `train()`: it trains for an epoch of `workload.epoch_steps` steps, `fused` of
them per call of the compiled function, and returns the logs, `{name: float}`.

All have the same network, data, metrics and optimizer, Keras's Adam with its defaults.
The iterator lives on from epoch to epoch; metrics are reset and read once an epoch.
"""

import importlib
import importlib.util
from collections.abc import Callable

NAMES = (
    "distfit",
    "hand_written",
    "stock_keras",
    "stock_keras_default",
    "tf_keras",
    "orbit",
)

_NEEDS = {"tf_keras": "tf_keras", "orbit": "orbit"}


def is_installed(name: str) -> bool:
    """Whether the package that a contender needs can be found."""
    return name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None


def takes_part(name: str, replicas: int) -> bool:
    """Whether a contender differs from the others on so many replicas."""
    return name != "stock_keras_default" or replicas > 1


def load(name: str) -> Callable:
    """Returns the `prepare` of a contender."""
    return importlib.import_module(f"benchmarks.contenders.{name}").prepare
