"""Examples of what makes parts fire: against every value computed the plain way, and with planted units."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import tiny
import vesalius as vs
from tiny_folder import tiny_folder
from vesalius.data.packing import Context, Group
from vesalius.describe import collecting, examples, read_parts
from vesalius.describe.collecting import Collector, Sizes, random_keys
from vesalius.describe.examples import ActivatingExamples, collect_examples
from vesalius.describe.illusion import across_corpora
from vesalius.describe.stored_examples import load_examples, merge_examples, save_examples
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs import Event

TEXTS = [
    "the cat sat on the mat " * 5,
    "",
    "12 hens and the fox " * 12,
    "a",
    "the the the\n\n" * 9,
    "z" * 61,
    "the cat",
]
CONTEXT = 20
SIZES = Sizes(top=6, sample=12, near=4, before=5, after=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> vs.Model:
    return vs.load(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def parts(model: vs.Model) -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    width = model.architecture[1].d_model
    rows = torch.randn(256, width, generator=draw)
    trained = vs.dictionaries.train(rows, vs.TrainConfig(n_latents=24, k=4, batch_size=64, steps=3), sink=vs.silent)
    sites = (vs.Site.parse("layers.1.resid_post"),)
    dictionary = replace(trained, in_sites=sites, out_sites=sites)
    direction = vs.Direction("layers.0.resid_post", torch.randn(width, generator=draw), "random")
    neurons = [vs.neuron(1, 2), vs.neuron(0, 1), vs.neuron(1, 0)]
    return [*neurons, direction, *map(dictionary.latent, range(dictionary.n_latents))]


def collect(model: vs.Model, parts: list[Any], **options: Any) -> ActivatingExamples:
    given = {"context": CONTEXT, "sizes": SIZES, "sink": vs.silent, **options}
    return collect_examples(model, given.pop("texts", TEXTS), parts, **given)


def plainly(model: vs.Model, parts: list[Any]) -> list[tuple[int, int, int, list[float]]]:
    """(document, number of the token, token, value of every part) of every token, by runs of one context each."""
    found = []
    for document, text in enumerate(TEXTS):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        for first in range(0, len(ids), CONTEXT - 1):
            piece = ids[first : first + CONTEXT - 1]
            tokens = vs.Tokens(torch.tensor([[model.tokenizer.bos_token_id, *piece]]))
            run = model.run(tokens, capture=[site for part in parts for site in part.reads])
            values = torch.stack([part.value(run)[0] for part in parts], 1).tolist()
            found += [(document, first + at, token, values[at + 1]) for at, token in enumerate(piece)]
    return found


def test_everything_that_is_kept_is_what_plain_runs_give(model: vs.Model, parts: list[Any]) -> None:
    rows, found = plainly(model, parts), collect(model, parts)
    assert found.tokens == len(rows)
    place = {(document, number): (token, values) for document, number, token, values in rows}
    values = torch.tensor([row[3] for row in rows])
    for number, one in enumerate(found):
        assert one.density == pytest.approx(float((values[:, number] > one.threshold).double().mean()))
        assert int(one.histogram.sum()) == int((values[:, number] > one.threshold).sum())
        for example in (*one.top, *one.sample, *one.near):
            token, plain = place[example.document, example.offset]
            assert example.ids[example.at] == token
            assert example.value == pytest.approx(plain[number], abs=1e-5)
            for step, value in enumerate(example.values):
                beside = place.get((example.document, example.offset + step - example.at))
                if beside is not None and value == value:
                    assert value == pytest.approx(beside[1][number], rel=2e-3, abs=1e-4)
        assert all(example.value > one.threshold for example in (*one.top, *one.sample))
        for example in one.background:
            assert example.value == pytest.approx(
                place[example.document, example.offset][1][number], rel=2e-3, abs=1e-4
            )
        assert all(example.value <= one.threshold for example in one.near)


def test_the_strongest_are_the_strongest_of_their_contexts_and_none_is_there_twice(
    model: vs.Model, parts: list[Any]
) -> None:
    rows = plainly(model, parts)
    for number, one in enumerate(collect(model, parts)):
        best: dict[tuple[int, int], float] = {}
        for document, at, _, values in rows:
            key = (document, at // (CONTEXT - 1))
            best[key] = max(best.get(key, -np.inf), values[number])
        assert [e.value for e in one.top] == sorted((e.value for e in one.top), reverse=True)
        assert len({e.ids for e in one.top}) == len(one.top)
        strongest = max(best.values())
        if strongest > one.threshold:
            assert one.top[0].value == pytest.approx(strongest, abs=1e-5)
        # What the top leaves out is weaker, or its window is there already.
        seen = {(e.document, e.offset // (CONTEXT - 1)) for e in one.top}
        left = [value for key, value in best.items() if key not in seen and value > one.threshold]
        assert len(one.top) == SIZES.top or len(left) <= len(best) - len(one.top)


def test_the_sample_does_not_depend_on_how_text_is_cut_into_groups(
    model: vs.Model, parts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect(model, parts[4:])
    monkeypatch.setattr(read_parts, "_MOST_ROWS", 1)
    cut = collect(model, parts[4:])
    for one, other in zip(whole, cut, strict=True):
        assert one.density == other.density
        assert torch.equal(one.histogram, other.histogram)
        assert {(e.document, e.offset) for e in one.sample} == {(e.document, e.offset) for e in other.sample}
        assert [e.value for e in one.top] == pytest.approx([e.value for e in other.top], rel=1e-5)


def test_a_pass_that_was_killed_goes_on_and_finds_the_same(
    model: vs.Model, parts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_parts, "_MOST_ROWS", 1)
    monkeypatch.setattr(examples, "GROUPS_BETWEEN", 2)
    steps = 0

    def dying(event: Event) -> None:
        nonlocal steps
        steps += event.kind == "advance"
        if steps == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, parts, out=tmp_path, sink=dying)
    resumed, whole = collect(model, parts, out=tmp_path), collect(model, parts)
    state, plain = resumed.collector.state(), whole.collector.state()
    for name, array in plain.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)
    with pytest.raises(InputError, match="another"):
        collect(model, parts[:2], out=tmp_path)


def varied(count: int = 7) -> list[str]:
    """Texts in which nothing is there twice: of equal examples either may be kept."""
    draw = np.random.default_rng(0)
    return ["".join(draw.choice(list("abcdefgh ,.12"), 60)) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 3])
def test_shards_that_are_merged_are_what_one_pass_finds(
    model: vs.Model, parts: list[Any], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(read_parts, "_MOST_ROWS", 1)
    whole = collect(model, parts, texts=varied())
    shards = [collect(model, parts, texts=varied(), shard=(number, count)) for number in range(count)]
    together = merge_examples(shards)
    state, expected = together.collector.state(), whole.collector.state()
    for name, array in expected.items():
        # Which near misses are looked at depends on what had been found by then; equally strong ones come in any order.
        if not name.startswith(("near.", "top.")) or name == "top.key":
            np.testing.assert_allclose(state[name], array, rtol=1e-5, err_msg=name)
    for name in ("top.document", "top.offset"):
        np.testing.assert_array_equal(np.sort(state[name]), np.sort(expected[name]), err_msg=name)
    for one in together:
        assert all(example.value <= one.threshold for example in one.near)


def test_shards_of_different_calls_and_missing_ones_are_refused(
    model: vs.Model, parts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_parts, "_MOST_ROWS", 1)
    first, second = (collect(model, parts[:2], shard=(number, 2)) for number in (0, 1))
    for wrong, reason in [
        ([first], r"shards \[0\] of 2"),
        ([first, first], r"shards \[0, 0\] of 2"),
        ([first, collect(model, parts[1:3], shard=(1, 2))], "different calls"),
        ([first, collect(model, parts[:2], shard=(1, 2), seed=1)], "different calls"),
        ([], "no shards"),
    ]:
        with pytest.raises(InputError, match=reason):
            merge_examples(wrong)
    assert merge_examples([second, first]).tokens == first.tokens + second.tokens
    with pytest.raises(InputError, match="from 0 to count - 1"):
        collect(model, parts, shard=(2, 2))


def test_what_is_stored_as_parquet_is_what_comes_back(model: vs.Model, parts: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pandas

    found = collect(model, parts)
    back = load_examples(save_examples(found, tmp_path), model, parts[3], parts[4].dictionary)
    assert back.parts == found.parts
    assert (back.texts, back.shard, repr(back)) == (found.texts, found.shard, repr(found))
    state = back.collector.state()
    for name, array in found.collector.state().items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)
    table = pandas.read_parquet(tmp_path / "examples.parquet")
    strongest = table[(table["part"] == str(parts[0])) & (table["kind"] == "top") & (table["rank"] == 0)].iloc[0]
    assert strongest["value"] == pytest.approx(found[0].top[0].value)
    assert strongest["token"] == found[0].top[0].token
    assert strongest["text"] == "".join(found[0].top[0].tokens)


def test_stored_examples_that_do_not_fit_are_refused(model: vs.Model, parts: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match=r"holds no parts\.parquet"):
        load_examples(tmp_path, model)
    save_examples(collect(model, parts[:2]), tmp_path)
    with pytest.raises(InputError, match="of another model"):
        load_examples(tmp_path, tiny.model("llama"))
    for name in ("examples.parquet", "parts.parquet"):
        kept = (tmp_path / name).read_bytes()
        for damaged in (kept[: len(kept) // 2], b"not a table", kept[:-40] + bytes(40)):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(FileFormatError, match="no examples that were saved here"):
                load_examples(tmp_path, model)
        (tmp_path / name).write_bytes(kept)


def test_without_pyarrow_storing_says_what_to_install(
    model: vs.Model, parts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        save_examples(collect(model, parts[:1]), tmp_path)


def group(ids: list[int], document: int = 0) -> Group:
    return Group((Context(document, 0, np.array(ids), np.ones(len(ids), dtype=bool)),))


def test_a_polysemantic_unit_is_seen_in_its_quantiles_and_not_among_its_strongest() -> None:
    # f1 + .6 f2: token 1 gives 1 and a little more or less, token 2 gives .6, other tokens nothing.
    draw = np.random.default_rng(0)
    found = Collector(1, torch.tensor([True]), Sizes(top=20, sample=64), seed=0)
    for document in range(200):
        ids = draw.choice([0, 1, 2], size=30, p=[0.9, 0.05, 0.05])
        noise = 0.05 * draw.random(30)
        values = np.select([ids == 1, ids == 2], [1 + noise, 0.6 + noise], 0.0)
        found.add(group(ids.tolist(), document), torch.tensor(values, dtype=torch.float32)[:, None])
    part = vs.neuron(0, 0)
    one = ActivatingExamples((part,), "", {}, found, None)[part]
    assert {example.token for example in one.top} == {"1"}  # what the strongest show is one feature
    shares = dict(one.tokens)
    assert shares["2"] == pytest.approx(0.5, abs=0.2)
    assert {example.token for example in one.band(0, 0.3)} == {"2"}


def test_a_unit_of_a_network_that_reads_two_tokens_shows_one_at_the_top_and_both_in_its_quantiles() -> None:
    module = tiny.llama()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        table = torch.nn.functional.normalize(torch.randn(tiny.VOCAB, 48, generator=draw), dim=1)
        table[[7, 9]] = torch.linalg.qr(torch.randn(48, 2, generator=draw))[0].T
        others = [token for token in range(tiny.VOCAB) if token not in (7, 9)]
        table[others] -= table[others] @ table[[7, 9]].T @ table[[7, 9]]
        module.model.embed_tokens.weight.copy_(table)
    # Token 7 and, more weakly, token 9.
    both = vs.Direction("embed", table[7] + 0.6 * table[9], "7 and 9")
    texts = [torch.randint(2, tiny.VOCAB, (40,), generator=draw).tolist() for _ in range(120)]
    one = collect_examples(vs.Model(module), texts, [both], context=40, bos="none", sink=vs.silent)[0]
    assert {example.token for example in one.top} == {"7"}
    shares = dict(one.tokens)
    assert shares["9"] > 0.15
    assert "9" in {example.token for example in one.band(0, 0.5)}
    assert {example.token for example in one.band(0.9, 1)} == {"7"}


def vit() -> vs.Model:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
                       patch_size=8, num_channels=3, num_labels=5)  # fmt: skip
    return vs.Model(ViTForImageClassification(config).eval())


def test_examples_of_images_are_their_patches_and_those_of_rows_are_the_rows(tmp_path: Path) -> None:
    images, model = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(1)), vit()
    neurons = [vs.neuron(1, number) for number in range(3)]
    found = collect_examples(model, images, neurons, sizes=SIZES, sink=vs.silent)
    values = model.run(images, capture=["layers.1.mlp_post"])["layers.1.mlp_post"]
    assert found.tokens == 50 * 5  # four patches and the class token
    for neuron, one in zip(neurons, found, strict=True):
        plain = neuron.value({vs.Site.parse("layers.1.mlp_post"): values})
        assert one.top[0].value == pytest.approx(float(plain.max()), abs=1e-5)
        for example in (*one.top, *one.sample, *one.near):
            assert example.value == pytest.approx(float(plain[example.document, example.offset]), abs=1e-5)
            assert example.token == f"[input {example.document}]"
        assert len({example.document for example in one.top}) == len(one.top)
        # Near misses are the patches of an image that do not make it fire where another one does.
        fires = set((plain > one.threshold).any(1).nonzero()[:, 0].tolist())
        assert {example.document for example in one.near} <= fires

    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    rows, unit = torch.randn(300, 6, generator=torch.Generator().manual_seed(2)), torch.eye(8)[3]
    part = vs.Direction("module:1|out", unit, "unit 3")
    one = collect_examples(vs.Model(net), rows, [part], sizes=SIZES, sink=vs.silent)[part]
    hidden = net[:2](rows)[:, 3]
    assert [example.document for example in one.top] == hidden.argsort(descending=True)[: SIZES.top].tolist()
    assert one.density == pytest.approx(float((hidden > one.threshold).double().mean()))
    with pytest.raises(InputError, match="give fewer inputs"):
        collect_examples(vs.Model(net), rows, [part], tokens=5)


def test_near_misses_are_tokens_that_the_part_fires_on_elsewhere() -> None:
    # Token 7 fires only after token 3.
    found = Collector(1, torch.tensor([True]), Sizes(), seed=0)
    draw = np.random.default_rng(0)
    for document in range(50):
        ids = draw.integers(0, 10, 40)
        values = ((ids == 7) & (np.roll(ids, 1) == 3) & (np.arange(40) > 0)).astype(np.float32)
        found.add(group(ids.tolist(), document), torch.tensor(values)[:, None])
    one = ActivatingExamples((vs.neuron(0, 0),), "", {}, found, None)[0]
    assert {example.token for example in (*one.top, *one.sample, *one.near)} == {"7"}
    before = [example.tokens[example.at - 1] for example in one.near if example.at > 0]
    assert one.near
    assert "3" not in before


def spoken(rule: dict[str, int], parts: tuple[Any, ...], name: str, seed: int) -> ActivatingExamples:
    """Examples of parts on random text: the first fires on "king"; random ones on the tokens that `rule` gives them."""
    draw, words = np.random.default_rng(seed), [f"w{number}" for number in range(60)] + ["king"]
    found = Collector(len(parts), torch.ones(len(parts), dtype=torch.bool), Sizes(), seed=0)
    for document in range(60):
        ids = draw.integers(0, 61, 40)
        fires = [60, *(rule[str(part)] for part in parts[1:])]
        values = np.stack([(ids == token) * (1 + 0.1 * draw.random(40)) for token in fires], 1)
        found.add(group(ids.tolist(), document), torch.tensor(values, dtype=torch.float32))
    tokenizer = SimpleNamespace(decode=lambda ids: words[ids[0]])
    return ActivatingExamples(parts, "m", {"name": name}, found, tokenizer)


def test_a_concept_is_the_same_on_two_corpora_and_a_random_direction_is_not() -> None:
    parts = tuple(vs.neuron(0, number) for number in range(22))
    draw = np.random.default_rng(1)
    # On each corpus a random direction has some token of its own; so has the last part, which looks like a concept.
    rules = [{str(part): int(draw.integers(0, 60)) for part in parts} for _ in range(2)]
    first, second = (spoken(rule, parts, name, seed) for seed, (rule, name) in enumerate(zip(rules, "ab", strict=True)))
    concept, illusion = across_corpora(first, second, parts[1:21])
    assert (concept.within, concept.across, illusion.within) == (1.0, 1.0, 1.0)
    assert illusion.across < 0.5
    assert concept.p <= 0.05 < illusion.p
    assert (concept.suspicious, illusion.suspicious) == (False, True)
    with pytest.raises(InputError, match="two corpora"):
        across_corpora(first, first, parts[1:21])
    with pytest.raises(InputError, match=r"p = .05 takes 19"):
        across_corpora(first, second, parts[1:5])


def test_examples_go_into_a_table(model: vs.Model, parts: list[Any], tmp_path: Path) -> None:
    frame = collect(model, parts).to_frame()
    assert set(frame["kind"]) == {"top", "sample", "near"}
    assert all(
        tokens[at] == token for tokens, at, token in zip(frame["tokens"], frame["at"], frame["token"], strict=True)
    )


def test_random_keys_are_uniform_and_independent_of_each_other() -> None:
    token, part = torch.arange(20_000), torch.zeros(20_000, dtype=torch.long)
    keys = torch.stack([random_keys(token, part + p, seed) for p in (0, 1) for seed in (0, 1)])
    assert torch.allclose(keys.mean(1), torch.full((4,), 0.5, dtype=torch.float64), atol=0.01)
    assert torch.allclose(keys.var(1), torch.full((4,), 1 / 12, dtype=torch.float64), atol=0.005)
    assert float((torch.corrcoef(keys) - torch.eye(4)).abs().max()) < 0.03


def test_memory_does_not_depend_on_the_length_of_the_text(model: vs.Model, parts: list[Any]) -> None:
    short, long = collect(model, parts), collect(model, parts, texts=TEXTS * 5)
    sizes = [sum(array.nbytes for array in one.collector.state().values()) for one in (short, long)]
    assert sizes[0] == sizes[1]
    assert long.tokens == 5 * short.tokens


def test_what_has_no_examples_is_refused_with_the_reason(model: vs.Model, parts: list[Any]) -> None:
    with pytest.raises(InputError, match="no parts: give at least one"):
        collect(model, [])
    with pytest.raises(InputError, match="twice"):
        collect(model, [parts[0], parts[0]])
    for name in ("layers.1.z[0]", "layers.1.mlp_out"):
        with pytest.raises(InputError, match="many numbers at each position"):
            collect(model, [vs.Unit(vs.Site.parse(name))])
    with pytest.raises(InputError, match="give no tokens"):
        collect(model, parts, texts=["", ""])
    with pytest.raises(UnknownNameError, match="unknown part"):
        collect(model, parts[:2])[vs.neuron(0, 7)]


def test_a_part_looks_like_itself_in_a_notebook(model: vs.Model, parts: list[Any]) -> None:
    found = collect(model, parts)
    assert repr(found).startswith(f"ActivatingExamples({len(parts)} parts on ")
    page = found[0]._repr_html_()
    assert str(parts[0]) in page
    assert "where it does not fire" in page
    assert collecting.BINS == len(found[0].histogram) == len(found[0].edges) - 1
