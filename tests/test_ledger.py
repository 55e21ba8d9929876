"""Laws of the ledger: the protocol is kept, nothing is lost, nothing can be changed unnoticed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from vesalius.errors import (
    FileFormatError,
    InputError,
    LedgerError,
    ProtocolError,
    TamperedError,
    UnknownNameError,
)
from vesalius.protocol import Claim, Evidence, Family, Verdict, content_hash, unmeasured
from vesalius.protocol.ledger import Ledger

SPLITS = ("discovery", "validation", "confirmation")
PER_SPLIT = 24


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A stand-in for Pairs: text with groups and splits."""

    texts: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    splits: tuple[str, ...]
    corruption: str = "swap"

    @property
    def content_hash(self) -> str:
        return content_hash(self)

    @property
    def example_hashes(self) -> tuple[str, ...]:
        return tuple(content_hash(text) for text in self.texts)

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.splits))

    def split(self, name: str) -> Prompts:
        return self.rows([row for row, split in enumerate(self.splits) if split == name])

    def rows(self, rows: Sequence[int]) -> Prompts:
        def pick(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[row] for row in rows)

        groups = {kind: pick(labels) for kind, labels in self.groups.items()}
        return dataclasses.replace(self, texts=pick(self.texts), groups=groups, splits=pick(self.splits))


def prompts(task: str = "ioi", **changes: Any) -> Prompts:
    rows = [(split, i) for split in SPLITS for i in range(PER_SPLIT)]
    given = {
        "texts": tuple(f"{task} {split} {i}" for split, i in rows),
        "groups": {
            "template": tuple(f"{split[0]}{i % 12}" for split, i in rows),
            "names": tuple(f"{split}A{i % 8}|{split}B{i % 8}" for split, i in rows),
        },
        "splits": tuple(split for split, _ in rows),
    }
    return Prompts(**{**given, **changes})


def claim(number: int = 0, data: Prompts | None = None, **changes: Any) -> Claim:
    parents = ((data or prompts()).split("discovery").content_hash,)
    measured = {"estimate": 10.0, "low": 9.0, "high": 11.0, "n": PER_SPLIT, "data_hash": parents[0]}
    given = {
        "statement": f"claim {number}",
        "subject": {"head": number},
        "check": "patch",
        "delta": 0.5,
        "n": PER_SPLIT,
    }
    return Claim(**{**given, "total_effect": 10.0, "parents": parents, "origin": {"scale": measured}, **changes})


def seal(ledger: Ledger, claims: Sequence[Claim], data: Prompts | None = None, **options: Any) -> Family:
    """What the claims are made from is opened first, as it should be."""
    ledger.open(data or prompts(), "discovery")
    return ledger.register(claims, **options)


