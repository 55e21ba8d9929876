"""The Ledger: claims are sealed, splits handed out, evidence appended, verdicts computed from what is stored."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from vesalius.errors import InputError, ProtocolError, TamperedError, UnknownNameError
from vesalius.jobs import write_atomic
from vesalius.protocol import Claim, Evidence, Family, Verdict
from vesalius.protocol.rules import Data, Opening, State, check_evidence, check_family, judge
from vesalius.protocol.store import GENESIS, Store
from vesalius.protocol.verdict import decide

FORMAT = "vesalius-ledger/1"


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
    """What `Ledger.verify` went through. `head` is the hash of the last record: kept elsewhere, it shows truncation."""

    records: int
    families: int
    claims: int
    evidence: int
    replications: int
    openings: int
    outcomes: Mapping[str, int]
    head: str


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

    def register(self, claims: Iterable[Claim], *, study: str = "") -> Family:
        """Seals the claims as one family, at once; the number of claims is what p-values are corrected for.

        The study defaults to the one that all claims name. Registering the same claims again gives the sealed family.
        A family sealed after data of its study were opened is marked exploratory. Raises ProtocolError for claims that
        are sealed elsewhere, or a second family of a study; InputError for no claims.
        """
        family = Family(claims=tuple(claims), study=study)
        if not study and len({claim.study for claim in family.claims}) == 1:
            family = Family(claims=family.claims, study=family.claims[0].study)
        with self._writing() as state:
            if family.id not in state.families:
                sealed = check_family(state, family.claims, family.study)
                self._append("family", sealed.id, {"family": sealed.to_json(), "at": _now()})
            return self._state().families[family.id]

    def open(self, pairs: Splittable[D], split: str) -> D:
        """Hands out a split, and logs that it was opened (every time).

        What the other splits hold (hashes and groups, not their content) is noted too, so that overlap can be checked.
        Raises UnknownNameError for a split that is not there.
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
        retried under another plan, when the data were not opened through this ledger, overlap with what the claim was
        made from or with what was open before it was registered (by example or by group), or when a declared leg is
        missing.
        """
        kind = "replication" if replication else "evidence"
        with self._writing() as state:
            kept = state.replications if replication else state.evidence
            if evidence.id not in {e.id for e in kept.get(evidence.claim_id, [])}:
                check_evidence(state, evidence, replication)
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

    def verify(self) -> Report:
        """Goes through the whole file again: every hash, the chain, every step against the protocol, every verdict.

        Raises TamperedError naming the first record that is not what was written, or that the protocol forbade.
        """
        self._store.check_integrity()
        state = State()
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
        return _report(state)

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
            self._append("data", data.data_hash, vars(data))
        elif known.example_hashes != data.example_hashes or known.groups != data.groups:
            raise InputError(f"data {data.data_hash[:12]} came with other examples or groups before; its hash is wrong")


def _data(given: Examples, root: str, split: str) -> Data:
    return Data(given.content_hash, root, split, given.example_hashes, given.groups)


def _verdicts(state: State, family: Family) -> tuple[Verdict, ...]:
    primaries = {claim.id: state.primary(claim.id) for claim in family.claims}
    found = {identity: evidence for identity, evidence in primaries.items() if evidence is not None}
    return decide(family.claims, found, exploratory=family.exploratory)


def _report(state: State) -> Report:
    verdicts = [verdict for family in state.families.values() for verdict in _verdicts(state, family)]
    return Report(
        records=state.last.seq if state.last else 0,
        families=len(state.families),
        claims=len(state.family_of),
        evidence=sum(map(len, state.evidence.values())),
        replications=sum(map(len, state.replications.values())),
        openings=len(state.openings),
        outcomes=dict(Counter(verdict.outcome for verdict in verdicts)),
        head=state.last.hash if state.last else GENESIS,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
