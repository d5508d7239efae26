"""The contenders, a module each.

Each has a function

    prepare(workload, strategy, fused) -> train

that builds the model of a `Workload` on the replicas of a strategy and returns a
function `train()`: it trains for an epoch of `workload.epoch_steps` steps, `fused` of
them per call of the compiled function, and returns the logs, `{name: float}`.

All have the network, the data, the metrics and the optimizer of the workload. The
iterator is kept across epochs; metrics are reset and read once an epoch.

On several workers each worker calls both functions, with the workload of all of them.
"""

import importlib
import importlib.util
from collections.abc import Callable

ON_REPLICAS = (
    "distfit",
    "hand_written",
    "stock_keras",
    "stock_keras_default",
    "tf_keras",
    "orbit",
)
ON_WORKERS = (
    "distfit",
    "hand_written",
    "hand_written_flat",
    "tf_keras",
    "torch_ddp",
    "stock_keras",
)
NAMES = tuple(dict.fromkeys(ON_REPLICAS + ON_WORKERS))

_NEEDS = {"tf_keras": "tf_keras", "orbit": "orbit", "torch_ddp": "torch"}


def is_installed(name: str) -> bool:
    """Whether the package that a contender needs can be found."""
    return name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None


def on_replicas(name: str, replicas: int) -> bool:
    """Whether a contender takes part on this number of replicas of one process."""
    if name == "stock_keras_default":
        return replicas > 1
    return name in ON_REPLICAS


def on_workers(name: str, fused: int) -> bool:
    """Whether a contender takes part on workers. PyTorch has no fused steps."""
    return name in ON_WORKERS and (name != "torch_ddp" or fused == 1)


def load(name: str) -> Callable:
    """Returns the `prepare` of a contender."""
    return importlib.import_module(f"benchmarks.contenders.{name}").prepare
