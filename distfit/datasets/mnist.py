"""MNIST: a sample that ships with distfit, the full set from a file or by download.

The sample holds 10,000 training and 2,000 test digits, evenly spaced over the full set.
`MNIST_LICENSE.txt` beside this file names the authors and says how it was made.
"""

import os
import pathlib
import zipfile

import numpy as np

SAMPLE = pathlib.Path(__file__).with_name("mnist_sample.npz")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")

Split = tuple[np.ndarray, np.ndarray]


def load(data_dir: str | os.PathLike | None = None) -> tuple[Split, Split]:
    """Returns `(x_train, y_train), (x_test, y_test)` as Keras's own loader does.

    Images are uint8 of shape (rows, 28, 28), labels uint8 of shape (rows,).

    Args:
        data_dir: where the full set is: a folder that holds `mnist.npz`, the path of
            such a file, or "download" for Keras's own download (kept in its cache). By
            default the shipped sample is read.

    Raises:
        FileNotFoundError: there is no archive at `data_dir`.
        ValueError: the file is not an `.npz` archive, or arrays are missing from it.
        ConnectionError: the download failed.
    """
    if data_dir == "download":
        return _download()
    return _read(SAMPLE if data_dir is None else _locate(pathlib.Path(data_dir)))


def scaled(images: np.ndarray, labels: np.ndarray) -> Split:
    """Returns float32 images of shape (rows, 28, 28, 1) in [0, 1] and int32 labels."""
    return images[..., np.newaxis].astype("float32") / 255, labels.astype("int32")


def _locate(data_dir: pathlib.Path) -> pathlib.Path:
    path = data_dir / "mnist.npz" if data_dir.is_dir() else data_dir
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no MNIST archive at {path}. "
            f"Received: data_dir={str(data_dir)!r}. "
            "Pass the folder that holds mnist.npz, the path of that file, or "
            "data_dir='download'; without data_dir the shipped sample is used."
        )
    return path


def _read(path: pathlib.Path) -> tuple[Split, Split]:
    try:
        with path.open("rb") as file, np.load(file) as archive:
            missing = [name for name in ARRAYS if name not in archive]
            if not missing:
                x_train, y_train, x_test, y_test = (archive[name] for name in ARRAYS)
                return (x_train, y_train), (x_test, y_test)
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        # A text file, an .npy file, an empty one and a truncated one fail differently.
        raise ValueError(
            "The MNIST file is not a readable .npz archive. "
            f"Received: file={str(path)!r}. "
            f"Pass an archive with the arrays {', '.join(ARRAYS)}."
        ) from error
    raise ValueError(
        f"The MNIST file lacks the arrays {', '.join(missing)}. "
        f"Received: file={str(path)!r}. "
        f"Pass an archive with the arrays {', '.join(ARRAYS)}."
    )


def _download() -> tuple[Split, Split]:
    import keras  # Not at the top, so that reading a file does not need it.

    try:
        return keras.datasets.mnist.load_data()
    except Exception as error:  # keras.utils.get_file raises a bare Exception
        raise ConnectionError(
            f"MNIST could not be downloaded ({error}). Received: data_dir='download'. "
            "Check the network, or fetch mnist.npz elsewhere and pass its path."
        ) from error
