"""Sweeps of networks that take images or other floats: a ViT by its sites, an EfficientNet, an LSTM, an MLP by path."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vesalius as vs
from vesalius.errors import InputError, NotFiniteError, PairsError
from vesalius.jobs import Event

N, CLASSES = 4, 7
ANSWERS = {"answer": torch.arange(N), "distractor": (torch.arange(N) + 3) % CLASSES}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vit() -> vs.Model:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=40, image_size=8, patch_size=4,
        num_labels=CLASSES, initializer_range=0.2,
    )  # fmt: skip
    return vs.Model(transformers.ViTForImageClassification(config).eval())


@pytest.fixture(scope="module")
def efficient() -> vs.Model:
    """Tiny, with weights and statistics of norms that let a signal through."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    config = transformers.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=320, num_labels=CLASSES
    )
    net = transformers.EfficientNetForImageClassification(config)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    net.train()
    with torch.no_grad():
        for seed in range(20):
            net(randn(8, 3, 32, 32, seed=seed))
    return vs.Model(net.eval(), adapter=None)


def corner_pairs(side: int) -> vs.Pairs:
    """Images that differ in the upper left quarter."""
    clean = randn(N, 3, side, side)
    corrupted = clean.clone()
    corrupted[:, :, : side // 2, : side // 2] = randn(N, 3, side // 2, side // 2, seed=1)
    return vs.Pairs(clean=clean, corrupted=corrupted, **ANSWERS)


def diff(logits: Tensor, pairs: vs.Pairs) -> Tensor:
    rows = torch.arange(len(pairs))
    return logits[rows, pairs.answer] - logits[rows, pairs.distractor]


def by_hand(model: vs.Model, pairs: vs.Pairs, path: str, where: Any, base: str = "corrupted") -> Tensor:
    """The metric when a module's output has the other inputs' value at `where`, with raw hooks."""
    module, seen = model.module.get_submodule(path), list[Tensor]()

    def keep(_module: nn.Module, _args: Any, out: Any) -> None:
        seen.append(out if isinstance(out, Tensor) else out[0])

    def write(_module: nn.Module, _args: Any, out: Any) -> Any:
        whole = (out if isinstance(out, Tensor) else out[0]).clone()
        whole[where] = seen[0][where]
        return whole if isinstance(out, Tensor) else (whole, *out[1:])

    other = "clean" if base == "corrupted" else "corrupted"
    with torch.no_grad():
        handle = module.register_forward_hook(keep)
        model.module(getattr(pairs, other))
        handle.remove()
        handle = module.register_forward_hook(write)
        out = model.module(getattr(pairs, base))
        handle.remove()
    return diff(out if isinstance(out, Tensor) else out.logits, pairs)


# ----------------------------------------------------------------------------------------------------------------- ViT


@pytest.mark.parametrize("base", ["corrupted", "clean"])
def test_every_layer_and_patch_of_a_vit_equals_a_raw_hook(vit: vs.Model, base: str) -> None:
    pairs, heard = corner_pairs(8), list[Event]()
    scores = vs.sweep(vit, pairs, sites="layers.*.resid_post", each="position", base=base, sink=heard.append)
    assert scores.values.shape == (2, 5, N)  # the class token and four patches
    assert heard[0].message.startswith("no replay: attention of the vit family reads later positions too")
    for layer in range(2):
        for position in range(5):
            expected = by_hand(vit, pairs, f"vit.layers.{layer}", (slice(None), position), base)
            assert torch.allclose(scores.values[layer, position], expected, atol=1e-5)
    assert float(scores.effects.abs().max()) > 0.1
    assert bool(scores.mask.all())


def test_patching_the_whole_last_layer_gives_the_other_image(vit: vs.Model) -> None:
    scores = vs.sweep(vit, corner_pairs(8), sites="layers.1.resid_post")
    assert torch.allclose(scores.values[0], scores.source, atol=1e-5)
    assert not torch.allclose(scores.base, scores.source, atol=1e-2)


def test_embeddings_of_equal_patches_are_skipped(vit: vs.Model) -> None:
    scores = vs.sweep(vit, corner_pairs(8), sites="embed", each="position")
    assert scores.cost.skipped == 4 * N
    changed = (scores.effects[0].abs() > 1e-6).any(1).tolist()
    assert changed == [False, True, False, False, False]  # the upper left patch is the first after the class token


def test_heads_of_a_vit_equal_interventions(vit: vs.Model) -> None:
    pairs = corner_pairs(8)
    clean = vit.run(pairs.clean, capture=["layers.*.z"]).activations
    scores = vs.sweep(vit, pairs, sites="layers.*.z", each="head")
    for layer in range(2):
        for head in range(6):
            edit = vs.Patch(f"layers.{layer}.z[{head}]", source=clean)
            logits = vit.run(pairs.corrupted, interventions=[edit]).logits
            assert torch.allclose(scores.values[layer, head], vs.logit_diff(logits, pairs), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"sites": "layers.*.attn_out", "edit": "zero"},
        {"sites": "layers.*.mlp_out", "edit": "mean", "each": "position"},
        {"sites": "layers.*.attn_out", "edit": "resample", "base": "clean"},
        {"sites": "layers.1.mlp_post", "each": "neuron", "group": 8},
        {"sites": "layers.0.z", "each": "head", "hold_patterns": True, "metric": vs.kl_divergence},
        {"sites": vs.Direction(vs.Site.parse("layers.0.resid_post"), randn(48)), "edit": "steer", "scale": 3.0},
        {"sites": "layers.0.resid_post", "each": "position", "metric": vs.answer_logprob},
    ],
    ids=str,
)
def test_other_edits_and_metrics_pass_their_check_and_are_felt(vit: vs.Model, options: dict[str, Any]) -> None:
    scores = vs.sweep(vit, corner_pairs(8), **options)
    assert scores.error is not None
    assert float(scores.effects.abs().max()) > 1e-3


