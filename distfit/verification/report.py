"""The result of `verify`: as a table, as JSON, and as a page with a plot."""

import dataclasses
import html
import io
import json
import math
import os
import pathlib
import string
import traceback
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

from distfit.verification import plot
from distfit.verification.comparison import CHECKS, Deviation
from distfit.verification.diagnosis import Finding

_MOST_ROWS = 60  # of a table on the screen


@dataclasses.dataclass
class Column:
    """One way to run the model on replicas.

    Attributes:
        name: "distfit", or "Keras" for Keras's own `fit`.
        deviations: From one device, within the tolerance or not.
        errors: `(replicas, mode, exception)` for what runs on one device alone.
    """

    name: str
    deviations: list[Deviation] = dataclasses.field(default_factory=list)
    errors: list[tuple[int, str, Exception]] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors and all(d.ok for d in self.deviations)


@dataclasses.dataclass
class Row:
    """A line of the table: a part of the model and a check, the worst of each column.

    Attributes:
        part: A layer, an optimizer, or a log.
        check: One of `comparison.CHECKS`.
        worst: The worst deviation by the name of the column.
    """

    part: str
    check: str
    worst: dict[str, Deviation]

    @property
    def ok(self) -> bool:
        return all(deviation.ok for deviation in self.worst.values())


