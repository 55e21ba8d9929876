"""What is said of channels, and images made for them: planted detectors that must be found, and one that must not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vesalius as vs
from vesalius.describe import Discovery, claims_of
from vesalius.errors import InputError
from vesalius.images import (
    Curves,
    Kinds,
    Pictures,
    Scaling,
    ask_kind,
    curves,
    exciting,
    foretells,
    stimuli,
    synthesise_images,
    tuning_of,
)
from vesalius.images.describing import areas_under
from vesalius.quantities import SELECTS, Runs

SIZE = 32
SMALL = Scaling(SIZE)
RADII, TURNS = (12, 17, 25), tuple(range(0, 360, 30))


def arc(radius: float, turn: float, side: int = 21) -> Tensor:
    """A kernel that fits a curve, drawn as the stimuli are but by other formulas, with zero mean."""
    at = (torch.arange(side) - side // 2) * 64 / SIZE
    x, y = at[None].expand(side, side), at[:, None].expand(side, side)
    cx, cy = -radius * math.cos(math.radians(turn)), -radius * math.sin(math.radians(turn))
    ring = torch.exp(-((((x - cx) ** 2 + (y - cy) ** 2).sqrt() - radius) ** 2) / 4.5)
    found = ring * torch.exp(-(x**2 + y**2) / 162)
    return found - found.mean()


class Detectors(nn.Module):
    """0: curves that bulge to the right, of either polarity; 1: upright lines; 2: anything bright; 3: red."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 4, 21, padding=10, bias=False)
        straight = arc(1e6, 0)
        kernels = [arc(15, 0), straight, torch.ones(21, 21) / 50, torch.zeros(21, 21)]
        with torch.no_grad():
            self.map.weight.copy_(torch.stack(kernels)[:, None].expand(4, 3, 21, 21))
            self.map.weight[3, 0, 10, 10], self.map.weight[3, 1:, 10, 10] = 2.0, -1.0
        self.act, self.pool, self.head = nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.map(x)
        # Either polarity: the arc and the line see size.
        found = torch.cat([found[:, :2].abs(), found[:, 2:].relu()], 1)
        out: Tensor = self.head(self.pool(self.act(found)).flatten(1))
        return out


@pytest.fixture(scope="module")
def model() -> vs.Model:
    torch.manual_seed(0)
    return vs.Model(Detectors().eval())


@pytest.fixture(scope="module")
def shown() -> vs.Corpus:
    return curves(SMALL, RADII, TURNS, repeats=2).corpus()


def channel(number: int) -> vs.Channel:
    return vs.Channel("module:act|out", number)


def test_a_planted_curve_detector_is_described_and_a_line_detector_is_not(model: vs.Model, shown: vs.Corpus) -> None:
    discovery = Discovery.of(Runs(model, shown), [channel(number) for number in range(4)])
    describer = Curves()
    describer.prepare(discovery, discovery.members)
    made = [describer.describe(discovery, member) for member in discovery.members]
    assert made[0].fits and "bulge at 0 degrees" in made[0].sentence
    assert [one.fits for one in made[1:]] == [False, False, False]
    # A line detector is tuned as well, but as much to curves of the other side, and to lines.
    assert made[1].predictions[2].mean < 0
    tuning = tuning_of(discovery.runs, channel(0))
    assert tuning.curves.shape == (3, 12) and tuning.within(160, 180) == ["180"]
    claims = [claim for claim, _ in claims_of(made[0], discovery)]
    assert [claim.quantity for claim in claims] == ["selects"] * 3
    assert len(claims[0].control["parts"]) == 3


def test_claims_about_it_are_supported_on_fresh_images_and_not_of_random_weights(
    model: vs.Model, shown: vs.Corpus, tmp_path: Path
) -> None:
    fresh = curves(SMALL, RADII, TURNS, repeats=2, seed=1)
    runs, new = Runs(model, shown), Runs(model, fresh.corpus())
    discovery = Discovery.of(runs, [channel(0)])
    claims = [claim for claim, _ in claims_of(Curves().describe(discovery, channel(0)), discovery)]
    evidence = [vs.validate.check(claim, runs=new) for claim in claims]
    found = vs.decide(claims, {one.claim_id: one for one in evidence})
    assert [verdict.outcome for verdict in found] == ["SUPPORTED"] * 3
    random = vs.validate.reinitialised(model, 0)
    other = [vs.validate.check(claim, model=random, data=fresh.corpus(), allow_other_model=True) for claim in claims]
    outcomes = [one.outcome for one in vs.decide(claims, {one.claim_id: one for one in other})]
    assert outcomes.count("SUPPORTED") < 3


def test_kinds_of_image_are_found_for_planted_channels(model: vs.Model) -> None:
    known = stimuli(SMALL, repeats=3)
    discovery = Discovery.of(Runs(model, known.corpus()), [channel(3)])
    made = Kinds().describe(discovery, channel(3))
    assert made is not None and made.fits
    assert made.predictions[0].parameters["some"]["colour"] == ["red"]
    assert made.rivals
    again = type(made).from_json(made.to_json())
    assert again == made
    whole = SELECTS.measure(discovery.runs, channel(3), made.predictions[0].parameters)
    mask = torch.tensor([colour == "red" for colour in known.labels["colour"]])
    (values,) = [exciting(model, [channel(3)], known, top=2)[0].values]
    assert float(areas_under(values, mask[None])[0]) <= float(whole.mean()) + 0.5 + 1e-6


