"""`vesalius ledger show | verify | export`. Needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vesalius.cli.screen import output, say
from vesalius.ledger import Ledger

app = typer.Typer(no_args_is_help=True, help="Look into a ledger of claims and evidence.")
LedgerFile = Annotated[Path, typer.Argument(help="A ledger.sqlite file.")]
STYLES = {"SUPPORTED": "green", "REFUTED": "red", "INCONCLUSIVE": "yellow"}


@app.command()
def show(file: LedgerFile) -> None:
    """Every claim with its verdict, computed now from the evidence."""
    with Ledger(file, create=False) as ledger:
        for family in ledger.families():
            table = Table(
                title=f"{family.study or 'claims'}: family {family.id[:12]}, {family.m} claims", title_justify="left"
            )
            for heading in ("verdict", "claim", "estimate", "95 % interval", "n", "p (Holm)"):
                table.add_column(heading)
            for claim, verdict in zip(family.claims, ledger.verdicts(family), strict=True):
                style = STYLES[verdict.outcome]
                numbers = (
                    ["-"] * 2
                    if verdict.estimate is None
                    else [f"{verdict.estimate:.3g}", _interval(verdict.low, verdict.high)]
                )
                p = verdict.p_refuted_holm if verdict.outcome == "REFUTED" else verdict.p_supported_holm
                reason = f" ({verdict.reason})" if verdict.reason else ""
                table.add_row(
                    f"[{style}]{verdict.outcome}{reason}[/]", claim.statement, *numbers, str(verdict.n), f"{p:.2g}"
                )
            output.print(table)


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3g} to {high:.3g}"


@app.command()
def verify(file: LedgerFile) -> None:
    """Recompute every hash and every verdict from the evidence; exit code 2 when anything does not match."""
    with Ledger(file, create=False) as ledger:
        say(str(ledger.verify()))


@app.command()
def export(file: LedgerFile, to: Annotated[Path, typer.Argument(help="JSON file to write.")]) -> None:
    """All records and verdicts as JSON."""
    with Ledger(file, create=False) as ledger:
        say(str(ledger.export(to)))
