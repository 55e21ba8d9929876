"""What the records of a ledger add up to. Nothing here touches a file.

The state is a replay of the records, so that `verify` can judge every step again as it was judged when it was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vesalius.errors import InputError, ProtocolError, TamperedError, VesaliusError
from vesalius.protocol import Claim, Evidence, Family
from vesalius.protocol.store import GENESIS, Record


@dataclass(frozen=True)
class Data:
    """What the ledger knows of a data set or split: its hash, its examples and the groups they are in."""

    data_hash: str
    root: str
    split: str
    example_hashes: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "example_hashes", tuple(map(str, self.example_hashes)))
        object.__setattr__(self, "groups", {str(k): tuple(map(str, v)) for k, v in self.groups.items()})
        for kind, labels in self.groups.items():
            if len(labels) != len(self.example_hashes):
                raise InputError(f"{len(labels)} labels of {kind!r} for {len(self.example_hashes)} examples")

    @property
    def examples(self) -> frozenset[str]:
        return frozenset(self.example_hashes)


@dataclass(frozen=True)
class Opening:
    """One time a split was handed out."""

    seq: int
    split: str
    data_hash: str
    root: str
    at: str


@dataclass
class State:
    """Everything that the records say so far."""

    last: Record | None = None
    families: dict[str, Family] = field(default_factory=dict)
    sealed_at: dict[str, int] = field(default_factory=dict)
    rules: dict[str, int] = field(default_factory=dict)
    """Family -> the version of the rules that it was sealed under, by which all of its evidence is judged."""
    family_of: dict[str, str] = field(default_factory=dict)
    data: dict[str, Data] = field(default_factory=dict)
    openings: list[Opening] = field(default_factory=list)
    evidence: dict[str, list[Evidence]] = field(default_factory=dict)
    replications: dict[str, list[Evidence]] = field(default_factory=dict)

    def family(self, claim_id: str) -> Family:
        """The family of a claim. Raises ProtocolError for a claim that was never registered."""
        if claim_id not in self.family_of:
            raise ProtocolError(f"claim {claim_id[:12]} is not registered; register its family before measuring it")
        return self.families[self.family_of[claim_id]]

    def claim(self, claim_id: str) -> Claim:
        return next(claim for claim in self.family(claim_id).claims if claim.id == claim_id)

    def primary(self, claim_id: str) -> Evidence | None:
        """The one evidence that a verdict rests on: the measured one, else the latest unmeasured."""
        stored = self.evidence.get(claim_id, [])
        return next((e for e in stored if e.measured), stored[-1] if stored else None)

    def examples(self, hashes: Iterable[str]) -> frozenset[str]:
        """All examples of these data, as far as they are known."""
        return frozenset().union(*(self.data[h].examples for h in hashes if h in self.data))

    def world(self, parents: Iterable[str]) -> frozenset[str]:
        """All examples of the data sets that the parents, or other versions of their examples, belong to."""
        seen = self.examples(parents)
        roots = {data.root for data in self.data.values() if data.examples & seen}
        return frozenset().union(*(data.examples for data in self.data.values() if data.root in roots))

    def add(self, record: Record) -> None:
        """Takes up the next record. Raises TamperedError for one that is not what was written."""
        record.check(self.last.hash if self.last else GENESIS)
        try:
            identity = _TAKE[record.kind](self, record)
        except (VesaliusError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise TamperedError(
                f"record {record.seq} ({record.kind} {record.id[:12]}) cannot be read: {error}"
            ) from error
        if identity != record.id:
            raise TamperedError(f"record {record.seq} ({record.kind}) holds {str(identity)[:12]}, not {record.id[:12]}")
        self.last = record


def data_rows(data: Data, examples: Sequence[str]) -> list[int]:
    """Rows of `data` that are among the examples."""
    wanted = set(examples)
    return [row for row, example in enumerate(data.example_hashes) if example in wanted]


def entities(labels: Iterable[str]) -> set[str]:
    """Single names: "Mary|John" is two."""
    return {name for label in labels for name in label.split("|")}


def _take_family(state: State, record: Record) -> str:
    family = Family.from_json(record.data["family"])
    state.families[family.id] = family
    state.sealed_at[family.id] = record.seq
    state.rules[family.id] = record.data.get("rules", 1)
    state.family_of |= {claim.id: family.id for claim in family.claims}
    return family.id


def _take_data(state: State, record: Record) -> str:
    data = Data(**record.data)
    state.data[data.data_hash] = data
    return data.data_hash


def _take_opening(state: State, record: Record) -> str:
    opening = Opening(seq=record.seq, **record.data)
    if opening.data_hash not in state.data:
        raise ProtocolError(f"data {opening.data_hash[:12]} were opened without being noted")
    state.openings.append(opening)
    return opening.data_hash


def _take_evidence(state: State, record: Record) -> str:
    evidence = Evidence.from_json(record.data)
    kept = state.replications if record.kind == "replication" else state.evidence
    kept.setdefault(evidence.claim_id, []).append(evidence)
    return evidence.id


_TAKE: dict[str, Callable[[State, Record], Any]] = {
    "family": _take_family,
    "data": _take_data,
    "opening": _take_opening,
    "evidence": _take_evidence,
    "replication": _take_evidence,
}
