"""`vesalius explain`: from texts to descriptions of parts that were tested on other texts, and the pages about them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vesalius as vs
from pages import Page
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder
from vesalius.cli.explaining import numbers, sites_named
from vesalius.describe.output import promoted_tokens
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import Event
from vesalius.jobs.progress import most_resident
from vesalius.model.direct import frozen_norm, token_effects
from vesalius.quantities.activation import counted
from vesalius.report import explain_schema
from vesalius.studies.explain import EXAMPLES, TESTED_PARTS
from vesalius.studies.explaining import documents_needed

TEXTS = [f"the cat sat on {n} mats and the fox ran from {n * 7} hens. " * (2 + n % 3) for n in range(64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> vs.Model:
    return vs.load(tiny_folder(tmp_path_factory.mktemp("explain")))


def planted(model: vs.Model, text: str) -> vs.Direction:
    """A part that fires on one token: the direction of its embedding."""
    token = model.tokenizer.encode(text, add_special_tokens=False)[0]
    weight = model.module.get_input_embeddings().weight.detach()
    return vs.Direction(vs.Site("resid_pre", 0), weight[token], f"embedding of {text}")


@pytest.fixture(scope="module")
def parts(model: vs.Model) -> list[Any]:
    return [planted(model, "f"), *(vs.neuron(1, number) for number in range(6))]


@dataclass(frozen=True)
class Ran:
    folder: Path
    events: int
    found: Any
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def ran(model: vs.Model, parts: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("out")
    same, asked = vs.studies.explaining(model, parts, TEXTS, context=64)
    assert same is model
    events: list[Event] = []
    found = vs.studies.Explanations(vs.studies.explain(same, asked, out=folder, sink=events.append))
    return Ran(folder, len(events), found, summary_of(found))


def summary_of(found: Any) -> dict[str, Any]:
    pages = vs.report.page_names([str(part) for part in found.asked.parts])
    timings = {"seconds": 1.0, "peak_memory_bytes": 1, "created_at": "now"}
    summary: dict[str, Any] = vs.studies.summarise_explained(
        found, command="vesalius explain", timings=timings, pages=pages
    )
    return summary


# --- the texts


def test_the_halves_share_no_document_and_no_context_and_repeated_ones_are_dropped(model: vs.Model) -> None:
    _, asked = vs.studies.explaining(model, [vs.neuron(0, 1)], [*TEXTS, *TEXTS[:5], "short"], context=64)
    assert asked.halves.counts["repeated"] == 5
    assert asked.halves.counts["too short"] == 1
    halves = {name: asked.corpus.split(name) for name in ("discovery", "validation")}
    rows = {name: [tuple(r[k].tolist()) for r, k in zip(half.tokens.ids, half.tokens.real, strict=True)]
            for name, half in halves.items()}  # fmt: skip
    assert not set(rows["discovery"]) & set(rows["validation"])
    assert all(len(set(some)) == len(some) > 0 for some in rows.values())
    texts = {name: {model.tokenizer.decode(ids[1:8]) for ids in some} for name, some in rows.items()}
    assert texts["discovery"] and texts["validation"]
    # What examples are collected from is the discovery half alone.
    discovered = [model.tokenizer.decode(ids) for ids in asked.halves.discovery]
    assert set(discovered) <= {
        model.tokenizer.decode(model.tokenizer.encode(t, add_special_tokens=False)) for t in TEXTS
    }
    assert len(discovered) == 32


def test_a_corpus_that_is_too_short_says_how_much_would_do_and_that_does(model: vs.Model) -> None:
    parts = [vs.neuron(0, number) for number in range(8)]
    with pytest.raises(InputError, match=r"the corpus holds 9 documents .* takes 24, half to discover") as caught:
        vs.studies.explaining(model, parts, TEXTS[:9])
    with pytest.raises(InputError, match=r"--tokens 300 reaches 3 documents") as caught:
        vs.studies.explaining(model, parts, TEXTS, tokens=300)
    enough = re.search(r"about ([\d,]+) tokens", str(caught.value))
    assert enough is not None
    _, asked = vs.studies.explaining(model, parts, TEXTS, tokens=int(enough[1].replace(",", "")) + 200)
    assert sum(asked.halves.tokens.values()) > 0
    with pytest.raises(InputError, match="the corpus holds 0 documents"):
        vs.studies.explaining(model, parts, ["short"])


@pytest.mark.parametrize(("parts", "least"), [(1, 12), (204, 12), (205, 13), (10_000, 18)])
def test_with_as_many_documents_a_p_value_can_pass_the_correction(parts: int, least: int) -> None:
    assert documents_needed(parts) == least
    assert 2.0**-least <= 0.05 / parts


# --- the study


def test_what_was_planted_is_described_and_supported_on_fresh_documents(ran: Ran) -> None:
    one = ran.found["layers.0.resid_pre direction embedding of f"]
    assert one.verdict == "SUPPORTED"
    assert 'on "f"' in one.sentence
    (claim,) = one.claims
    assert claim["n"] == len(ran.found.asked.corpus.split("validation"))
    assert claim["interval"][0] > claim["delta"]
    assert {"effect", "control", "shuffled"} <= {leg["name"] for leg in claim["legs"]}
    assert one.counter["both"] > 0.9 * one.counter["picked"]


def test_the_claims_were_sealed_before_the_other_documents_were_opened(ran: Ran) -> None:
    with vs.Ledger(ran.folder / "ledger.sqlite") as ledger:
        splits = [opening.split for opening in ledger.openings()]
        assert splits == ["discovery", "validation"]
        assert not any(verdict.exploratory for verdict in ran.found.study.verdicts)
        assert ledger.verify().evidence == len(ran.found.study.claims)


def test_counterexamples_are_what_reading_the_texts_shows(ran: Ran) -> None:
    study = ran.found.study
    runs = study[TESTED_PARTS].runs
    for one in (one for one in ran.found if one.counter):
        rule = one.description.predictions[0].parameters["rule"]
        values = vs.quantities.activation.token_values(runs, [one.part])[0]
        fires = (values > study[EXAMPLES][one.part].threshold) & counted(runs)
        picks = vs.quantities.fires_where.picked(runs, rule)
        expected = (int(fires.sum()), int(picks.sum()), int((fires & picks).sum()))
        assert tuple(one.counter[name] for name in ("fires", "picked", "both")) == expected
        for kind, wrong in (("silent", picks & ~fires), ("unexplained", fires & ~picks)):
            shown = one.counter[kind]
            assert len(shown) == min(6, int(wrong.any(1).sum()))
            for example in shown:
                assert example["value"] == pytest.approx(example["values"][example["at"]])
                assert (example["value"] > study[EXAMPLES][one.part].threshold) == (kind == "unexplained")


class StopError(Exception):
    pass


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_a_study_that_was_killed_goes_on_and_says_the_same(
    ran: Ran, model: vs.Model, parts: list[Any], tmp_path: Path, share: float
) -> None:
    _, asked = vs.studies.explaining(model, parts, TEXTS, context=64)
    seen = 0

    def sink(_: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == round(share * ran.events):
            raise StopError

    with pytest.raises(StopError):
        vs.studies.explain(model, asked, out=tmp_path, sink=sink)
    again = vs.studies.Explanations(vs.studies.explain(model, asked, out=tmp_path, sink=vs.silent))
    assert [claim.id for claim in again.study.claims] == [claim.id for claim in ran.found.study.claims]
    plain = lambda summary: {k: v for k, v in summary.items() if k != "timings"}  # noqa: E731
    assert plain(summary_of(again)) == plain(ran.summary)


def test_a_folder_of_another_study_is_refused(ran: Ran, model: vs.Model) -> None:
    _, asked = vs.studies.explaining(model, [vs.neuron(0, 1)], TEXTS, context=64)
    with pytest.raises(InputError, match="holds another study"):
        vs.studies.explain(model, asked, out=ran.folder, sink=vs.silent)


def test_where_no_rule_holds_nothing_is_claimed_and_the_pages_are_there(model: vs.Model, tmp_path: Path) -> None:
    # A direction that nothing is written along never fires, and is no error.
    never = vs.Direction(vs.Site("embed"), torch.randn(model.architecture[1].d_model), "nothing")
    object.__setattr__(never, "vector", torch.zeros_like(never.vector))
    _, asked = vs.studies.explaining(model, [never], TEXTS, context=64)
    found = vs.studies.Explanations(vs.studies.explain(model, asked, out=tmp_path, sink=vs.silent))
    assert found.study.answer[0] == "No rule holds for any of the 1 parts."
    summary = summary_of(found)
    assert summary["counts"] | {"described": 0, "never_fired": 1} == summary["counts"]
    assert found[0].sentence == "never fires on these texts"
    index = vs.report.write_explained(summary, [one._repr_html_() for one in found], tmp_path)
    assert "never fires" in (tmp_path / summary["parts"][0]["page"]).read_text() and index.exists()


# --- baselines


def test_random_directions_take_the_place_of_the_parts_at_their_sites(model: vs.Model, parts: list[Any]) -> None:
    same, asked = vs.studies.explaining(model, parts, TEXTS, context=64, baseline="random-directions")
    assert same is model
    assert [part.reads[0].whole for part in asked.parts] == [part.reads[0].whole for part in parts]
    assert all(isinstance(part, vs.Direction) for part in asked.parts)
    assert len(set(asked.parts)) == len(parts)
    again = vs.studies.explaining(model, parts, TEXTS, context=64, baseline="random-directions")[1]
    assert again.parts == asked.parts
    # Their controls are random directions as well, and must be others.
    runs = vs.Runs(model, asked.corpus)
    controls = vs.validate.matched_controls(runs, asked.parts[0], []).parts
    assert not {tuple(c.vector.tolist()) for c in controls} & {tuple(p.vector.tolist()) for p in asked.parts}


def test_a_random_network_has_the_same_parts_and_other_weights(model: vs.Model, parts: list[Any]) -> None:
    other, asked = vs.studies.explaining(model, parts[1:], TEXTS, context=64, baseline="random-network")
    assert other.content_hash != model.content_hash
    assert asked.parts == tuple(parts[1:])
    with pytest.raises(
        UnknownNameError, match="unknown baseline 'noise'; known: random-directions, random-network, unt"
    ):
        vs.studies.explaining(model, parts, TEXTS, baseline="noise")


def test_latents_of_an_untrained_dictionary_take_the_place_of_those_of_a_trained_one(
    model: vs.Model, parts: list[Any], given: Path
) -> None:
    trained = vs.dictionaries.load(given / "sae")
    same, asked = vs.studies.explaining(
        model, [trained.latent(n) for n in (3, 5)], TEXTS, context=64, baseline="untrained-dictionary"
    )
    assert same is model
    assert [str(part) for part in asked.parts] == [str(trained.latent(n)) for n in (3, 5)]
    assert asked.parts[0].dictionary.content_hash != trained.content_hash
    with pytest.raises(InputError, match="is for latents of one dictionary"):
        vs.studies.explaining(model, parts, TEXTS, context=64, baseline="untrained-dictionary")


# --- made inputs


def test_units_of_a_toy_network_are_explained_and_their_rules_challenged() -> None:
    model = vs.toys.text_network([vs.toys.PlantedUnit((2, 3), 8.0), vs.toys.PlantedUnit((5,), 8.0)])
    texts = [model.tokenizer.decode(row) for row in vs.toys.PlantedText(frequency=0.1).draw(80, 48, 0).tolist()]
    units = [vs.neuron(0, 0), vs.neuron(0, 1), vs.neuron(0, 7)]
    _, asked = vs.studies.explaining(model, units, texts, context=64, challenged=True)
    found = vs.studies.Explanations(vs.studies.explain(model, asked, sink=vs.silent))
    assert [one.verdict for one in found] == ["SUPPORTED", "SUPPORTED", None]
    assert 'on "w2", "w3"' in found[0].sentence
    assert "overlooked" in found.study
    rows = summary_of(found)["parts"]
    assert all(row["given_up"] == [] for row in rows)
    assert explain_schema.check(summary_of(found)) is None


# --- the output side


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_direct_effects_on_tokens_are_those_of_the_frozen_norm(family: str) -> None:
    model, draw = tiny.model(family), torch.Generator().manual_seed(0)
    writes, final = torch.randn(3, 48, generator=draw), torch.randn(3, 48, generator=draw)
    answer, distractor = torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9])
    effects = token_effects(model, writes)
    rows = torch.arange(3)
    found = effects[rows, answer] - effects[rows, distractor]
    exact = frozen_norm(model, final, answer, distractor).of(writes)
    # Alike but for the scale of each row's norm, which is above zero.
    centred = final - final.mean(-1, keepdim=True) if family == "gpt2" else final
    scale = (centred.pow(2).mean(-1) + 1e-5).rsqrt()
    torch.testing.assert_close(found * scale, exact, rtol=1e-3, atol=1e-4)


def test_a_neuron_promotes_what_its_output_weights_point_to(model: vs.Model) -> None:
    layer = model.layer(1)
    column = layer.mlp.down_proj.weight.detach()[:, 4]
    norm, unembedding = model.module.model.norm.weight.detach(), model.W_U
    expected = (column * norm) @ unembedding.T
    (found,) = promoted_tokens(model, [vs.neuron(1, 4)], 3)
    assert [value for _, value in found.promoted] == pytest.approx(expected.topk(3).values.tolist(), rel=1e-4)
    assert [value for _, value in found.suppressed] == pytest.approx(
        (-expected).topk(3).values.neg().tolist(), rel=1e-4
    )
    (elsewhere,) = promoted_tokens(model, [vs.Direction(vs.Site("mlp_post", 1), torch.ones(column.shape[0] * 0 + 96))])
    assert "not into the residual stream" in elsewhere.why


# --- pages


def test_notebook_and_page_show_the_same(ran: Ran) -> None:
    cards = [one._repr_html_() for one in ran.found]
    index = vs.report.write_explained(ran.summary, cards, ran.folder)
    for row, card in zip(ran.summary["parts"], cards, strict=True):
        text = (ran.folder / row["page"]).read_text("utf-8")
        assert card in text
        page = Page(text)
        assert page.badly_closed == [] and page.open == []
        assert "http" not in re.sub(r"http-equiv|<code.*?</code>", "", text)
    page = Page(index.read_text("utf-8"))
    assert page.badly_closed == [] and page.open == []
    assert page.count("tr") == len(cards) + 1
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links == [row["page"] for row in ran.summary["parts"]]
    assert page.count("input") == 6  # one search, five kinds


def test_page_names_are_files_and_no_two_alike() -> None:
    assert vs.report.page_names(["layers.0.z[1]", "layers.0.z 1", "a/../b"]) == [
        "parts/layers.0.z_1.html", "parts/layers.0.z_1-2.html", "parts/a_.._b.html"
    ]  # fmt: skip


def test_the_summary_follows_its_schema_and_the_page_about_it_is_generated(ran: Ran) -> None:
    explain_schema.check(ran.summary)
    for row in (row for row in ran.summary["parts"] if row["claims"]):
        assert {"verdict", "estimate", "interval", "n"} <= set(row["claims"][0])
    with pytest.raises(InputError, match=r"summary\.parts"):
        explain_schema.check({**ran.summary, "parts": [{}]})
    page = Path(__file__).parent.parent / "docs" / "explain-schema.md"
    assert page.read_text("utf-8") == explain_schema.markdown()


# --- the command


def test_names_stand_for_parts() -> None:
    assert list(map(str, sites_named("layers.2.mlp_post[0:3]"))) == [f"layers.2.mlp_post[{n}]" for n in range(3)]
    assert list(map(str, sites_named("layers.2.mlp_post[90]"))) == ["layers.2.mlp_post[90]"]
    assert numbers("0:2, 9,1") == [0, 1, 9]
    for wrong in ("2:2", "a", "1:", ":", "0:99999999"):
        with pytest.raises(InputError, match="names no numbers"):
            numbers(wrong)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, texts and a dictionary."""
    folder = tmp_path_factory.mktemp("given")
    model = vs.load(tiny_folder(folder))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    store = vs.data.harvest(
        model, TEXTS, sites=["layers.1.resid_post"], out=folder / "acts", context=64, sink=vs.silent
    )
    config = vs.TrainConfig(n_latents=48, k=4, steps=20, batch_size=64, held_out=0.3)
    vs.dictionaries.train(store, config, folder / "sae", sink=vs.silent)
    return folder


