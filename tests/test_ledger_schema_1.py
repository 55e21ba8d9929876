"""A ledger with claims of schema 1 opens and verifies with the head that it had, and its claims can be tested again.

`data/ledger-schema-1.sqlite.gz` was made by version 0.1.0 as of commit cfd9aef: a study of `planted_induction(0)` on
`planted_pairs(8)` with five random sets, whose family got two more claims of the direct effect: one about an idle head,
and one whose threshold lies close to what head 1.2 does. The head is what that version said.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from vesalius.protocol import Claim
from vesalius.protocol.ledger import Ledger
from vesalius.quantities import Runs
from vesalius.toys import planted_induction, planted_pairs
from vesalius.validate import check

STORED = Path(__file__).parent / "data" / "ledger-schema-1.sqlite.gz"
HEAD = "73b8b08470bae7268bd9c6d4a42bd241d75a9e74b58ba29731a3a890768affdc"
VERDICTS = {
    "3264418db036": 0.051, "deba53cbbd18": 0.051, "fae1705f3dec": 0.051, "14c90b4d3aa5": 0.051, "e5438f2f9c14": 0.071,
    "51cc3b19f8d4": 0.161, "f0212453be9b": 0.127, "20cd6854d732": 0.051, "f8b348636e65": 0.051, "bb1aca08478c": 0.161,
    "a93e2e938748": 0.161, "95578bd8b48e": 1.0, "65e99e55bf3d": 0.877,
}  # fmt: skip
"""Beginning of the claim's id, Holm-adjusted p-value of support by the present rule.

The version that made it said SUPPORTED of the first eleven and REFUTED of the twelfth. Verdicts are computed, not
stored: eight layouts can't decide thirteen claims by a rule whose p-values are never below 2^-8.
"""
SAME = ("claim_id", "data_hash", "model_hash", "example_hashes")
OF_CIRCUIT = ("circuit keeps", "circuit is needed")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(gzip.decompress(STORED.read_bytes()))
    return path


def test_it_verifies_with_the_head_that_it_had(path: Path) -> None:
    with Ledger(path, create=False) as ledger:
        found = ledger.verify()
    assert (found.head, found.records, found.claims, found.evidence) == (HEAD, 22, 13, 13)


def test_its_claims_keep_their_ids_and_are_decided_by_the_present_rule(path: Path) -> None:
    with Ledger(path, create=False) as ledger:
        (family,) = ledger.families()
        verdicts = ledger.verdicts(family)
    assert {v.claim_id[:12]: pytest.approx(v.p_supported_holm, abs=0.001) for v in verdicts} == VERDICTS
    assert {(v.outcome, v.reason) for v in verdicts} == {("INCONCLUSIVE", "n_too_small")}
    assert [claim.id for claim in family.claims] == [verdict.claim_id for verdict in verdicts]
    assert not family.exploratory and not any(verdict.exploratory for verdict in verdicts)


def test_its_claims_read_by_either_word_and_are_written_as_they_were(path: Path) -> None:
    with Ledger(path, create=False) as ledger:
        claims = ledger.claims()
    for claim in claims:
        assert claim.schema == 1
        assert (claim.check, claim.total_effect) == (claim.quantity, claim.scale)
        assert {"check", "total_effect"} <= set(claim.to_json())
        assert not {"schema", "quantity", "scale", "scale_name"} & set(claim.to_json())
        assert Claim.from_json(claim.to_json()).id == claim.id


def test_its_claims_give_the_same_figures_when_they_are_tested_again(path: Path) -> None:
    with Ledger(path, create=False) as ledger:
        stored = [(claim, ledger.evidence(claim)[-1]) for claim in ledger.claims() if claim.quantity not in OF_CIRCUIT]
    opened = {name: pairs.split("validation") for name, pairs in planted_pairs(8).items()}
    runs = Runs(planted_induction(0), opened)
    for claim, before in stored:
        again = check(claim, runs=runs)
        assert [getattr(again, name) for name in SAME] == [getattr(before, name) for name in SAME]
        np.testing.assert_allclose(again.effects, before.effects, atol=1e-4)
        np.testing.assert_allclose(again.control or (), before.control or (), atol=1e-4)
        for name, values in before.nulls.items():
            np.testing.assert_allclose(again.nulls[name], values, atol=1e-4)