def evidence(of: Claim, data: Prompts, mean: float = 2.0, **changes: Any) -> Evidence:
    effects = [mean + 0.1 * ((7 * i) % 5 - 2) for i in range(len(data.texts))]
    given = {"effects": effects, "groups": data.groups, "example_hashes": data.example_hashes, "plan_hash": "plan"}
    return Evidence(claim_id=of.id, **{**given, "data_hash": data.content_hash, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as opened:
        yield opened


# --- the plain story -------------------------------------------------------------------------------------------------


def test_a_claim_sealed_then_tested_on_fresh_data_gets_its_verdict(ledger: Ledger, path: Path) -> None:
    family = seal(ledger, [claim(0), claim(1)], study="ioi")
    validation = ledger.open(prompts(), "validation")
    assert validation == prompts().split("validation")
    identity = ledger.append(evidence(claim(0), validation))
    verdict = ledger.verdict(claim(0))
    assert (verdict.outcome, verdict.scope, verdict.exploratory) == ("SUPPORTED", "general", False)
    assert ledger.verdict(claim(1).id).reason == "unmeasured"
    assert ledger.verdicts(family) == ledger.verdicts(family.id) == (verdict, ledger.verdict(claim(1)))
    with Ledger(path) as again:
        assert again.verdict(claim(0)) == verdict
        assert again.claims() == (claim(0), claim(1)) and again.families() == (family,)
        assert [stored.id for stored in again.evidence(claim(0))] == [identity]
        assert [(o.split, o.data_hash) for o in again.openings()] == [
            ("discovery", prompts().split("discovery").content_hash),
            ("validation", validation.content_hash),
        ]


def test_verify_recomputes_everything_and_counts_it(ledger: Ledger) -> None:
    seal(ledger, [claim(0), claim(1)])
    validation = ledger.open(prompts(), "validation")
    ledger.append(evidence(claim(0), validation))
    ledger.append(evidence(claim(0), validation, mean=1.9), replication=True)
    report = ledger.verify()
    assert (report.families, report.claims, report.evidence, report.replications, report.openings) == (1, 2, 1, 1, 2)
    assert report.outcomes == {"SUPPORTED": 1, "INCONCLUSIVE": 1}
    assert report.records == 4 + 1 + 1 + 1 + 2  # data sets noted, opening, family, opening, evidence
    ledger.open(prompts(), "validation")
    assert ledger.verify().head != report.head


def test_export_holds_every_record_and_verdict(ledger: Ledger, tmp_path: Path) -> None:
    seal(ledger, [claim(0)])
    ledger.append(evidence(claim(0), ledger.open(prompts(), "validation")))
    content = json.loads(ledger.export(tmp_path / "out" / "ledger.json").read_text())
    assert content["format"] == "vesalius-ledger/1"
    assert [record["seq"] for record in content["records"]] == list(range(1, ledger.verify().records + 1))
    assert Verdict.from_json(content["verdicts"][0]) == ledger.verdict(claim(0))
    assert Evidence.from_json(content["records"][-1]["payload"]).id == content["records"][-1]["id"]


# --- families --------------------------------------------------------------------------------------------------------


def test_a_family_registered_again_is_the_sealed_one(ledger: Ledger) -> None:
    sealed = seal(ledger, [claim(0), claim(1)], study="s")
    ledger.open(prompts(), "validation")
    again = seal(ledger, [claim(0), claim(1)], study="s")
    assert again == sealed and not again.exploratory
    assert ledger.verify().families == 1


def test_the_study_of_a_family_is_that_of_its_claims(ledger: Ledger) -> None:
    assert seal(ledger, [claim(0, study="ioi"), claim(1, study="ioi")]).study == "ioi"


def test_m_counts_unmeasured_claims(ledger: Ledger) -> None:
    seal(ledger, [claim(number) for number in range(40)])
    validation = ledger.open(prompts(), "validation")
    weak = [0.78 + 0.14 * ((7 * i) % 5 - 2) for i in range(PER_SPLIT)]
    ledger.append(evidence(claim(0), validation, effects=weak))
    result = ledger.verdict(claim(0))
    assert result.p_supported_holm == pytest.approx(min(1, 40 * result.p_supported))
    assert result.p_supported < 0.05 and result.outcome == "INCONCLUSIVE"


def test_later_families_do_not_change_a_verdict(ledger: Ledger) -> None:
    seal(ledger, [claim(0)])
    ledger.append(evidence(claim(0), ledger.open(prompts(), "validation")))
    before = ledger.verdict(claim(0))
    seal(ledger, [claim(number) for number in range(1, 60)])
    assert ledger.verdict(claim(0)) == before


def test_a_study_has_one_sealed_family(ledger: Ledger) -> None:
    seal(ledger, [claim(0)], study="ioi")
    with pytest.raises(ProtocolError, match="the family of study 'ioi' is sealed with 1 claims"):
        seal(ledger, [claim(1)], study="ioi")
    with pytest.raises(ProtocolError, match="is already sealed in family"):
        seal(ledger, [claim(0), claim(1)], study="other")
    with pytest.raises(InputError, match="at least one claim"):
        seal(ledger, [])


def test_a_family_sealed_after_its_data_were_opened_is_exploratory(ledger: Ledger) -> None:
    ledger.open(prompts(), "discovery")
    assert not seal(ledger, [claim(0)], study="ioi").exploratory  # what it was made from may be open
    validation = ledger.open(prompts(), "validation")
    late = seal(ledger, [claim(1)], study="ioi")
    assert late.exploratory
    with pytest.raises(ProtocolError, match="in split 'validation', which was opened before the claim was registered"):
        ledger.append(evidence(claim(1), validation))
    ledger.append(evidence(claim(1), ledger.open(prompts(), "confirmation")))
    verdict = ledger.verdict(claim(1))
    assert verdict.outcome == "SUPPORTED" and verdict.exploratory
    sva = prompts("sva")
    assert not seal(ledger, [claim(2, sva)], sva).exploratory  # other data were not seen
    assert ledger.verify().outcomes == {"SUPPORTED": 1, "INCONCLUSIVE": 2}


def test_opening_another_corruption_of_the_same_prompts_counts_as_opening_them(ledger: Ledger) -> None:
    swap, abc = prompts(), dataclasses.replace(prompts(), corruption="abc")
    ledger.open(swap, "validation")
    late = claim(0, abc)
    with_abc = ledger.open(abc, "discovery")
    assert seal(ledger, [late]).exploratory
    assert late.parents == (with_abc.content_hash,)
    with pytest.raises(ProtocolError, match="opened before the claim was registered"):
        ledger.append(evidence(late, ledger.open(abc, "validation")))


def test_a_claim_without_parents_may_come_from_anything_opened_before(ledger: Ledger) -> None:
    discovery = ledger.open(prompts(), "discovery")
    made = claim(0, parents=())
    assert seal(ledger, [made]).exploratory
    with pytest.raises(ProtocolError, match="is from the split 'discovery', which claims are made from"):
        ledger.append(evidence(made, discovery))
    again = dataclasses.replace(prompts(), splits=tuple({"discovery": "mine"}.get(s, s) for s in prompts().splits))
    with pytest.raises(ProtocolError, match="the claim names no parents"):
        ledger.append(evidence(made, ledger.open(again, "mine")))
    ledger.append(evidence(made, ledger.open(prompts(), "validation")))
    assert ledger.verdict(made).exploratory


def test_new_examples_of_groups_that_were_open_before_are_not_fresh(ledger: Ledger) -> None:
    base = prompts()
    template = tuple(label.replace("c", "v") for label in base.groups["template"])  # confirmation reuses templates
    data = dataclasses.replace(base, groups={**base.groups, "template": template})
    ledger.open(data, "validation")
    late = claim(0, data)
    seal(ledger, [late], data)
    with pytest.raises(ProtocolError, match=r"shares 12 'template' group\(s\) \(v0, .*opened before the claim"):
        ledger.append(evidence(late, ledger.open(data, "confirmation")))


# --- what evidence must come from ------------------------------------------------------------------------------------


def test_evidence_for_an_unknown_claim_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ProtocolError, match="is not registered"):
        ledger.append(evidence(claim(0), prompts().split("validation")))
    with pytest.raises(ProtocolError, match="is not registered"):
        ledger.verdict("feed")


def test_evidence_on_data_that_were_not_opened_here_is_refused(ledger: Ledger) -> None:
    seal(ledger, [claim(0)])
    ledger.open(prompts(), "discovery")  # notes what validation holds, but does not open it
    with pytest.raises(ProtocolError, match="which this ledger never opened"):
        ledger.append(evidence(claim(0), prompts().split("validation")))
    opened = ledger.open(prompts(), "validation")
    stranger = evidence(claim(0), opened, example_hashes=("feed", *opened.example_hashes[1:]))
    with pytest.raises(ProtocolError, match="example feed is not in the opened split 'validation'"):
        ledger.append(stranger)


def test_evidence_on_the_data_a_claim_was_made_from_is_refused(ledger: Ledger) -> None:
    seal(ledger, [claim(0)])
    with pytest.raises(ProtocolError, match=r"was made from data .*; test it on data it never saw"):
        ledger.append(evidence(claim(0), ledger.open(prompts(), "discovery")))


def test_an_example_of_the_parents_is_refused_in_whatever_split_it_hides(ledger: Ledger) -> None:
    base = prompts(groups={})
    leaking = dataclasses.replace(
        base, texts=tuple(base.texts[0] if i == PER_SPLIT else t for i, t in enumerate(base.texts))
    )
    seal(ledger, [claim(0, leaking)], leaking)
    with pytest.raises(
        ProtocolError, match=r"1 example\(s\), first .* are in split 'discovery', which the claim was made"
    ):
        ledger.append(evidence(claim(0, leaking), ledger.open(leaking, "validation")))


@pytest.mark.parametrize(("kind", "label"), [("template", "d3"), ("names", "validationA0|discoveryB5")])
def test_a_group_of_the_parents_is_refused(ledger: Ledger, kind: str, label: str) -> None:
    base = prompts()
    labels = tuple(label if i == PER_SPLIT else given for i, given in enumerate(base.groups[kind]))
    leaking = dataclasses.replace(base, groups={**base.groups, kind: labels})
    seal(ledger, [claim(0, leaking)], leaking)
    shared = label.split("|")[-1]
    with pytest.raises(ProtocolError, match=rf"shares 1 '{kind}' group\(s\) \({shared}\) with split 'discovery'"):
        ledger.append(evidence(claim(0, leaking), ledger.open(leaking, "validation")))


def test_groups_cannot_be_left_out_or_renamed(ledger: Ledger) -> None:
    seal(ledger, [claim(0)])
    opened = ledger.open(prompts(), "validation")
    without = evidence(claim(0), opened, groups={"template": opened.groups["template"]})
    renamed = evidence(claim(0), opened, groups={**opened.groups, "template": tuple(map(str, range(PER_SPLIT)))})
    for made, kind in ((without, "names"), (renamed, "template")):
        with pytest.raises(ProtocolError, match=f"its '{kind}' groups are missing or not the opened split's"):
            ledger.append(made)
    added = evidence(claim(0), opened, groups={**opened.groups, "mine": tuple(map(str, range(PER_SPLIT)))})
    with pytest.raises(ProtocolError, match="the opened split 'validation' has no groups 'mine'; they cannot be added"):
        ledger.append(added)
    ledger.append(evidence(claim(0), opened))


def test_parents_that_the_ledger_does_not_know_are_refused(ledger: Ledger) -> None:
    made = claim(0, parents=("feed" * 16,))
    assert seal(ledger, [made]).exploratory
    with pytest.raises(ProtocolError, match="was made from data feedfeedfeed, of which this ledger knows nothing"):
        ledger.append(evidence(made, ledger.open(prompts(), "validation")))


def test_evidence_lacking_a_declared_leg_is_refused_at_once(ledger: Ledger) -> None:
    made = claim(0, control={"parts": ["h2"]})
    seal(ledger, [made])
    with pytest.raises(ProtocolError, match="lacks the leg 'control'"):
        ledger.append(evidence(made, ledger.open(prompts(), "validation")))


def test_an_unknown_split_is_refused_and_every_opening_is_logged(ledger: Ledger) -> None:
    with pytest.raises(UnknownNameError, match="unknown split 'test'; known: confirmation, discovery, validation"):
        ledger.open(prompts(), "test")
    ledger.open(prompts(), "validation")
    ledger.open(prompts(), "validation")
    assert [opening.split for opening in ledger.openings()] == ["validation", "validation"]


def test_data_whose_hash_does_not_tell_them_apart_are_refused(ledger: Ledger) -> None:
    class Wrong(Prompts):
        content_hash = "same"  # type: ignore[assignment]

    ledger.open(Wrong(("a",), {}, ("x",)), "x")
    with pytest.raises(InputError, match="came with other examples or groups before"):
        ledger.open(Wrong(("b",), {}, ("x",)), "x")


# --- one primary evidence --------------------------------------------------------------------------------------------


def test_there_is_one_primary_and_replications_never_change_the_verdict(ledger: Ledger) -> None:
    seal(ledger, [claim(0)])
    opened = ledger.open(prompts(), "validation")
    contrary = evidence(claim(0), opened, mean=-2.0)
    with pytest.raises(ProtocolError, match="a replication is measured, and follows measured primary evidence"):
        ledger.append(contrary, replication=True)
    ledger.append(evidence(claim(0), opened))
    before = ledger.verdict(claim(0))
    with pytest.raises(ProtocolError, match="has its primary evidence, and there is only one"):
        ledger.append(contrary)
    assert ledger.append(contrary, replication=True) == contrary.id
    assert ledger.replications(claim(0)) == (contrary,)
    assert ledger.verdict(claim(0)) == before


def test_the_same_evidence_again_changes_nothing(ledger: Ledger) -> None:
    seal(ledger, [claim(0)])
    opened = ledger.open(prompts(), "validation")
    first = ledger.append(evidence(claim(0), opened, created_at="2025-01-01"))
    records = ledger.verify().records
    assert ledger.append(evidence(claim(0), opened, created_at="2025-01-02", cost={"seconds": 3})) == first
    assert ledger.verify().records == records


def test_only_what_was_unmeasured_may_be_tried_again_and_only_by_the_same_plan(ledger: Ledger) -> None:
    seal(ledger, [claim(0)])
    opened = ledger.open(prompts(), "validation")
    ledger.append(unmeasured(claim(0).id, "out of memory", plan_hash="plan"))
    assert ledger.verdict(claim(0)).reason == "unmeasured"
    with pytest.raises(ProtocolError, match="a retry must keep that plan, but this is plan another"):
        ledger.append(evidence(claim(0), opened, plan_hash="another"))
    ledger.append(evidence(claim(0), opened))
    assert ledger.verdict(claim(0)).outcome == "SUPPORTED"
    with pytest.raises(ProtocolError, match="has its primary evidence"):
        ledger.append(unmeasured(claim(0).id, "the result was not liked", plan_hash="plan"))
    assert [stored.measured for stored in ledger.evidence(claim(0))] == [False, True]


def test_a_refused_step_leaves_no_trace(ledger: Ledger) -> None:
    seal(ledger, [claim(0)])
    opened = ledger.open(prompts(), "validation")
    before = ledger.verify()
    with pytest.raises(ProtocolError):
        ledger.append(evidence(claim(0), opened, data_hash="feed"))
    assert ledger.verify() == before
    ledger.append(evidence(claim(0), opened))
    assert ledger.verdict(claim(0)).outcome == "SUPPORTED"


# --- tampering -------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(path: Path) -> Path:
    with Ledger(path) as ledger:
        seal(ledger, [claim(0), claim(1)])
        opened = ledger.open(prompts(), "validation")
        ledger.append(evidence(claim(0), opened))
        ledger.append(evidence(claim(1), opened))
    return path


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE records SET payload = '{}' WHERE seq = 1",
        "DELETE FROM records WHERE seq = 1",
        "INSERT OR REPLACE INTO records SELECT seq, kind, id, '{}', previous, hash FROM records WHERE seq = 2",
        "INSERT INTO records SELECT 99, kind, id, payload, previous, hash FROM records WHERE seq = 2",
    ],
)
def test_triggers_refuse_to_change_or_remove_a_record(written: Path, statement: str) -> None:
    connection = sqlite3.connect(written)
    with pytest.raises(sqlite3.IntegrityError, match="the ledger is append-only"):
        connection.execute(statement)
    connection.close()
    with Ledger(written) as ledger:
        ledger.verify()


