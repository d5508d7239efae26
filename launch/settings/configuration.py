"""Resolves the settings of a run from all their sources, and writes them to a file.

From lowest to highest priority: the defaults here, those of the reference model, for
`evaluate` the settings that the training wrote, the --config file, --config.key=value,
and the flags.
"""

import errno
import pathlib
import re
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

from launch import run_files
from launch.errors import UsageError, unwritten
from launch.settings import checks, targets
from launch.settings.flags import CommandLine

FILE = "config.json"


def defaults() -> ml_collections.ConfigDict:
    """Returns the settings that every run has; a placeholder means "not set"."""
    config = ml_collections.ConfigDict()
    config.model = "gan"
    config.dataset = config_dict.placeholder(str)
    config.callbacks = config_dict.placeholder(str)
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
    config.checkpoint_every = "1epoch,10min"
    config.keep = 3
    config.monitor = config_dict.placeholder(str)
    config.mode = "min"
    config.on_save_error = "raise"
    config.on_non_finite = "stop"
    return config


def preview(command_line: CommandLine) -> ml_collections.ConfigDict:
    """Resolves and checks the settings as far as possible without TensorFlow.

    Overrides of keys that may belong to the model are left to `resolve`.

    Raises:
        UsageError: a setting is invalid.
    """
    config = _stack(command_line, None, known_overrides_only=True)
    checks.check(config)
    return config


def resolve(
    command_line: CommandLine, model_defaults: ml_collections.ConfigDict | None
) -> ml_collections.ConfigDict:
    """Resolves and checks the settings of a run.

    Args:
        command_line: the parsed command line.
        model_defaults: the `get_config()` of the reference model; None for a user's own
            model, whose configuration file may hold settings of any name.

    Raises:
        UsageError: a setting is invalid.
    """
    config = _stack(command_line, model_defaults)
    checks.check(config)
    if model_defaults is not None:
        checks.check_keys(config, {*defaults(), *model_defaults})
    return config


def write(config: ml_collections.ConfigDict) -> None:
    """Writes the settings to the working folder, which is created if needed.

    Raises:
        UsageError: the folder cannot be written to.
        RunError: its disk is full.
    """
    folder = pathlib.Path(config.workdir)
    try:
        run_files.write_text(folder / FILE, config.to_json_best_effort(indent=2) + "\n")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise unwritten(folder / FILE, error) from error
        raise unwritable(folder, error) from error


def recorded(folder: pathlib.Path) -> Mapping[str, Any]:
    """Reads the settings that a training wrote, so that `evaluate` needs no flags.

    Raises:
        UsageError: there are none.
    """
    found = run_files.read_json(folder / FILE)
    if found is None:
        raise UsageError(
            f"The folder has no training to evaluate: {FILE} is missing or malformed. "
            f"Received: --workdir={folder}. "
            "Give the --workdir of a training, or its --model."
        )
    return found


def unwritable(folder: pathlib.Path, error: OSError) -> UsageError:
    """The error for a working folder that cannot be written to."""
    return UsageError(
        f"The working folder cannot be written to ({error.strerror}). "
        f"Received: --workdir={folder}. Give another folder."
    )


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
        if config.model is None:
            raise UsageError(
                "A run needs a model. Received: model=None. Give --model=gan, say."
            )
        if config.workdir is None:
            config.workdir = f"runs/{config.model.replace(':', '.')}"
        return config

    config = stacked()
    if command_line.command == "evaluate":
        # The other sources determine the folder, and override the settings in it.
        folder = pathlib.Path(config.workdir)
        layer = {**_for_evaluation(recorded(folder)), "workdir": config.workdir}
        layers.insert(0, (str(folder / FILE), layer))
        config = stacked()
    return config


def _put(
    config: ml_collections.ConfigDict, layer: Mapping[str, Any], source: str
) -> None:
    # Only a reference, not its value, has the type of a placeholder.
    try:
        references = ml_collections.ConfigDict(layer)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(
            f"The settings cannot be read ({error}). Received: {source}. Rename "
            "that setting, or give it a plain value."
        ) from error
    for key, reference in references.items(preserve_field_references=True):
        if key not in config:
            config[key] = reference
            continue
        try:
            config.update({key: layer[key]})
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"The setting {key} takes {config.get_type(key).__name__}. "
                f"Received: {key}={layer[key]!r} in {source}. Give that type."
            ) from error


def _override(
    config: ml_collections.ConfigDict, overrides: Iterable[str], known_only: bool
) -> None:
    """Applies `--config.key=value` arguments, parsed with the types of the settings."""
    for override in overrides:
        path = re.sub(r"--?(no)?config\.", "", override).partition("=")[0]
        if path.partition(".")[0] in config:
            _override_one(config, override, path)
        elif not known_only:
            raise UsageError(
                f"Unknown setting. Received: {override}. "
                f"The settings of this run are {', '.join(sorted(config))}."
            )


def _override_one(config: ml_collections.ConfigDict, override: str, path: str) -> None:
    argv = ["launch", override]
    try:
        if override.endswith("=None"):  # config_flags accepts None only for strings
            config.update_from_flattened_dict({path: None})
            return
        values = flags.FlagValues()
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=False, sys_argv=argv
        )
        values(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"The override is invalid ({error}). Received: {override}. "
            "Name an existing setting and give a value of its type."
        ) from error


def _load_file(config: str | None) -> Mapping[str, Any]:
    """Runs `get_config()` of `path.py`, or of `path.py:argument` with that argument."""
    if config is None:
        return {}
    path, *argument = config.split(":", 1)
    if not pathlib.Path(path).is_file():
        raise UsageError(
            f"No such file. Received: --config={config}. "
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
            "get_config() of the configuration file does not return a ConfigDict. "
            f"Received: {loaded!r} from --config={config}. Return one."
        )
    return loaded


def _for_evaluation(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drops the multi_worker strategy: its workers are not needed to evaluate."""
    if recorded.get("strategy") != "multi_worker":
        return recorded
    return {name: value for name, value in recorded.items() if name != "strategy"}