@pytest.mark.parametrize("budget", [1, 2, 1000])
def test_what_runs_together_does_not_change_the_values(vit: vs.Model, budget: int) -> None:
    found, plain = (vs.sweep(vit, corner_pairs(8), sites="layers.0.attn_out", **o) for o in ({"budget": budget}, {}))
    assert torch.allclose(found.values, plain.values, atol=1e-6)


def test_a_killed_sweep_of_images_goes_on(vit: vs.Model, tmp_path: Any) -> None:
    first = vs.sweep(vit, corner_pairs(8), sites="layers.0.attn_out", out=tmp_path)
    again = vs.sweep(vit, corner_pairs(8), sites="layers.0.attn_out", out=tmp_path, sink=vs.silent)
    assert torch.equal(first.values, again.values)
    with pytest.raises(InputError):
        vs.sweep(vit, corner_pairs(8), sites="layers.0.attn_out", out=tmp_path, base="clean")


# ------------------------------------------------------------------------------------------------- networks by path


def test_an_efficientnets_blocks_and_channels_equal_raw_hooks(efficient: vs.Model) -> None:
    pairs, heard = corner_pairs(32), list[Event]()
    blocks = [f"efficientnet.encoder.blocks.{n}" for n in range(7)]
    scores = vs.sweep(efficient, pairs, sites="module:efficientnet.encoder.blocks.*|out", sink=heard.append)
    assert scores.sites == tuple(f"module:{block}|out" for block in blocks)
    assert heard[0].message.startswith("no replay: EfficientNetForImageClassification has no adapter")
    for row, block in enumerate(blocks):
        expected = by_hand(efficient, pairs, block, slice(None))
        assert torch.allclose(scores.values[row], expected, atol=1e-4)
    assert float(scores.effects.abs().max()) > 0.1
    channels = vs.sweep(efficient, pairs, sites=f"module:{blocks[1]}|out", each="position")
    for channel in range(channels.values.shape[1]):
        expected = by_hand(efficient, pairs, blocks[1], (slice(None), channel))
        assert torch.allclose(channels.values[0, channel], expected, atol=1e-4)


def test_an_efficientnet_is_read_and_edited(efficient: vs.Model) -> None:
    images, name = corner_pairs(32).clean, "module:efficientnet.encoder.blocks.1|out"
    assert vs.Site.parse(name) in efficient.sites()
    plain = efficient.run(images, capture=[name])
    with torch.no_grad():
        assert torch.equal(plain.logits, efficient.module(images).logits)
    other = efficient.run(corner_pairs(32).corrupted, capture=[name])
    patched = efficient.run(images, interventions=[vs.Patch(name, source=other.activations)])
    assert not torch.allclose(patched.logits, plain.logits, atol=1e-3)
    channel = vs.Ablate(name, positions=[2])
    edited = efficient.run(images, capture=[name], interventions=[channel])
    assert float(edited[name][:, 2].abs().max()) == 0
    assert torch.equal(edited[name][:, :2], plain[name][:, :2])
    assert edited.diagnostics[0]["norm_ratio"] < 1


@pytest.mark.parametrize("edit", ["zero", "mean", "resample"])
def test_means_of_channels_are_over_examples(efficient: vs.Model, edit: str) -> None:
    pairs, name = corner_pairs(32), "module:efficientnet.encoder.blocks.1|out"
    scores = vs.sweep(efficient, pairs, sites=name, edit=edit)
    other = efficient.run(pairs.clean, capture=[name])
    held = {"zero": torch.zeros_like(other[name]), "mean": other[name].mean(0, keepdim=True).expand_as(other[name])}
    if edit in held:
        run = efficient.run(pairs.corrupted, interventions=[vs.Patch(name, source=held[edit])])
        assert torch.allclose(scores.values[0], vs.logit_diff(run.logits, pairs), atol=1e-4)
    assert scores.error is not None


