"""`vesalius calibrate`: false positives and power of each validator."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path

from rich.table import Table

import vesalius as vs
from vesalius.cli import checks
from vesalius.cli.screen import Screen, bars, output
from vesalius.jobs import write_atomic


def run(*, seeds: int, quick: bool, json: Path | None, device: str | None) -> None:
    """Measure, print a row per validator and per kind of simulated data, and write the figures as JSON if asked."""
    checks.device(device)
    with bars() as progress:
        where = checks.chosen_device(device)
        found = vs.studies.calibrate(seeds=seeds, quick=quick, sink=Screen(progress), device=where)
    data = found.to_json()
    if json is not None:
        write_atomic(json, jsonlib.dumps(data, indent=2) + "\n")
    table = Table(title="Calibration", title_justify="left")
    for heading in ("name", "false_positive_rate", "upper_bound", "power", "n"):
        table.add_column(heading)
    for row in data["validators"]:
        table.add_row(*(str(row[key]) for key in ("name", "false_positive_rate", "upper_bound", "power", "n")))
    output.print(table)
    at_delta = Table(title="Simulated families, effects exactly at the threshold", title_justify="left")
    for heading in ("data", "claims", *(found.simulated[0].rates if found.simulated else ())):
        at_delta.add_column(heading)
    for row in found.simulated:
        at_delta.add_row(row.data, str(row.m), *map(str, row.rates.values()))
    output.print(at_delta)
    units = Table(title="Units planted in text, one claim each", title_justify="left")
    for heading in ("quantity", "supported", "upper bound", "refuted", "inconclusive"):
        units.add_column(heading)
    for number, unit in enumerate(found.units):
        if number == 0 or unit.setting != found.units[number - 1].setting:
            units.add_section()
            units.add_row(f"[bold]{unit.setting}[/]")
        shares = (unit.supported.share, unit.supported.upper, unit.refuted.share, unit.inconclusive.share)
        units.add_row(unit.quantity, *(f"{share:.3f}" for share in shares))
    output.print(units)
