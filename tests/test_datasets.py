"""Datasets: what they hold, where they are read from, and how bad files are refused."""

import numpy as np
import pytest

from distfit import datasets
from distfit.datasets import mnist, synthetic


@pytest.fixture
def full_mnist(tmp_path):
    """Writes a tiny archive in the format of the full MNIST and returns its path."""
    path = tmp_path / "mnist.npz"
    images = np.arange(3 * 28 * 28, dtype="uint8").reshape(3, 28, 28)
    labels = np.array([3, 1, 2], "uint8")
    np.savez(path, x_train=images, y_train=labels, x_test=images[:1], y_test=labels[:1])
    return path


def test_the_shipped_sample_has_10000_training_and_2000_test_digits():
    (x_train, y_train), (x_test, y_test) = mnist.load()
    assert x_train.shape == (10000, 28, 28) and y_train.shape == (10000,)
    assert x_test.shape == (2000, 28, 28) and y_test.shape == (2000,)
    assert {a.dtype.name for a in (x_train, y_train, x_test, y_test)} == {"uint8"}


def test_the_shipped_sample_has_every_digit_about_equally_often():
    (_, y_train), (_, y_test) = mnist.load()
    for labels in (y_train, y_test):
        share = np.bincount(labels) / len(labels)
        assert len(share) == 10 and share.min() > 0.07 and share.max() < 0.13


def test_the_licence_note_ships_beside_the_sample():
    note = mnist.SAMPLE.with_name("MNIST_LICENSE.txt").read_text()
    assert "Yann LeCun and Corinna Cortes" in note and "CC BY-SA 3.0" in note


@pytest.mark.parametrize("as_folder", [True, False])
def test_the_full_set_is_read_from_its_folder_and_from_its_path(full_mnist, as_folder):
    data_dir = full_mnist.parent if as_folder else full_mnist
    (x_train, y_train), (x_test, y_test) = mnist.load(data_dir)
    np.testing.assert_array_equal(y_train, [3, 1, 2])
    assert x_train[0, 0, 5] == 5 and len(x_test) == len(y_test) == 1


def test_mnist_is_loaded_as_float_images_with_a_channel_and_whole_labels(full_mnist):
    (x, y), _ = datasets.load("mnist", {"data_dir": str(full_mnist)})
    assert x.shape == (3, 28, 28, 1) and x.dtype == "float32" and y.dtype == "int32"
    assert x[0, 0, 5, 0] == np.float32(5) / 255 and x.max() <= 1


def test_a_missing_archive_is_refused_by_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Received: data_dir=.*nothing"):
        mnist.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"at .*mnist\.npz"):
        mnist.load(tmp_path)


def test_an_archive_without_an_array_is_refused_by_the_name_of_the_array(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=[0], y_train=[0], x_test=[0])
    with pytest.raises(ValueError, match=r"lacks the arrays y_test\. Received: file="):
        mnist.load(tmp_path)


@pytest.mark.parametrize("content", ["text", "empty", "truncated", "array"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, full_mnist, content):
    path = tmp_path / "other.npz"
    if content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        archive = full_mnist.read_bytes()
        bytes_of = {"text": b"x_train", "empty": b"", "truncated": archive[:999]}
        path.write_bytes(bytes_of[content])
    with pytest.raises(
        ValueError, match=r"not a readable \.npz archive\. Received: file="
    ):
        mnist.load(path)


def test_download_is_that_of_keras_and_its_failure_says_what_to_do(monkeypatch):
    import keras

    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: "arrays")
    assert mnist.load("download") == "arrays"

    def offline():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", offline)
    with pytest.raises(ConnectionError, match="URL fetch failure.*Check the network"):
        mnist.load("download")


def test_regression_repeats_by_seed_and_differs_between_seeds():
    x, y = synthetic.regression(rows=50, seed=7)
    again_x, again_y = synthetic.regression(rows=50, seed=7)
    other_x, _ = synthetic.regression(rows=50, seed=8)
    assert x.shape == (50, 32) and y.shape == (50, 1)
    assert x.dtype == y.dtype == np.float32
    np.testing.assert_array_equal(x, again_x)
    np.testing.assert_array_equal(y, again_y)
    assert not np.array_equal(x, other_x)


def test_regression_is_linear_up_to_its_noise():
    x, y = synthetic.regression(rows=2000, features=4, noise=0.1)
    solution, squared_error, *_ = np.linalg.lstsq(x, y, rcond=None)
    np.testing.assert_allclose(solution[:, 0], [-1, -1 / 3, 1 / 3, 1], atol=0.05)
    assert np.sqrt(squared_error[0] / 2000) == pytest.approx(0.1, rel=0.1)


def test_regression_refuses_to_be_empty():
    with pytest.raises(ValueError, match="Received: rows=0, features=32"):
        synthetic.regression(rows=0)


def test_training_and_validation_rows_of_regression_differ():
    (x, y), (x_validation, y_validation) = datasets.load("regression", {"seed": 3})
    assert len(x) == len(y) == 1000 and len(x_validation) == len(y_validation) == 200
    assert not np.array_equal(x[:200], x_validation)


@pytest.mark.parametrize("name", datasets.NAMES)
def test_every_name_loads_without_settings(name):
    train, validation = datasets.load(name, {})
    assert len(train) == len(validation) == 2


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="Received: name='cifar'.*mnist, regression"):
        datasets.load("cifar", {})
