"""What people see in a notebook: short forms, and plain words when a value of the wrong kind is handed over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
import vesalius as vs
from vesalius.errors import UnknownNameError

SITE = vs.Site.parse("layers.1.resid_post")


@pytest.fixture(scope="module")
def model() -> vs.Model:
    return tiny.model("llama")


def test_values_print_on_one_short_line(model: vs.Model) -> None:
    pairs = tiny.pairs()
    tokens = pairs.tokens("clean")
    run = model.run(tokens, capture="layers.1.z", interventions=vs.Ablate("layers.0.mlp_out"))
    assert repr(SITE) == "Site('layers.1.resid_post')"
    assert repr(vs.Direction(SITE, torch.ones(48), "warm")) == "Direction('warm' at layers.1.resid_post, width 48)"
    assert repr(vs.Subspace(SITE, torch.eye(48)[:3])) == "Subspace(layers.1.resid_post, rank 3, width 48)"
    assert repr(tokens) == "Tokens(6 prompts of 6 to 9 tokens)"
    padded = vs.Tokens(torch.nn.functional.pad(tokens.ids, (0, 4)), torch.nn.functional.pad(tokens.real, (0, 4)))
    assert repr(padded) == repr(tokens)
    assert repr(pairs) == "Pairs(6 of 6 to 9 tokens, corrupted)"
    assert repr(run) == "Run(logits [6, 9, 61], Activations(layers.1.z [6, 9, 6, 8]), 1 interventions)"
    assert repr(vs.logit_diff) == "Metric(logit_diff, logits)"
    assert repr(model.generate(tokens, 2)) == "Generation(6 prompts, up to 2 new tokens)"
    many = repr(model.run(tokens, capture="*").activations)
    assert many.startswith("Activations(embed [6, 9, 48], layers.0.resid_pre [6, 9, 48], ")
    assert many.endswith(f"... ({len(model.sites())} sites))")


def test_pairs_say_what_they_come_with() -> None:
    one = torch.tensor([[3, 4, 5], [6, 7, 8]])
    pairs = vs.Pairs(
        clean=one, corrupted=one + 1, answer=one[:, 0], distractor=one[:, 1], task="mine", corruption="swap",
        groups={"names": ("a", "b")}, splits=("discovery", "validation"), named_positions={"s2": torch.tensor([1, 1])},
    )  # fmt: skip
    assert repr(pairs) == (
        "Pairs(mine, 2 of 3 to 3 tokens, swap; 1 discovery, 1 validation; groups names; named_positions s2)"
    )
    assert repr(pairs.tokens("clean")) == "Tokens(2 prompts of 3 tokens, named_positions s2)"


def test_one_site_and_one_edit_need_no_list(model: vs.Model) -> None:
    tokens, edit = tiny.pairs().tokens("clean"), vs.Ablate("layers.0.mlp_out")
    single, listed = model.run(tokens, SITE, edit), model.run(tokens, [SITE], [edit])
    assert torch.equal(single[SITE], listed[SITE])
    written = model.generate(tokens, 2, edit, "layers.1.resid_post"), model.generate(tokens, 2, [edit], [SITE])
    assert torch.equal(written[0][SITE], written[1][SITE])


UNCHECKED = """
import tiny
import vesalius as vs
from vesalius import errors

model, pairs = tiny.model("llama"), tiny.pairs()
for change in ({"pairs": "When Mary"}, {"metric": "logit_diff"}, {"budget": 0}):
    try:
        vs.sweep(model, **{"pairs": pairs, "sites": "layers.0.z", **change})
    except errors.InputError as error:
        print(error)
try:
    model.run(pairs.tokens("clean"), interventions=["layers.0.mlp_out"])
except errors.InputError as error:
    print(error)
"""


def test_something_else_is_refused_with_what_is_taken() -> None:
    """In a process of its own, without the checks of types that tests have."""
    done = subprocess.run(
        [sys.executable, "-c", UNCHECKED], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "a sweep takes vs.Pairs (from vs.data.ioi, vs.data.load_pairs, or vs.Pairs(clean=...)); got str",
        "metric= takes a vs.Metric such as vs.logit_diff; got 'logit_diff'",
        "budget= is the number of tokens that run together, at least 1; got 0",
        "interventions= takes edits such as vs.Ablate(site); got str",
    ]


def test_many_captured_sites_are_told_by_kind(model: vs.Model) -> None:
    run = model.run(tiny.pairs().tokens("clean"), capture=["layers.*.z", "layers.*.q", "layers.*.k"])
    with pytest.raises(UnknownNameError, match=r"known: layers\.\*\.k, layers\.\*\.q, layers\.\*\.z\. Add it"):
        run["layers.0.v"]
