"""The flags of `python -m launch`, each defined once, and their parser.

No flag has a default here: without a flag, its setting comes from the configuration
file or the model's own defaults (see configuration.py).
"""

import dataclasses
import difflib
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from launch.errors import UsageError

COMMANDS = ("train", "evaluate", "verify")


class _Kind(NamedTuple):
    define: Callable
    placeholder: str
    takes: str


_TEXT = _Kind(flags.DEFINE_string, "STRING", "a string")
_INTEGER = _Kind(flags.DEFINE_integer, "N", "a whole number")
_NUMBER = _Kind(flags.DEFINE_float, "X", "a number")
_SWITCH = _Kind(flags.DEFINE_boolean, "", "true or false")

SETTINGS: dict[str, tuple[_Kind, str]] = {
    "strategy": (
        _TEXT,
        "one_device, mirrored, multi_worker, or auto: multi_worker in a cluster or "
        "with --num_workers, mirrored on several devices",
    ),
    "model": (
        _TEXT,
        "a reference model (default: gan), or package.module:function, a function that "
        "takes the configuration and returns a compiled keras.Model",
    ),
    "dataset": (
        _TEXT,
        "a dataset of distfit, or package.module:function, a function that takes the "
        "configuration and returns (train, validation)",
    ),
    "callbacks": (
        _TEXT,
        "package.module:function, a function that takes the configuration and returns "
        "Keras callbacks, the same on every worker",
    ),
    "batch_size": (_INTEGER, "rows of the global batch, over all replicas"),
    "epochs": (_INTEGER, "epochs to train"),
    "steps_per_epoch": (
        _INTEGER,
        "steps per epoch; --config.steps_per_epoch=None for the whole dataset",
    ),
    "learning_rate": (_NUMBER, "learning rate of the optimizer"),
    "seed": (_INTEGER, "seed of weights, shuffling, dropout and noise"),
    "virtual_devices": (_INTEGER, "number of devices to split the CPU into"),
    "workdir": (_TEXT, "folder for the results (default: runs/MODEL)"),
    "steps_per_execution": (
        _INTEGER,
        "steps per call of the compiled function; callbacks run between calls",
    ),
    "mixed_precision": (_TEXT, "Keras dtype policy, such as mixed_bfloat16"),
    "jit_compile": (_SWITCH, "compile the step with XLA"),
    "data_dir": (
        _TEXT,
        "full MNIST: mnist.npz, its folder, or 'download'; by default a bundled sample "
        "is used",
    ),
    "verbose": (_INTEGER, "0 silent, 1 a progress bar, 2 a line per epoch"),
    "checkpoint_every": (
        _TEXT,
        "when to save: 100steps, 1epoch, 5min, several of these with commas, or never "
        "(default: 1epoch,10min)",
    ),
    "keep": (_INTEGER, "checkpoints to keep, at least 2 (default: 3)"),
    "monitor": (
        _TEXT,
        "a metric, such as val_loss: the --keep best checkpoints by it are kept, and "
        "the latest two",
    ),
    "mode": (_TEXT, "whether the best --monitor is the min (default) or the max"),
    "on_save_error": (
        _TEXT,
        "if a checkpoint cannot be written: raise, which ends the run at the next step "
        "(default), or warn",
    ),
    "on_non_finite": (
        _TEXT,
        "at a loss that is NaN or infinite: stop (default), or rollback to the last "
        "checkpoint and go on without that batch",
    ),
}
# Flags of `evaluate` alone.
EVALUATE: dict[str, tuple[_Kind, str]] = {
    "weights": (
        _TEXT,
        "evaluate: the weights of the trained model (default, once it is there), of "
        "the latest checkpoint, or of the best by --monitor: model, latest or best",
    ),
}
# Flags of `verify` alone, which makes its own strategies and devices.
VERIFY: dict[str, tuple[_Kind, str]] = {
    "replicas": (_TEXT, "verify: replica counts to compare (default: 1,2,4)"),
    "steps": (_INTEGER, "verify: training steps to compare (default: 3)"),
    "tolerance": (_NUMBER, "verify: maximum relative deviation (default: 1e-5)"),
}
# Flags that describe this process and its cluster; they are not settings of the run.
CLUSTER: dict[str, tuple[_Kind, str]] = {
    "num_workers": (
        _INTEGER,
        "number of workers to start on this host; in a cluster, its expected size",
    ),
    "workers": (
        _TEXT,
        "the cluster as host:port,host:port,...: the same on each worker, chief first",
    ),
    "worker_index": (_INTEGER, "index of this process in --workers, from 0"),
    "tee": (
        _TEXT,
        "with --num_workers, whose output to show: chief (default), or all, each line "
        "prefixed with its worker",
    ),
    "stall_timeout": (
        _NUMBER,
        "seconds without progress after which a worker ends the run (default: 1800); "
        "0 to wait forever. A run of one process ends so only where this or "
        "--max_restarts is given",
    ),
    "stop_timeout": (
        _NUMBER,
        "seconds in which a run saves after SIGTERM or Ctrl-C, before it is ended "
        "(default: 25, as clusters mostly allow 30); 0 for as many as it takes",
    ),
    "fresh": (
        _SWITCH,
        "start anew: what an earlier run left in --workdir is moved to earlier-1 in it",
    ),
    "max_restarts": (
        _INTEGER,
        "how often to start again from the last checkpoint after a failure (default: "
        "0); progress sets the count back",
    ),
}
TEES = ("chief", "all")
WEIGHTS = ("model", "latest", "best")
_ALL = {**SETTINGS, **CLUSTER, **EVALUATE, **VERIFY}
# Of each command, the flags that it does not take.
_OF_SAVING = (
    *("checkpoint_every", "keep", "on_save_error", "on_non_finite"),
    *("fresh", "max_restarts"),
)
_NOT_TAKEN = {
    "train": (*EVALUATE, *VERIFY),
    "evaluate": (*_OF_SAVING, *VERIFY),
    "verify": (
        *("strategy", "virtual_devices", "monitor", "mode", *_OF_SAVING),
        *CLUSTER,
        *EVALUATE,
    ),
}
_CONFIG_HELP = (
    "Python file whose get_config() returns settings as an ml_collections.ConfigDict; "
    "FILE.py:ARGUMENT calls it with an argument"
)


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The parsed command line.

    Attributes:
        command: one of `COMMANDS`.
        settings: the flags that were given, by name.
        config: the path of the configuration file, with its argument, if any.
        overrides: the `--config.key=value` arguments, unparsed: the configuration
            determines their types.
        verify: the arguments of `distfit.verify` that were given.
        weights: what `evaluate` takes, one of `WEIGHTS`, or None for its default.
        cluster: the flags of `CLUSTER` that were given.
    """

    command: str = "train"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    verify: dict[str, Any] = dataclasses.field(default_factory=dict)
    cluster: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()


def parse(arguments: Sequence[str]) -> CommandLine:
    """Reads the arguments that follow `python -m launch`.

    Raises:
        UsageError: an unknown flag or command, or a value of the wrong type.
    """
    overrides = tuple(a for a in arguments if _is_override(a))
    values = _define()
    try:
        rest = values(["launch", *(a for a in arguments if not _is_override(a))])
    except flags.Error as error:
        raise UsageError(_explain(error)) from error
    command = _command(rest[1:])
    given = {name: values[name].value for name in _ALL if values[name].present}
    _check_flags_of(command, given)
    return CommandLine(
        command=command,
        settings={name: given[name] for name in given if name in SETTINGS},
        verify=_verify_arguments(given),
        cluster=_cluster_arguments(given),
        weights=_weights(given),
        config=values["config"].value,
        overrides=overrides,
    )


def help_text() -> str:
    """Returns what `--help` prints."""
    rows = [(name, kind.placeholder, text) for name, (kind, text) in _ALL.items()]
    rows += [("config", "FILE.py", _CONFIG_HELP)]
    rows += [("config.KEY", "VALUE", "one setting of the configuration, by name")]
    lines = [f"python -m launch [{'|'.join(COMMANDS)}] [--flag=value ...]", ""]
    for name, placeholder, text in rows:
        lines.append(f"  --{name}{'=' if placeholder else ''}{placeholder}")
        lines.append(textwrap.indent(textwrap.fill(text, 78), " " * 8))
    return "\n".join(lines)


def _define() -> flags.FlagValues:
    # Not absl's global flags, to which any imported module may add.
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # the command may come before, between or after flags
    for name, (kind, text) in _ALL.items():
        kind.define(name, None, text, flag_values=values)
    flags.DEFINE_string("config", None, _CONFIG_HELP, flag_values=values)
    return values


def _is_override(argument: str) -> bool:
    return re.match(r"--?(no)?config\.", argument) is not None


def _command(positional: Sequence[str]) -> str:
    if not positional:
        return "train"
    if len(positional) > 1 or positional[0] not in COMMANDS:
        raise UsageError(
            "Unknown command. "
            f"Received: command={' '.join(positional)!r}. "
            f"Choose {' or '.join(COMMANDS)}, and write settings as --flag=value."
        )
    return positional[0]


def _check_flags_of(command: str, given: dict[str, Any]) -> None:
    """Raises a `UsageError` for a flag that the command does not take."""
    for name in _NOT_TAKEN[command]:
        if name in given:
            raise UsageError(
                f"The command {command} takes no --{name}. "
                f"Received: --{name}={given[name]}. {_advice(command, name)}"
            )


def _advice(command: str, name: str) -> str:
    if name in VERIFY:
        return "Use it with python -m launch verify."
    if name in EVALUATE:
        return "Use it with python -m launch evaluate."
    if command == "verify" and name in ("strategy", "virtual_devices", "num_workers"):
        return "Give replica counts as --replicas=1,2,4."
    return "Use it with python -m launch train."


def _weights(given: dict[str, Any]) -> str | None:
    weights = given.get("weights")
    if weights not in (None, *WEIGHTS):
        raise UsageError(
            "Unknown value of --weights. "
            f"Received: --weights={weights}. Give {', '.join(WEIGHTS)}."
        )
    return weights


def _verify_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `distfit.verify`, checked without TensorFlow."""
    arguments = {name: given[name] for name in VERIFY if name in given}
    if "replicas" in arguments:
        arguments["replicas"] = _numbers("replicas", arguments["replicas"])
    for name in ("steps", "tolerance"):
        if name in arguments and not arguments[name] > 0:
            raise UsageError(
                f"{name} must be positive. Received: --{name}={arguments[name]}. "
                "Leave it out for the default."
            )
    return arguments


