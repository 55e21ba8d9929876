"""The random-weights control: the trained model's claims, tested on the re-initialised model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.jobs import Blocks, Sink, silent
from vesalius.model import Model
from vesalius.protocol import content_hash
from vesalius.studies.summary import claim_row
from vesalius.studies.task_circuit import Study
from vesalius.studies.testing import claims_on as _claims_on


def claims_on(trained: Study, model: Model, folder: Path, sink: Sink = silent) -> list[dict[str, Any]]:
    """Rows (as in a summary's `claims`) of a finished study's claims, tested on another model.

    folder: where the ledger and the finished pieces of this test are kept. [] for a stopped study.
    """
    if trained.family is None or trained.circuit is None:
        return []
    family, draws = trained.family, trained.options.random_sets
    plan = content_hash([family.id, model.content_hash, draws, __version__])
    folder.mkdir(parents=True, exist_ok=True)
    verdicts, evidence = _claims_on(
        family, trained.circuit, trained.question.corruptions, model, folder / "trained-claims.sqlite",
        draws=draws, blocks=Blocks(folder / "trained-claims", plan, sink), seed=trained.options.seed, sink=sink,
    )  # fmt: skip
    rows = zip(family.claims, verdicts, strict=True)
    return [claim_row(claim, verdict, evidence.get(claim.id)) for claim, verdict in rows]
