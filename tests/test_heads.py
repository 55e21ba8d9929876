"""Heads in any text: what is read of them, roles on planted heads, and `vesalius heads`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
import vesalius as vs
from pages import Page, run_examples
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder
from vesalius.describe import HEADS_IN_TEXT, OTHERWISE_IN_TEXT
from vesalius.errors import InputError, UnknownNameError
from vesalius.quantities import LOOKS_AT, TARGETS, WRITES_WHAT_IT_SEES
from vesalius.quantities.heads_in_text import seen_in
from vesalius.report import study_schemas
from vesalius.toys.mechanisms import mechanism
from vesalius.toys.text import WordTokenizer

TEXTS = [f"the cat sat on {n} mats and the fox ran from {n * 7} hens. " * 3 for n in range(56)]
FIRST = 3


class Letters:
    """A token is punctuation, a line break, a digit or a letter, by its id."""

    def decode(self, ids: list[int]) -> str:
        return "".join({0: "\n", 1: " .", 2: " Cat", 3: " 7"}.get(int(token), f" w{int(token)}") for token in ids)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_read_of_heads_equals_loops_over_the_models_own_attention(family: str) -> None:
    module = tiny.FAMILIES[family](layers=2).requires_grad_(False)
    model = vs.Model(module, tokenizer=Letters())
    generator = torch.Generator().manual_seed(1)
    # Few different tokens, so that they come again.
    rows = [torch.randint(0, 8, (length,), generator=generator).tolist() for length in (12, 9)]
    seen = seen_in(vs.Runs(model, vs.Corpus(vs.Tokens.from_rows(rows))))
    names = {0: "line break", 1: "punctuation", 2: "capitalised", 3: "digits"}
    module.set_attn_implementation("eager")
    for number, row in enumerate(rows):
        with torch.no_grad():
            out = module(torch.tensor([row]), output_attentions=True, output_hidden_states=True)
        normed = by_hand_directions(module, family, row, out)
        for part, at in seen.numbers.items():
            site = part.writes[0]
            assert site.layer is not None and site.index is not None
            pattern = out.attentions[site.layer][0, site.index]
            for to in TARGETS:
                values, others = [], []
                for q in range(FIRST, len(row)):
                    keys = [k for k in range(q + 1) if is_target(to, row, q, k, names)]
                    rest = [k for k in range(1, q + 1) if k not in keys]
                    if keys and rest:
                        values.append(float(pattern[q, keys].sum()))
                        others.append(float(pattern[q, rest].mean()) * len(keys))
                assert float(seen.mass[to][at, number]) == pytest.approx(sum(values) / max(1, len(values)), abs=1e-5)
                found = float(seen.elsewhere[to][at, number])
                assert found == pytest.approx(sum(others) / max(1, len(others)), abs=1e-5)
            gained = []
            for q in range(FIRST, len(row)):
                logits = torch.stack([normed(site.layer, site.index, q, k) for k in range(1, q + 1)])
                weights = pattern[q, 1 : q + 1] / pattern[q, 1 : q + 1].sum()
                gained.append(float((weights * logits).sum() - logits.mean()))
            assert seen.copied is not None
            assert float(seen.copied[at, number]) == pytest.approx(sum(gained) / len(gained), abs=1e-4)


def is_target(to: str, row: list[int], q: int, k: int, names: dict[int, str]) -> bool:
    if to == "first":
        return k == 0
    if k == 0:
        return False
    if to in ("itself", "previous", "two back"):
        return q - k == {"itself": 0, "previous": 1, "two back": 2}[to]
    if to == "repeated":
        return k < q and row[k] == row[q]
    if to == "after repeated":
        return k < q and row[k - 1] == row[q]
    # A line break is no other class; punctuation, capitalised words and digits do not overlap here.
    return k < q and names.get(row[k]) == to


def by_hand_directions(module: object, family: str, row: list[int], out: object) -> Callable[..., torch.Tensor]:
    """(layer, head, query, key) -> what the head's write at the query adds to the logit of the token at the key."""
    model = vs.Model(module)  # type: ignore[arg-type]
    run = model.run(vs.Tokens.from_rows([row]), capture=["layers.*.z", "layers.*.resid_post"])
    final = run[f"layers.{len(out.attentions) - 1}.resid_post"][0]  # type: ignore[attr-defined]
    norm = module.model.norm if family == "llama" else module.transformer.ln_f  # type: ignore[attr-defined]
    unembedding = module.lm_head.weight  # type: ignore[attr-defined]

    def logit(layer: int, head: int, q: int, k: int) -> torch.Tensor:
        z = run[f"layers.{layer}.z"][0, q, head]
        if family == "llama":
            o = module.model.layers[layer].self_attn.o_proj.weight  # type: ignore[attr-defined]
            write = o[:, head * len(z) : (head + 1) * len(z)] @ z
            scale = (final[q].pow(2).mean() + norm.variance_epsilon).rsqrt()
        else:
            o = module.transformer.h[layer].attn.c_proj.weight  # type: ignore[attr-defined]
            write = z @ o[head * len(z) : (head + 1) * len(z)]
            write = write - write.mean()
            scale = (final[q].var(unbiased=False) + norm.eps).rsqrt()
        return (write * scale * norm.weight) @ unembedding[row[k]]

    return logit


