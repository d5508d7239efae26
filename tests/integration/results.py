"""What a run of `python -m launch` leaves, for comparison with another run."""

import json
import pathlib
import zipfile


def of(workdir: pathlib.Path) -> tuple[bytes, list[dict]]:
    """The weights and optimizer, bit for bit, and the metrics of each epoch."""
    with zipfile.ZipFile(workdir / "model.keras") as file:
        weights = file.read("model.weights.h5")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    return weights, [{**e, "seconds": 0} for e in epochs if "epoch" in e]
