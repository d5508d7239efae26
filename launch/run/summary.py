"""The summary that a run prints at its end."""

from collections.abc import Mapping
from typing import Any


def table(rows: Mapping[str, Any]) -> str:
    """Formats the rows as lines of name and value, floats with 5 significant digits."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{_text(value)}" for name, value in rows.items())


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
