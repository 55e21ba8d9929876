"""Which steps the protocol of a claim forbids. Nothing here touches a file.

A family and all of its evidence are judged by the rules that it was sealed under. Rules 2, which are written today, go
by what the ledger handed out: evidence holds every example of the opened split, in its groups, on the model that the
claim is about; what a claim was made from was opened before it was sealed. Rules 1 asked for less, and are kept for
ledgers of earlier versions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vesalius.errors import ProtocolError
from vesalius.protocol import Claim, Evidence, Family
from vesalius.protocol.correction import corrected_together
from vesalius.protocol.evidence import RETRIED, TRIES
from vesalius.protocol.legs import check_legs
from vesalius.protocol.state import Data, State, data_rows, entities
from vesalius.protocol.store import Record

RULES = 2
DISCOVERY = "discovery"
LARGEST = 1e100
"""Sums of squares of larger effects cannot be computed."""


def judge(state: State, record: Record) -> None:
    """Raises ProtocolError when the next record is a step that the protocol forbids."""
    if record.kind == "family":
        family, rules = Family.from_json(record.data["family"]), record.data.get("rules", 1)
        if rules not in (1, RULES):
            raise ProtocolError(f"the family was sealed under rules {rules!r}; this version knows 1 and {RULES}")
        if rules < max(state.rules.values(), default=1):
            raise ProtocolError("the family was sealed under rules that were given up before")
        expected = check_family(state, family.claims, family.study, family.control_model, rules)
        if expected.exploratory != family.exploratory:
            raise ProtocolError("the family's exploratory mark is not what the openings before it say")
    elif record.kind in ("evidence", "replication"):
        check_evidence(state, Evidence.from_json(record.data), record.kind == "replication")


def check_family(
    state: State, claims: Iterable[Claim], study: str, control_model: str = "", rules: int = RULES
) -> Family:
    """The family as it would be sealed now. Raises ProtocolError for claims or a study that are sealed already, and
    for a claim that names its own groups.
    """
    claims = tuple(claims)
    exploratory = _is_exploratory(state, claims)
    if rules > 1:
        exploratory = exploratory or not all(_is_recorded(state, claim) for claim in claims)
        for claim in claims:
            if "clusters" in claim.parameters:
                raise ProtocolError(
                    f"claim {claim.id[:12]} names clusters, but groups come from the data and not from a claim: leave "
                    "them out, and give the data the groups that they have"
                )
    family = Family(claims=claims, study=study, exploratory=exploratory, control_model=control_model)
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
    strict = state.rules[family.id] > 1
    _check_order(state, claim, evidence, replication)
    if strict and not evidence.measured:
        _check_tries(state, claim, evidence)
    if evidence.measured:
        _check_source(state, claim, evidence)
        if strict:
            _check_whole(state, claim, evidence)
            _check_model(state, claim, family, evidence)
        _check_parents(state, claim, evidence)
        _check_earlier(state, claim, family, evidence)
        check_legs(claim, evidence, sum(one.m for one in corrected_together(state, family)))


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
    final = [e.why for e in earlier if e.why not in RETRIED]
    if state.rules[state.family_of[claim.id]] > 1 and final and not replication:
        raise ProtocolError(
            f"claim {claim.id[:12]} is unmeasured, because: {final[0]}; that is what its evidence says, and no "
            f"accident ({', '.join(RETRIED)}) after which it might be tried again"
        )


def _check_tries(state: State, claim: Claim, evidence: Evidence) -> None:
    evidence.check_reason()
    tries = len(state.evidence.get(claim.id, []))
    if tries >= TRIES:
        raise ProtocolError(f"claim {claim.id[:12]} was tried {tries} times; it stays unmeasured")


def _check_source(state: State, claim: Claim, evidence: Evidence) -> None:
    name = f"evidence for claim {claim.id[:12]}"
    if evidence.data_hash not in {opening.data_hash for opening in state.openings}:
        raise ProtocolError(
            f"{name} was measured on data {evidence.data_hash[:12] or '(none)'}, which this ledger never opened; "
            "take the split from ledger.open(pairs, split)"
        )
    data = state.data[evidence.data_hash]
    foreign = [h for h in (*evidence.example_hashes, *evidence.missing) if h not in data.examples]
    if foreign:
        raise ProtocolError(f"{name}: example {foreign[0][:12]} is not in the opened split {data.split!r}")
    for kind, labels in data.groups.items():
        allowed = set(zip(data.example_hashes, labels, strict=True))
        given = evidence.groups.get(kind)
        if given is None or any(pair not in allowed for pair in zip(evidence.example_hashes, given, strict=True)):
            raise ProtocolError(f"{name}: its {kind!r} groups are missing or not the opened split's; pass them on")


def _check_whole(state: State, claim: Claim, evidence: Evidence) -> None:
    """Every example that was handed out, as it was handed out, and as many as were planned."""
    name, data = f"evidence for claim {claim.id[:12]}", state.data[evidence.data_hash]
    if data.split == DISCOVERY and data.data_hash not in claim.parents:
        raise ProtocolError(f"{name} is from the split {DISCOVERY!r}, which claims are made from; test it on another")
    made_up = sorted(set(evidence.groups) - set(data.groups))
    if made_up:
        raise ProtocolError(
            f"{name}: the opened split {data.split!r} has no groups {made_up[0]!r}; they cannot be added"
        )
    left_out = Counter(data.example_hashes) - Counter((*evidence.example_hashes, *evidence.missing))
    if left_out or len(evidence.example_hashes) + len(evidence.missing) > len(data.example_hashes):
        raise ProtocolError(
            f"{name} holds {evidence.n} of the {len(data.example_hashes)} examples of split {data.split!r}, "
            f"and of {sum(left_out.values())} no word (first {min(left_out, default='none')[:12]}): measure all that "
            "were handed out, each once, or say in missing= of each that is left out why (the claim then counts as "
            "unmeasured)"
        )
    if len(data.example_hashes) < claim.n:
        raise ProtocolError(
            f"{name} is from {len(data.example_hashes)} examples, but {claim.n} were planned (n=): append "
            "unmeasured(claim.id, 'too few examples'), or plan for as many as there are"
        )
    large = [value for values in evidence.columns.values() for value in values if abs(value) > LARGEST]
    if large:
        raise ProtocolError(f"{name} holds {large[0]:g}, with which nothing can be computed; is it a measured value?")


def _check_model(state: State, claim: Claim, family: Family, evidence: Evidence) -> None:
    """The subject's model; a declared control's; or, where neither is named, the one of the family's first evidence."""
    stated = family.control_model or str(claim.subject.get("model_hash", ""))
    if not stated:
        before = [e for one in family.claims for e in state.evidence.get(one.id, ()) if e.measured]
        stated = before[0].model_hash if before else evidence.model_hash
    if evidence.model_hash != stated:
        whose = "the family is a control on" if family.control_model else "the claim is about"
        raise ProtocolError(
            f"evidence for claim {claim.id[:12]} is from model {evidence.model_hash[:12] or '(none)'}, but {whose} "
            f"model {stated[:12] or '(none)'}; to test claims on another model, declare it before: "
            "ledger.register(claims, control_model=model.content_hash)"
        )


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
    world = state.world(claim.parents)
    for opening in state.openings:
        data = state.data[opening.data_hash]
        if opening.seq > state.sealed_at[family.id] or data.data_hash in claim.parents:
            continue
        related = state.rules[family.id] > 1 or not claim.parents or bool(data.examples & world)
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
        common = entities(other.groups[kind]) & _groups_of(state, evidence, kind)
        if common:
            listed = ", ".join(sorted(common)[:5])
            raise ProtocolError(
                f"{name} shares {len(common)} {kind!r} group(s) ({listed}) with split {other.split!r}, {why}; new "
                "examples of old groups are not fresh data (of a kind that splits share on purpose, such as an order, "
                "take pairs.sampled_groups())"
            )


def _groups_of(state: State, evidence: Evidence, kind: str) -> set[str]:
    """Groups of this kind that the evidence touches, by its own labels and by those of the opened data."""
    data = state.data[evidence.data_hash]
    labels = data.groups.get(kind, ())
    known = [labels[row] for row in data_rows(data, evidence.example_hashes)] if labels else []
    return entities([*evidence.groups.get(kind, ()), *known])


def _is_exploratory(state: State, claims: Sequence[Claim]) -> bool:
    """Whether data of these claims, beyond what they were made from, had been opened."""
    parents = {parent for claim in claims for parent in claim.parents}
    seen = state.examples(parents)
    world = state.world(parents)
    fresh = [state.data[opening.data_hash].examples - seen for opening in state.openings]
    return any(examples and (not parents or examples & world) for examples in fresh)


def _is_recorded(state: State, claim: Claim) -> bool:
    """Whether all that a claim was made from was opened here, and its threshold rests on what was measured there."""
    opened = {opening.data_hash for opening in state.openings}
    measured = claim.origin.get("effect" if claim.has_fixed_scale else "scale")
    return (
        bool(claim.parents)
        and set(claim.parents) <= opened
        and measured is not None
        and measured["data_hash"] in claim.parents
    )