@pytest.fixture(scope="module")
def planted() -> vs.Model:
    """A GPT-2 with weights set by hand: head 0.0 looks at the token before, head 1.0 after a repetition, and copies.

    Every token and place has a dimension of its own, so that the norms scale all of them alike.
    """
    module = tiny.gpt2(layers=2, tie_word_embeddings=False).requires_grad_(False)
    for parameter in module.parameters():
        parameter.zero_()
    token, place, before, out, wide, sharp = 0, 8, 20, 28, 12, 40.0
    blocks = module.transformer.h
    for norm in (*(one for block in blocks for one in (block.ln_1, block.ln_2)), module.transformer.ln_f):
        norm.weight.fill_(1.0)
    module.transformer.wte.weight[range(8), range(token, token + 8)] = 1
    module.transformer.wpe.weight[range(12), range(place, place + 12)] = 1
    query, key, value = (0, 48, 96)
    blocks[0].attn.c_attn.weight[range(place + 1, place + wide), range(query, query + wide - 1)] = sharp
    blocks[0].attn.c_attn.weight[range(place, place + wide), range(key, key + wide)] = 1
    blocks[0].attn.c_attn.weight[range(token, token + 8), range(value, value + 8)] = 1
    blocks[0].attn.c_proj.weight[range(8), range(before, before + 8)] = 1
    blocks[1].attn.c_attn.weight[range(token, token + 8), range(query, query + 8)] = sharp
    blocks[1].attn.c_attn.weight[range(before, before + 8), range(key, key + 8)] = 1
    blocks[1].attn.c_attn.weight[range(token, token + 8), range(value, value + 8)] = 1
    blocks[1].attn.c_proj.weight[range(8), range(out, out + 8)] = 1
    module.lm_head.weight[range(8), range(out, out + 8)] = 1
    return vs.Model(module, tokenizer=WordTokenizer(), name="induction")


def texts_of_names(n: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(8, generator=generator).tolist() for _ in range(n)]
    return [[f, e, a, b, c, d, a] for a, b, c, d, e, f, *_ in orders]


def corpus_of(rows: list[list[int]], splits: list[str]) -> vs.Corpus:
    documents = tuple(map(str, range(len(rows))))
    return vs.Corpus(vs.Tokens.from_rows(rows), {"document": documents}, tuple(splits))


def test_the_heads_of_an_induction_circuit_are_found_and_hold_on_fresh_texts(planted: vs.Model, tmp_path: Path) -> None:
    rows = texts_of_names(64, 0)
    corpus = corpus_of(rows, ["discovery"] * 32 + ["validation"] * 32)
    ledger = vs.Ledger(tmp_path / "ledger.sqlite")
    heads = [vs.head(layer, index) for layer in range(2) for index in range(4)]
    setting = vs.describe.Discovery.of(vs.Runs(planted, ledger.open(corpus, "discovery")), heads, study="heads")
    found = vs.describe.describe(setting, HEADS_IN_TEXT, otherwise=OTHERWISE_IN_TEXT)
    assert found[vs.head(0, 0)].label == "previous-token head"  # type: ignore[union-attr]
    assert found[vs.head(1, 0)].label == "induction head"  # type: ignore[union-attr]
    # The others have no weights: attention is even, and to look everywhere is no role.
    assert all(found[head] is None for head in heads if head not in (vs.head(0, 0), vs.head(1, 0)))
    fits = [fit for fit in found.fits.values() if fit is not None]
    claims = [claim for fit in fits for claim, _ in vs.describe.claims_of(fit, setting)]
    assert {claim.quantity for claim in claims} == {LOOKS_AT.name, WRITES_WHAT_IT_SEES.name}
    with ledger:
        family = ledger.register(claims)
        fresh = vs.Runs(planted, ledger.open(corpus, "validation"))
        for claim in family.claims:
            ledger.append(vs.validate.check(claim, runs=fresh))
            assert ledger.verdict(claim).outcome == "SUPPORTED", claim.statement


