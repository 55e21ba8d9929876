"""Concepts as data: splits that share nothing, files, minimal pairs, tagged words, and what is read of each."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import vesalius as vs
from tiny_folder import tiny_folder
from vesalius.concepts import concept_from_frame, load_concept, minimal_pairs, read_sites, tagged_words
from vesalius.errors import FileFormatError, InputError, UnknownNameError

TEXTS = tuple(f"the fox number {n} ran" for n in range(8)) + tuple(f"the cat number {n} sat" for n in range(8))
LABELS = ("fox",) * 8 + ("cat",) * 8
GROUPS = tuple(str(n) for n in range(8)) * 2


def concept(**changes: Any) -> vs.Concept:
    return vs.Concept(**{"name": "animal", "inputs": TEXTS, "labels": LABELS, "groups": GROUPS, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> vs.Model:
    made = tmp_path_factory.mktemp("concept")
    tiny_folder(made)
    return vs.load(made / "tiny")


def test_division_keeps_groups_whole_and_labels_even() -> None:
    divided = concept().divided(seed=3)
    sides = {split: divided.subset(divided.rows(split)) for split in divided.split_names}
    assert set(sides) == {"discovery", "validation"}
    assert not set(sides["discovery"].groups) & set(sides["validation"].groups)
    assert divided.balance()["discovery"] == {"cat": 4, "fox": 4, "groups": 4}
    assert divided.rows("train").tolist() == divided.rows("discovery").tolist()
    assert "fox" in divided._repr_html_()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ("fox",) * 16}, "two labels are needed"),
        ({"labels": ("fox",) * 14 + ("cat",) * 2}, "'cat' has 2 examples; 4 of each"),
        ({"labels": LABELS[:-1]}, "16 inputs for 15 labels"),
        ({"inputs": ("", *TEXTS[1:])}, "text 0 is empty"),
        ({"splits": ("train",) * 8 + ("test",) * 8}, "every example in discovery"),
        ({"splits": ("train", "test") * 8, "groups": ("a",) * 16}, "group 'a' is in 'discovery' and in 'validation'"),
        ({"inputs": (TEXTS[8], *TEXTS[1:])}, "the same and labelled 'fox' and 'cat'"),
        ({"inputs": (TEXTS[1], *TEXTS[1:]), "groups": (), "splits": ("train", "test") * 8}, "example .* is in"),
        ({"spans": ((0, 99),) * 16}, "outside text 0"),
        ({"labels": (1.0,) * 16}, "not all the same"),
    ],
)
def test_what_would_mislead_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        concept(**changes)


def test_other_distributions_keep_only_what_discovery_has_not_seen() -> None:
    divided = concept().divided(seed=0)
    other = concept(inputs=tuple(f"not {text}" for text in TEXTS), labels=LABELS[8:] + LABELS[:8])
    both = divided.with_shifted({"negated": other})
    assert both.shifted == ("negated",)
    seen = {divided.groups[row] for row in divided.rows("discovery")}
    kept = {both.groups[row].removeprefix("negated: ") for row in both.rows("negated")}
    assert kept and not kept & seen
    with pytest.raises(InputError, match="among those"):
        divided.with_shifted({"same": divided.subset(divided.rows("discovery"))})
    with pytest.raises(UnknownNameError, match="divided"):
        concept().rows("discovery")


def test_files_of_every_kind_give_the_same(tmp_path: Path) -> None:
    rows = [{"text": t, "label": label, "group": g, "split": "train" if int(g) < 4 else "test"}
            for t, label, g in zip(TEXTS, LABELS, GROUPS, strict=True)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    made = [load_concept(tmp_path / f"a.{suffix}") for suffix in ("jsonl", "csv")]
    pandas = pytest.importorskip("pandas")
    made.append(concept_from_frame(pandas.DataFrame(rows), name="a"))
    assert len({one.content_hash for one in made}) == 1
    assert made[0].split_names == ("discovery", "validation")
    with pytest.raises(UnknownNameError, match="statement"):
        load_concept(tmp_path / "a.csv", text="statement")
    with pytest.raises(FileFormatError, match="no file"):
        load_concept(tmp_path / "b.csv")
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": null}\n' * 2)
    with pytest.raises(InputError, match="2 of 2 texts"):
        load_concept(tmp_path / "bad.jsonl")


def test_numbers_as_labels(tmp_path: Path) -> None:
    path = tmp_path / "degree.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}", "label": n / 3}) + "\n" for n in range(12)))
    found = load_concept(path, continuous=True)
    assert found.continuous and found.classes == () and found.numbers[3] == pytest.approx(1.0)
    assert len(found.divided(seed=1).rows("validation")) in range(4, 9)
    path.write_text('{"text": "a", "label": "tall"}\n')
    with pytest.raises(InputError, match="which is no number"):
        load_concept(path, continuous=True)


def test_parquet(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"text": list(TEXTS), "label": list(LABELS)}), tmp_path / "a.parquet")
    assert len(load_concept(tmp_path / "a.parquet")) == 16


def test_minimal_pairs_stay_together_and_tagged_words_know_their_place() -> None:
    pairs = minimal_pairs([f"the foxes {n} run" for n in range(6)], [f"the foxes {n} runs" for n in range(6)])
    divided = pairs.divided(seed=0)
    assert all(len({divided.splits[n], divided.splits[n + 6]}) == 1 for n in range(6))
    sentences = [[("the", "DET"), ("fox", "NOUN"), ("ran", "VERB")]] * 1 + [
        [("a", "DET"), (f"cat{n}", "NOUN"), ("sat", "VERB")] for n in range(4)
    ]
    words = tagged_words(sentences, keep=("NOUN", "VERB"))
    assert words.classes == ("NOUN", "VERB") and len(words) == 10
    start, end = words.spans[0]
    assert words.texts[0][start:end] == "fox" and words.types[0] == "fox"


def test_reading_agrees_with_plain_runs_text_by_text(model: vs.Model) -> None:
    given = concept(spans=((4, 7),) * 16)
    sites = ["layers.0.resid_post", "layers.1.mlp_out", "layers.1.z[1]"]
    tokenizer, first = model.tokenizer, vs.data.bos_token(model.tokenizer)
    found = {at: read_sites(model, given, sites, at=at, sink=vs.silent) for at in ("last", "mean", "span", "tokens")}
    for number in (0, 3, 11):
        ids = tokenizer.encode(TEXTS[number], add_special_tokens=False)
        if first != "none":
            ids = [tokenizer.convert_tokens_to_ids(first), *ids]
        run = model.run(vs.Tokens.from_rows([ids]), capture=[vs.Site.parse(site).whole for site in sites])
        offsets = tokenizer(TEXTS[number], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        more = len(ids) - len(offsets)
        inside = [place + more for place, (a, b) in enumerate(offsets) if a < 7 and b > 4]
        for site in map(vs.Site.parse, sites):
            whole = run[site.whole][0] if site.index is None else run[site.whole][0, :, site.index]
            wanted = {"last": whole[-1], "mean": whole[1:].mean(0), "span": whole[inside].mean(0)}
            for at, rows in wanted.items():
                assert np.allclose(found[at][site][number], rows.detach().numpy(), atol=1e-4), (at, site)
            own = found["tokens"][site][found["tokens"].owner == number]
            assert np.allclose(own, whole[1:].detach().numpy(), atol=1e-4)


def test_images_and_token_ids_are_read_too(model: vs.Model) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    images = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shapes = vs.Concept("shape", images, ("round", "square") * 6)
    rows = read_sites(vs.Model(net.eval()), shapes, "module:1|out", at="mean", sink=vs.silent)
    assert np.allclose(rows["module:1|out"], net[:2](images).mean((2, 3)).detach().numpy(), atol=1e-6)
    ids = torch.randint(2, tiny.VOCAB, (12, 5), generator=torch.Generator().manual_seed(0))
    own = tiny.model("gpt2")
    rows = read_sites(own, vs.Concept("ids", ids, ("a", "b") * 6), "layers.1.resid_post", sink=vs.silent)
    whole = own.run(ids, capture="layers.1.resid_post")["layers.1.resid_post"]
    assert np.allclose(rows["layers.1.resid_post"], whole[:, -1].detach().numpy(), atol=1e-5)
    with pytest.raises(UnknownNameError, match="place to read"):
        read_sites(model, concept(), "layers.0.resid_post", at="first", sink=vs.silent)
    with pytest.raises(InputError, match="context"):
        read_sites(model, concept(), "layers.0.resid_post", context=4, sink=vs.silent)


SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="public data sets are not beside the project")


@needs_shared
def test_statements_about_cities_and_their_negations_share_no_city() -> None:
    folder = SHARED / "geometry-of-truth"
    given = {"text": "statement", "label": "label", "group": "city"}
    cities = load_concept(folder / "cities.csv", **given).divided(seed=0)
    both = cities.with_shifted({"negated": load_concept(folder / "neg_cities.csv", **given)})
    assert both.balance()["negated"] == {"0": 374, "1": 374, "groups": 374}
    with pytest.raises(InputError, match="is in"):
        texts = (*cities.texts, cities.texts[0])
        vs.Concept("leak", texts, (*cities.labels, cities.labels[0]), splits=(*cities.splits, "other"))


@needs_shared
def test_minimal_pairs_and_tagged_words_of_public_data() -> None:
    with gzip.open(SHARED / "blimp" / "blimp.jsonl.gz", "rt") as lines:
        rows = [json.loads(next(lines)) for _ in range(40)]
    pairs = minimal_pairs([row["sentence_good"] for row in rows], [row["sentence_bad"] for row in rows])
    assert pairs.balance()["all"] == {"bad": 40, "good": 40, "groups": 40}
