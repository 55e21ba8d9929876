"""A representative call of every entry point that takes a model, with what it finds by name.

What tests and the script for a real GPU run on two devices and compare; so nothing here needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.model.direct import direct_effects
from vesalius.quantities import QUANTITIES, Runs
from vesalius.quantities.heads_in_text import seen_in

FAMILIES = ("llama", "gpt2")
Found = Mapping[str, Any]
ROUNDED = 0.1
"""How far values of rounded products may lie apart: each kernel rounds on its own."""


def quiet(_event: Any) -> None:
    """Nobody listens."""


def runs(model: vs.Model) -> Found:
    tokens = tiny.pairs().tokens("clean")
    run = model.run(tokens, capture=["layers.*.*", "embed", "final_norm", "logits"])
    return {str(site): run[site] for site in run.activations} | {"logits": run.logits}


def edits(model: vs.Model) -> Found:
    pairs = tiny.pairs()
    tokens = pairs.tokens("clean")
    other = model.run(pairs.tokens("corrupted"), capture=["layers.1.z", "layers.1.pattern"])
    kept = model.run(tokens, capture=["layers.1.resid_post"]).activations
    vector = torch.randn(48, generator=torch.Generator().manual_seed(0))
    basis = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    direction, subspace = vs.Direction("layers.1.resid_post", vector), vs.Subspace("layers.1.resid_post", basis)
    mask = tokens.real & (torch.arange(tokens.ids.shape[1]) > 2)
    made = {
        "zero": vs.Ablate("layers.1.z[2]"),
        "mean": vs.Ablate("layers.1.resid_post", "mean", reference=kept),
        "resample": vs.Ablate("layers.1.resid_post", "resample", reference=kept),
        "patch": vs.Patch("layers.1.z", source=other.activations, positions=mask),
        "vector": vs.Patch("layers.1.mlp_out", source=vector, positions=[1, 2]),
        "freeze": vs.Freeze("layers.1.pattern", source=other.activations),
        "steer": vs.Steer(direction, scale=2.0, positions=tokens.lengths - 1),
        "project": vs.Project(subspace, centre=vector),
        "centred": vs.Project(direction, keep=True, centre=kept),
        "noise": vs.Noise("embed", scale=0.5, std=vector.abs()),
        "interchange": vs.Interchange(subspace, source=kept, examples=torch.arange(6).flip(0), positions=range(6)),
        "group": vs.Ablate(vs.Group("layers.1.mlp_post", [1, 4])),
        "replace": vs.Replace("layers.1.mlp_in", "layers.1.mlp_out", lambda x: 2 * x, ref="twice"),
    }
    return {name: model.run(tokens, interventions=[edit]).logits for name, edit in made.items()}


def generation(model: vs.Model) -> Found:
    tokens = tiny.pairs().tokens("clean")
    greedy = model.generate(tokens, 4, interventions=[vs.Ablate("layers.1.z[1]", positions="last")])
    drawn = model.generate(tokens, 4, temperature=1.0, seed=3)
    return {"greedy": greedy.tokens.ids, "drawn": drawn.tokens.ids}


def sweeps(model: vs.Model) -> Found:
    pairs, found = tiny.pairs(), {}
    for edit in ("patch", "zero", "mean", "resample"):
        found[edit] = vs.sweep(model, pairs, sites="layers.*.z", each="head", edit=edit, sink=quiet).values
    found["positions"] = vs.sweep(model, pairs, sites="layers.*.resid_post", each="position", sink=quiet).values
    found["neurons"] = vs.sweep(model, pairs, sites="layers.1.mlp_post", each="neuron", group=20, sink=quiet).values
    found["steer"] = vs.sweep(model, pairs, sites="layers.1.mlp_post", each="neuron", group=40, edit="steer", scale=1.0,
                              sink=quiet).values  # fmt: skip
    given = [vs.Ablate("layers.0.z[1]")]
    found["given"] = vs.sweep(
        model, pairs, sites="layers.1.mlp_out", given=given, hold_patterns=True, sink=quiet
    ).values
    found["kl"] = vs.sweep(model, pairs, sites="layers.*.k", metric=vs.kl_divergence, sink=quiet).values
    direction = vs.Direction("layers.1.resid_post", torch.ones(48).cumsum(0))
    found["direction"] = vs.sweep(model, pairs, sites=[direction], sink=quiet).values
    found["module"] = vs.sweep(model, pairs, sites=f"module:{_mlp(model)}|out", sink=quiet).values
    found["rounded"] = vs.sweep(model, pairs, sites="layers.0.mlp_out", compute="bfloat16", sink=quiet).values
    return found


def _mlp(model: vs.Model) -> str:
    return next(name for name, _ in model.module.named_modules() if name.endswith("1.mlp"))


def paths(model: vs.Model) -> Found:
    pairs = tiny.pairs()
    to = {"logits": "logits", "mlp": "layers.2.mlp_in", "queries": ["layers.2.q", "layers.2.v"]}
    return {
        name: vs.path_patching(model, pairs, senders="layers.*.z", each="head", receivers=receivers, sink=quiet).values
        for name, receivers in to.items()
    }


def tracing(model: vs.Model) -> Found:
    found = vs.causal_tracing(model, tiny.pairs(), [1, 2], draws=2, sink=quiet)
    return {kind: found[kind].values for kind in ("resid_post", "mlp_out", "attn_out")} | {"clean": found.clean}


def attribution(model: vs.Model) -> Found:
    pairs = tiny.pairs()
    return {
        "heads": vs.attribution_patching(model, pairs, sites="layers.*.z", each="head").values,
        "positions": vs.attribution_patching(model, pairs, sites="layers.*.resid_pre", each="position").values,
        "steps": vs.attribution_patching(model, pairs, sites="layers.1.mlp_out", steps=3).values,
    }


def direct(model: vs.Model) -> Found:
    pairs = tiny.pairs()
    return dict(direct_effects(model, pairs, pairs.tokens("clean")).contributions)


def quantities(model: vs.Model) -> Found:
    runs = Runs(model, tiny.pairs(), sink=quiet)
    parts, head = runs.components[:6], vs.head(1, 2)
    found = {way: runs.effects(parts, "corrupted", way) for way in ("noising", "denoising")}
    found |= {"shuffled": runs.shuffled_effects(parts, "corrupted", "noising"), "pattern": runs.pattern(head)}
    for name, parameters in (("direct_effect", {}), ("copies", {"key": "end"}), ("activation", {"at": "max"})):
        part = vs.neuron(1, 3) if name == "activation" else head
        found[name] = QUANTITIES[name].measure(runs, part, parameters)
    return found


def lenses(model: vs.Model) -> Found:
    tokens, sites = tiny.pairs().tokens("clean"), ["layers.1.resid_post", "layers.2.resid_post"]
    texts = [row.tolist() for row in torch.randint(2, tiny.VOCAB, (40, 16), generator=torch.Generator().manual_seed(0))]
    lens = vs.describe.fit_tuned_lens(model, texts, sites=sites, steps=3, batch_size=32, context=20, sink=quiet)
    found = {}
    for name, one in (("logit", vs.describe.LogitLens(model, sites)), ("tuned", lens)):
        read = one.read(tokens)
        found |= {f"{name} kl": read.kl.nan_to_num(), f"{name} rank": read.rank}
    return found


def split_effects(model: vs.Model) -> Found:
    parts = ["embed", "layers.1.z[2]", "layers.1.mlp_out", "layers.1.mlp_post[3]", "layers.0.resid_post"]
    found = vs.describe.split_effects(model, tiny.pairs(), parts, sink=quiet)
    return {"total": found.total, "direct": found.direct}


def steering(model: vs.Model) -> Found:
    pairs = tiny.pairs()
    vector = vs.describe.contrast_vector(model, "layers.1.resid_post", pairs.tokens("clean"), pairs.tokens("corrupted"))
    found = vs.describe.steer(model, vector.direction, pairs, scales=[2.0], plain=pairs.tokens("corrupted"), random=2,
                              sink=quiet)  # fmt: skip
    neuron = vs.describe.steer(model, vs.neuron(1, 3), pairs.tokens("clean"), scales=[9.0], towards=[5], random=2,
                               sink=quiet)  # fmt: skip
    return {"effects": found.effects, "random": found.random, "cost": found.cost, "neuron": neuron.effects}


def patchscopes(model: vs.Model) -> Found:
    one, other = (tiny.pairs().tokens(which) for which in ("clean", "corrupted"))
    mapping = vs.describe.AffineMap(torch.eye(48).flip(0), torch.ones(48))
    found = {"within": vs.describe.patchscope(model, one, sites="layers.*.resid_post", into=other).logits}
    found["mapped"] = vs.describe.patchscope(
        model, one, sites="layers.1.resid_post", into=other, target=model, mapping=mapping
    ).logits
    return found


def overlooked(model: vs.Model) -> Found:
    runs, parts = Runs(model, vs.Corpus(tiny.pairs().tokens("clean")), sink=quiet), [vs.neuron(1, n) for n in range(5)]
    found = vs.describe.overlooked(runs, parts, most=5)
    costs = {str(part): cost.estimate for part, cost in zip(found.parts, found.costs, strict=True)}
    return {"estimates": found.estimates, "costs": torch.tensor([costs[str(part)] for part in parts])}


def input_attribution(model: vs.Model) -> Found:
    tokens = tiny.pairs().tokens("clean")
    return {
        method: vs.describe.attribute(model, tokens, vs.neuron(1, 3), method=method, sink=quiet).values
        for method in ("gradient_x_input", "ablate")
    }


class Words:
    """A word a token."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{int(token)}" for token in ids)