def forge(path: Path, *statements: str) -> None:
    """Changes the file as somebody would who removes the triggers, and puts them back."""
    connection = sqlite3.connect(path)
    triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement)
    for _, text in triggers:
        connection.execute(text)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "UPDATE records SET payload = replace(payload, '2.2', '2.3') WHERE seq = 8",
            "record 8 .* does not match its hash",
        ),
        ("UPDATE records SET kind = 'replication' WHERE seq = 8", "record 8 .* does not match its hash"),
        ("UPDATE records SET id = 'feed' WHERE seq = 9", "record 9 .* does not match its hash"),
        ("UPDATE records SET previous = hash WHERE seq = 9", "record 9 .* does not match its hash"),
        ("DELETE FROM records WHERE seq = 8", "record 9 .* does not follow the record before it"),
    ],
)
def test_a_forged_record_is_found_and_named(written: Path, statement: str, message: str) -> None:
    forge(written, statement)
    with Ledger(written) as ledger, pytest.raises(TamperedError, match=message):
        ledger.verify()
    with Ledger(written) as ledger, pytest.raises(TamperedError, match=message):
        ledger.verdict(claim(0))


def test_a_forbidden_record_is_found_even_with_perfect_hashes(written: Path) -> None:
    with Ledger(written) as ledger:
        second = evidence(claim(0), prompts().split("validation"), mean=9.0)
        with ledger._store.transaction():
            ledger._append("evidence", second.id, second.to_json())
        with pytest.raises(
            TamperedError, match=r"record 10 \(evidence\) breaks the protocol: .* has its primary evidence"
        ):
            ledger.verify()


