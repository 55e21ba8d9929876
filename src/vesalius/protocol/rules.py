"""What the records add up to, and which steps the protocol of a claim forbids. Nothing here touches a file.

The state is a replay of the records, so that `verify` can judge every step again as it was judged when it was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vesalius.errors import InputError, ProtocolError, TamperedError, VesaliusError
from vesalius.protocol import Claim, Evidence, Family
from vesalius.protocol.store import GENESIS, Record
from vesalius.protocol.verdict import check_legs


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


def judge(state: State, record: Record) -> None:
    """Raises ProtocolError when the next record is a step that the protocol forbids."""
    if record.kind == "family":
        family = Family.from_json(record.data["family"])
        if check_family(state, family.claims, family.study).exploratory != family.exploratory:
            raise ProtocolError("the family's exploratory mark is not what the openings before it say")
    elif record.kind in ("evidence", "replication"):
        check_evidence(state, Evidence.from_json(record.data), record.kind == "replication")


def check_family(state: State, claims: Iterable[Claim], study: str) -> Family:
    """The family as it would be sealed now. Raises ProtocolError for claims or a study that are sealed already."""
    claims = tuple(claims)
    family = Family(claims=claims, study=study, exploratory=_is_exploratory(state, claims))
    for claim in claims:
        if claim.id in state.family_of:
            raise ProtocolError(
                f"claim {claim.id[:12]} is already sealed in family {state.family_of[claim.id][:12]}; "
                "a claim is tested, and counted, in one family only"
            )
    before = [f for f in state.families.values() if f.study == study]
    if study and before and not family.exploratory:
        raise ProtocolError(
            f"the family of study {study!r} is sealed with {before[0].m} claims; all claims of a study are registered "
            "together, since their number is what the p-values are corrected for"
        )
    return family


def check_evidence(state: State, evidence: Evidence, replication: bool) -> None:
    """Raises ProtocolError when this evidence may not be appended now."""
    claim, family = state.claim(evidence.claim_id), state.family(evidence.claim_id)
    _check_order(state, claim, evidence, replication)
    if evidence.measured:
        _check_source(state, claim, evidence)
        _check_parents(state, claim, evidence)
        _check_earlier(state, claim, family, evidence)
        check_legs(claim, evidence, family.m)


def _check_order(state: State, claim: Claim, evidence: Evidence, replication: bool) -> None:
    earlier = state.evidence.get(claim.id, [])
    decided = any(e.measured for e in earlier)
    if replication and not (decided and evidence.measured):
        raise ProtocolError(f"claim {claim.id[:12]}: a replication is measured, and follows measured primary evidence")
    if decided and not replication:
        raise ProtocolError(
            f"claim {claim.id[:12]} has its primary evidence, and there is only one; append with replication=True to "
            "keep this beside it (the verdict stays)"
        )
    if earlier and not replication and evidence.plan_hash != earlier[0].plan_hash:
        raise ProtocolError(
            f"claim {claim.id[:12]} was unmeasured under plan {earlier[0].plan_hash[:12] or '(none)'}; a retry must "
            f"keep that plan, but this is plan {evidence.plan_hash[:12] or '(none)'}"
        )


def _check_source(state: State, claim: Claim, evidence: Evidence) -> None:
    name = f"evidence for claim {claim.id[:12]}"
    if evidence.data_hash not in {opening.data_hash for opening in state.openings}:
        raise ProtocolError(
            f"{name} was measured on data {evidence.data_hash[:12] or '(none)'}, which this ledger never opened; "
            "take the split from ledger.open(pairs, split)"
        )
    data = state.data[evidence.data_hash]
    foreign = [h for h in evidence.example_hashes if h not in data.examples]
    if foreign:
        raise ProtocolError(f"{name}: example {foreign[0][:12]} is not in the opened split {data.split!r}")
    for kind, labels in data.groups.items():
        allowed = set(zip(data.example_hashes, labels, strict=True))
        given = evidence.groups.get(kind)
        if given is None or any(pair not in allowed for pair in zip(evidence.example_hashes, given, strict=True)):
            raise ProtocolError(f"{name}: its {kind!r} groups are missing or not the opened split's; pass them on")


def _check_parents(state: State, claim: Claim, evidence: Evidence) -> None:
    for parent in claim.parents:
        if parent == evidence.data_hash:
            raise ProtocolError(f"claim {claim.id[:12]} was made from data {parent[:12]}; test it on data it never saw")
        if parent not in state.data:
            raise ProtocolError(
                f"claim {claim.id[:12]} was made from data {parent[:12]}, of which this ledger knows nothing, so "
                "overlap cannot be checked; open that split through the ledger too"
            )
        _refuse_overlap(state, claim, evidence, state.data[parent], "which the claim was made from")


def _check_earlier(state: State, claim: Claim, family: Family, evidence: Evidence) -> None:
    """What was open before the claim was sealed may have shaped it."""
    world = _world(state, claim.parents)
    for opening in state.openings:
        data = state.data[opening.data_hash]
        if opening.seq > state.sealed_at[family.id] or data.data_hash in claim.parents:
            continue
        related = not claim.parents or bool(data.examples & world)
        why = "which was opened before the claim was registered"
        if not claim.parents:
            why += " (the claim names no parents, so it may come from anything opened before)"
        _refuse_overlap(state, claim, evidence, data, why, by_group=related)


def _refuse_overlap(
    state: State, claim: Claim, evidence: Evidence, other: Data, why: str, by_group: bool = True
) -> None:
    name = f"evidence for claim {claim.id[:12]}"
    shared = data_rows(other, evidence.example_hashes)
    if shared:
        example = other.example_hashes[shared[0]][:12]
        raise ProtocolError(f"{name}: {len(shared)} example(s), first {example}, are in split {other.split!r}, {why}")
    for kind in sorted(other.groups) if by_group else ():
        common = _entities(other.groups[kind]) & _groups_of(state, evidence, kind)
        if common:
            listed = ", ".join(sorted(common)[:5])
            raise ProtocolError(
                f"{name} shares {len(common)} {kind!r} group(s) ({listed}) with split {other.split!r}, {why}; new "
                "examples of old groups are not fresh data (of a kind that splits share on purpose, such as an order, "
                "take pairs.sampled_groups())"
            )


def data_rows(data: Data, examples: Sequence[str]) -> list[int]:
    """Rows of `data` that are among the examples."""
    wanted = set(examples)
    return [row for row, example in enumerate(data.example_hashes) if example in wanted]


def _groups_of(state: State, evidence: Evidence, kind: str) -> set[str]:
    """Groups of this kind that the evidence touches, by its own labels and by those of the opened data."""
    data = state.data[evidence.data_hash]
    labels = data.groups.get(kind, ())
    known = [labels[row] for row in data_rows(data, evidence.example_hashes)] if labels else []
    return _entities([*evidence.groups.get(kind, ()), *known])


def _entities(labels: Iterable[str]) -> set[str]:
    """Single names: "Mary|John" is two."""
    return {name for label in labels for name in label.split("|")}


def _is_exploratory(state: State, claims: Sequence[Claim]) -> bool:
    """Whether data of these claims, beyond what they were made from, had been opened."""
    parents = {parent for claim in claims for parent in claim.parents}
    seen = _examples(state, parents)
    world = _world(state, parents)
    fresh = [state.data[opening.data_hash].examples - seen for opening in state.openings]
    return any(examples and (not parents or examples & world) for examples in fresh)


def _world(state: State, parents: Iterable[str]) -> frozenset[str]:
    """All examples of the data sets that the parents, or other versions of their examples, belong to."""
    seen = _examples(state, parents)
    roots = {data.root for data in state.data.values() if data.examples & seen}
    return frozenset().union(*(data.examples for data in state.data.values() if data.root in roots))


def _examples(state: State, hashes: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*(state.data[h].examples for h in hashes if h in state.data))


def _take_family(state: State, record: Record) -> str:
    family = Family.from_json(record.data["family"])
    state.families[family.id] = family
    state.sealed_at[family.id] = record.seq
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
