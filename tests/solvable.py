"""Tasks that a random model does, because their answers are what it says; and small studies of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tiny
import vesalius as vs
from vesalius.jobs import Sink, silent
from vesalius.studies import Options, Question, Study, run_study, summarise
from vesalius.toys import planted_induction, planted_pairs

OPTIONS = Options(random_sets=5, check=False)
TIMINGS = {"steps": [], "seconds": 1.0, "peak_memory_bytes": 1, "created_at": "now", "sealed_at": None}


def solved(model: vs.Model, pairs: vs.Pairs, wrong: Collection[int] = ()) -> vs.Pairs:
    """The same prompts; the answer is the model's favourite token, but its least likely one in the rows `wrong`."""
    last = model.run(pairs.tokens("clean")).logits[torch.arange(len(pairs)), pairs.at]
    best, worst = last.argmax(1), last.argmin(1)
    swap = torch.tensor([row in wrong for row in range(len(pairs))])
    return replace(pairs, answer=torch.where(swap, worst, best), distractor=torch.where(swap, best, worst))


def random_pairs(n: int = 32, templates: int = 8, corruption: str = "corrupted") -> vs.Pairs:
    """Random prompts in both splits, with templates and names that the splits do not share."""
    pairs = tiny.pairs(n=n)
    half = templates // 2
    number = [row % half + (row >= n // 2) * half for row in range(n)]
    return replace(
        pairs,
        groups={"template": tuple(f"t{t}" for t in number), "names": tuple(f"a{row}|b{row}" for row in range(n))},
        splits=tuple("discovery" if row < n // 2 else "validation" for row in range(n)),
        corruption=corruption,
    )


def random_question(model: vs.Model, wrong: Collection[int] = (), n: int = 32) -> Question:
    """A task of one corruption that a random model does, but for the rows `wrong`."""
    return Question("random", "What does it say?", {"corrupted": solved(model, random_pairs(n), wrong)})


def planted() -> tuple[Question, vs.Model]:
    """The planted network and its task, both corruptions."""
    return Question("planted", "Which token followed?", planted_pairs(36)), planted_induction(0)


def summary_of(study: Study, **changes: Any) -> dict[str, Any]:
    """Its summary, with timings that do not change."""
    return summarise(study, command="vesalius study", timings=TIMINGS, **changes)


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what differs between two runs with one seed."""
    return {name: value for name, value in json.loads(json.dumps(summary)).items() if name != "timings"}


def small_study(out: Path | None, sink: Sink = silent, **changes: Any) -> Study:
    """A study of the planted network; changes: of its options."""
    question, model = planted()
    return run_study(question, model, out=out, options=replace(OPTIONS, **changes), sink=sink)