def test_a_removed_trigger_is_found(written: Path) -> None:
    connection = sqlite3.connect(written)
    connection.execute("DROP TRIGGER records_no_update")
    connection.close()
    with Ledger(written) as ledger, pytest.raises(TamperedError, match="'records_no_update', which keeps records"):
        ledger.verify()


def test_any_flipped_byte_of_a_payload_is_found(written: Path) -> None:
    content = written.read_bytes()
    start = content.find(b'"claim_id":')
    assert start > 0
    rng = random.Random(0)
    for _ in range(40):
        flipped = bytearray(content)
        flipped[start + rng.randrange(600)] ^= 1 << rng.randrange(8)
        written.write_bytes(flipped)
        with Ledger(written) as ledger, pytest.raises(TamperedError, match=r"record \d+ .* does not match its hash"):
            ledger.verify()
    written.write_bytes(content)
    with Ledger(written) as ledger:
        assert ledger.verify().evidence == 2  # positive control


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, not a database " * 50)
    with pytest.raises(FileFormatError, match=r"notes\.txt cannot be used as a ledger .*not SQLite"):
        Ledger(text)
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE songs (name TEXT)")
    connection.close()
    with pytest.raises(FileFormatError, match="is an SQLite file of something else"):
        Ledger(other)
    assert text.read_text().startswith("these are notes")


