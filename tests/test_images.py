"""Networks that see: pictures, stimuli, channels as parts, what excites them, sweeps of channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import vesalius as vs
from vesalius.errors import FileFormatError, InputError, NotFiniteError
from vesalius.images import (
    LITE0,
    Pictures,
    Scaling,
    ablate_channels,
    box_of,
    curves,
    exciting,
    picture,
    read_picture,
    read_pictures,
    responses,
    rows_of,
    stimuli,
)
from vesalius.model.resuming import record_to

SMALL = Scaling(32)


class Block(nn.Module):
    """A convolution with a sum around it, one activation module called twice, and an operation that is no module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.norm(self.second(self.act(self.first(x))))) + x
        return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.act = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()
        self.blocks = nn.ModuleList([Block(8) for _ in range(3)])
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.pool(self.act(x)).flatten(1))
        return found


@pytest.fixture(scope="module")
def net() -> vs.Model:
    return vs.Model(Net().eval())


def images(n: int = 6, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -------------------------------------------------------------------------------------------------------------- sweeps


def by_hand(model: vs.Model, given: Tensor, path: str, channel: int, fill: float = 0.0) -> Tensor:
    def write(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, channel] = fill
        return out

    handle = model.module.get_submodule(path).register_forward_hook(write)
    with torch.no_grad():
        found: Tensor = model.module(given)
    handle.remove()
    return found


@pytest.mark.parametrize("path", ["blocks.0", "blocks.1.second", "blocks.2", "stem", "blocks.2.norm"])
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_a_channel_sweep_equals_raw_hooks(net: vs.Model, path: str, mode: str) -> None:
    given = images()
    found = ablate_channels(net, given, f"module:{path}|out", mode=mode, batch=4)
    whole = net.run(given, capture=f"module:{path}|out")
    classes = whole.logits.argmax(1, keepdim=True)
    for channel in range(8):
        fill = 0.0 if mode == "zero" else float(whole[f"module:{path}|out"][:, channel].mean())
        expected = by_hand(net, given, path, channel, fill).gather(1, classes)[:, 0]
        assert torch.allclose(found.values[channel], expected, atol=1e-5)
    assert float(found.effects.abs().max()) > 1e-3
    assert found.error < 1e-5
    assert not any("forward" in module.__dict__ for module in net.module.modules())


def test_channels_that_are_off_are_not_run() -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model = vs.Model(nn.Sequential(*body).eval())
    with torch.no_grad():
        body[0].bias[2] = -100.0
    found = ablate_channels(model, images(), "module:1|out", target=1)
    assert found.cost.skipped == 6
    assert torch.equal(found.values[2], found.base)
    assert float(found.off_distribution[2]) == 0


def test_what_no_later_module_reads_is_not_kept(net: vs.Model) -> None:
    whole = record_to(net.module, net.module.blocks[2], (images(),), {})
    assert all(not any(one.stride()) for given in whole.outputs.values() for one in given)
    inner = record_to(net.module, net.module.blocks[2].second, (images(),), {})
    kept = [module for module, given in inner.outputs.items() for one in given if any(one.stride())]
    assert kept == [net.module.blocks[1]]


def test_a_run_cannot_start_where_a_module_is_called_twice(net: vs.Model) -> None:
    with pytest.raises(InputError, match="called 2 times"):
        ablate_channels(net, images(), "module:blocks.0.act|out")
    for site, options, says in (
        ("module:head|out", {}, "no map"),
        ("module:blocks.0|in", {}, "at a module's output"),
        ("module:blocks.0|out", {"channels": [8]}, "8 channels"),
        ("module:blocks.0|out", {"target": 5}, "no class 5"),
        ("module:blocks.0|out", {"mode": "median"}, "unknown mode"),
    ):
        with pytest.raises(InputError, match=says):
            ablate_channels(net, images(), site, **options)


# ---------------------------------------------------------------------------------------------------- channels as parts


def test_a_channel_is_a_part_that_is_read_edited_and_named(net: vs.Model) -> None:
    part = vs.Channel("module:blocks.1|out", 3)
    run = net.run(images(), capture=part.reads, interventions=[vs.Ablate(part)])
    assert float(part.value(run.activations).abs().max()) == 0
    assert torch.allclose(run.logits, by_hand(net, images(), "blocks.1", 3), atol=1e-5)
    assert vs.resolve(part.ref) == part
    assert str(part) == "channel 3 of blocks.1"
    with pytest.raises(InputError, match=r"\[image, channel, \.\.\.\]"):
        net.run(images(), interventions=[vs.Ablate(vs.Channel("module:blocks.1|out", 8))])
    with pytest.raises(InputError, match="module's output"):
        vs.Channel("layers.0.mlp_out", 1)


def test_the_pixels_that_a_unit_sees_are_its_receptive_field(net: vs.Model) -> None:
    stem = vs.Channel("module:stem|out", 0)
    assert box_of(net, stem, images()[0], 4, 5) == (7, 9, 9, 11)
    assert box_of(net, stem, images()[0], 0, 0) == (0, 1, 0, 1)
    top, bottom, left, right = box_of(net, vs.Channel("module:blocks.1|out", 0), images()[0], 8, 8)
    assert bottom - top <= 18 and right - left <= 18


class Red(nn.Module):
    """Channel 0: red less the others; channel 1: brightness. Each by place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, -0.5, -0.5], [1.0, 1.0, 1.0]])[:, :, None, None])
        self.act, self.pool, self.head = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.pool(self.act(self.conv(x))).flatten(1))
        return found


def test_exciting_images_of_a_red_detector_are_red() -> None:
    model, shown = vs.Model(Red().eval()), stimuli(SMALL, repeats=1)
    found = exciting(model, [vs.Channel("module:act|out", 0)], shown, top=5)[0]
    assert {shown.labels["colour"][one.number] for one in found.of("top")} == {"red"}
    assert len(found.of("quantile")) == 7
    assert all(one.value <= float(found.values.median()) for one in found.of("near miss"))
    assert found.crop(found.of("top")[0]).shape == (3, 1, 1)
    seen = responses(model, shown, "module:act|out")
    assert torch.equal(seen.values[:, 0], found.values)
    assert seen.shape == (32, 32)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_curves_and_lines_have_one_contrast_and_fresh_seeds_give_fresh_images() -> None:
    shown = curves(SMALL, radii=(10, 20), orientations=(0, 90, 180))
    assert len(shown) == 3 * 4
    spread = shown.values.flatten(1).std(1)
    straight = torch.tensor([family == "line" for family in shown.labels["family"]])
    assert float(spread[straight].mean()) == pytest.approx(float(spread[~straight].mean()), rel=0.1)
    assert not torch.equal(shown.values, curves(SMALL, radii=(10, 20), orientations=(0, 90, 180), seed=1).values)
    assert torch.equal(shown.values, curves(SMALL, radii=(10, 20), orientations=(0, 90, 180)).values)
    SMALL.check(shown.values)
    SMALL.check(stimuli(SMALL, repeats=1).values)
    corpus = shown.corpus(splits=["discovery", "validation"] * 6)
    assert len(corpus.split("validation")) == 6 and corpus.kind == "images"
    assert corpus.split("discovery").labels["family"].count("line") == 3
    with pytest.raises(InputError, match="measured on texts"):
        _ = corpus.tokens


def test_a_folder_of_images_is_read_and_what_is_no_image_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "cats").mkdir()
    pixels = np.zeros((40, 50, 3), np.uint8)
    pixels[:, 25:] = (255, 0, 0)
    image.fromarray(pixels).save(tmp_path / "cats" / "one.png")
    image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    found = read_pictures(tmp_path, SMALL)
    assert found.names == ("cats/one.png", "grey.png") and found.labels["category"] == ("cats", "none")
    assert found.values.shape == (2, 3, 32, 32)
    assert found.values[0, :, 16, 30].tolist() == pytest.approx([1, -1, -1], abs=1e-5)
    assert torch.equal(found.values[1, 0], found.values[1, 2])
    assert SMALL.bytes_of(found.values[0])[16, 30].tolist() == [255, 0, 0]
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(FileFormatError, match="cannot be read as an image"):
        read_pictures(tmp_path, SMALL)
    for path, says in ((tmp_path / "none.png", "there is no image"),):
        with pytest.raises(FileFormatError, match=says):
            read_picture(path, SMALL)
    with pytest.raises(FileFormatError, match="holds no images"):
        (tmp_path / "empty").mkdir()
        read_pictures(tmp_path / "empty", SMALL)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.zeros(2, 3, 24, 32), "takes images"),
        (torch.zeros(2, 32, 32, 3), "channels seem to come last"),
        (torch.full((1, 3, 32, 32), 200.0), "this network's pictures have -1 to 1"),
        (torch.full((1, 3, 32, 32), float("nan")), "NaN"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "images are floats"),
    ],
)  # fmt: skip
def test_images_that_the_network_does_not_take_are_refused(given: Tensor, says: str) -> None:
    with pytest.raises((InputError, NotFiniteError), match=says):
        SMALL.check(given)


def test_pixels_that_are_none_are_refused() -> None:
    for pixels, says in ((np.zeros((3, 40, 40)), "pixels are"), (np.full((9, 9, 3), 300.0), "0 to 255")):
        with pytest.raises(InputError, match=says):
            picture(pixels, LITE0)
    with pytest.raises(InputError, match="2 names for 3"):
        Pictures(torch.zeros(3, 3, 4, 4), ("a", "b"))


# ------------------------------------------------------------------------------------------------------ ViT and rows


@pytest.fixture(scope="module")
def vit() -> vs.Model:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    return vs.Model(transformers.ViTForImageClassification(config).eval())


@pytest.mark.parametrize("method", ["grad_cam", "attention_rollout", "occlusion", "integrated_gradients"])
def test_patches_of_a_vit_are_explained(vit: vs.Model, method: str) -> None:
    image = images(1, 16)[0]
    found = vs.explain(vit, image, 2, method=method, features=4, baseline="mean")
    assert len(found) == 16 and found.names[5] == "rows 4-7, columns 4-7"
    assert float(found.shares.abs().max()) > 0
    if method == "occlusion":
        absent = image.clone()
        absent[:, 4:8, 4:8] = image.mean((1, 2), keepdim=True)
        expected = vit.run(torch.stack([image, absent])).logits[:, 2]
        assert float(found.shares[5]) == pytest.approx(float(expected[0] - expected[1]), abs=1e-5)
    if method == "integrated_gradients":
        assert found.relative_gap < 1e-2


def test_a_neuron_of_a_vit_is_excited_and_selects(vit: vs.Model) -> None:
    shown = stimuli(Scaling(16), repeats=1)
    part = vs.neuron(1, 3)
    runs = vs.Runs(vit, shown.corpus())
    values = vs.quantities.SELECTS.measure(runs, part, {"some": {"family": ["grating"]}})
    assert len(values) == len(shown)
    made = vs.images.synthesise_images(vit, part, Scaling(16), steps=4, optima=1)
    assert made.history.shape == (4, 1)
    with pytest.raises(InputError, match="takes images of 16 x 16"):
        vs.explain(vit, images(1, 32)[0], 2, method="gradient")


@pytest.mark.parametrize("of", ["map", "stream"])
def test_a_dictionary_is_trained_on_channels_and_on_a_vit_s_stream(vit: vs.Model, of: str) -> None:
    if of == "map":
        network = vs.Model(Net().eval())
        rows = rows_of(network, images(), "module:blocks.1|out")
        whole = network.run(images(), capture="module:blocks.1|out")["module:blocks.1|out"]
        assert torch.allclose(rows[16 * 3 + 5], whole[0, :, 3, 5], atol=1e-6)
    else:
        rows = rows_of(vit, images(24, 16), "layers.0.resid_post")
        assert rows.shape == (24 * 17, 24)
    few = vs.TrainConfig(kind="topk", n_latents=32, k=4, batch_size=128, steps=60, lr=3e-3, seed=0)
    coder = vs.dictionaries.train(rows, few, sink=vs.silent)
    rebuilt = coder.decode(coder.encode(rows))
    fvu = float((rows - rebuilt).square().sum() / (rows - rows.mean(0)).square().sum())
    assert fvu < 0.6


def test_a_network_that_counts_batches_has_a_content_hash(net: vs.Model) -> None:
    assert net.module.blocks[0].norm.num_batches_tracked.ndim == 0
    assert len(net.content_hash) == 64