def test_a_claim_about_another_head_is_refuted(planted: vs.Model) -> None:
    """The same sentence about a head that looks everywhere alike."""
    corpus = corpus_of(texts_of_names(48, 1), ["validation"] * 48)
    runs = vs.Runs(planted, corpus)
    right = vs.describe.claim_about(runs, vs.head(0, 0), LOOKS_AT, {"to": "previous"})
    wrong = vs.describe.claim_about(runs, vs.head(0, 1), LOOKS_AT, {"to": "previous"}, size=right.delta)
    outcomes = {
        claim.id: vs.decide([claim], {claim.id: vs.validate.check(claim, runs=runs)})[0].outcome
        for claim in (right, wrong)
    }
    assert outcomes == {right.id: "SUPPORTED", wrong.id: "REFUTED"}


def test_what_cannot_be_asked_of_heads_says_why(planted: vs.Model) -> None:
    runs = vs.Runs(planted, corpus_of(texts_of_names(4, 2), ["discovery"] * 4))
    with pytest.raises(UnknownNameError, match="place that a head can look at"):
        LOOKS_AT.measure(runs, vs.head(0, 0), {"to": "verbs"})
    assert "no attention head" in LOOKS_AT.refuses(runs, vs.neuron(0, 0))
    assert "measured on texts" in LOOKS_AT.refuses(vs.Runs(planted, tiny.pairs()), vs.head(0, 0))
    own = mechanism("induction").model
    without = vs.Model(own.module, tokenizer=WordTokenizer(), adapter=own.adapter)
    assert "where it can be read" in LOOKS_AT.refuses(vs.Runs(without, runs.data), vs.head(0, 0))
    bare = vs.Model(planted.module)
    assert "no tokenizer" in LOOKS_AT.refuses(vs.Runs(bare, runs.data), vs.head(0, 0))
    with pytest.raises(InputError, match="has no tokenizer"):
        vs.studies.describing_heads(bare, TEXTS)
    with pytest.raises(UnknownNameError, match="random-network"):
        vs.studies.describing_heads(planted, TEXTS, baseline="random-directions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("heads")
    tiny_folder(made)
    (made / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return made


def test_the_command_writes_a_page_goes_on_where_it_was_and_says_what_it_found(
    folder: Path, run: Callable[..., Done]
) -> None:
    command = ("heads", "--model", folder / "tiny", "--corpus", folder / "texts.jsonl", "--out", folder / "out")
    done = run(*command, "--context", 64)
    assert done.code == 0, done.err
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["schema"] == "vesalius/heads/1"
    assert {head["verdict"] for head in summary["heads"]} <= {
        None,
        "SUPPORTED",
        "REFUTED",
        "NOT SPECIFIC",
        "INCONCLUSIVE",
    }
    page = Page((folder / "out" / "report.html").read_text())
    assert not page.badly_closed and not page.open
    assert page.count("rect") == len(summary["heads"])
    assert all(sentence in page.text for sentence in summary["answer"])
    again = run(*command, "--context", 64)
    assert json.loads((folder / "out" / "summary.json").read_text())["heads"] == summary["heads"], again.err
    other = run(*command, "--context", 32)
    assert other.code == 2 and "holds another study" in other.err


def test_what_is_written_follows_its_schema_and_the_page_about_it_is_generated(folder: Path) -> None:
    summary = json.loads((folder / "out" / "summary.json").read_text())
    study_schemas.check(summary)
    with pytest.raises(UnknownNameError, match="unknown key"):
        study_schemas.check({**summary, "more": 1})
    with pytest.raises(UnknownNameError, match="schema of a study's summary"):
        study_schemas.check({"schema": "vesalius/other/1"})
    page = Path(__file__).parents[1] / "docs" / "study-schemas.md"
    assert page.read_text() == study_schemas.markdown()


def test_the_command_refuses_what_it_cannot_do(folder: Path, run: Callable[..., Done]) -> None:
    command = ("heads", "--model", folder / "tiny", "--corpus", folder / "texts.jsonl", "--out", folder / "no")
    assert "random-network" in run(*command, "--baseline", "random-directions").err
    short = run(*command, "--tokens", 200)
    assert short.code == 2 and "documents" in short.err
    assert not (folder / "no" / "report.html").exists()


@pytest.mark.demo_model
def test_the_page_runs_and_names_the_known_heads_of_the_demo_model(
    demo: vs.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vs, "load", lambda _: demo)
    run_examples("heads.md")
    said = capsys.readouterr().out
    assert re.search(
        r"layers\.17\.z\[3\] looks 0\.[1-9]\d after repetitions, 0\.0\d\d at as many other tokens", said
    ), said
    assert "head 16.0 as previous-token head: looks at the token before" in said