@dataclasses.dataclass
class Report:
    """What `distfit.verify` found out.

    Attributes:
        model: Name of the model's class.
        replicas: The numbers of replicas that were compared with one device.
        tolerance: The largest deviation that passes.
        columns: The run as a `distfit.Model`; before it, for another `keras.Model`, the
            one by Keras's own `fit`.
        findings: The mistakes; none if the model is right.
    """

    model: str
    replicas: list[int]
    tolerance: float
    columns: list[Column]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether N replicas do what one device does, and nothing else is wrong."""
        return not self.findings and all(column.ok for column in self.columns)

    @property
    def rows(self) -> list[Row]:
        """The table: what was compared, and the worst deviations."""
        rows: dict[tuple[str, str], Row] = {}
        for column in self.columns:
            for deviation in column.deviations:
                key = (_part_of(deviation), deviation.check)
                row = rows.setdefault(key, Row(*key, {}))
                worst = row.worst.get(column.name)
                if worst is None or _badness(deviation) > _badness(worst):
                    row.worst[column.name] = deviation
        return sorted(rows.values(), key=lambda row: CHECKS.index(row.check))

    def __str__(self) -> str:
        parts = [self._table_text()] if self.columns else []
        parts += [str(finding) for finding in self.findings]
        return "\n".join([*parts, self.verdict])

    @property
    def verdict(self) -> str:
        """The result in one line."""
        numbers = ", ".join(map(str, self.replicas))
        if self.ok:
            worst = max(
                (d.value for column in self.columns for d in column.deviations),
                default=0.0,
            )
            return (
                f"OK: {self.model} on {numbers} replicas is what it is on one device "
                f"(worst deviation {worst:.1e}, tolerance {self.tolerance:g})."
            )
        count = len(self.findings)
        mistakes = f"{count} finding{'' if count == 1 else 's'}"
        return f"NOT OK: {self.model} on {numbers} replicas: {mistakes}."

    def _table_text(self) -> str:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        several = len(self.columns) > 1
        for heading in ("part", "check"):
            table.add_column(heading, overflow="fold")
        for column in self.columns:
            name = f"{column.name}: " if several else ""
            table.add_column(f"{name}worst deviation", justify="right")
            table.add_column("verdict")
        rows = self.rows
        shown = rows
        if len(rows) > _MOST_ROWS:  # Whatever differs, and as many of the rest.
            bad = [row for row in rows if not row.ok]
            good = [row for row in rows if row.ok][: max(_MOST_ROWS - len(bad), 0)]
            shown = [row for row in rows if row in bad[:_MOST_ROWS] or row in good]
        for row in shown:
            cells = [_cells(row.worst.get(column.name)) for column in self.columns]
            texts = [row.part, row.check, *(text for pair in cells for text in pair)]
            table.add_row(*map(rich.text.Text, texts))  # No markup, whatever is in it.
        text = io.StringIO()
        rich.console.Console(file=text, width=110).print(table)
        left = len(rows) - len(shown)
        more = f"\n({left} more rows are in report.json)" if left else ""
        lines = [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
        return "\n".join(lines) + more + "\n"

    def to_json(self) -> dict[str, Any]:
        """All numbers, as `report.json` has them."""
        return {
            "ok": self.ok,
            "model": self.model,
            "replicas": self.replicas,
            "tolerance": self.tolerance,
            "verdict": self.verdict,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "columns": [
                {
                    "name": column.name,
                    "ok": column.ok,
                    "errors": [_error_json(*error) for error in column.errors],
                    "deviations": [_deviation_json(d) for d in column.deviations],
                }
                for column in self.columns
            ],
        }

    def to_html(self) -> str:
        """A page that needs no other file: findings, a plot and the table."""
        names = [column.name for column in self.columns]
        return _PAGE.substitute(
            title=html.escape(f"{self.model} on {_and(self.replicas)} replicas"),
            verdict=html.escape(self.verdict),
            state="ok" if self.ok else "bad",
            findings="".join(map(_finding_html, self.findings)),
            plots="".join(
                plot.deviations(column.name, column.deviations, self.tolerance)
                for column in self.columns
            ),
            headings="".join(
                f"<th>{html.escape(name)}: worst deviation</th><th>verdict</th>"
                for name in names
            ),
            rows="".join(_row_html(row, names) for row in self.rows),
            errors="".join(
                f"<pre>{html.escape(_traceback(error))}</pre>"
                for column in self.columns
                for _, _, error in column.errors
            ),
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `report.json` and `report.html` to a folder, made if need be."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        (folder / "report.json").write_text(text + "\n")
        (folder / "report.html").write_text(self.to_html())


def _part_of(deviation: Deviation) -> str:
    """The layer or the optimizer of a variable, or the name of a log."""
    if deviation.check in ("log", "evaluate", "predict"):
        return deviation.label
    return deviation.label.rpartition("/")[0] or deviation.label


def _badness(deviation: Deviation) -> tuple[bool, float]:
    return (not deviation.ok, deviation.value)


def _cells(deviation: Deviation | None) -> tuple[str, str]:
    if deviation is None:
        return "", ""
    verdict = "same" if deviation.ok else f"differs on {deviation.replicas}"
    if not deviation.ok and deviation.ratio is not None:
        verdict += f" (× {deviation.ratio:.3g})"
    return _number(deviation.value), verdict


def _number(value: float) -> str:
    return (
        "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else "not finite"
    )


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


def _error_json(replicas: int, mode: str, error: Exception) -> dict[str, Any]:
    return {
        "replicas": replicas,
        "mode": mode,
        "error": f"{type(error).__name__}: {error}",
        "traceback": _traceback(error),
    }


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _and(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _finding_html(finding: Finding) -> str:
    place = f"<code>{html.escape(finding.place)}</code>" if finding.place else ""
    return (
        f"<section><h3>{html.escape(finding.kind)}</h3>"
        f"<p>{html.escape(finding.message)}</p>"
        f"<p><b>{html.escape(finding.advice)}</b></p>{place}</section>"
    )


def _row_html(row: Row, names: list[str]) -> str:
    cells = [_cells(row.worst.get(name)) for name in names]
    values = "".join(
        f"<td class=number>{html.escape(number)}</td><td>{html.escape(verdict)}</td>"
        for number, verdict in cells
    )
    state = "ok" if row.ok else "bad"
    part, check = html.escape(row.part), html.escape(row.check)
    return f'<tr class="{state}"><td>{part}</td><td>{check}</td>{values}</tr>'


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
$findings
$plots
<table><thead><tr><th>part</th><th>check</th>$headings</tr></thead>
<tbody>$rows</tbody></table>
$errors
</html>
"""
)
