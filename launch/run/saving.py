"""Saves the trained model to the working folder, and loads its weights to evaluate."""

import pathlib
import warnings

import keras

from launch.errors import UsageError

MODEL_FILE = "model.keras"
WEIGHTS_FILE = "model.weights.h5"


def save(model: keras.Model, folder: pathlib.Path) -> str:
    """Saves the model, or if Keras cannot, its weights, and returns the file name.

    Keras saves a subclass with its own arguments only if it has a `get_config()`.
    """
    whole, weights = folder / MODEL_FILE, folder / WEIGHTS_FILE
    try:
        model.save(whole)
        weights.unlink(missing_ok=True)  # of an earlier training
        return MODEL_FILE
    except NotImplementedError:
        whole.unlink(missing_ok=True)  # Keras leaves a partial file
        model.save_weights(weights)
        return WEIGHTS_FILE


def load_weights(model: keras.Model, folder: pathlib.Path) -> None:
    """Loads the weights that `save` wrote into a built model.

    Raises:
        UsageError: there are none, or they do not fit the model.
    """
    files = [folder / name for name in (MODEL_FILE, WEIGHTS_FILE)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(
            "The working folder has no trained model. "
            f"Received: --workdir={folder}. Train with this --workdir first."
        )
    try:
        with warnings.catch_warnings():
            # About the optimizers' state, which is not needed to evaluate.
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            model.load_weights(file)
    except ValueError as error:
        raise UsageError(
            f"The trained weights do not fit this model ({error}). "
            f"Received: --workdir={folder}. Use the settings it was trained with."
        ) from error
