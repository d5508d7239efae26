"""The result of `verify`: as a table, as JSON, and as a page with a plot."""

import dataclasses
import html
import io
import json
import math
import os
import pathlib
import string
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

from distfit.partition.findings import InFull, percent
from distfit.verification import plot
from distfit.verification.comparison import CHECKS, Deviation, describe
from distfit.verification.problems import Problem

_MOST_ROWS = 60  # of a table on the screen
_SET_ASIDE = (
    "Set aside as rounding, since nothing differs when the same steps are computed in "
    "float64: "
)


@dataclasses.dataclass
class Row:
    """A line of the table.

    Attributes:
        part: A layer, an optimizer, or a log.
        check: One of `comparison.CHECKS`.
        worst: The worst deviation of that part in that check.
    """

    part: str
    check: str
    worst: Deviation


@dataclasses.dataclass
class Report:
    """The result of `distfit.verify`.

    Attributes:
        model: Name of the model's class.
        replicas: The numbers of replicas that were compared with one device.
        tolerance: The largest deviation that passes.
        deviations: Everything that was compared, within the tolerance or not.
        problems: What kept the model from being compared or from running.
        not_partitioned: What every replica computes in full, the largest first: the
            numbers are right, but more replicas do not speed it up.
        set_aside: What differs in float32 but not when the same steps are computed in
            float64: rounding decided, say, which of two almost equal numbers is larger.
    """

    model: str
    replicas: list[int]
    tolerance: float
    deviations: list[Deviation]
    problems: list[Problem]
    not_partitioned: list[InFull]
    set_aside: list[str]

    @property
    def ok(self) -> bool:
        """Whether N replicas match one device."""
        return not self.problems and all(d.ok for d in self.deviations)

    @property
    def rows(self) -> list[Row]:
        """The table: what was compared, and the worst deviations."""
        rows: dict[tuple[str, str], Row] = {}
        for deviation in self.deviations:
            key = (_part_of(deviation), deviation.check)
            row = rows.setdefault(key, Row(*key, deviation))
            if _badness(deviation) > _badness(row.worst):
                row.worst = deviation
        return sorted(rows.values(), key=lambda row: CHECKS.index(row.check))

    def __str__(self) -> str:
        parts = [self._table_of_deviations()] if self.deviations else []
        parts += [str(problem) for problem in self.problems]
        if self.not_partitioned:
            parts.append(self._table_of_what_is_in_full())
        parts += [_SET_ASIDE + text for text in self.set_aside]
        return "\n".join([*parts, self.verdict])

    @property
    def verdict(self) -> str:
        """The result in one or two sentences."""
        on = f"{self.model} on {', '.join(map(str, self.replicas))} replicas"
        if self.ok:
            worst = max((d.value for d in self.deviations), default=0.0)
            return (
                f"OK: {on} matches one device "
                f"(worst deviation {worst:.1e}, tolerance {self.tolerance:g})."
            )
        failed = [d for d in self.deviations if not d.ok]
        if failed:
            return f"NOT OK: {on}. {describe(failed)}"
        return f"NOT OK: {on}: {self.problems[0].kind}."

    def _table_of_deviations(self) -> str:
        rows = self.rows
        shown = rows
        if len(rows) > _MOST_ROWS:  # Rows that differ, then others up to it.
            bad = [row for row in rows if not row.worst.ok][:_MOST_ROWS]
            good = [row for row in rows if row.worst.ok][: _MOST_ROWS - len(bad)]
            shown = [row for row in rows if row in bad or row in good]
        cells = [(r.part, r.check, *_number_and_verdict(r.worst)) for r in shown]
        headings = ("part", "check", "worst deviation", "verdict")
        left = len(rows) - len(shown)
        more = f"({left} more rows are in report.json)\n" if left else ""
        return _table(headings, cells, right=2) + more

    def _table_of_what_is_in_full(self) -> str:
        cells = [(e.operation, percent(e.share), e.line) for e in self.not_partitioned]
        headings = ("computed in full on every replica", "share of the step", "line")
        return _table(headings, cells[:_MOST_ROWS], right=1)

    def to_json(self) -> dict[str, Any]:
        """All numbers, as `report.json` has them."""
        return {
            "ok": self.ok,
            "model": self.model,
            "replicas": self.replicas,
            "tolerance": self.tolerance,
            "verdict": self.verdict,
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "not_partitioned": [dataclasses.asdict(e) for e in self.not_partitioned],
            "set_aside": self.set_aside,
            "deviations": [_deviation_json(d) for d in self.deviations],
        }

    def to_html(self) -> str:
        """A self-contained page: problems, a plot and tables."""
        numbers = ", ".join(map(str, self.replicas))
        return _PAGE.substitute(
            title=html.escape(f"{self.model} on {numbers} replicas"),
            verdict=html.escape(self.verdict),
            state="ok" if self.ok else "bad",
            problems="".join(map(_problem_html, self.problems)),
            set_aside="".join(
                f"<p>{html.escape(_SET_ASIDE + text)}</p>" for text in self.set_aside
            ),
            plot=plot.deviations(self.model, self.deviations, self.tolerance),
            rows="".join(map(_row_html, self.rows)),
            in_full=_in_full_html(self.not_partitioned),
            tracebacks="".join(
                f"<pre>{html.escape(problem.traceback)}</pre>"
                for problem in self.problems
                if problem.traceback
            ),
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `report.json` and `report.html` to a folder, creating it if needed."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        (folder / "report.json").write_text(text + "\n")
        (folder / "report.html").write_text(self.to_html())


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]], right: int) -> str:
    """A table as text; the column `right` holds numbers."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        justify: Any = "right" if index == right else "left"
        table.add_column(heading, overflow="fold", justify=justify)
    for texts in cells:
        table.add_row(*map(rich.text.Text, texts))  # Not parsed as markup.
    text = io.StringIO()
    rich.console.Console(file=text, width=110).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    lines = [line for line in lines if line]
    return "\n".join(lines) + "\n"


def _part_of(deviation: Deviation) -> str:
    """The layer or the optimizer of a variable, or the name of a log."""
    if deviation.check in ("log", "evaluate", "predict"):
        return deviation.label
    return deviation.label.rpartition("/")[0] or deviation.label


def _badness(deviation: Deviation) -> tuple[bool, float]:
    return (not deviation.ok, deviation.value)


def _number_and_verdict(deviation: Deviation) -> tuple[str, str]:
    verdict = "same" if deviation.ok else f"differs on {deviation.replicas}"
    if not deviation.ok and deviation.ratio is not None:
        verdict += f" (× {deviation.ratio:.3g})"
    return _number(deviation.value), verdict


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def _deviation_json(deviation: Deviation) -> dict[str, Any]:
    batch = deviation.batch
    return {
        "replicas": deviation.replicas,
        "check": deviation.check,
        "label": deviation.label,
        "step": deviation.step + 1,
        "batch": None if batch is None else batch.kind,
        "rows": None if batch is None else batch.rows,
        "deviation": deviation.value if math.isfinite(deviation.value) else None,
        "ratio": deviation.ratio,
        "ok": deviation.ok,
    }


def _problem_html(problem: Problem) -> str:
    place = f"<code>{html.escape(problem.place)}</code>" if problem.place else ""
    return (
        f"<section><h3>{html.escape(problem.kind)}</h3>"
        f"<p>{html.escape(problem.message)}</p>{place}</section>"
    )


def _row_html(row: Row) -> str:
    number, verdict = map(html.escape, _number_and_verdict(row.worst))
    state = "ok" if row.worst.ok else "bad"
    part, check = html.escape(row.part), html.escape(row.check)
    return (
        f'<tr class="{state}"><td>{part}</td><td>{check}</td>'
        f"<td class=number>{number}</td><td>{verdict}</td></tr>"
    )


def _in_full_html(entries: Sequence[InFull]) -> str:
    if not entries:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(entry.operation)}</td>"
        f"<td class=number>{percent(entry.share)}</td>"
        f"<td><code>{html.escape(entry.line)}</code></td></tr>"
        for entry in entries
    )
    return (
        "<h2>Computed in full on every replica</h2>"
        "<p>The numbers are right, but more replicas do not speed this up.</p>"
        "<table><thead><tr><th>operation</th><th>share of the step</th><th>line</th>"
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


_PAGE = string.Template(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>distfit verify: $title</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto;
         padding: 0 1em; color: #222; }
  .verdict { padding: .6em 1em; border-left: .4em solid; }
  .verdict.ok { border-color: #2a7; background: #effaf4; }
  .verdict.bad { border-color: #c33; background: #fdf1f0; }
  section { margin: 1em 0; padding-left: 1em; border-left: 2px solid #c33; }
  section h3 { margin: 0; }
  section p { margin: .2em 0; }
  table { border-collapse: collapse; margin-top: 1em; }
  th, td { padding: .15em .8em .15em 0; text-align: left;
           border-bottom: 1px solid #ddd; }
  .number { text-align: right; font-variant-numeric: tabular-nums; }
  tr.bad { color: #b22; }
  pre { overflow-x: auto; font-size: 12px; background: #f6f6f6; padding: 1em; }
</style>
<h1>$title</h1>
<p class="verdict $state">$verdict</p>
$problems
$set_aside
$plot
<table><thead><tr><th>part</th><th>check</th>
<th>worst deviation</th><th>verdict</th></tr></thead>
<tbody>$rows</tbody></table>
$in_full
$tracebacks
</html>
"""
)