def test_latents_are_explained_from_the_command_line(run: Callable[..., Done], given: Path, tmp_path: Path) -> None:
    words = ("--corpus", given / "texts.jsonl", "--context", 64, "--model", given / "tiny", "--out", tmp_path / "out")
    done = run("explain", "--dictionary", given / "sae", "--latents", "0:5", "--challenge", *words)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    explain_schema.check(summary)
    assert [row["part"] for row in summary["parts"]] == [f"layers.1.resid_post latent {n}" for n in range(5)]
    assert summary["dictionary"]["latents"] == 48
    assert summary["answer"][0] in " ".join(done.out.split())
    assert "expected cost of everything" in done.words
    assert (tmp_path / "out" / "index.html").exists()
    assert "vesalius explain" in summary["reproduce"]["command"]


def test_what_cannot_be_explained_is_one_message_and_exit_code_2(
    run: Callable[..., Done], given: Path, tmp_path: Path
) -> None:
    def refused(*words: object) -> str:
        done = run("explain", *words, "--model", given / "tiny", "--out", tmp_path / "no")
        assert done.code == 2, done.out
        return done.words

    texts = ("--corpus", given / "texts.jsonl", "--context", 64)
    assert "name parts, such as" in refused(*texts)
    assert "one or the other" in refused("layers.0.mlp_post[1]", "--dictionary", given / "sae", *texts)
    assert "is not a site name" in refused("mlp 3", *texts)
    assert "has 2 layers" in refused("layers.9.mlp_post[1]", *texts)
    assert "numbered from 0" in refused("layers.0.mlp_post[0:1000]", *texts)
    assert "many numbers at each position" in refused("layers.0.mlp_post", *texts)
    assert "there is no latent 48" in refused("--dictionary", given / "sae", "--latents", "40:60", *texts)
    assert "unknown baseline 'noise'" in refused("layers.0.mlp_post[1]", "--baseline", "noise", *texts)
    assert "there is no file or folder" in refused("layers.0.mlp_post[1]", "--corpus", tmp_path / "nothing.jsonl")
    (tmp_path / "one.txt").write_text(TEXTS[0])
    assert "A .txt file is one document" in refused("layers.0.mlp_post[1]", "--corpus", tmp_path / "one.txt")
    assert not (tmp_path / "no" / "index.html").exists()


