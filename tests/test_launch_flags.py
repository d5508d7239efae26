"""The command line: what it means, which source of a setting wins, what is refused."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import ml_collections
import pytest
from ml_collections import config_dict

import distfit
from launch.__main__ import main
from launch.errors import UsageError
from launch.run import quiet, summary
from launch.settings import checks, configuration, flags, targets
from launch.settings.flags import CommandLine

ROOT = pathlib.Path(__file__).resolve().parents[1]

BAD_COMMAND_LINES = {
    "unknown flag": ("--bach_size=3", "--bach_size. Did you mean --batch_size?"),
    "value of the wrong type": (
        "--batch_size=x",
        "--batch_size=x. Give a whole number",
    ),
    "missing value": ("--batch_size", "Missing value for flag --batch_size"),
    "unknown command": ("serve", "command='serve'. Choose train or evaluate or verify"),
    "two commands": ("train evaluate", "command='train evaluate'"),
    "strategy": ("--strategy=parameter_server", "auto, one_device, mirrored"),
    "multi_worker alone": ("--strategy=multi_worker", "--strategy=multi_worker"),
    "model": ("--model=gann", "--model=gann. Did you mean gan?"),
    "path to a module": ("--model=no.such:build --dataset=mnist", "no.such:build"),
    "path that is none": ("--model=a-b:build", "package.module:function"),
    "own model without data": ("--model=json:loads", "no --dataset"),
    "dataset": ("--dataset=cifar", "mnist, regression, or a path"),
    "batch size": ("--batch_size=0", "batch_size=0"),
    "epochs": ("--epochs=0", "epochs=0"),
    "steps": ("--steps_per_epoch=0", "steps_per_epoch=0"),
    "execution": ("--steps_per_execution=-1", "steps_per_execution=-1"),
    "virtual devices": ("--virtual_devices=-2", "virtual_devices=-2"),
    "seed": ("--seed=-1", "seed=-1"),
    "learning rate": ("--learning_rate=nan", "learning_rate=nan"),
    "policy": ("--mixed_precision=half", "mixed_bfloat16"),
    "verbosity": ("--verbose=3", "verbose=3"),
    "unit of time": (
        "--checkpoint_every=5m",
        "or never alone. Received: --checkpoint_every=5m. Give e.g. 100steps",
    ),
    "never and more": ("--checkpoint_every=never,1epoch", "every=never,1epoch. Give"),
    "no time to save": ("--checkpoint_every=1epoch,0min", "every=1epoch,0min"),
    "one checkpoint": ("--keep=1", "keep must be at least 2. Received: keep=1"),
    "mode": ("--mode=mean", "--mode=mean. Choose one of min, max"),
    "error of a save": ("--on_save_error=warm", "--on_save_error=warm. Did you mean"),
    "non-finite loss": ("--on_non_finite=skip", "--on_non_finite=skip. Choose one of"),
    "config value of saving": (
        "--config.checkpoint_every=None",
        "--checkpoint_every=None",
    ),
    "data": ("--data_dir=nowhere", "--data_dir=nowhere"),
    "file as folder": ("--workdir=file/run", "--workdir=file/run"),
    "config file": ("--config=none.py", "--config=none.py"),
    "config override": ("--config.epochs=x", "--config.epochs=x"),
    "config value": ("--config.epochs=0", "epochs=0"),
    "config value None": ("--config.batch_size=None", "batch_size=None"),
    "nothing trained": ("evaluate --workdir=new", "--workdir=new"),
    "replicas": ("verify --replicas=1,x", "--replicas=1,x. Give e.g. --replicas=1,2,4"),
    "no replicas": ("verify --replicas=0", "--replicas=0"),
    "tolerance": ("verify --tolerance=0", "--tolerance=0"),
    "steps to verify": ("verify --steps=x", "--steps=x. Give a whole number"),
    "restarts": ("--max_restarts=-1", "--max_restarts=-1"),
    "weights": ("evaluate --weights=last", "--weights=last. Give model, latest, best"),
    "weights to train": ("--weights=best", "command train takes no --weights"),
    "fresh evaluation": ("evaluate --fresh", "command evaluate takes no --fresh"),
    "callbacks": ("--callbacks=mine", "not a path to a function"),
    "flag of verify": ("--replicas=2", "command train takes no --replicas"),
    "flag of train": ("verify --strategy=mirrored", "verify takes no --strategy"),
    "workers of verify": ("verify --num_workers=2", "verify takes no --num_workers"),
    "no workers": ("--num_workers=0", "--num_workers=0"),
    "workers by halves": ("--workers=a:1,b:1", "--workers=a:1,b:1 alone"),
    "index without workers": ("--worker_index=1", "--worker_index=1 alone"),
    "index of no worker": (
        "--workers=a:1 --worker_index=1",
        "--worker_index=1, with 1",
    ),
    "index of no number": ("--workers=a:1 --worker_index=x", "Give a whole number"),
    "output": ("--num_workers=2 --tee=none", "--tee=none. Give chief or all"),
    "stall timeout": ("--stall_timeout=-1", "--stall_timeout=-1.0. Give 0"),
    "stop timeout": ("--stop_timeout=-1", "--stop_timeout=-1.0. Give 0"),
    "endless stall timeout": ("--stall_timeout=nan", "--stall_timeout=nan"),
    "workers that are mirrored": (
        "--num_workers=2 --strategy=mirrored",
        "would train alone. Received: --strategy=mirrored, --num_workers=2",
    ),
    "workers of virtual devices": (
        "--num_workers=2 --virtual_devices=2",
        "exactly one replica. Received: --virtual_devices=2",
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Starts each test in an empty folder and restores the import path after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    pathlib.Path("file").touch()
    return tmp_path


def model_defaults(**settings):
    """Returns settings as the get_config() of a reference model might."""
    config = ml_collections.ConfigDict({"dataset": "mnist", "batch_size": 64})
    config.update(settings)
    return config


def write_config(name="settings.py", body="config.epochs = 7"):
    pathlib.Path(name).write_text(
        "import ml_collections\n"
        "def get_config(argument=None):\n"
        "    config = ml_collections.ConfigDict()\n"
        f"    {body}\n"
        "    return config\n"
    )
    return name


@pytest.mark.parametrize(
    "arguments, expected", BAD_COMMAND_LINES.values(), ids=BAD_COMMAND_LINES
)
def test_bad_input_ends_with_code_2_and_one_clear_line(arguments, expected, capsys):
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("launch: ")
    assert "Received: " in err and expected in err
    assert not pathlib.Path("runs").exists()


def test_bad_input_is_refused_before_tensorflow_is_imported(folder):
    script = (
        "import sys; from launch.__main__ import main\n"
        "codes = [main(a.split()) for a in sys.argv[1:]]\n"
        "assert set(codes) == {2}, codes\n"
        "assert not {'tensorflow', 'keras', 'distfit'} & set(sys.modules)\n"
    )
    bad = [arguments for arguments, _ in BAD_COMMAND_LINES.values()]
    subprocess.run(
        [sys.executable, "-c", script, *bad],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=True,
        capture_output=True,
    )


def test_flags_that_were_not_given_leave_no_setting():
    assert flags.parse(["--epochs=3"]) == CommandLine(settings={"epochs": 3})
    assert flags.parse([]) == CommandLine()


def test_the_command_may_stand_anywhere_and_overrides_are_kept_apart():
    line = flags.parse(["--config.a.b=1", "--epochs=3", "evaluate", "--nojit_compile"])
    assert line.command == "evaluate"
    assert line.settings == {"epochs": 3, "jit_compile": False}
    assert line.overrides == ("--config.a.b=1",)


def test_what_describes_the_cluster_is_no_setting_of_the_run():
    given = {"num_workers": 2, "tee": "all", "stall_timeout": 0.5}
    line = flags.parse(["--epochs=3", *(f"--{k}={v}" for k, v in given.items())])
    assert line == CommandLine(settings={"epochs": 3}, cluster=given)
    assert not set(flags.CLUSTER) & set(configuration.resolve(line, model_defaults()))


def test_help_names_every_flag(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        f"--{name}" in text
        for name in [*flags.SETTINGS, *flags.CLUSTER, "config", "config.KEY"]
    )


def test_every_setting_has_a_flag_and_every_flag_a_setting():
    assert set(configuration.defaults()) == set(flags.SETTINGS)


def test_flags_win_over_overrides_over_the_file_over_the_model():
    defaults = model_defaults(epochs=1, learning_rate=0.1, seed=1, batch_size=8)
    body = "config.epochs = 2; config.learning_rate = 0.2; config.seed = 2"
    line = CommandLine(
        config=write_config(body=body),
        overrides=("--config.epochs=3", "--config.learning_rate=0.3"),
        settings={"epochs": 4},
    )
    config = configuration.resolve(line, defaults)
    assert config.epochs == 4
    assert config.learning_rate == 0.3
    assert config.seed == 2
    assert config.batch_size == 8
    assert config.strategy == "auto"


def test_overrides_take_the_type_of_the_setting():
    defaults = model_defaults(rate=0.5, bias=True, shape=(1, 2), hidden=None)
    defaults.hidden = config_dict.placeholder(int)
    overrides = (
        "rate=2",
        "bias=false",
        "shape=(3,4)",
        "hidden=5",
        "dataset=regression",
    )
    line = CommandLine(overrides=tuple(f"--config.{o}" for o in overrides))
    config = configuration.resolve(line, defaults)
    assert (config.rate, config.bias, config.shape) == (2.0, False, (3, 4))
    assert (config.hidden, config.dataset) == (5, "regression")


def test_an_override_none_lifts_a_limit_of_the_model():
    line = CommandLine(overrides=("--config.steps_per_epoch=None",))
    config = configuration.resolve(line, model_defaults(steps_per_epoch=100))
    assert config.steps_per_epoch is None


def test_an_override_of_an_unknown_setting_is_refused_with_those_there_are():
    line = CommandLine(overrides=("--config.latent=3",))
    configuration.preview(line)  # as far as known yet, it is a setting of the model
    with pytest.raises(UsageError, match="Received: --config.latent=3.*latent_dim"):
        configuration.resolve(line, model_defaults(latent_dim=128))


def test_a_config_file_takes_its_argument_after_a_colon():
    name = write_config(body="config.epochs = int(argument)")
    config = configuration.resolve(CommandLine(config=f"{name}:5"), model_defaults())
    assert config.epochs == 5


def test_an_unknown_key_in_the_file_is_refused_for_a_reference_model():
    line = CommandLine(config=write_config(body="config.bach_size = 3"))
    with pytest.raises(UsageError, match="Received: bach_size=3.*batch_size"):
        configuration.resolve(line, model_defaults())


def test_a_model_of_ones_own_may_have_settings_of_any_name():
    line = CommandLine(
        config=write_config(body="config.hidden = 3; config.net = {'depth': 1}"),
        settings={"model": "json:loads", "dataset": "mnist"},
        overrides=("--config.net.depth=2",),
    )
    config = configuration.resolve(line, None)
    assert (config.hidden, config.net.depth) == (3, 2)


def test_a_value_of_the_wrong_type_in_the_file_is_refused_by_its_key():
    line = CommandLine(config=write_config(body="config.epochs = 'many'"))
    with pytest.raises(UsageError, match="epochs takes int. Received: epochs='many'"):
        configuration.resolve(line, model_defaults())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("import nothing_of_this_name", "ModuleNotFoundError.*line 1"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError.*line 1"),
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "KeyError: 'get_config'"),
        ("def get_config(): return 3", "does not return a ConfigDict"),
    ],
)
def test_a_config_file_that_fails_is_refused_in_one_line(text, expected):
    pathlib.Path("broken.py").write_text(text)
    with pytest.raises(UsageError, match=expected):
        configuration.preview(CommandLine(config="broken.py"))


def test_the_working_folder_is_named_after_the_model():
    assert configuration.resolve(CommandLine(), model_defaults()).workdir == "runs/gan"
    line = CommandLine(settings={"model": "json.decoder:loads", "dataset": "mnist"})
    assert configuration.resolve(line, None).workdir == "runs/json.decoder.loads"


def test_evaluate_takes_up_the_settings_of_the_training_below_flags():
    defaults = model_defaults(shape=(1, 2), steps_per_epoch=100)
    trained = CommandLine(
        settings={"seed": 5, "batch_size": 16, "workdir": "here"},
        overrides=("--config.steps_per_epoch=None",),
    )
    configuration.write(configuration.resolve(trained, defaults))
    line = CommandLine("evaluate", settings={"workdir": "here", "batch_size": 8})
    config = configuration.resolve(line, defaults)
    assert (config.seed, config.batch_size, config.steps_per_epoch) == (5, 8, None)
    assert config.shape == (1, 2)


def test_a_training_is_evaluated_in_the_folder_where_it_is_now():
    trained = CommandLine(settings={"workdir": "before"})
    configuration.write(configuration.resolve(trained, model_defaults()))
    pathlib.Path("runs").mkdir()
    pathlib.Path("before").rename("runs/gan")
    config = configuration.resolve(CommandLine("evaluate"), model_defaults())
    assert config.workdir == "runs/gan"


def test_evaluating_does_not_take_the_workers_that_trained():
    recorded = CommandLine(settings={"strategy": "multi_worker", "workdir": "here"})
    configuration.write(configuration.resolve(recorded, model_defaults()))
    line = CommandLine("evaluate", settings={"workdir": "here"})
    assert configuration.resolve(line, model_defaults()).strategy == "auto"
    line = CommandLine("evaluate", settings=recorded.settings)
    assert configuration.resolve(line, model_defaults()).strategy == "multi_worker"


def test_the_written_settings_are_json():
    line = CommandLine(settings={"workdir": "a/b"})
    configuration.write(configuration.resolve(line, model_defaults()))
    written = json.loads(pathlib.Path("a/b/config.json").read_text())
    assert written["model"] == "gan" and written["batch_size"] == 64


def test_names_are_read_from_the_sources_as_they_are_when_imported():
    from distfit import datasets, models, strategy

    assert targets.declared("models/__init__.py") == models.NAMES
    assert targets.declared("datasets/__init__.py") == datasets.NAMES
    assert targets.declared("strategy.py") == strategy.NAMES


@pytest.mark.parametrize(
    "text, expected",
    [
        ("never", []),
        ("100steps, 2 epochs,10min,30s", ["100steps", "2 epochs", "10min", "30s"]),
    ],
)
def test_what_checkpoint_every_takes_a_checkpoint_takes(text, expected, tmp_path):
    line = flags.parse([f"--checkpoint_every={text}"])
    every = checks.moments(configuration.preview(line))
    assert every == expected
    distfit.callbacks.Checkpoint(tmp_path, every)


def test_a_module_in_the_current_folder_is_found_without_importing_it(folder):
    package = folder / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "mine.py").touch()
    targets.check("model", "my_package.mine:build", ())
    with pytest.raises(UsageError, match="no module of that name"):
        targets.check("model", "my_package.other:build", ())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("import nothing_of_this_name", "ModuleNotFoundError.*module_[0-9].py, line 1"),
        ("def build(:", "SyntaxError.*line 1"),
        ("build = 3", r"Define build\(config\) in .*module_[0-9]\.py"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused_in_one_line(
    folder, text, expected
):
    name = f"module_{len(text) % 10}"  # each its own, as a module is imported once
    (folder / f"{name}.py").write_text(text)
    with pytest.raises(UsageError, match=expected):
        targets.load_function("model", f"{name}:build")


@pytest.fixture
def unset_log_level(monkeypatch):
    level = logging.getLogger("tensorflow").level
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "")
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    yield
    logging.getLogger("tensorflow").setLevel(level)


BANNER = b"I0000 00:00:1.5 77 port.cc:153] oneDNN custom operations are on.\n"


def test_banners_of_tensorflow_are_dropped_and_warnings_kept(unset_log_level, capfd):
    with quiet.tensorflow_import():
        os.write(2, BANNER + b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"


def test_nothing_is_dropped_when_the_import_fails(unset_log_level, capfd):
    with pytest.raises(ImportError), quiet.tensorflow_import():
        os.write(2, BANNER)
        raise ImportError
    assert capfd.readouterr().err == BANNER.decode()


def test_who_sets_the_log_level_gets_what_tensorflow_says(monkeypatch, capfd):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    with quiet.tensorflow_import():
        os.write(2, BANNER)
    assert capfd.readouterr().err == BANNER.decode()


def test_the_summary_aligns_names_and_rounds_numbers():
    text = summary.table({"loss": 0.123456789, "results": "runs/gan", "epochs": 12})
    assert text == "loss     0.12346\nresults  runs/gan\nepochs   12"
