"""What nobody reads is not computed, in any family, and the numbers are those of plain runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import families
import tiny
import vesalius as vs
from families import FAMILIES, distinct
from patching import edited
from vesalius.adapters import submodule
from vesalius.patching.edits import Edits, Rows, Table
from vesalius.patching.evaluate import Outcome, evaluate
from vesalius.patching.plain import plain_value
from vesalius.patching.record import Recording, record
from vesalius.patching.sources import source_for
from vesalius.patching.targets import Variant

REPLAYED = sorted(name for name, family in FAMILIES.items() if family.replayed)
EDITS = ("patch", "zero", "mean", "resample")


class Table4:
    """A model, four pairs, and everything that a keep-set ablates."""

    def __init__(self, name: str) -> None:
        self.name, self.model, self.pairs = name, families.model(name), tiny.pairs(n=4)
        self.sites = [*self.model.sites("layers.*.z"), *self.model.sites("layers.*.mlp_out")]
        inside = [site for site in self.model.sites() if site.kind in ("mlp_post", "mlp_in", "q", "v")]
        runs = [
            record(self.model, self.pairs.tokens(which), [*self.sites, *inside]) for which in ("clean", "corrupted")
        ]
        self.clean, self.corrupted = runs
        _, self.layout = self.model.architecture
        heads = range(self.layout.n_heads)
        self.parts = [s for s in self.sites if s.kind == "mlp_out"]
        self.parts += [site[head] for site in self.sites if site.kind == "z" for head in heads]

    def kept(self, *names: str) -> Variant:
        """Everything ablated but these."""
        return edited(tuple(part for part in self.parts if str(part) not in names))

    def run(self, variants: list[Variant], mode: str, watch: list[vs.Site] | None = None) -> Outcome:
        source = source_for(mode, self.clean, self.corrupted, 0)
        return evaluate(self.clean, variants, source, self.pairs, vs.logit_diff, watch=watch or [], check=False)

    def worst(self, variants: list[Variant], mode: str, out: Outcome) -> float:
        source = source_for(mode, self.clean, self.corrupted, 0)
        base: Recording = self.clean
        found = [
            abs(plain_value(base, variant, source, self.pairs, vs.logit_diff, e) - float(out.values[number, e]))
            for number, variant in enumerate(variants)
            for e in range(4)
        ]
        return max(found) / float(out.values.max() - out.values.min())


@pytest.fixture(scope="module", params=distinct(REPLAYED))
def table(request: pytest.FixtureRequest) -> Table4:
    return Table4(request.param)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """How many tokens a module computed, call by call."""
    seen: list[int] = []

    def count(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output.shape[-2])

    handle = module.register_forward_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def sets(table: Table4) -> list[Variant]:
    """Sets that keep little, nothing, one head, one MLP; and single parts, for which nearly everything is needed."""
    return [table.kept(), table.kept("layers.0.mlp_out"), table.kept("layers.1.z[1]", "layers.0.z[0]"),
            table.kept("layers.1.mlp_out", "layers.0.z[1]"), edited((vs.Site("z", 0, 1),)),
            edited((vs.Site("mlp_out", 1),), 4)]  # fmt: skip


@pytest.mark.parametrize("mode", EDITS)
def test_keeping_little_equals_plain_runs(table: Table4, mode: str) -> None:
    if mode in ("zero", "mean") and table.name not in ("llama", "gpt2", "gemma3", "gpt_neox", "bloom", "mixtral"):
        pytest.skip("values from other prompts are the harder case, and every family has them")
    assert table.worst(sets(table), mode, table.run(sets(table), mode)) < 1e-5


def test_parts_inside_what_is_not_needed_are_edited_all_the_same(table: Table4) -> None:
    inside = [vs.Site("mlp_post", 0, 3), vs.Site("q", 1, 0), vs.Site("v", 0, 0), vs.Site("mlp_in", 1)]
    known = [site for site in inside if site.whole in table.model.sites()]
    variants = [*sets(table), *(edited((site,)) for site in known), edited((*known, *table.parts[:3]))]
    out = table.run(variants, "patch")
    assert table.worst(variants, "patch", out) < 1e-5


def test_watched_sites_are_computed_where_they_are_watched(table: Table4) -> None:
    watch = [vs.Site("pattern", 1), vs.Site("q", 1), vs.Site("z", 1)]
    variants = sets(table)
    out = table.run(variants, "patch", watch)
    assert table.worst(variants, "patch", out) < 1e-5
    plain = table.model.run(table.pairs.tokens("clean"), capture=["layers.1.q"])["layers.1.q"]
    assert not torch.equal(out.watched[watch[1]][0, 0], torch.zeros_like(plain[0, 0]))


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "llama"])
def test_modules_are_given_only_the_tokens_that_matter(name: str) -> None:
    table = Table4(name)
    adapter = table.model.adapter
    assert adapter is not None
    mlps = [submodule(table.model.layer(n), adapter.sites["mlp_in"].path) for n in range(table.layout.n_layers)]
    query = submodule(table.model.layer(0), adapter.sites["q"].path)
    live = int((table.pairs.at + 1 - torch.tensor([2, 3, 2, 3])).sum())
    with counted(mlps[0]) as first, counted(mlps[-1]) as last, counted(query) as queries:
        table.run([table.kept("layers.1.mlp_out")], "patch")
        table.run([edited((vs.Site("z", 0, 1),))], "patch")
    # Layer 0 computes nothing for the set that ablates it, and everything for a single head.
    assert (first, queries) == ([0, live], [0, live])
    # The last MLP is computed where it is read.
    assert last[-1] == 4


def test_a_row_is_overwritten_only_when_all_of_it_is() -> None:
    site, zero = vs.Site("z", 0), torch.zeros(5, dtype=torch.long)
    rows = Rows(torch.arange(5), zero, zero + 2, zero + 6)
    values = (torch.zeros(1, 1, 2, 3),)

    def table(row: int, index: int, first: int, stop: int) -> Table:
        one = torch.tensor([row])
        return Table(site, values, one, one * 0 + index, one * 0, one * 0 + first, one * 0 + stop)

    edits = Edits([table(0, -1, 2, 6), table(1, 0, 0, 9), table(1, 1, 2, 6), table(2, 0, 2, 6), table(2, 0, 2, 6),
                   table(3, -1, 3, 6)])  # fmt: skip
    assert edits.overwritten(site, rows, 2).tolist() == [True, True, False, False, False]
    assert edits.overwritten(vs.Site("z", 1), rows, 2).tolist() == [False] * 5
