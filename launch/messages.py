"""The messages of errors, without what Keras and TensorFlow put around the cause."""

import os
import re

# How TensorFlow tells of its graph: what made its nodes, and which of them failed.
_GRAPH = re.compile(
    r"Graph execution error:\s*"
    r"|Detected at node .*\n(?:<stack traces unavailable>\n|[ \t].*\n|\n)*"
    r"|\{\{(?:function_)?node [^{}]*\}\} *"
    r"|\n\t \[\[.*\]\]"
    r"|\s*\[Op:[^\]\n]*\](?: name:.*)?"
    r"|\n\d+ successful operations\.\n\d+ derived errors ignored\."
)
_SEVERAL = re.compile(r"\d+ root error\(s\) found\.")
_NEXT = re.compile(r"\s*\(\d+\) [A-Z_]+: *")
_TRACEBACK = "\nTraceback (most recent call last):\n"  # of a py_function
_IN_THE_STEP = "In the step, at "  # how a note of distfit begins


def cause(error: BaseException) -> str:
    """Returns the message of an error, without graphs and colours."""
    message = without_colours(str(error))
    if not type(error).__module__.startswith("tensorflow."):
        return message
    message = _GRAPH.sub("", message).strip()
    causes = _NEXT.split(message)[1:] if _SEVERAL.match(message) else [message]
    causes = [each.partition(_TRACEBACK)[0].strip() for each in causes]
    return "\n".join(dict.fromkeys(causes))


def place(error: BaseException) -> str:
    """Returns the lines that distfit's notes name, as "my.py:19  x = f(y)", or ""."""
    notes = getattr(error, "__notes__", [])
    lines = [n.removeprefix(_IN_THE_STEP) for n in notes if n.startswith(_IN_THE_STEP)]
    return "; ".join(line.removeprefix(f"{os.getcwd()}{os.sep}") for line in lines)


def line(cause: str, place: str) -> str:
    """Returns the two as one line."""
    text = f"{cause} ({place})" if place else cause
    return " ".join(text.split())


def without_colours(text: str) -> str:
    """Removes the escape sequences by which Keras colours text."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)
