"""Datasets by name, in the form that `fit()` takes: MNIST and a small regression.

    train, validation = distfit.datasets.load("mnist", config)

Each of the two is a tuple `(x, y)` of NumPy arrays. Nothing here needs TensorFlow.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from distfit.datasets import mnist, synthetic

# A plain literal: `launch` reads it from this file before it imports any of distfit.
NAMES = ("mnist", "regression")

Arrays = tuple[np.ndarray, np.ndarray]


def load(name: str, config: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    """Returns `(train, validation)` of the dataset `name`, one of `NAMES`.

    Args:
        name: the dataset.
        config: the settings of the run. "mnist" reads `data_dir` (see `mnist.load`),
            "regression" reads `seed`; both may be missing.

    Raises:
        ValueError: there is no dataset of that name, or its file is not an archive.
        FileNotFoundError: there is nothing at `data_dir`.
    """
    loaders: dict[str, Callable[[Mapping[str, Any]], tuple[Arrays, Arrays]]] = {
        "mnist": _mnist,
        "regression": _regression,
    }
    if name not in loaders:
        raise ValueError(
            f"There is no dataset of that name. Received: name={name!r}. "
            f"Choose one of {', '.join(NAMES)}."
        )
    return loaders[name](config)


def _mnist(config: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    train, test = mnist.load(config.get("data_dir"))
    return mnist.scaled(*train), mnist.scaled(*test)


def _regression(config: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    seed = config.get("seed", 0)
    train = synthetic.regression(rows=1000, seed=seed)
    validation = synthetic.regression(rows=200, seed=seed + 1)
    return train, validation
