"""What came out of explaining parts: one card for each, which notebooks and pages show alike, and the summary."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.metadata import version
from typing import Any

from vesalius import __version__
from vesalius.describe import Description, PartExamples
from vesalius.describe.example import Example
from vesalius.describe.output import Promoted, promoted_tokens
from vesalius.errors import UnknownNameError
from vesalius.parts import Part
from vesalius.protocol import Claim, Verdict
from vesalius.quantities.rules import in_words
from vesalius.studies.explain import EXAMPLES, TESTED_PARTS, by_subject, outcome_of
from vesalius.studies.explaining import Explaining
from vesalius.studies.study import Study
from vesalius.studies.summary import short_row
from vesalius.studies.task_circuit import DESCRIPTIONS, FAMILY

SCHEMA = "vesalius/explain/1"
NO_RULE, NEVER = "no rule holds", "never fires on these texts"


@dataclass(frozen=True, eq=False)
class Explained:
    """One part: what makes it fire, what is said of it, and how that stood the test.

    claims: rows as in the summary. verdict: SUPPORTED when all claims are, else the worst; None without any. counter:
    tokens that break its rule on the documents for validation, see `describe.counterexamples`; {} without a rule.
    """

    part: Part
    examples: PartExamples
    description: Description | None
    claims: tuple[Mapping[str, Any], ...]
    verdict: str | None
    counter: Mapping[str, Any]
    output: Promoted

    @property
    def name(self) -> str:
        return str(self.part)

    @property
    def sentence(self) -> str:
        """The description with the figures of discovery, or why there is none."""
        if self.description is not None:
            return self.description.sentence
        return NO_RULE if self.examples.top else NEVER

    def _repr_html_(self) -> str:
        verdict = f"<p><b class='verdict'>{self.verdict}</b></p>" if self.verdict else ""
        against = _against(self.counter, self.examples.top[0].value if self.examples.top else 0.0)
        sections = [
            f"<p class='sentence'>{escape(self.sentence)}</p>{verdict}{_claims(self.claims)}",
            f"<h3>Counterexamples</h3>{against}" if against else "",
            f"<h3>Tokens that it promotes and suppresses</h3>{self.output._repr_html_()}",
            self.examples._repr_html_(),
        ]
        return "".join(f"<div class='card'>{section}</div>" for section in sections if section)


def _claims(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was claimed and measured, with the legs of each verdict."""
    if not rows:
        return ""
    heads = "".join(f"<th>{name}</th>" for name in ("claim", "verdict", "estimate", "95 % interval", "n", "legs"))
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(cell)}</td>"
            for cell in (
                row["statement"],
                row["verdict"] + _why(row),
                "" if row["estimate"] is None else f"{row['estimate']:+.3g} {row['unit']}",
                "" if row["interval"] is None else f"{row['interval'][0]:+.3g} to {row['interval'][1]:+.3g}",
                f"{row['n']} texts of {row['n_groups']} documents",
                "; ".join(f"{leg['name']}: {leg['theta']:+.3g} past its margin" for leg in row["legs"]),
            )
        )
        + "</tr>"
        for row in rows
    )
    control = next((row["control"] for row in rows if row["control"]), None)
    compared = f"<p class='small'>Control: {escape(control)}.</p>" if control else ""
    return f"<div class='scroll'><table><tr>{heads}</tr>{lines}</table></div>{compared}"


def _why(row: Mapping[str, Any]) -> str:
    """Why a claim was not supported, or how many texts would decide."""
    if row["n_to_decide"]:
        return f": about {row['n_to_decide']:,} such texts would decide"
    return f" ({row['reason']})" if row["reason"] else ""


def _against(counter: Mapping[str, Any], top: float) -> str:
    """Where the rule is wrong, on the documents for validation."""
    if not counter:
        return ""
    picked, fires, both = counter["picked"], counter["fires"], counter["both"]
    right = f"{both / picked:.0%} of the {picked:,} tokens that the rule picks" if picked else "(the rule picks none)"
    found = f"{both / fires:.0%} of the {fires:,} tokens that it fires on" if fires else "(it never fires there)"
    said = f"<p>On {counter['tokens']:,} fresh tokens it fires on {right}, and the rule picks {found}.</p>"
    as_good = [escape(one["words"]) for one in counter.get("rivals", ()) if not one["told_apart"]]
    said += f"<p>As good on these texts, and not to be told apart: {'; '.join(as_good)}.</p>" if as_good else ""
    kinds = (("picked by the rule, and silent", "silent"), ("fires, and the rule does not pick it", "unexplained"))
    return said + "".join(
        f"<h4>{words}</h4>{''.join(Example(**one).html(top) for one in counter[kind])}"
        for words, kind in kinds
        if counter[kind]
    )