def _cluster_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of `CLUSTER`; discovery.py checks how they combine."""
    arguments = {name: given[name] for name in CLUSTER if name in given}
    if arguments.get("num_workers", 1) < 1:
        raise UsageError(
            "num_workers must be at least 1. "
            f"Received: --num_workers={arguments['num_workers']}. "
            "Leave it out to train in this process."
        )
    if arguments.get("max_restarts", 0) < 0:
        raise UsageError(
            "max_restarts must be 0 or more. "
            f"Received: --max_restarts={arguments['max_restarts']}. "
            "Leave it out to end at the first failure."
        )
    if arguments.get("tee", TEES[0]) not in TEES:
        raise UsageError(
            "Unknown value of --tee. "
            f"Received: --tee={arguments['tee']}. Give {' or '.join(TEES)}."
        )
    for name in ("stall_timeout", "stop_timeout"):
        seconds = arguments.get(name, 0.0)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise UsageError(
                f"The {name.replace('_', ' ')} must be a finite number of seconds, 0 "
                f"or more. Received: --{name}={seconds}. Give 0 to wait forever."
            )
    return arguments


def _numbers(name: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(
            f"--{name} takes positive whole numbers, separated by commas. "
            f"Received: --{name}={text}. Give e.g. --{name}=1,2,4."
        )
    return tuple(int(part) for part in parts)


def _explain(error: flags.Error) -> str:
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown(error.flagname)
    # absl's message: "flag --batch_size=x: invalid literal for int() with base 10".
    illegal = re.match(r"flag --(?P<name>\w+)=(?P<value>.*?): ", str(error))
    if illegal and illegal["name"] in _ALL:
        name, value = illegal["name"], illegal["value"]
        takes = _ALL[name][0].takes
        return f"--{name} takes {takes}. Received: --{name}={value}. Give {takes}."
    return f"The flags are invalid. Received: {error}. See python -m launch --help."


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, [*_ALL, "config"], n=1)
    advice = f"Did you mean --{near[0]}?" if near else "See python -m launch --help."
    return f"Unknown flag. Received: --{name}. {advice}"
