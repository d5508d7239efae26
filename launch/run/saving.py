"""The trained model in the working folder: written after training, read to evaluate."""

import pathlib
import warnings

import keras

from launch.errors import UsageError

MODEL_FILE = "model.keras"
WEIGHTS_FILE = "model.weights.h5"


def save(model: keras.Model, folder: pathlib.Path) -> str:
    """Saves the model, or its weights alone, and returns the name of the file.

    Keras saves a subclass with arguments of its own only if it has a `get_config()`.
    """
    whole, weights = folder / MODEL_FILE, folder / WEIGHTS_FILE
    try:
        model.save(whole)
        weights.unlink(missing_ok=True)  # of a training before this one
        return MODEL_FILE
    except NotImplementedError:
        whole.unlink(missing_ok=True)  # Keras leaves what it had begun
        model.save_weights(weights)
        return WEIGHTS_FILE


def load_weights(model: keras.Model, folder: pathlib.Path) -> None:
    """Gives a built model the weights that `save` has kept.

    Raises:
        UsageError: there are none, or they are those of another model.
    """
    files = [folder / name for name in (MODEL_FILE, WEIGHTS_FILE)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(
            "There is no trained model in the working folder. "
            f"Received: --workdir={folder}. Train into it first."
        )
    try:
        with warnings.catch_warnings():
            # The optimizers' state, which nobody needs in order to evaluate.
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            model.load_weights(file)
    except ValueError as error:
        raise UsageError(
            f"The trained weights do not fit this model ({error}). "
            f"Received: --workdir={folder}. Use the settings it was trained with."
        ) from error
