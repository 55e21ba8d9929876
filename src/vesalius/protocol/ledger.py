"""The Ledger: claims are sealed, splits handed out, evidence appended, verdicts computed from what is stored."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from vesalius.errors import InputError, ProtocolError, TamperedError, UnknownNameError
from vesalius.jobs import write_atomic
from vesalius.protocol import Claim, Evidence, Family, Verdict
from vesalius.protocol.correction import corrected_together
from vesalius.protocol.legs import DEFAULT_CLUSTERS
from vesalius.protocol.rules import RULES, check_evidence, check_family, judge
from vesalius.protocol.state import Data, Opening, State
from vesalius.protocol.store import GENESIS, Store
from vesalius.protocol.verdict import decide

FORMAT = "vesalius-ledger/1"
SHORTEST_HEAD = 12


class Examples(Protocol):
    """Data whose content can be told apart: a hash of all, one of each example, and the groups examples are in."""

    @property
    def content_hash(self) -> str: ...
    @property
    def example_hashes(self) -> tuple[str, ...]: ...
    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]: ...


D = TypeVar("D", bound=Examples)
D_co = TypeVar("D_co", bound=Examples, covariant=True)


class Splittable(Examples, Protocol[D_co]):
    """Examples in named splits, such as Pairs."""

    @property
    def split_names(self) -> tuple[str, ...]: ...
    def split(self, name: str, /) -> D_co: ...


@dataclass(frozen=True)
class Report:
    """What `Ledger.verify` went through.

    head: the hash of the last record; kept elsewhere, it shows that a ledger was cut, replaced or written anew. after:
    records behind the one whose hash `verify` was given. earlier_rules: families sealed by versions of this package
    that asked for less.
    """

    records: int
    families: int
    claims: int
    evidence: int
    replications: int
    openings: int
    outcomes: Mapping[str, int]
    head: str
    after: int = 0
    earlier_rules: int = 0


class Ledger:
    """The append-only record of claims and what became of them, in one SQLite file (write-ahead log, synced).

    Several processes may use one ledger; a record whose append returned survives a crash. Use as a context manager, or
    `close` it. create=False refuses a file that is not there. Raises FileFormatError for a file that is no ledger or is
    damaged; any method may raise TamperedError naming a record that does not match its hash.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        self._store = Store(self.path, create)
        self._kept = State()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; nothing can be read or appended afterwards."""
        self._store.close()

    def register(self, claims: Iterable[Claim], *, study: str = "", control_model: str = "") -> Family:
        """Seals the claims as one family, at once; what p-values are corrected for is the number of its claims and of
        those of every other family that is sealed on the same data before these are opened.

        The study defaults to the one that all claims name. control_model: hash of another model than the claims are
        about, on which all of them are tested: a control. Registering the same claims again gives the sealed family. A
        family is marked exploratory when data of its study, beyond what its claims were made from, had been opened; and
        when a claim names no parents, or some that were not opened here, or no measurement of what its threshold rests
        on (its `origin`). Raises ProtocolError for claims that are sealed elsewhere or name their own groups, or a
        second family of a study; InputError for no claims.
        """
        family = Family(claims=tuple(claims), study=study, control_model=control_model)
        if not study and len({claim.study for claim in family.claims}) == 1:
            family = replace(family, study=family.claims[0].study)
        with self._writing() as state:
            if family.id not in state.families:
                sealed = check_family(state, family.claims, family.study, control_model)
                self._append("family", sealed.id, {"family": sealed.to_json(), "rules": RULES, "at": _now()})
            return self._state().families[family.id]

    def open(self, pairs: Splittable[D], split: str) -> D:
        """Hands out a split, and logs that it was opened (every time): discovery, which claims are made from, and later
        the split that they are tested on.

        What the other splits hold (hashes and groups, not their content) is noted too, so that overlap can be checked.
        Raises UnknownNameError for a split that is not there, InputError for examples that came in other groups before.
        """
        if split not in pairs.split_names:
            raise UnknownNameError("split", split, pairs.split_names or ["(these data have no splits)"])
        parts = {name: pairs.split(name) for name in pairs.split_names}
        root = pairs.content_hash
        known = [_data(pairs, root, ""), *(_data(part, root, name) for name, part in parts.items())]
        opened = parts[split]
        with self._writing():
            for data in known:
                self._note(data)
            opening = {"split": split, "data_hash": opened.content_hash, "root": root, "at": _now()}
            self._append("opening", opened.content_hash, opening)
        return opened

    def append(self, evidence: Evidence, *, replication: bool = False) -> str:
        """Stores evidence for a registered claim and returns its id; evidence that is stored already changes nothing.

        Raises ProtocolError when the claim is not registered, has its primary evidence (use replication=True), is
        retried under another plan, too often, or after a reason that is no accident; when the data were not opened
        through this ledger, are not all there or fewer than planned, overlap with what the claim was made from or with
        what was open before it was registered (by example or by group); when the model is not the claim's; or when a
        declared leg is missing.
        """
        kind = "replication" if replication else "evidence"
        with self._writing() as state:
            kept = state.replications if replication else state.evidence
            if evidence.id not in {e.id for e in kept.get(evidence.claim_id, [])}:
                check_evidence(state, evidence, replication)
                if not replication and state.rules[state.family_of[evidence.claim_id]] < RULES:
                    raise ProtocolError(
                        f"claim {evidence.claim_id[:12]} was sealed by an earlier version, whose rules asked for less; "
                        "it keeps its verdict, and takes replications only: register it again in a new ledger"
                    )
                self._append(kind, evidence.id, evidence.to_json())
        return evidence.id

    def verdict(self, claim: Claim | str) -> Verdict:
        """The verdict of a claim (or claim id), computed now from the evidence of its family."""
        identity = claim if isinstance(claim, str) else claim.id
        state = self._state()
        verdicts = _verdicts(state, state.family(identity))
        return next(verdict for verdict in verdicts if verdict.claim_id == identity)

    def verdicts(self, family: Family | str) -> tuple[Verdict, ...]:
        """The verdicts of a family (or family id), in the order of its claims."""
        identity = family if isinstance(family, str) else family.id
        state = self._state()
        if identity not in state.families:
            raise ProtocolError(f"family {identity[:12]} is not registered in {self.path}")
        return _verdicts(state, state.families[identity])

    def families(self) -> tuple[Family, ...]:
        """All families, in the order in which they were sealed."""
        return tuple(self._state().families.values())

    def claims(self) -> tuple[Claim, ...]:
        """All claims, family by family."""
        return tuple(claim for family in self.families() for claim in family.claims)

    def evidence(self, claim: Claim | str) -> tuple[Evidence, ...]:
        """What was appended for a claim, in order, without replications: unmeasured attempts, then the measured one."""
        return tuple(self._state().evidence.get(claim if isinstance(claim, str) else claim.id, ()))

    def replications(self, claim: Claim | str) -> tuple[Evidence, ...]:
        """Later evidence that never changes the verdict, in order."""
        return tuple(self._state().replications.get(claim if isinstance(claim, str) else claim.id, ()))

    def openings(self) -> tuple[Opening, ...]:
        """Every time a split was handed out, in order."""
        return tuple(self._state().openings)

    def verify(self, *, head: str = "") -> Report:
        """Goes through the whole file again: every hash, the chain, every step against the protocol, every verdict.

        head: the hash (or its first 12 or more digits) that was printed when the ledger was last seen; it must be that
        of a record. Raises TamperedError naming the first record that is not what was written, or that the protocol
        forbade, and for a ledger without that head; InputError for a head that is too short.
        """
        if head and len(head) < SHORTEST_HEAD:
            raise InputError(f"head {head!r} is too short to tell ledgers apart; give at least {SHORTEST_HEAD} digits")
        self._store.check_integrity()
        state, seen = State(), 0
        for record in self._store.read():
            try:
                record.check(state.last.hash if state.last else GENESIS)
                judge(state, record)
            except (
                InputError,
                ProtocolError,
                ValueError,
                TypeError,
                LookupError,
                AttributeError,
                ArithmeticError,
            ) as error:
                raise TamperedError(f"record {record.seq} ({record.kind}) breaks the protocol: {error}") from error
            state.add(record)
            seen = record.seq if head and record.hash.startswith(head) else seen
        if head and not seen:
            raise TamperedError(
                f"{self.path} has no record with the hash {head}: it was cut after that was printed, written anew, or "
                "is another ledger"
            )
        return _report(state, seen)

    def export(self, path: str | Path) -> Path:
        """Writes all records, their hashes and the verdicts as JSON, atomically."""
        state = self._state()
        records = [
            {"seq": r.seq, "kind": r.kind, "id": r.id, "previous": r.previous, "hash": r.hash, "payload": r.data}
            for r in self._store.read()
        ]
        verdicts = [v.to_json() for family in state.families.values() for v in _verdicts(state, family)]
        content = {"format": FORMAT, "records": records, "verdicts": verdicts}
        return write_atomic(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[State]:
        try:
            with self._store.transaction():
                yield self._state()
        except BaseException:
            self._kept = State()  # it may have taken up records that were rolled back
            raise

    def _state(self) -> State:
        for record in self._store.read(self._kept.last.seq if self._kept.last else 0):
            self._kept.add(record)
        return self._kept

    def _append(self, kind: str, identity: str, data: Any) -> None:
        self._store.append(kind, identity, data, self._state().last)

    def _note(self, data: Data) -> None:
        known = self._state().data.get(data.data_hash)
        if known is None:
            for earlier in self._state().data.values():
                _check_groups(data, earlier)
            self._append("data", data.data_hash, vars(data))
        elif known.example_hashes != data.example_hashes or known.groups != data.groups:
            raise InputError(f"data {data.data_hash[:12]} came with other examples or groups before; its hash is wrong")


def _data(given: Examples, root: str, split: str) -> Data:
    return Data(given.content_hash, root, split, given.example_hashes, given.groups)


def _check_groups(data: Data, earlier: Data) -> None:
    """Raises InputError when an example is in other groups than it was before, or has lost those that count."""
    if not data.examples & earlier.examples:
        return
    for kind, labels in earlier.groups.items():
        if kind not in data.groups:
            if kind in DEFAULT_CLUSTERS:
                raise InputError(f"these examples came with groups {kind!r} before, and have none now; leave them in")
            continue
        before, now = _of_example(earlier, labels), _of_example(data, data.groups[kind])
        changed = [example for example in now if before.get(example, now[example]) != now[example]]
        if changed:
            example = changed[0]
            raise InputError(
                f"example {example[:12]} came in {kind!r} group {min(before[example])!r} before, and in "
                f"{min(now[example])!r} now; one ledger knows an example by one group of a kind"
            )


def _of_example(data: Data, labels: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for example, label in zip(data.example_hashes, labels, strict=True):
        found.setdefault(example, set()).add(label)
    return found


def _verdicts(state: State, family: Family) -> tuple[Verdict, ...]:
    """Of a family, corrected together with all that share its data."""
    together = [claim for one in corrected_together(state, family) for claim in one.claims]
    primaries = {claim.id: state.primary(claim.id) for claim in together}
    found = {identity: evidence for identity, evidence in primaries.items() if evidence is not None}
    tries = {identity: len(state.evidence[identity]) for identity in found} if state.rules[family.id] > 1 else {}
    verdicts = decide(together, found, exploratory=family.exploratory, tries=tries)
    own = {claim.id for claim in family.claims}
    return tuple(verdict for verdict in verdicts if verdict.claim_id in own)


def _report(state: State, seen: int) -> Report:
    verdicts = [verdict for family in state.families.values() for verdict in _verdicts(state, family)]
    records = state.last.seq if state.last else 0
    return Report(
        records=records,
        families=len(state.families),
        claims=len(state.family_of),
        evidence=sum(map(len, state.evidence.values())),
        replications=sum(map(len, state.replications.values())),
        openings=len(state.openings),
        outcomes=dict(Counter(verdict.outcome for verdict in verdicts)),
        head=state.last.hash if state.last else GENESIS,
        after=records - seen if seen else 0,
        earlier_rules=sum(rules < RULES for rules in state.rules.values()),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