def heads_in_text(model: vs.Model) -> Found:
    spoken = vs.Model(model.module, tokenizer=Words())
    seen = seen_in(vs.Runs(spoken, vs.Corpus(tiny.pairs().tokens("clean")), sink=quiet))
    assert seen.copied is not None
    return {"mass": torch.stack([*seen.mass.values()]), "copied": seen.copied, "entropy": seen.entropy}


ENTRIES: dict[str, Callable[[vs.Model], Found]] = {
    "run": runs, "edits": edits, "generate": generation, "sweep": sweeps, "path patching": paths, "tracing": tracing,
    "attribution": attribution, "direct effects": direct, "quantities": quantities, "lenses": lenses,
    "split effects": split_effects, "steering": steering, "patchscopes": patchscopes, "overlooked": overlooked,
    "input attribution": input_attribution, "heads in text": heads_in_text,
}  # fmt: skip
ON_THE_CPU = {
    "quantities", "sweep", "path patching", "tracing", "attribution", "lenses", "split effects", "steering",
    "patchscopes", "overlooked", "input attribution", "heads in text",
}  # fmt: skip
"""Entry points whose results are results, and on the CPU wherever the model is."""


def worst_difference(entry: str, on_cpu: vs.Model, moved: vs.Model) -> float:
    """Largest difference of what an entry point finds with two models, over the largest number.

    Numbers that are all under .01 are what rounding leaves of a sum, and count as they are.
    """
    expected, found = ENTRIES[entry](on_cpu), ENTRIES[entry](moved)
    worst = 0.0
    for name in expected.keys() - {"rounded"}:
        one, other = on_the_cpu(expected[name]).float(), on_the_cpu(found[name]).float()
        finite = one.isfinite()
        worst = max(worst, float((one - other)[finite].abs().max() / one[finite].abs().max().clamp_min(0.01)))
    return worst


def on_the_cpu(value: Any) -> Tensor:
    return value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
