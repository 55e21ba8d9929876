"""Long jobs say what they cost and how far they are unless told not to; training writes down what it measures."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest
import torch
from rich.console import Console

import vesalius as vs
from tiny_folder import tiny_folder
from vesalius.dictionaries import Dictionary
from vesalius.dictionaries.training.run_files import _masked
from vesalius.errors import FileFormatError
from vesalius.jobs import Event
from vesalius.jobs.progress import DrawingSink, bars

CONFIG = vs.TrainConfig(n_latents=24, k=3, steps=20, batch_size=64, checkpoint_every=5, held_out=0.3)
TEXTS = [f"the hens and the fox said {number} " * 6 for number in range(24)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> vs.Model:
    return vs.load(str(tiny_folder(tmp_path_factory.mktemp("model"))), sink=vs.silent)


def test_harvest_train_and_quality_show_their_cost_unless_told_to_be_silent(
    model: vs.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def all_of_it(out: Path, **sink: object) -> str:
        store = vs.data.harvest(model, TEXTS, sites=["layers.1.resid_post"], out=out / "acts", context=64, **sink)  # type: ignore[arg-type]
        sae = vs.dictionaries.train(store, CONFIG, out / "sae", **sink)  # type: ignore[arg-type]
        vs.dictionaries.quality(sae, store, model=model, n=100, contexts=3, **sink)  # type: ignore[arg-type]
        return capsys.readouterr().err

    told = all_of_it(tmp_path / "told")
    for words in ("expected cost: about", "of memory", "from here", "are held out", "in the model: about"):
        assert words in told
    assert all_of_it(tmp_path / "silent", sink=vs.silent) == ""


def test_a_bar_says_what_its_last_step_said() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    progress = bars(console)
    draw = DrawingSink(progress)
    draw(Event("start", "train", 0, 5))
    draw(Event("advance", "train", 2, 5, "fvu 0.25 [x]"))
    draw(Event("note", "train", message="beside it"))
    console.print(progress.get_renderable())
    assert isinstance(console.file, io.StringIO)
    assert "2/5" in console.file.getvalue() and "fvu 0.25 [x]" in console.file.getvalue()


def rows(n: int = 500) -> torch.Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(0))


def test_metrics_are_a_line_a_step_and_those_of_the_history(tmp_path: Path) -> None:
    sae = vs.dictionaries.train(rows(), CONFIG, tmp_path, tensorboard=True, sink=vs.silent)
    assert isinstance(sae, Dictionary) and sae.history is not None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    for name in ("loss", "fvu", "l0", "dead", "lr"):
        assert [line[name] for line in lines] == pytest.approx(sae.history[name].tolist())
    assert lines[-1]["tokens"] == 20 * 64 and lines[-1]["tokens_per_second"] > 0
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.")
    found = scalars(events.read_bytes())
    assert len(found) == 20
    assert [step for step, _ in found] == list(range(1, 21))
    assert [values["train/fvu"] for _, values in found] == pytest.approx(sae.history["fvu"].tolist(), rel=1e-6)


def test_metrics_of_a_run_that_was_broken_off_have_no_gap_and_no_step_twice(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "advance" and event.done == 13:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        vs.dictionaries.train(rows(), CONFIG, tmp_path, tensorboard=True, sink=stop)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')  # cut, as by a power cut
    sae = vs.dictionaries.train(rows(), CONFIG, tmp_path, tensorboard=True, sink=vs.silent)
    assert isinstance(sae, Dictionary) and sae.history is not None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["fvu"] for line in lines] == pytest.approx(sae.history["fvu"].tolist())
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert [step for step, _ in scalars(events.read_bytes())] == list(range(1, 21))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match=r"cannot write to .*file"):
        vs.dictionaries.train(rows(), CONFIG, tmp_path / "file" / "sae", sink=vs.silent)


def test_the_checksum_is_that_of_the_record_format() -> None:
    """CRC-32C of "123456789" is E3069283 (RFC 3720, B.4), turned by 15 bits and shifted by a constant."""
    crc = 0xE3069283
    assert struct.unpack("<I", _masked(b"123456789"))[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scalars(content: bytes) -> list[tuple[int, dict[str, float]]]:
    """Step and values of every event, by the wire format of protocol buffers."""
    found, at = [], 0
    while at < len(content):
        (size,) = struct.unpack("<Q", content[at : at + 8])
        assert content[at + 8 : at + 12] == _masked(content[at : at + 8])
        record = content[at + 12 : at + 12 + size]
        fields = dict(parsed(record))
        if 5 in fields:
            values = [dict(parsed(value)) for _, value in parsed(fields[5])]
            found.append((fields[2], {v[1].decode(): struct.unpack("<f", v[2])[0] for v in values}))
        at += size + 16
    return found


def parsed(message: bytes) -> list[tuple[int, object]]:
    fields, at = [], 0
    while at < len(message):
        key, at = message[at], at + 1
        kind = key & 7
        if kind in (0, 2):
            value, shift = 0, 0
            while True:
                byte, at = message[at], at + 1
                value |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            content: object = value
            if kind == 2:
                content, at = message[at : at + value], at + value
        else:
            size = {1: 8, 5: 4}[kind]
            content, at = message[at : at + size], at + size
        fields.append((key >> 3, content))
    return fields