def test_areas_under_many_rules_are_those_of_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (40,), generator=draw).float()
    masks = torch.rand(5, 40, generator=draw) < 0.3
    for mask, area in zip(masks, areas_under(values, masks), strict=True):
        pairs = values[mask][:, None] - values[~mask][None]
        assert float(area) == pytest.approx(float(((pairs > 0) + 0.5 * (pairs == 0)).double().mean()))


def test_selects_refuses_what_it_cannot_measure(model: vs.Model, shown: vs.Corpus) -> None:
    runs = Runs(model, shown)
    for given, says in (
        ({"some": {"hue": ["red"]}}, "unknown label"),
        ({"some": {}}, "one label at least"),
        ({"some": {"family": ["curve"]}, "others": {"orientation": ["0"]}}, "of both kinds"),
        ({"some": {"family": ["star"]}}, "0 images of one kind"),
        ({"some": {"family": ["curve"]}, "at": "median"}, "unknown place"),
    ):
        with pytest.raises(InputError, match=says):
            SELECTS.measure(runs, channel(0), given)
    with pytest.raises(InputError, match="curves and lines"):
        tuning_of(Runs(model, stimuli(SMALL, repeats=1).subset(range(48)).corpus()), channel(0))


class Oracle:
    """Answers what it is told to, and keeps what it was asked."""

    def __init__(self, answer: str) -> None:
        self.answer, self.asked = answer, list[Any]()

    def complete(self, messages: Any) -> str:
        self.asked += messages
        return self.answer


def test_a_model_that_sees_is_held_to_what_it_says(model: vs.Model) -> None:
    known = stimuli(SMALL, repeats=2)
    discovery = Discovery.of(Runs(model, known.corpus()), [channel(3)])
    found = exciting(model, [channel(3)], known, top=3)[0]
    chat = Oracle('It likes red. {"sentence": "red things", "some": {"colour": ["red"]}}')
    said = ask_kind(chat, found, discovery, SMALL)
    assert said.fits and "red things" in said.sentence
    parts = chat.asked[0]["content"]
    pictures = [one for one in parts if one["type"] == "image_url"]
    assert len(pictures) >= 3 and pictures[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert not ask_kind(Oracle('{"some": {"colour": ["blue"]}}'), found, discovery, SMALL).fits
    for answer, says in (
        ("no idea", "no JSON object"),
        ('{"some": {}}', "names no kind"),
        ('{"some": {"mood": ["sad"]}}', "unknown label"),
        ('{"some": {"colour": ["mauve"]}}', "unknown value of colour"),
    ):
        with pytest.raises(InputError, match=says):
            ask_kind(Oracle(answer), found, discovery, SMALL)


# ----------------------------------------------------------------------------------------------------------- synthesis


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 1, 16, bias=False)
        weight = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.map.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.map(x).flatten(1)
        return found


def test_a_made_image_for_a_planted_channel_beats_the_best_picture(model: vs.Model) -> None:
    known = stimuli(SMALL, repeats=1)
    made = synthesise_images(model, channel(3), SMALL, steps=40, pictures=known)
    assert made.beats or "NOT more" in made.sentence
    mean = SMALL.fractions(made.images).mean((0, 2, 3))
    assert float(mean[0]) > float(mean[1:].max()) + 0.2  # red
    assert made.held_out.shape == (2,) and float(made.held_out.min()) > 0.5 * float(made.values.min())
    SMALL.check(made.images)
    top = [one.number for one in exciting(model, [channel(3)], known, top=2)[0].of("top")]
    said = foretells(model, channel(3), made, top, known, stimuli(SMALL, repeats=1, seed=1))
    assert -1 <= said.made <= 1 and -1 <= said.natural <= 1 and said.n == 2


def test_the_optimum_of_a_linear_part_is_its_weight_vector() -> None:
    net = Linear().eval()
    made = synthesise_images(
        vs.Model(net), vs.Channel("module:map|out", 0), Scaling(16), optima=1, steps=300, norm=1.0, robust=False
    )
    weight = net.map.weight.detach().flatten()
    assert float(torch.cosine_similarity(made.images.flatten(), weight, dim=0)) > 1 - 1e-4
    assert float(made.values[0]) == pytest.approx(float(weight.norm()), rel=1e-4)


def test_images_made_for_one_part_are_pushed_apart(model: vs.Model) -> None:
    def cosine(diversity: float) -> float:
        made = synthesise_images(model, channel(2), SMALL, steps=12, diversity=diversity, seed=2)
        flat = torch.nn.functional.normalize((made.images - made.images.mean((2, 3), keepdim=True)).flatten(1), dim=1)
        return float(flat[0] @ flat[1])

    assert cosine(3.0) < cosine(0.0) + 1e-3
    with pytest.raises(InputError, match="at least one step"):
        synthesise_images(model, channel(0), SMALL, steps=0)


def test_pictures_without_the_labels_have_no_kinds(model: vs.Model) -> None:
    plain = Pictures(torch.zeros(20, 3, SIZE, SIZE), tuple(map(str, range(20))))
    assert Kinds().describe(Discovery.of(Runs(model, plain.corpus()), [channel(0)]), channel(0)) is None