@dataclass(frozen=True, eq=False)
class Explanations(Sequence[Explained]):
    """The parts of a finished study: `explanations[3]` or `explanations["layers.2.mlp_post[90]"]` is one of them."""

    study: Study

    @property
    def asked(self) -> Explaining:
        asked: Explaining = self.study.question
        return asked

    def __len__(self) -> int:
        return len(self.asked.parts)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self._of(number) for number in range(len(self))[which]]
        if isinstance(which, int):
            return self._of(range(len(self))[which])
        if str(which) not in self._numbers:
            raise UnknownNameError("part", str(which), list(self._numbers)[:20])
        return self._of(self._numbers[str(which)])

    def __iter__(self) -> Iterator[Explained]:
        return map(self._of, range(len(self)))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {str(part): number for number, part in enumerate(self.asked.parts)}

    @cached_property
    def _output(self) -> list[Promoted]:
        return promoted_tokens(self.study.model, self.asked.parts)

    @cached_property
    def _claimed(self) -> dict[str, list[tuple[Claim, Verdict]]]:
        claims = self.study.claims
        return by_subject(claims, zip(claims, self.study.verdicts, strict=True))

    def _of(self, number: int) -> Explained:
        part, study = self.asked.parts[number], self.study
        tested, claimed = study.get(TESTED_PARTS), self._claimed.get(str(part), [])
        evidence = {} if tested is None else tested.evidence
        estimates = study[DESCRIPTIONS].estimates
        rows = [
            {
                **short_row(claim, verdict, evidence.get(claim.id), estimates.get(claim.id)),
                "legs": [{"name": leg["name"], "theta": leg["theta"], "p": leg["p_greater"]} for leg in verdict.legs],
            }
            for claim, verdict in claimed
        ]
        return Explained(
            part=part,
            examples=study[EXAMPLES][number],
            description=study[DESCRIPTIONS].fits[str(part)] if rows else None,
            claims=tuple(rows),
            verdict=outcome_of([verdict for _, verdict in claimed]),
            counter={} if tested is None else tested.counter.get(str(part), {}),
            output=self._output[number],
        )

    def _repr_html_(self) -> str:
        return self.study._repr_html_()


def summarise_explained(
    found: Explanations, *, command: str, timings: Mapping[str, Any], pages: Sequence[str] = ()
) -> dict[str, Any]:
    """The summary as a dict (schema: docs/explain-schema.md). pages: of each part, relative to the index."""
    study, asked = found.study, found.asked
    rows = [_row(one, page) for one, page in zip(found, pages or [""] * len(found), strict=True)]
    outcomes = [row["verdict"] for row in rows]
    return {
        "schema": SCHEMA,
        "model": {"name": study.model.name, "hash": study.model.content_hash, "note": study.model.note},
        "baseline": asked.baseline,
        "dictionary": dict(asked.about) or None,
        "texts": asked.halves.read(asked.context),
        "seed": asked.seed,
        "stopped": study.stopped,
        "answer": list(study.answer),
        "counts": {
            "parts": len(rows),
            "described": sum(outcome is not None for outcome in outcomes),
            "never_fired": sum(not one["fires"] for one in rows),
            **{
                name.lower().replace(" ", "_"): outcomes.count(name)
                for name in ("SUPPORTED", "REFUTED", "NOT SPECIFIC", "INCONCLUSIVE")
            },
        },
        "parts": rows,
        "family": {"id": study[FAMILY].id, "m": study[FAMILY].m} if FAMILY in study else None,
        "timings": {"sealed_at": study.sealed_at, "ledger_head": study.ledger_head or None, **timings},
        "reproduce": {
            "command": command,
            "version": __version__,
            "python": platform.python_version(),
            "torch": version("torch").split("+")[0],
            "transformers": version("transformers"),
            "ledger": "ledger.sqlite" if FAMILY in study else None,
        },
    }


def _row(one: Explained, page: str) -> dict[str, Any]:
    counter = {key: value for key, value in one.counter.items() if isinstance(value, int)}
    return {
        "part": one.name,
        "page": page,
        "kind": str(one.part.ref["kind"]),
        "density": one.examples.density,
        "threshold": one.examples.threshold,
        "fires": bool(one.examples.top),
        "sentence": one.sentence,
        "label": None if one.description is None else one.description.label,
        "score": None if one.description is None else one.description.score,
        "verdict": one.verdict,
        "claims": [dict(row) for row in one.claims],
        "rule_on_validation": counter or None,
        "rivals": [rival["words"] for rival in one.counter.get("rivals", ()) if not rival["told_apart"]],
        "given_up": [] if one.description is None else [in_words(was["rule"]) for was in one.description.history],
        "promoted": [{"token": token, "effect": effect} for token, effect in one.output.promoted],
        "suppressed": [{"token": token, "effect": effect} for token, effect in one.output.suppressed],
    }
