"""Made-up data, the same on every machine for the same seed."""

import numpy as np


def regression(
    *, rows: int = 1000, features: int = 32, seed: int = 0, noise: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(x, y)` in float32, shapes (rows, features) and (rows, 1).

    The shapes are those of Keras's guide on custom steps. Inputs are uniform in [0, 1);
    targets are a fixed linear function of them plus normal noise, so there is something
    to learn and the mean squared error cannot fall below `noise ** 2`.

    Raises:
        ValueError: `rows` or `features` is below 1.
    """
    if rows < 1 or features < 1:
        raise ValueError(
            "A regression needs at least one row and one feature. "
            f"Received: rows={rows}, features={features}. Pass positive numbers."
        )
    generator = np.random.default_rng(seed)
    x = generator.random((rows, features), dtype="float32")
    slope = np.linspace(-1, 1, features, dtype="float32")[:, np.newaxis]
    error = generator.standard_normal((rows, 1), dtype="float32")
    return x, x @ slope + np.float32(noise) * error
