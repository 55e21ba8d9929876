"""Direct effects: what each component adds to the metric's logits by itself, with the final norm frozen.

The residual stream at the read position is the sum of the embeddings and of every head's and MLP's output. With the
final norm's scale held at its value in the run, the logit difference is therefore an exact sum over components (direct
logit attribution: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). The tests check the sum. A
component's share says nothing about its effect through later layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.adapters.base import frozen_scale, gain, parameter
from vesalius.errors import InputError, SelfCheckError, UnknownNameError
from vesalius.inputs import Pairs, Tokens
from vesalius.model import Model
from vesalius.model.attention import capped
from vesalius.model.weights import rounding
from vesalius.site import Site


@dataclass(frozen=True, eq=False)
class Direct:
    """contributions: component -> [example], in logits: heads, MLPs, embeddings, and `bias` for all biases together."""

    contributions: Mapping[str, Float[Tensor, " example"]]

    def __getitem__(self, component: Site | str) -> Float[Tensor, " example"]:
        if str(component) not in self.contributions:
            raise UnknownNameError("component", str(component), self.contributions)
        return self.contributions[str(component)]

    def total(self) -> Float[Tensor, " example"]:
        return torch.stack(list(self.contributions.values())).sum(0)


@dataclass(frozen=True, eq=False)
class Frozen:
    """The final norm, frozen at one run: maps a residual write to logit differences, linearly.

    direction: [example, d_model]; a write w at the read position adds w @ direction to the logit difference.
    """

    direction: Float[Tensor, "example d_model"]
    constant: Float[Tensor, " example"]

    def of(self, write: Float[Tensor, "example ... d_model"]) -> Float[Tensor, "example ..."]:
        return torch.einsum("e...d,ed->e...", write, self.direction.to(write))


def frozen_norm(model: Model, final: Float[Tensor, "example d_model"], answer: Tensor, distractor: Tensor) -> Frozen:
    """Direction of the logit difference answer - distractor through the final norm frozen at `final`."""
    adapter, layout = model.architecture
    norm = submodule(model.module, adapter.final_norm)
    unembedding = model.unembedding
    difference = (unembedding.matrix[answer] - unembedding.matrix[distractor]).to(final) * layout.logit_scale
    weighted = difference * gain(adapter.norm, norm).to(final)
    bias = parameter(norm, "bias")
    constant = difference @ bias if bias is not None else difference.new_zeros(len(difference))
    if unembedding.bias is not None:
        extra = (unembedding.bias[answer] - unembedding.bias[distractor]).to(constant)
        constant = constant + extra * layout.logit_scale
    scaled = weighted * frozen_scale(adapter.norm, norm, final)
    # LayerNorm also centres its input, which is linear: centring the direction does the same.
    return Frozen(scaled if adapter.norm != "layer" else scaled - scaled.mean(-1, keepdim=True), constant)


def token_effects(model: Model, writes: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    """Direct effect of each write on every logit, per unit of the final norm's scale.

    The norm's weights and centring are in it, and its scale, which is above zero, is not: at a token where that is s, a
    write w adds s times this row. Raises InputError for a model without unembedding.
    """
    adapter, layout = model.architecture
    norm, unembedding = submodule(model.module, adapter.final_norm), model.unembedding.matrix
    given = writes.to(unembedding)
    centred = given - given.mean(-1, keepdim=True) if adapter.norm == "layer" else given
    return (centred * gain(adapter.norm, norm).to(given)) @ unembedding.T * layout.logit_scale


def direct_effects(model: Model, pairs: Pairs, tokens: Tokens) -> Direct:
    """Every component's direct contribution to the logit difference of one run. tokens: the prompts to run.

    The contributions sum to the run's logit difference, and are held to it; in a model that caps its logits (Gemma 2),
    to the difference before the cap, which is not linear. Where a norm follows attention (Gemma, OLMo 2), heads are
    counted with that norm frozen as well. Raises InputError for a model whose logits are no such sum (BERT has norms on
    the residual stream), SelfCheckError when the sum differs beyond rounding from the run's own logits: the adapter
    then lacks a scale or a component.
    """
    model.check_evaluating()
    adapter, layout = model.architecture
    if not adapter.direct:
        raise InputError(
            f"{model.name} has no direct effects: the logits of the {adapter.family} family are not the unembedding of "
            "the normed sum of what its components wrote at a prompt's position"
        )
    outside = [str(site) for site in model.sites("*") if site.kind in ("embed", "pos_embed")]
    last = f"layers.{layout.n_layers - 1}.resid_post"
    unembedded = ["logits"] if "logits" in adapter.outside else []
    run = model.run(
        tokens, capture=["layers.*.z", "layers.*.attn_out", "layers.*.mlp_out", *outside, last, *unembedded]
    )
    rows = torch.arange(len(tokens))
    frozen = frozen_norm(model, run[last][rows, pairs.at], pairs.answer, pairs.distractor)
    found: dict[str, Tensor] = {name: frozen.of(run[name][rows, pairs.at]) for name in outside}
    bias = frozen.constant
    for layer in range(layout.n_layers):
        z = run[f"layers.{layer}.z"][rows, pairs.at]
        writes, own = model.attention_shares(layer, z)
        shares = frozen.of(writes)
        for head in range(layout.n_heads):
            found[f"layers.{layer}.z[{head}]"] = shares[:, head]
        rest = run[f"layers.{layer}.attn_out"][rows, pairs.at] - writes.sum(1)
        _check_rest(f"layers.{layer}.attn_out", rest, own, writes)
        bias = bias + frozen.of(rest)
        found[f"layers.{layer}.mlp_out"] = frozen.of(run[f"layers.{layer}.mlp_out"][rows, pairs.at])
    direct = Direct({**found, "bias": bias})
    logits = run.logits[rows, pairs.at]
    bare = run["logits"][rows, pairs.at] if unembedded else logits / layout.logit_scale
    _check_sum(model, direct, logits, bare, pairs)
    return direct


def _check_rest(site: str, rest: Float[Tensor, "example d_model"], own: Tensor, writes: Tensor) -> None:
    """Raises InputError when what attention wrote beside its heads' shares is not its output projection's own bias."""
    size = writes.norm(dim=-1).sum(1) + own.norm(dim=-1)
    off = float(((rest - own).norm(dim=-1) / size.clamp_min(torch.finfo(size.dtype).tiny)).max())
    if not off <= max(rounding(rest), 1e-4):
        raise InputError(
            f"{site} is not the sum of its heads' shares and the output projection's bias: {off:.1%} of their size is "
            "left over. The attention module does more than its output projection, so heads have no direct effects here"
        )


def _check_sum(model: Model, direct: Direct, own: Tensor, unembedded: Tensor, pairs: Pairs) -> None:
    """Hold the sum to the run's logits [example, vocab], by way of what the unembedding gave: a cap is not linear."""
    adapter, layout = model.architecture
    rows, total = torch.arange(len(own)), direct.total().float()
    scaled = unembedded.float() * layout.logit_scale
    bound = getattr(adapter.config_of(model.module), adapter.cap) if adapter.cap else None
    difference = scaled[rows, pairs.answer] - scaled[rows, pairs.distractor]
    parts = torch.stack(list(direct.contributions.values())).abs().sum(0).float()
    allowed = (1e-4 if own.dtype in (torch.float32, torch.float64) else 16 * torch.finfo(own.dtype).eps) * (
        parts + (own.max(-1).values - own.min(-1).values).float()
    )
    if not bool(torch.isfinite(own).all()):
        return
    for what, off in (
        ("the unembedding's output times the adapter's scales", (capped(scaled, bound) - own.float()).abs().amax(-1)),
        ("the sum of all contributions", (total - difference).abs()),
    ):
        if bool((off > allowed).any()):
            raise SelfCheckError(
                f"{what} differs by {float(off.max()):.3g} from the logits of {model.name}'s own run: the "
                f"{adapter.family} adapter lacks a scale (residual_scale, logit_scale, logits_over, cap) or a "
                f"component. Of the config: {_scales(adapter.config_of(model.module))}. See vs.check_adapter(model)"
            )


def _scales(config: Any) -> str:
    """The fields of a config that look like scales, in words."""
    known = ("scal", "multiplier", "softcap")
    found = [f"{name}={value}" for name, value in vars(config).items() if any(part in name for part in known)]
    return ", ".join(found) or "no field that is named like a scale"