class Reader(nn.Module):
    """An LSTM over features, read at its last step; `steps` gives logits of every step."""

    def __init__(self, steps: bool = False) -> None:
        super().__init__()
        self.lstm, self.head, self.steps = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, CLASSES), steps

    def forward(self, x: Tensor) -> Tensor:
        out = self.lstm(x)[0]
        return self.head(out if self.steps else out[:, -1])


@pytest.mark.parametrize("steps", [False, True])
def test_an_lstm_over_features_is_swept_step_by_step(steps: bool) -> None:
    torch.manual_seed(0)
    model = vs.Model(Reader(steps).eval())
    pairs = vs.Pairs(clean=randn(N, 3, 5), corrupted=randn(N, 3, 5, seed=1), **ANSWERS)
    scores = vs.sweep(model, pairs, sites="module:lstm|out", each="position")
    assert scores.values.shape == (1, 3, N)
    assert torch.allclose(scores.values[0, :2], scores.base.expand(2, N))  # only the last step is read
    assert torch.allclose(scores.values[0, 2], scores.source, atol=1e-5)


def test_units_of_an_mlp_are_swept() -> None:
    torch.manual_seed(0)
    model = vs.Model(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)))
    pairs = vs.Pairs(clean=randn(N, 5), corrupted=randn(N, 5, seed=1), **ANSWERS)
    scores = vs.sweep(model, pairs, sites="module:1|out", each="position")
    for unit in range(8):
        assert torch.allclose(scores.values[0, unit], by_hand(model, pairs, "1", (slice(None), unit)), atol=1e-5)
    # The logits are linear in the units.
    assert torch.allclose(scores.effects[0].sum(0), scores.source - scores.base, atol=1e-4)


def test_a_classifier_of_prompts_is_swept() -> None:
    torch.manual_seed(0)
    model = vs.Model(nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(24, CLASSES)))
    clean = torch.randint(0, 11, (N, 4), generator=torch.Generator().manual_seed(0))
    pairs = vs.Pairs(clean=clean, corrupted=(clean + 1) % 11, **ANSWERS)
    scores = vs.sweep(model, pairs, sites="module:0|out", each="position")
    for position in range(4):
        expected = by_hand(model, pairs, "0", (slice(None), position))
        assert torch.allclose(scores.values[0, position], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_pairs_of_images_are_pairs(tmp_path: Any) -> None:
    pairs = corner_pairs(8)
    assert pairs.raw
    assert repr(pairs) == "Pairs(4 of [3, 8, 8], corrupted)"
    assert len(set(pairs.example_hashes)) == N
    assert pairs.subset([1, 2]).content_hash != pairs.content_hash == corner_pairs(8).content_hash
    assert pairs.subset([2]).example_hashes[0] == pairs.example_hashes[2]
    assert repr(pairs.inputs("clean")) == "Raw(4 inputs of [3, 8, 8])"


def test_what_are_no_pairs_of_images_is_refused() -> None:
    images = randn(N, 3, 8, 8)
    with pytest.raises(PairsError, match="pair 0: clean and corrupted prompts are identical"):
        vs.Pairs(clean=images, corrupted=images, **ANSWERS)
    with pytest.raises(NotFiniteError, match="corrupted holds NaN or infinity"):
        vs.Pairs(clean=images, corrupted=images / 0, **ANSWERS)
    with pytest.raises(PairsError, match="named_positions and decoder are for prompts"):
        vs.Pairs(clean=images, corrupted=-images, named_positions={"eye": torch.zeros(N, dtype=torch.long)}, **ANSWERS)
    with pytest.raises(InputError, match=r"inputs that are not tokens must be floats \[example, ...\]"):
        vs.Pairs(clean=images, corrupted=torch.ones(N, 3, 8, 8, dtype=torch.long), **ANSWERS)


def test_what_images_cannot_do_yet_says_so(vit: vs.Model, efficient: vs.Model) -> None:
    pairs = corner_pairs(8)
    with pytest.raises(InputError, match=r"Pairs\(4 of \[3, 8, 8\], corrupted\) holds floats and no prompts"):
        vs.attribution_patching(vit, pairs, sites="layers.0.z")
    with pytest.raises(InputError, match="given= takes edits of prompts"):
        vs.sweep(vit, pairs, sites="layers.0.z", given=[vs.Ablate("layers.0.mlp_out")])
    with pytest.raises(InputError, match=r"count the same positions: .*blocks\.1\|out has 8, .* Sweep them apart"):
        vs.sweep(efficient, corner_pairs(32), sites="module:efficientnet.encoder.blocks.*|out", each="position")
    with pytest.raises(InputError, match=r"takes int64 token ids \[batch, pos\]; got Raw\(4 inputs of \[3\]\)"):
        ids = vs.Pairs(clean=randn(N, 3), corrupted=randn(N, 3, seed=1), **ANSWERS)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9,
                                          intermediate_size=8)  # fmt: skip
        vs.sweep(vs.Model(transformers.LlamaForCausalLM(config).eval()), ids, sites="layers.0.z")
