"""Writing with a cache equals running every longer prompt anew, with edits on the prompt and on what is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
import tiny
import vesalius as vs
from vesalius.errors import InputError, InterventionError, NotFiniteError
from vesalius.model.generation import edited_tokens

NEW = 5


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def ragged() -> vs.Tokens:
    """Prompts of 6 to 9 tokens."""
    return tiny.pairs().tokens("clean")


@pytest.fixture(scope="module")
def even() -> vs.Tokens:
    return vs.Tokens(tiny.pairs().clean)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def anew(model: vs.Model, tokens: vs.Tokens, make: Any, steps: int) -> tuple[list[list[int]], list[list[Tensor]]]:
    """New tokens and their logits, prompt by prompt, without a cache. make: (row, width) -> edits of that run."""
    written, logits = [], []
    for row, (ids, size) in enumerate(zip(tokens.ids.tolist(), tokens.lengths.tolist(), strict=True)):
        here, seen = ids[:size], []
        for _ in range(steps):
            last = model.run(torch.tensor([here]), interventions=make(row, len(here))).logits[0, -1]
            seen.append(last)
            here = [*here, int(last.argmax())]
        written.append(here[size:])
        logits.append(seen)
    return written, logits


def same_as_anew(model: vs.Model, tokens: vs.Tokens, edits: list[Any], make: Any, steps: int = NEW) -> vs.Generation:
    made = model.generate(tokens, steps, interventions=edits)
    written, logits = anew(model, tokens, make, steps)
    assert [list(row) for row in made.new] == written
    expected = torch.stack([torch.stack(rows) for rows in logits])
    assert float((made.logits - expected).abs().max()) <= 1e-5 * float(expected.max() - expected.min())
    return made


# ------------------------------------------------------------------------------------------------------------- as anew


def test_writing_without_edits_equals_running_anew_and_the_models_own_generate(
    model: vs.Model, ragged: vs.Tokens, even: vs.Tokens
) -> None:
    for tokens in (ragged, even):
        same_as_anew(model, tokens, [], lambda row, width: [])
    own = model.module.generate(even.ids, attention_mask=torch.ones_like(even.ids), max_new_tokens=NEW,
                                do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert torch.equal(model.generate(even, NEW).tokens.ids, own)


@pytest.mark.parametrize("padding", ["ragged", "even"])
def test_edits_on_prompt_and_new_tokens_equal_running_anew(
    model: vs.Model, padding: str, request: pytest.FixtureRequest
) -> None:
    tokens: vs.Tokens = request.getfixturevalue(padding)
    vector, source = randn(48), randn(6, 14, 48, seed=1)
    site, positions = "layers.1.resid_post", [2, 4, 9, 10]
    direction = vs.Direction(vs.Site.parse("layers.2.mlp_out"), randn(48, seed=2))

    def make(row: int, width: int) -> list[Any]:
        here = [p for p in positions if p < width]
        return [
            vs.Steer(site, scale=2.0, vector=vector, positions=here),
            vs.Ablate("layers.0.z[1]"),
            vs.Patch("layers.0.mlp_out", source=source[row : row + 1, :width], positions=here),
            vs.Project(direction),
            vs.Noise("embed", scale=0.3, seed=3, examples=torch.tensor([row]), positions=here),
            vs.Replace("layers.1.mlp_in", "layers.1.mlp_out", lambda x: x.sin(), "sin", positions=here),
        ]

    # All prompts are at least 6 long; what is past the end of a run is never reached there.
    edits = [
        vs.Steer(site, scale=2.0, vector=vector, positions=positions),
        vs.Ablate("layers.0.z[1]"),
        vs.Patch("layers.0.mlp_out", source=source, positions=positions),
        vs.Project(direction),
        vs.Noise("embed", scale=0.3, seed=3, positions=positions),
        vs.Replace("layers.1.mlp_in", "layers.1.mlp_out", lambda x: x.sin(), "sin", positions=positions),
    ]
    made = same_as_anew(model, tokens, edits, make)
    assert made.new != model.generate(tokens, NEW).new


@pytest.mark.parametrize("padding", ["ragged", "even"])
def test_values_of_other_runs_while_writing_equal_running_anew(
    model: vs.Model, padding: str, request: pytest.FixtureRequest
) -> None:
    """Freeze, Interchange, and the three ways to ablate: what was recorded goes to the token it was recorded at."""
    tokens: vs.Tokens = request.getfixturevalue(padding)
    names = ["layers.0.attn_out", "layers.1.z", "layers.1.mlp_post", "layers.2.mlp_out"]
    other = model.run(torch.randint(2, tiny.VOCAB, (6, 13), generator=torch.Generator().manual_seed(4)), capture=names)
    order, at = torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([0, 5, 2, 3, 1, 4])

    def edits(rows: Tensor, width: int) -> list[Any]:
        here = [p for p in (1, 4, 8, 9) if p < width]
        cut = vs.Activations({site: other[site][rows, :width] for site in other.activations})
        every = vs.Activations({site: other[site][:, :width] for site in other.activations})
        return [
            vs.Freeze("layers.0.attn_out", source=cut, positions=here),
            vs.Interchange("layers.1.z[1]", source=every, examples=order[rows], source_positions=at[rows],
                           positions=here),
            vs.Ablate("layers.1.mlp_post", mode="mean", reference=other.activations, positions=here),
            vs.Patch("layers.2.mlp_out[5]", source=cut, positions=here),
        ]  # fmt: skip

    everyone = torch.arange(6)
    made = same_as_anew(model, tokens, edits(everyone, 13), lambda row, width: edits(everyone[row : row + 1], width))
    assert not torch.equal(made.logits, model.generate(tokens, NEW).logits)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "phi3", "opt", "bloom", "mixtral"])
def test_other_ways_to_tell_positions_equal_running_anew_too(family: str, ragged: vs.Tokens) -> None:
    """Sliding windows (which count columns), positions from the mask, slopes by distance, experts."""
    model = families.model(family)
    vector = randn(model.architecture[1].d_model)

    def make(_row: int, width: int) -> list[Any]:
        here = [p for p in (2, 8, 9) if p < width]
        return [vs.Steer("layers.0.resid_post", scale=1.0, vector=vector, positions=here), vs.Ablate("layers.1.z[1]")]

    same_as_anew(model, ragged, make(0, 10), make, 4)


@pytest.mark.parametrize("kind", ["q", "k", "v", "resid_mid", "mlp_post"])
def test_edits_of_every_kept_tensor_equal_running_anew(model: vs.Model, ragged: vs.Tokens, kind: str) -> None:
    name = f"layers.1.{kind}"
    edit = vs.Replace(name, name, lambda x: x + 0.5, "shift", positions=[3, 8])
    made = same_as_anew(model, ragged, [edit], lambda _, width: [
        vs.Replace(name, name, lambda x: x + 0.5, "shift", positions=[p for p in (3, 8) if p < width])])  # fmt: skip
    assert not torch.equal(made.logits, model.generate(ragged, NEW).logits)


@pytest.mark.parametrize("padding", ["ragged", "even"])
@pytest.mark.parametrize("kind", ["scores", "pattern"])
def test_edits_of_attention_equal_running_anew_with_values_cut_to_the_width(
    model: vs.Model, kind: str, padding: str, request: pytest.FixtureRequest
) -> None:
    tokens: vs.Tokens = request.getfixturevalue(padding)
    hidden = torch.ones(13, 13, dtype=torch.bool).triu(1)
    given = randn(6, model.architecture[1].n_heads, 13, 13).abs().masked_fill(hidden, -1e9 if kind == "scores" else 0.0)
    edits = [
        vs.Patch(f"layers.1.{kind}[2]", source=given[:, 2], positions=[4, 9, 11]),
        vs.Ablate("layers.0.pattern[0]"),
    ]

    def make(row: int, width: int) -> list[Any]:
        here = [p for p in (4, 9, 11) if p < width]
        return [
            vs.Patch(f"layers.1.{kind}[2]", source=given[row : row + 1, 2, :width, :width], positions=here),
            edits[1],
        ]

    made = same_as_anew(model, tokens, edits, make)
    assert not torch.equal(made.logits, model.generate(tokens, NEW).logits)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gemma2"])
@pytest.mark.parametrize("kind", ["scores", "pattern"])
def test_edited_attention_inside_a_window_equals_running_anew(family: str, kind: str, ragged: vs.Tokens) -> None:
    """The cache then holds the last keys only."""
    model, back = families.model(family), torch.arange(12)[:, None] - torch.arange(12)
    outside = (back < 0) | (back >= 3)
    given = randn(6, 6, 12, 12).abs().masked_fill(outside, -1e9 if kind == "scores" else 0.0)

    def make(row: int, width: int) -> list[Any]:
        here = [p for p in (5, 9, 10) if p < width]
        rows = slice(row, row + 1) if row >= 0 else slice(None)
        return [vs.Patch(f"layers.0.{kind}", source=given[rows, :, :width, :width], positions=here)]

    made = same_as_anew(model, ragged, make(-1, 12), make, 4)
    assert not torch.equal(made.logits, model.generate(ragged, 4).logits)


def test_per_example_positions_and_masks_are_token_numbers(model: vs.Model, ragged: vs.Tokens) -> None:
    last = ragged.lengths - 1
    each = vs.Ablate("layers.1.z", positions=last)
    as_mask = vs.Ablate("layers.1.z", positions=torch.arange(9) == last[:, None])
    first_new = vs.Ablate("layers.1.z", positions=ragged.lengths)
    made = [model.generate(ragged, 3, interventions=[edit]) for edit in (each, as_mask, first_new)]
    assert torch.equal(made[0].logits, made[1].logits)
    plain = model.generate(ragged, 3)
    assert torch.equal(made[2].logits[:, 0], plain.logits[:, 0])
    assert not torch.equal(made[2].logits[:, 1], plain.logits[:, 1])
    assert not torch.equal(made[0].logits[:, 0], plain.logits[:, 0])


def test_an_edit_on_a_new_token_leaves_what_came_before_alone(model: vs.Model, ragged: vs.Tokens) -> None:
    late = vs.Ablate("layers.0.resid_post", positions=ragged.lengths + 2)
    made, plain = model.generate(ragged, NEW, interventions=[late]), model.generate(ragged, NEW)
    assert torch.equal(made.logits[:, :3], plain.logits[:, :3])
    assert not torch.equal(made.logits[:, 3], plain.logits[:, 3])


def test_padding_side_and_neighbours_do_not_change_what_is_written(model: vs.Model, ragged: vs.Tokens) -> None:
    ids, mask = torch.zeros_like(ragged.ids), torch.zeros_like(ragged.real)
    for row, size in enumerate(ragged.lengths.tolist()):
        ids[row, 9 - size :], mask[row, 9 - size :] = ragged.ids[row, :size], True
    edit = vs.Noise("layers.1.resid_post", scale=1.0, positions=[1, 7])
    right, left = (
        model.generate(t, NEW, interventions=[edit], temperature=1.0, seed=2) for t in (ragged, vs.Tokens(ids, mask))
    )
    assert right.new == left.new
    assert torch.allclose(right.logits, left.logits, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- captures


@pytest.mark.parametrize("padding", ["ragged", "even"])
def test_captures_are_those_of_one_run_over_everything_written(
    model: vs.Model, padding: str, request: pytest.FixtureRequest
) -> None:
    tokens: vs.Tokens = request.getfixturevalue(padding)
    names = ["layers.1.z", "layers.2.resid_post", "layers.0.k", "logits", "layers.1.pattern", "layers.1.result"]
    edit = vs.Steer("layers.0.resid_post", scale=1.0, vector=randn(48))
    made = model.generate(tokens, NEW, interventions=[edit], capture=names)
    ran = made.activations.tokens
    assert ran is not None
    assert torch.equal(ran.lengths, tokens.lengths + NEW - 1)
    once = model.run(ran, capture=names, interventions=[edit])
    for name in names:
        assert made[name].shape == once[name].shape
        real = ran.real if "pattern" not in name else ran.real[:, None, :, None] & ran.real[:, None, None, :]
        found, expected = (run[name] * real[(...,) + (None,) * (run[name].ndim - real.ndim)] for run in (made, once))
        assert torch.allclose(found, expected, atol=1e-4), name


def test_diagnostics_say_in_which_pass_an_edit_acted(model: vs.Model, ragged: vs.Tokens) -> None:
    edits = [vs.Ablate("layers.0.z", positions=[1]), vs.Ablate("layers.1.z", positions=ragged.lengths + 1)]
    found = model.generate(ragged, 4, interventions=edits).diagnostics
    assert [(entry["pass"], entry["intervention"]["part"]["site"]) for entry in found] == [
        (0, "layers.0.z"), (2, "layers.1.z")]  # fmt: skip
    assert found[1]["norm_ratio"] == 0.0


# ------------------------------------------------------------------------------------------------------ choosing tokens


def test_sampling_is_the_seeds_doing_and_follows_the_distribution(model: vs.Model) -> None:
    ids = torch.tensor([[5, 6, 7]]).expand(4000, -1).contiguous()
    made = model.generate(ids, 1, temperature=2.0, seed=0)
    expected = (made.logits[0, 0] / 2).softmax(-1)
    counts = torch.bincount(torch.tensor(made.new)[:, 0], minlength=tiny.VOCAB) / 4000
    assert float((counts - expected).abs().max()) < 0.03
    few = ids[:3]
    runs = [model.generate(few, 4, temperature=2.0, seed=seed).new for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) == 3  # draws of their own


def test_a_stop_token_ends_its_prompt_and_not_the_others(model: vs.Model, ragged: vs.Tokens) -> None:
    plain = model.generate(ragged, NEW)
    stop = plain.new[0][1]
    made = model.generate(ragged, NEW, stop=stop, capture=["layers.0.z"])
    for full, cut in zip(plain.new, made.new, strict=True):
        assert cut == (full[: full.index(stop) + 1] if stop in full else full)
    assert made.tokens.lengths.tolist() == [
        n + len(row) for n, row in zip(ragged.lengths.tolist(), made.new, strict=True)
    ]
    ran = made.activations.tokens
    assert ran is not None
    assert made["layers.0.z"].shape[1] == ran.ids.shape[1]
    alone = model.generate(vs.Tokens(ragged.ids[:1, : int(ragged.lengths[0])]), NEW, stop=stop)
    assert alone.new == made.new[:1]
    assert alone.logits.shape[1] == len(alone.new[0])


def test_hooks_are_gone_after_writing_and_after_an_error(model: vs.Model, ragged: vs.Tokens) -> None:
    def fail(tensor: Tensor) -> Tensor:
        if tensor.shape[1] == 1:
            raise RuntimeError("stop")
        return tensor

    broken = vs.Replace("layers.1.z", "layers.1.z", fail, "fail")
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(ragged, NEW, interventions=[broken, vs.Ablate("layers.0.v")], capture=["layers.0.z"])
    model.generate(ragged, 2, interventions=[vs.Ablate("layers.0.v")], capture=["*"])
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()) == 0
    assert model.module.config._attn_implementation == "sdpa"


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (-1, "position -1: while a model writes, positions count from the start"),
        (13, r"position 13 is never run: prompts of 9 tokens and 5 new ones are run up to position 12"),
        (torch.ones(6, 4).bool(), r"a position mask must be \(6, 9\) \(the prompts\) or \(6, 13\)"),
        (torch.tensor([1, 2]), r"per-example positions must be \[6\]"),
    ],
)
def test_positions_that_are_never_run_are_refused(
    model: vs.Model, ragged: vs.Tokens, positions: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(ragged, NEW, interventions=[vs.Ablate("layers.0.z", positions=positions)])


def test_positions_become_masks_over_what_is_run() -> None:
    lengths = torch.tensor([2, 4])
    assert edited_tokens(None, lengths, 3).tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert edited_tokens([1, 5], lengths, 3).long().tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1]]
    assert edited_tokens(lengths, lengths, 3).long().tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]


def test_values_that_do_not_reach_as_far_as_they_are_used_are_refused(model: vs.Model, ragged: vs.Tokens) -> None:
    source = model.run(ragged, capture=["layers.0.z"]).activations
    with pytest.raises(
        InterventionError, match=r"token 9 of prompt 0 is to be edited, but its source, .* has 9 tokens"
    ):
        model.generate(ragged, NEW, interventions=[vs.Patch("layers.0.z", source=source)])
    inside = vs.Patch("layers.0.z", source=source, positions=ragged.real)
    assert model.generate(ragged, NEW, interventions=[inside]).new == model.generate(ragged, NEW).new


def test_what_cannot_be_done_while_writing_is_refused(model: vs.Model, even: vs.Tokens) -> None:
    with pytest.raises(InterventionError, match=r"Noise at layers.0.pattern is not fixed token by token"):
        model.generate(even, 2, interventions=[vs.Noise("layers.0.pattern", scale=1.0)])
    with pytest.raises(InputError, match="max_new_tokens must be at least 1; got 0"):
        model.generate(even, 0)
    with pytest.raises(InputError, match="sampling needs seed="):
        model.generate(even, 1, temperature=1.0)
    with pytest.raises(InputError, match="temperature must be 0"):
        model.generate(even, 1, temperature=-1.0)
    with pytest.raises(NotFiniteError, match="the logits of new token 0 are NaN"):
        model.generate(even, 1, interventions=[vs.Steer("layers.0.resid_post", scale=float("nan"), vector=randn(48))])
    with pytest.raises(InputError, match="does not write"):
        vs.Model(nn.Linear(2, 2)).generate(torch.ones(1, 2), 1)
