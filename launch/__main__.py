"""python -m launch [train|evaluate|verify] --flag=value ...: `train` is the default.

Exit codes: 0 done; 1 training failed, or `verify` has findings; 2 something given is
wrong, and nothing was trained; 130 interrupted.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence

from launch import configuration, flags, quiet
from launch.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """Runs a command line and returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(flags.help_text())
        return 0
    try:
        return 0 if _run(arguments) else 1
    except UsageError as error:
        return _fail(2, str(error))
    except FloatingPointError as error:  # of NonFinite: it says all there is to say
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except Exception as error:
        traceback.print_exc()
        return _fail(1, f"failed with {type(error).__name__}: {error}")


def _run(arguments: Sequence[str]) -> bool:
    # Modules of the user are looked up where the command is started.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    command_line = flags.parse(arguments)
    model = configuration.preview(command_line).model
    with quiet.tensorflow_import():
        from launch import worker
    return worker.run(command_line, model)


def _fail(code: int, message: str) -> int:
    """Says why on one line of stderr, without the colours that Keras puts in."""
    line = " ".join(re.sub(r"\x1b\[\d*m", "", message).split())
    print("launch:", line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