def test_a_truncated_ledger_is_refused(written: Path) -> None:
    content = written.read_bytes()
    for size in (50, len(content) // 2, len(content) - 5000):
        written.write_bytes(content[:size])
        with pytest.raises(
            FileFormatError, match=r"ledger\.sqlite (is damaged or truncated|cannot be used as a ledger)"
        ):
            Ledger(written)


def test_paths_that_cannot_hold_a_ledger_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is a folder; a ledger is one file"):
        Ledger(tmp_path)
    with pytest.raises(FileFormatError, match=r"the folder .*missing of the ledger does not exist"):
        Ledger(tmp_path / "missing" / "ledger.sqlite")
    with pytest.raises(FileFormatError, match=r"there is no ledger at .*typo\.sqlite"):
        Ledger(tmp_path / "typo.sqlite", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_ledger_says_so(path: Path) -> None:
    ledger = Ledger(path)
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.claims()


# --- several processes, and crashes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have imported this module already, by forking a clean server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(entry or "." for entry in sys.path))
        forkserver.ensure_running()
    return context


def append_claims(path: Path, first: int, count: int, replies: Connection) -> None:
    """Child: appends evidence for claims first, first + 1, ... and says each id as soon as append has returned."""
    with Ledger(path) as ledger:
        validation = prompts().split("validation")
        for number in range(first, first + count):
            replies.send(ledger.append(evidence(claim(number), validation)))
    replies.close()


def register_and_open(path: Path, replies: Connection) -> None:
    """Child: makes the file, or finds it made by the other child, and appends."""
    with Ledger(path) as ledger:
        ledger.open(prompts(), "validation")
        replies.send("done")


def said(replies: Connection) -> list[str]:
    """Everything a child said before it ended or was killed."""
    heard = []
    try:
        while replies.poll(20):
            heard.append(replies.recv())
    except (EOFError, ConnectionResetError):
        return heard
    raise AssertionError("the child hangs")


def start(context: Any, target: Any, *args: Any) -> tuple[Any, Connection]:
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=target, args=(*args, theirs))
    child.start()
    theirs.close()
    return child, ours


def test_processes_append_at_once_without_loss(path: Path, processes: Any) -> None:
    with Ledger(path) as ledger:
        seal(ledger, [claim(number) for number in range(45)])
        ledger.open(prompts(), "validation")
    children = [start(processes, append_claims, path, first, 15) for first in (0, 15, 30)]
    ids = [identity for _, replies in children for identity in said(replies)]
    for child, _ in children:
        child.join()
        assert child.exitcode == 0
    with Ledger(path) as ledger:
        assert ledger.verify().evidence == 45
        assert {stored.id for made in ledger.claims() for stored in ledger.evidence(made)} == set(ids)


def test_processes_may_create_the_file_at_once(path: Path, processes: Any) -> None:
    children = [start(processes, register_and_open, path) for _ in range(4)]
    assert [said(replies) for _, replies in children] == [["done"]] * 4
    for child, _ in children:
        child.join()
    with Ledger(path) as ledger:
        assert ledger.verify().openings == 4


def test_twenty_kills_lose_no_record_whose_append_returned(path: Path, processes: Any) -> None:
    total = 80
    with Ledger(path) as ledger:
        seal(ledger, [claim(number) for number in range(total)])
        ledger.open(prompts(), "validation")
    rng, returned, kills, mid_work = random.Random(1), set(), 0, 0
    for kills in range(1, 21):
        child, replies = start(processes, append_claims, path, 3 * (kills - 1), total - 3 * kills)
        # By what it has said and not by the clock alone: on a busy machine some milliseconds are nothing.
        first = [replies.recv() for _ in range(2)]
        time.sleep(rng.random() * 0.03)
        child.kill()
        heard = [*first, *said(replies)]
        child.join()
        mid_work += child.exitcode == -9
        returned.update(heard)
    with Ledger(path) as ledger:
        stored = {kept.id for made in ledger.claims() for kept in ledger.evidence(made)}
        assert returned <= stored
        assert ledger.verify().evidence == len(stored)
    assert kills == 20 and mid_work >= 16 and len(returned) >= 40  # two of its own each