def test_a_dictionary_of_another_model_is_refused(run: Callable[..., Done], given: Path, tmp_path: Path) -> None:
    other = vs.load(given / "tiny")
    with torch.no_grad():
        other.module.model.embed_tokens.weight.mul_(1.5)
    other.module.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    done = run("explain", "--dictionary", given / "sae", "--corpus", given / "texts.jsonl", "--context", 64,
               "--model", tmp_path / "other", "--out", tmp_path / "no")  # fmt: skip
    assert done.code == 2
    assert "the dictionary was made for" in done.words and "give --model the model that it was made for" in done.words


@pytest.mark.slow
@pytest.mark.demo_model
def test_two_hundred_neurons_take_minutes_and_little_memory(demo: vs.Model, tmp_path: Path) -> None:
    parts = [vs.neuron(2, number) for number in range(200)]
    began = time.process_time()
    model, asked = vs.studies.explaining(demo, parts, "stdlib", tokens=200_000)
    found = vs.studies.Explanations(vs.studies.explain(model, asked, out=tmp_path, sink=vs.silent))
    assert sum(asked.halves.tokens.values()) >= 200_000
    assert time.process_time() - began < 15 * 60
    assert most_resident() < 4e9
    assert found[vs.neuron(2, 90)].verdict == "SUPPORTED"
    supported = sum(one.verdict == "SUPPORTED" for one in found)
    assert 5 <= supported <= 100  # most neurons have no rule of this kind
