"""`vesalius ledger show | verify | export`. Needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vesalius.cli.screen import output, say
from vesalius.errors import InputError
from vesalius.protocol import Claim, Verdict
from vesalius.protocol.ledger import Ledger

app = typer.Typer(no_args_is_help=True, help="Read a ledger of claims and evidence, and check that it is unaltered.")
LedgerFile = Annotated[Path, typer.Argument(help="A ledger.sqlite file.")]
STYLES = {"SUPPORTED": "green", "REFUTED": "red", "NOT SPECIFIC": "magenta", "INCONCLUSIVE": "yellow"}
"""Outcomes of a verdict in the order in which they are counted, with the colour of each."""


def _open(file: Path) -> Ledger:
    return Ledger(file, create=False)


@app.command()
def show(file: LedgerFile) -> None:
    """Every claim with its verdict, computed now from the evidence."""
    with _open(file) as ledger:
        for family in ledger.families():
            name = escape(family.study or "claims")
            mark = ", exploratory" if family.exploratory else ""
            title = f"{name}: family {family.id[:12]}, {family.m} claims{mark}"
            table = Table(title=title, title_justify="left")
            table.add_column("verdict", no_wrap=True)
            table.add_column("claim")
            for heading in ("estimate", "95 % interval", "n", "p (Holm)"):
                table.add_column(heading, justify="right", no_wrap=True)
            for claim, verdict in zip(family.claims, ledger.verdicts(family), strict=True):
                table.add_row(*_cells(claim, verdict))
            output.print(table)


def _cells(claim: Claim, verdict: Verdict) -> tuple[str, ...]:
    style = STYLES.get(verdict.outcome, "bold")
    # On a line of its own: the column is then as wide as the outcome alone.
    reason = f"\n{verdict.reason.replace('_', ' ')}" if verdict.reason else ""
    estimate = "-" if verdict.estimate is None else f"{verdict.estimate:.3g}"
    interval = "-" if verdict.low is None or verdict.high is None else f"{verdict.low:.3g} to {verdict.high:.3g}"
    # The p of the outcome; of INCONCLUSIVE that of support, which was not reached.
    refuted = verdict.outcome in ("REFUTED", "NOT SPECIFIC")
    p = verdict.p_refuted_holm if refuted else verdict.p_supported_holm
    outcome = f"[{style}]{verdict.outcome}[/]{escape(reason)}"
    return outcome, escape(claim.statement), estimate, interval, str(verdict.n), f"{p:.2g}"


@app.command()
def verify(file: LedgerFile) -> None:
    """Recompute every hash and every verdict from the evidence; exit code 2 when anything does not match."""
    with _open(file) as ledger:
        found = ledger.verify()
    order = [*STYLES, *sorted(set(found.outcomes) - set(STYLES))]
    verdicts = ", ".join(f"{found.outcomes[one]} {one}" for one in order if found.outcomes.get(one)) or "none"
    say(f"{file}: all {found.records} records are as they were written, in order, and follow the protocol.")
    say(f"{found.claims} claims, {found.evidence} with evidence; data was opened {found.openings} times.")
    say(f"Verdicts: {verdicts}.")
    say(f"Hash of the last record: {found.head}")


@app.command()
def export(file: LedgerFile, to: Annotated[Path, typer.Argument(help="JSON file to write.")]) -> None:
    """All records and verdicts as JSON."""
    if to.exists() and file.exists() and to.samefile(file):
        raise InputError(f"{to} is the ledger itself and would be overwritten; give another file to export to")
    with _open(file) as ledger:
        say(str(ledger.export(to)))
