"""A plot of deviations per step, as a self-contained SVG."""

import html
import math
from collections.abc import Sequence

from distfit.verification.comparison import CHECKS, Deviation

_WIDTH, _HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 34, 44
# Smallest and largest exponent drawn; deviations beyond are moved to the edge.
_LEAST, _LARGEST = -9, 2
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)


def deviations(title: str, found: Sequence[Deviation], tolerance: float) -> str:
    """Draws the worst deviation of each check in each step, and the tolerance.

    Args:
        title: The heading of the plot.
        found: The deviations; those that belong to no single step are left out.
        tolerance: Drawn as a dashed line.

    Returns:
        An `<svg>` element.
    """
    by_step = [d for d in found if d.batch is not None]
    steps = 1 + max((d.step for d in by_step), default=0)
    parts = [*_axes(title, by_step, steps), _tolerance_line(tolerance)]
    checks = [check for check in CHECKS if any(d.check == check for d in by_step)]
    for index, check in enumerate(checks):
        worst = [
            max(
                (d.value for d in by_step if (d.check, d.step) == (check, s)), default=0
            )
            for s in range(steps)
        ]
        points = [(_x(step, steps), _y(value)) for step, value in enumerate(worst)]
        parts += _line(points, _COLOURS[index % len(_COLOURS)], check, index)
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    style = 'font-family="system-ui, sans-serif" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>'
    )


def _axes(title: str, found: Sequence[Deviation], steps: int) -> list[str]:
    right = _WIDTH - _RIGHT
    parts = [
        f'<text x="{_LEFT}" y="16" font-weight="bold">{html.escape(title)}: worst '
        "deviation from one device, per step</text>"
    ]
    for exponent in range(_LEAST, _LARGEST + 1):
        y = _y(10.0**exponent)
        label = f"≤ 1e{exponent}" if exponent == _LEAST else f"1e{exponent}"
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#e4e4e4"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for step in range(steps):
        kinds = dict.fromkeys(d.batch.kind for d in found if d.step == step and d.batch)
        x, y = _x(step, steps), _HEIGHT - _BOTTOM
        parts.append(
            f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle">{step + 1}</text>'
            f'<text x="{x:.1f}" y="{y + 33}" text-anchor="middle" fill="#666">'
            f"{html.escape(', '.join(kinds))}</text>"
        )
    return parts


def _tolerance_line(tolerance: float) -> str:
    y = _y(tolerance)
    right = _WIDTH - _RIGHT
    return (
        f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#c33" stroke-dasharray="5 4"/>'
        f'<text x="{right + 8}" y="{y + 4:.1f}" fill="#c33">tolerance</text>'
    )


def _line(points, colour: str, label: str, index: int) -> list[str]:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    y = _TOP + 12 + 17 * index
    x = _WIDTH - _RIGHT + 8
    return [
        f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>',
        *(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>'
            for a, b in points
        ),
        f'<path d="M{x} {y - 4}h18" stroke="{colour}" stroke-width="3"/>',
        f'<text x="{x + 24}" y="{y}">{html.escape(label)}</text>',
    ]


def _x(step: int, steps: int) -> float:
    width = _WIDTH - _LEFT - _RIGHT
    return _LEFT + width * (step + 0.5) / steps


def _y(value: float) -> float:
    least, largest = 10.0**_LEAST, 10.0**_LARGEST
    exponent = math.log10(min(max(value, least), largest))
    height = _HEIGHT - _TOP - _BOTTOM
    return _TOP + height * (_LARGEST - exponent) / (_LARGEST - _LEAST)
