"""Small pieces of HTML for notebooks: all text escaped, and styled inline because a notebook lacks our style sheet."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from vesalius.errors import InputError, UnknownNameError
from vesalius.report.words import VERDICTS, number

_COLOURS = {"SUPPORTED": "#0b6b58", "REFUTED": "#a8321a", "NOT SPECIFIC": "#6b4aa8", "INCONCLUSIVE": "#6a6456"}
_CELL = "padding:2px 12px 2px 0;text-align:{};vertical-align:top"


def table(rows: Sequence[Mapping[str, Any]], *, caption: str = "") -> str:
    """An HTML table of rows with the same keys, which become its header; numbers are rounded and set to the right.

    Raises InputError when a row has other keys than the first.
    """
    # By the first row's keys: a column that only later rows have would be a table that lies about the first.
    names = list(rows[0]) if rows else []
    for index, row in enumerate(rows):
        if list(row) != names:
            raise InputError(f"row {index} has the keys {list(row)}; the first row has {names}")
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    head = "".join(f'<th scope="col" style="{_CELL.format("left")}">{html.escape(str(name))}</th>' for name in names)
    body = "".join(f"<tr>{''.join(_cell(row[name]) for name in names)}</tr>" for row in rows)
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def verdict(outcome: str) -> str:
    """A verdict as a coloured word with its sign. Raises UnknownNameError for anything but the four outcomes."""
    if outcome not in VERDICTS:
        raise UnknownNameError("verdict", outcome, VERDICTS)
    word, sign = VERDICTS[outcome]
    return f'<span style="color:{_COLOURS[outcome]};font-weight:600">{sign} {word}</span>'


def _cell(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    shown = f"{value:,}" if isinstance(value, int) and is_number else number(value) if is_number else str(value)
    return f'<td style="{_CELL.format("right" if is_number else "left")}">{html.escape(shown)}</td>'
