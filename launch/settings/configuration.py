"""The settings of a run: which source wins, and where the result is kept.

From weakest to strongest: the defaults here, those of the reference model, for
`evaluate` what the training wrote to its folder, the --config file, --config.key=value,
and the flags that were given.
"""

import json
import pathlib
import re
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

from launch.errors import UsageError
from launch.settings import checks, targets
from launch.settings.flags import CommandLine

FILE = "config.json"


def defaults() -> ml_collections.ConfigDict:
    """Returns the settings that every run has. A placeholder stands for "not set"."""
    config = ml_collections.ConfigDict()
    config.model = "gan"
    config.dataset = config_dict.placeholder(str)
    config.data_dir = config_dict.placeholder(str)
    config.batch_size = 32
    config.epochs = 1
    config.steps_per_epoch = config_dict.placeholder(int)
    config.learning_rate = 0.001
    config.seed = 1337
    config.strategy = "auto"
    config.virtual_devices = 0
    config.mixed_precision = config_dict.placeholder(str)
    config.steps_per_execution = config_dict.placeholder(int)
    config.jit_compile = config_dict.placeholder(bool)
    config.workdir = config_dict.placeholder(str)
    config.verbose = config_dict.placeholder(int)
    return config


def preview(command_line: CommandLine) -> ml_collections.ConfigDict:
    """Resolves and checks all that is known without the model, so without TensorFlow.

    Overrides of settings that only the model may know wait for `resolve`.

    Raises:
        UsageError: no run can start with this.
    """
    config = _stack(command_line, None, known_overrides_only=True)
    checks.check(config)
    return config


def resolve(
    command_line: CommandLine, model_defaults: ml_collections.ConfigDict | None
) -> ml_collections.ConfigDict:
    """Resolves and checks the settings of a run.

    Args:
        command_line: what was asked for.
        model_defaults: the `get_config()` of the reference model; None for a user's own
            model, whose configuration file may hold settings of any name.

    Raises:
        UsageError: no run can start with this.
    """
    config = _stack(command_line, model_defaults)
    checks.check(config)
    if model_defaults is not None:
        checks.check_keys(config, {*defaults(), *model_defaults})
    return config


def write(config: ml_collections.ConfigDict) -> None:
    """Writes the settings to the working folder, which is made if need be.

    Raises:
        UsageError: the folder cannot be written to.
    """
    folder = pathlib.Path(config.workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = config.to_json_best_effort(indent=2)
        (folder / FILE).write_text(text + "\n")
    except OSError as error:
        raise UsageError(
            f"The working folder cannot be written to ({error.strerror}). "
            f"Received: --workdir={folder}. Give another folder."
        ) from error


def _stack(
    command_line: CommandLine,
    model_defaults: ml_collections.ConfigDict | None,
    *,
    known_overrides_only: bool = False,
) -> ml_collections.ConfigDict:
    layers = [(f"--config={command_line.config}", _load_file(command_line.config))]

    def stacked() -> ml_collections.ConfigDict:
        config = defaults()
        if model_defaults is not None:
            _put(config, model_defaults, "get_config() of the model")
        for source, layer in layers:
            _put(config, layer, source)
        _override(config, command_line.overrides, known_overrides_only)
        _put(config, command_line.settings, "the flags")
        if config.workdir is None:
            config.workdir = f"runs/{config.model.replace(':', '.')}"
        return config

    config = stacked()
    if command_line.command == "evaluate":
        # The other sources say which folder it is, and win over what it holds.
        file = pathlib.Path(config.workdir, FILE)
        layers.insert(0, (str(file), _for_evaluation(_load_recorded(file))))
        config = stacked()
    return config


def _put(
    config: ml_collections.ConfigDict, layer: Mapping[str, Any], source: str
) -> None:
    # A reference, and not its value, has the type of a placeholder.
    references = ml_collections.ConfigDict(layer)
    for key, reference in references.items(preserve_field_references=True):
        if key not in config:
            config[key] = reference
            continue
        try:
            config.update({key: layer[key]})
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"The setting {key} takes {config.get_type(key).__name__}. "
                f"Received: {key}={layer[key]!r} in {source}. Give one of that type."
            ) from error


def _override(
    config: ml_collections.ConfigDict, overrides: Iterable[str], known_only: bool
) -> None:
    """Applies `--config.key=value` arguments with the types that the settings have."""
    for override in overrides:
        path = re.sub(r"--?(no)?config\.", "", override).partition("=")[0]
        if path.partition(".")[0] in config:
            _override_one(config, override, path)
        elif not known_only:
            raise UsageError(
                f"There is no such setting. Received: {override}. "
                f"The settings of this run are {', '.join(sorted(config))}."
            )


def _override_one(config: ml_collections.ConfigDict, override: str, path: str) -> None:
    argv = ["launch", override]
    try:
        if override.endswith("=None"):  # which config_flags takes for no type but text
            config.update_from_flattened_dict({path: None})
            return
        values = flags.FlagValues()
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=False, sys_argv=argv
        )
        values(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"The setting cannot be overridden so ({error}). Received: {override}. "
            "Name an existing setting and give a value of its type."
        ) from error


def _load_file(config: str | None) -> Mapping[str, Any]:
    """Runs `get_config()` of `path.py` or, with its argument, `path.py:argument`."""
    if config is None:
        return {}
    path, *argument = config.split(":", 1)
    if not pathlib.Path(path).is_file():
        raise UsageError(
            f"There is no such file. Received: --config={config}. "
            "Give the path of a Python file with a function get_config()."
        )
    try:
        loaded = runpy.run_path(path)["get_config"](*argument)
    except Exception as error:
        raise UsageError(
            f"The configuration file fails with {type(error).__name__}: {error} "
            f"({targets.place(error)}). Received: --config={config}. "
            "Make its get_config() return a ConfigDict."
        ) from error
    if not isinstance(loaded, ml_collections.ConfigDict | Mapping):
        raise UsageError(
            "get_config() of the configuration file returns no ConfigDict. "
            f"Received: {loaded!r} from --config={config}. Return one."
        )
    return loaded


def _load_recorded(file: pathlib.Path) -> Mapping[str, Any]:
    """Reads what a training wrote, so that `evaluate` need not be told it again."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"There is no training to evaluate in this folder ({error}). "
            f"Received: --workdir={file.parent}. "
            "Give the --workdir of a finished training, or its --model."
        ) from error


def _for_evaluation(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leaves out the workers: those that trained need not be there to evaluate."""
    if recorded.get("strategy") != "multi_worker":
        return recorded
    return {name: value for name, value in recorded.items() if name != "strategy"}
