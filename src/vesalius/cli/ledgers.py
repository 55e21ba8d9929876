"""`vesalius ledger show | verify | export`. Needs neither torch nor transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vesalius.cli.screen import output, say
from vesalius.errors import FileFormatError, InputError, TamperedError
from vesalius.jobs.untrusted import UnreadableError, read_json
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
            mark += f", a control on model {family.control_model[:12]}" if family.control_model else ""
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
    outcome = f"[{style}]{verdict.outcome}[/]{escape(reason)}"
    return outcome, escape(claim.statement), estimate, interval, str(verdict.n), f"{_p(verdict):.2g}"


def _p(verdict: Verdict) -> float:
    """Of the outcome; of INCONCLUSIVE that of support, which was not reached."""
    refuted = verdict.outcome in ("REFUTED", "NOT SPECIFIC")
    return verdict.p_refuted_holm if refuted else verdict.p_supported_holm


@app.command()
def verify(
    file: LedgerFile,
    head: Annotated[str, typer.Option(help="The head that a study printed: the ledger must hold that record.")] = "",
) -> None:
    """Recompute every hash and every verdict from the evidence, and compare them with the head and with the
    summary.json beside the ledger; exit code 2 when anything does not match."""
    with _open(file) as ledger:
        found = ledger.verify(head=head)
        compared = compare_summary(ledger, file)
    if not found.records:
        raise FileFormatError(
            f"{file} holds no records: nothing was ever written to it, or it was copied without the {file.name}-wal "
            "beside it"
        )
    order = [*STYLES, *sorted(set(found.outcomes) - set(STYLES))]
    verdicts = ", ".join(f"{found.outcomes[one]} {one}" for one in order if found.outcomes.get(one)) or "none"
    say(f"{file}: all {found.records} records are as they were written, in order, and follow the protocol.")
    say(f"{found.claims} claims, {found.evidence} with evidence; data was opened {found.openings} times.")
    say(f"Verdicts: {verdicts}.")
    if found.earlier_rules:
        say(f"{found.earlier_rules} of {found.families} families were sealed by an earlier version, with weaker rules.")
    if head:
        after = "it is the last" if not found.after else f"{found.after} were written after it"
        say(f"The record with the given head is there; {after}.")
    if compared:
        say(f"{compared} says the same.")
    say(f"Head (hash of the last record): {found.head}")


def compare_summary(ledger: Ledger, file: Path) -> str:
    """The name of the summary beside a ledger, if there is one of this ledger and it says what the ledger says; or "".

    Raises TamperedError naming the claim, or the head, that differ.
    """
    beside = file.with_name("summary.json")
    if not beside.is_file():
        return ""
    try:
        summary = read_json(beside)
    except UnreadableError as error:
        raise FileFormatError(f"{beside} cannot be read: {error}") from error
    named = _at(summary, "reproduce", "ledger")
    if named != file.name:
        return ""
    head = str(_at(summary, "timings", "ledger_head") or "")
    if head:
        try:
            ledger.verify(head=head)
        except (TamperedError, InputError) as error:
            raise TamperedError(f"{beside} was written from another ledger: {error}") from error
    verdicts = {v.claim_id: v for family in ledger.families() for v in ledger.verdicts(family)}
    rows = _at(summary, "claims")
    for row in rows if isinstance(rows, list) else []:
        verdict = verdicts.get(str(_at(row, "id")))
        said = {name: _at(row, name) for name in SAID}
        if verdict is None or not _same(said, _said(verdict)):
            raise TamperedError(
                f"{beside} says of claim {str(_at(row, 'id'))[:12]}: {_in_words(said)}; the ledger says: "
                f"{'nothing' if verdict is None else _in_words(_said(verdict))}"
            )
    return beside.name


SAID = ("verdict", "reason", "estimate", "low", "high", "n", "p_holm")
"""What a summary's row says of a claim that the ledger says as well."""


def _said(verdict: Verdict) -> dict[str, Any]:
    """The same of a verdict."""
    return {"verdict": verdict.outcome, "p_holm": _p(verdict), **{name: getattr(verdict, name) for name in SAID[1:-1]}}


def _same(said: dict[str, Any], found: dict[str, Any]) -> bool:
    """Alike, but for rounding: another machine computes the last digits differently."""
    return all(said[name] == value or _close(said[name], value) for name, value in found.items())


def _close(said: Any, value: Any) -> bool:
    numbers = isinstance(value, float) and isinstance(said, int | float)
    return numbers and math.isclose(said, value, rel_tol=1e-6, abs_tol=1e-12)


def _in_words(said: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in said.items())


def _at(data: Any, *names: str) -> Any:
    """What stands under these names, or None."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data


@app.command()
def export(file: LedgerFile, to: Annotated[Path, typer.Argument(help="JSON file to write.")]) -> None:
    """All records and verdicts as JSON."""
    if to.exists() and file.exists() and to.samefile(file):
        raise InputError(f"{to} is the ledger itself and would be overwritten; give another file to export to")
    with _open(file) as ledger:
        say(str(ledger.export(to)))
