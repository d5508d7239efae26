"""`python -m launch` as a user starts it: real processes in an empty folder."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 240  # a hard limit; each takes a few seconds on an idle machine
ENDLESS = ("--model=custom_step", "--epochs=100000")

MODULE = """
import distfit
import keras
import numpy as np
import tensorflow as tf


class Custom(distfit.Model):
    def __init__(self, hidden):
        super().__init__()
        self.layer = keras.layers.Dense(hidden)
        self.top = keras.layers.Dense(1)

    def call(self, x):
        return self.top(self.layer(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
        return {m.name: m.result() for m in self.metrics}


class Broken(Custom):
    def train_step(self, data):
        raise ValueError("a mistake in the step")


def build(config, cls=Custom):
    model = cls(config.get("hidden", 4))
    model.compile(keras.optimizers.SGD(config.learning_rate), "mse")
    return model


def build_broken(config):
    return build(config, Broken)


def build_uncompiled(config):
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


def build_stock(config):
    model = build_uncompiled(config)
    model.compile("sgd", "mse")
    return model


def rows(config, count=20):
    x = np.arange(3 * count, dtype="float32").reshape(count, 3) / (3 * count)
    return (x, x.sum(axis=1, keepdims=True)), (x[:8], x[:8, :1])


def dataset(config):
    train, _ = rows(config)
    return tf.data.Dataset.from_tensor_slices(train).batch(config.batch_size), None


class AsksForReplicas(Custom):
    def train_step(self, data):
        x, y = data
        replicas = self.distribute_strategy.num_replicas_in_sync
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(y - self(x, training=True))) / replicas
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def build_asking_for_replicas(config):
    return build(config, AsksForReplicas)


def not_a_number(config):
    (x, y), _ = rows(config)
    x[9] = np.nan  # with batches of 4 on 2 replicas: step 3 and its first replica
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(4), None


def empty(config):
    return rows(config, count=0)


def of_unequal_length(config):
    (x, y), validation = rows(config)
    return (x, y[:-1]), validation


def alone(config):
    return rows(config)[0][0]
"""


def environment():
    chosen = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    chosen.pop("TF_CPP_MIN_LOG_LEVEL", None)
    return chosen


def run_python(folder, *arguments, seconds=SECONDS):
    """Runs Python in `folder`; kills it when it takes too long."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def launch(folder, *arguments):
    return run_python(folder, "-m", "launch", *arguments)


END = "the end of a command, with code"
SEVERAL = f"""
import json, sys
from launch.__main__ import main

for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    for stream in (sys.stdout, sys.stderr):
        print({END!r}, code, file=stream, flush=True)
"""

MINE = ("--model=mine:build", "--dataset=mine:rows", "--batch_size=4")
ON_TWO = (*MINE, "--virtual_devices=2")
OVERRIDDEN = ("--config=settings.py", "--config.hidden=6", "--epochs=2")
VERIFY = ("verify", *MINE, "--batch_size=8")
STOCK = "--model=mine:build_stock"
REFUSED = {
    "--dataset=mine:empty": "empty",
    "--dataset=mine:of_unequal_length": "'x' sizes: 20 'y' sizes: 19",
    "--dataset=mine:alone": "not a pair (train, validation)",
    "--dataset=mine:none_such": "Define none_such(config)",
    "--model=mine:build_uncompiled": "not return a compiled keras.Model",
}

# By name. The first makes the most virtual devices: a process cannot add any later.
COMMANDS = {
    "verify": (*VERIFY, "--workdir=verified"),
    "verify wrong": (
        *(*VERIFY, "--model=mine:build_asking_for_replicas"),
        *("--dataset=mine:dataset", "--replicas=2", "--workdir=wrong"),
    ),
    "verify few": (*VERIFY, "--batch_size=3", "--workdir=few"),
    "one": (*MINE, *OVERRIDDEN, "--virtual_devices=1", "--workdir=one"),
    "two": (*ON_TWO, *OVERRIDDEN, "--workdir=two"),
    "compiled": (*ON_TWO, *OVERRIDDEN, "--jit_compile", "--workdir=compiled"),
    "evaluate two": (
        *("evaluate", "--workdir=two", "--model=mine:build"),
        *("--learning_rate=0.5", "--seed=99"),
    ),
    "stock": (*ON_TWO, STOCK, "--workdir=stock"),
    "evaluate stock": ("evaluate", "--workdir=stock", STOCK),
    "dataset": (
        *(*ON_TWO, "--dataset=mine:dataset", "--steps_per_execution=2"),
        "--workdir=dataset",
    ),
    "going on": (
        *(*ON_TWO, "--dataset=mine:dataset", "--steps_per_execution=2"),
        *("--workdir=dataset", "--epochs=2", "--verbose=0"),
    ),
    "not a number": (*ON_TWO, "--dataset=mine:not_a_number", "--workdir=nan"),
    "broken": (*ON_TWO, "--model=mine:build_broken", "--workdir=broken"),
    **{flag: (*ON_TWO, flag, "--workdir=refused") for flag in REFUSED},
    "override": ("--config.latent=3", "--workdir=refused"),
    "data": ("--model=mnist_cnn", "--data_dir=.", "--workdir=refused"),
    "no loss": (
        *("--model=low_level_step", "--epochs=1", "--steps_per_epoch=2"),
        "--workdir=no-loss",
    ),
    "evaluate no loss": ("evaluate", "--model=low_level_step", "--workdir=no-loss"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the commands run, with modules of a user."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "mine.py").write_text(MODULE)
    (folder / "settings.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'hidden': 5, 'epochs': 9, 'seed': 4})\n"
    )
    (folder / "mnist.npz").write_text("no archive")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """What each of the commands returned and printed.

    All run in one process: importing TensorFlow takes longer than any of them.
    """
    given = json.dumps(list(COMMANDS.values()))
    run = run_python(folder, "-c", SEVERAL, given, seconds=3 * SECONDS)
    outs, errs = (_parts(text) for text in (run.stdout, run.stderr))
    assert len(outs) == len(errs) == len(COMMANDS), run.stdout + run.stderr
    return {
        name: types.SimpleNamespace(returncode=code, stdout=out, stderr=err)
        for name, (code, out), (_, err) in zip(COMMANDS, outs, errs, strict=True)
    }


def _parts(text):
    """Pairs of the exit code and the text of each command."""
    found, lines = [], []
    for line in text.splitlines(keepends=True):
        before, end, code = line.partition(END)
        if not end:
            lines.append(line)
            continue
        found.append((int(code), "".join([*lines, before])))
        lines = []
    return found


def check_done(result):
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def check_refused(result, *expected):
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("launch: ")
    assert all(text in result.stderr for text in expected), result.stderr


def epochs(folder, workdir):
    lines = (folder / workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [entry for entry in found if "epoch" in entry]


def reported(result):
    """Returns the summary as a dict of strings."""
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def test_the_gan_trains_on_two_devices_and_leaves_its_results(tmp_path):
    result = launch(
        tmp_path,
        "--strategy=mirrored",
        "--virtual_devices=2",
        "--batch_size=8",
        "--steps_per_epoch=2",
        "--epochs=2",
    )
    check_done(result)
    summary = reported(result)
    assert (summary["model"], summary["strategy"]) == ("gan", "MirroredStrategy")
    assert (summary["replicas"], summary["results"]) == ("2", "runs/gan")
    run = tmp_path / "runs" / "gan"
    assert (run / "model.keras").stat().st_size > 0
    for epoch in (1, 2):
        image = (run / "samples" / f"epoch-{epoch:03d}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert config["virtual_devices"] == 2 and config["batch_size"] == 8
    assert [line["epoch"] for line in epochs(tmp_path, run)] == [1, 2]
    assert {"d_loss", "g_loss", "seconds"} <= set(epochs(tmp_path, run)[0])


@pytest.mark.parametrize(
    "name, saved",
    # Without get_config(), a model cannot be saved as a whole.
    [("two", "model.weights.h5"), ("stock", "model.keras")],
)
def test_a_model_of_ones_own_trains_and_evaluates_by_its_path(
    folder, results, name, saved
):
    """Derived from `distfit.Model`, or a `keras.Model` of any class."""
    check_done(results[name])
    assert reported(results[name])["saved"] == saved
    found = {path.name for path in (folder / name).glob("model.*")}
    assert found == {saved, "model.json"}
    last = epochs(folder, name)[-1]
    evaluated = results[f"evaluate {name}"]
    check_done(evaluated)
    summary = reported(evaluated)
    assert summary["replicas"] == "2"  # as it was trained
    assert float(summary["loss"]) == pytest.approx(last["val_loss"], rel=1e-4)
    assert summary["dataset"] == "mine:rows"


def test_an_evaluation_names_the_settings_that_differ_from_the_training(results):
    changed = "learning_rate=0.5, which was 0.001, seed=99, which was 4"
    line = f"Evaluating with other settings: {changed}.\n"
    assert results["evaluate two"].stdout.count(line) == 1
    assert "other settings" not in results["evaluate stock"].stdout


def test_two_devices_train_to_the_numbers_of_one_also_with_xla(folder, results):
    lines = []
    for name in ("one", "two", "compiled"):
        check_done(results[name])
        lines.append(epochs(folder, name))
    for one, *others in zip(*lines, strict=True):
        for other in others:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)


def test_config_file_override_and_flag_reach_the_model(folder, results):
    check_done(results["two"])
    config = json.loads((folder / "two" / "config.json").read_text())
    assert (config["hidden"], config["epochs"], config["seed"]) == (6, 2, 4)
    assert len(epochs(folder, "two")) == 2


def test_a_tf_dataset_of_ones_own_trains_without_validation(folder, results):
    check_done(results["dataset"])
    assert "val_loss" not in epochs(folder, "dataset")[0]


def test_where_a_silent_run_goes_on_is_said_once(results):
    check_done(results["going on"])
    place = "Going on from dataset/checkpoints/step-5: epoch 2, step 1.\n"
    assert results["going on"].stdout.count(place) == 1
    assert "Epoch" not in results["going on"].stdout


def test_a_loss_that_is_not_a_number_fails_and_names_step_and_replica(folder, results):
    result = results["not a number"]
    assert result.returncode == 1
    assert "step 3 on replica 0" in result.stderr and result.stderr.count("\n") == 1
    assert not (folder / "nan" / "model.keras").exists()


def test_a_mistake_in_the_step_fails_with_its_traceback(results):
    result = results["broken"]
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "mine.py" in result.stderr
    assert "a mistake in the step" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("flag", REFUSED)
def test_what_shows_only_with_tensorflow_is_refused_in_one_line(folder, results, flag):
    check_refused(results[flag], REFUSED[flag])
    assert not (folder / "refused").exists()


def test_an_override_that_the_reference_model_does_not_know_is_refused(results):
    check_refused(results["override"], "--config.latent=3", "latent_dim")


def test_a_model_without_a_loss_cannot_be_evaluated(results):
    check_done(results["no loss"])
    check_refused(results["evaluate no loss"], "no test_step")


def test_a_broken_data_file_is_refused(results):
    check_refused(results["data"], "not a readable .npz archive")


def test_verify_passes_a_right_model_and_writes_its_report(folder, results):
    check_done(results["verify"])
    expected = "OK: Custom on 1, 2, 4 replicas matches one device"
    assert expected in results["verify"].stdout
    assert json.loads((folder / "verified" / "report.json").read_text())["ok"]
    assert "<svg" in (folder / "verified" / "report.html").read_text()
    assert not (folder / "verified" / "config.json").exists()


def test_verify_fails_a_model_that_asks_how_many_replicas_there_are(folder, results):
    result = results["verify wrong"]
    assert (result.returncode, result.stderr) == (1, "")
    assert "differs on 2" in result.stdout
    assert not json.loads((folder / "wrong" / "report.json").read_text())["ok"]


def test_verify_refuses_batches_smaller_than_the_replicas(folder, results):
    check_refused(results["verify few"], "a batch of 3 rows for 4 replicas")
    assert not (folder / "few").exists()


def test_an_interrupt_ends_without_a_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *ENDLESS],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # If the tests run in the background, children would ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        process.stdout.readline()  # "Epoch 1/100000"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "launch: interrupted" and "Traceback" not in err


def test_the_first_process_of_a_container_ends_when_it_is_told_to(tmp_path):
    # It is process 1 of its namespace, where signals without a handler are ignored.
    alone = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
    try:
        tried = subprocess.run([*alone, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs `unshare`, of Debian's package util-linux")
    if tried.returncode:
        pytest.skip(f"no process namespace can be made here: {tried.stderr.strip()}")
    process = subprocess.Popen(
        [*alone, sys.executable, "-m", "launch", *ENDLESS],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.stdout.readline()  # "Epoch 1/100000"
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        os.kill(int(children.read_text()), signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 143 and "Traceback" not in err, err


def test_the_example_of_the_readme_runs_as_it_stands(tmp_path):
    text = (ROOT / "README.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    result = run_python(tmp_path, "-c", example)
    assert result.returncode == 0, result.stderr
    assert "34/34" in result.stdout
