"""The output side of a part: the tokens that it promotes and suppresses directly, by way of the unembedding.

What a part writes goes through the final norm's weights (and its centring, where it centres) and the unembedding. The
norm's scale differs from token to token and is above zero, so it is left out: the order of the tokens is exact for the
direct effect, and the numbers are in units of that scale. What later layers make of the write is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.directions import Direction
from vesalius.errors import InputError
from vesalius.inputs.beginning import speller
from vesalius.model import Model
from vesalius.model.direct import token_effects
from vesalius.model.weights import dtype_of, linear_of
from vesalius.parts import Part, Unit
from vesalius.site import RESIDUAL, Site

SHOWN = 10
TOGETHER = 64
HOW = (
    "Direct effect on the logits, by way of the final norm's weights and the unembedding; the norm's scale, which is "
    "above zero and differs from token to token, is left out, so that the order is exact and the size is not. What "
    "later layers make of it is not in it."
)


@runtime_checkable
class _Decoded(Protocol):
    """A latent: what one unit of it adds, by site."""

    @property
    def rows(self) -> dict[Site, Tensor]: ...


@dataclass(frozen=True)
class Promoted:
    """Tokens with the part's direct effect on their logits, the largest first, and the smallest first. why: when there
    are none."""

    promoted: tuple[tuple[str, float], ...] = ()
    suppressed: tuple[tuple[str, float], ...] = ()
    why: str = ""

    def _repr_html_(self) -> str:
        if self.why:
            return f"<p>{escape(self.why)}</p>"
        rows = [("promotes", self.promoted), ("suppresses", self.suppressed)]
        lines = "".join(f"<p><b>{verb}</b> {' '.join(_effect(*one) for one in some)}</p>" for verb, some in rows)
        return f"{lines}<p class='small'>{escape(HOW)}</p>"


def _effect(token: str, value: float) -> str:
    return f"<code title='{value:+.3g}'>{shown(token)}</code>"


def shown(token: str) -> str:
    """A token as HTML, so that one can see it: line ends and spaces at its ends are drawn."""
    drawn = token.replace("\n", "⏎").replace("\t", "⇥")
    return escape(drawn) if drawn.strip() else "␣" * len(drawn)


def promoted_tokens(model: Model, parts: Sequence[Part], count: int = SHOWN) -> list[Promoted]:
    """Of each part the tokens that it promotes and suppresses most; `why` not, for one that does not write into the
    residual stream or in a model whose logits are no sum of what is written there."""
    found = [_written(model, part) for part in parts]
    made = [Promoted(why=one) if isinstance(one, str) else None for one in found]
    whole = [number for number, one in enumerate(found) if isinstance(one, Tensor)]
    for first in range(0, len(whole), TOGETHER):
        some = whole[first : first + TOGETHER]
        effects = token_effects(model, torch.stack([found[number] for number in some]))  # type: ignore[misc]
        for number, row in zip(some, effects, strict=True):
            high, low = row.topk(min(count, len(row))), (-row).topk(min(count, len(row)))
            made[number] = Promoted(_named(model, high.indices, high.values), _named(model, low.indices, -low.values))
    return [one for one in made if one is not None]


def promoted_ids(model: Model, part: Part, count: int = SHOWN) -> list[int]:
    """Ids of the tokens that a part promotes most; none where it cannot be said."""
    written = _written(model, part)
    return [] if isinstance(written, str) else token_effects(model, written[None])[0].topk(count).indices.tolist()


def _named(model: Model, ids: Tensor, values: Tensor) -> tuple[tuple[str, float], ...]:
    spell = speller(model.tokenizer)
    return tuple((spell(token), value) for token, value in zip(ids.tolist(), values.tolist(), strict=True))


def _written(model: Model, part: Part) -> Float[Tensor, " d_model"] | str:
    """What one unit of a part adds to the residual stream; or why it cannot be said."""
    if model.adapter is None or not model.adapter.direct or model.adapter.stacks:
        return "The logits of this model are no sum of what its parts write, so there is no direct effect on them."
    site = part.writes[0]
    if isinstance(part, _Decoded):
        rows = [row for at, row in part.rows.items() if _residual(at)]
        return torch.stack(rows).sum(0) if rows else _elsewhere(part)
    if isinstance(part, Direction) and _residual(site):
        return part.vector
    if isinstance(part, Unit) and site.kind == "mlp_post" and site.index is not None:
        return _of_neuron(model, site)
    if isinstance(part, Unit) and _residual(site.whole) and site.index is not None:
        return torch.nn.functional.one_hot(torch.tensor(site.index), model.architecture[1].d_model).float()
    return _elsewhere(part)


def _residual(site: Site) -> bool:
    """Whether what is written there is added to the residual stream as it is."""
    added = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed", "pos_embed")
    return site.kind in added and site.axes == RESIDUAL and site.index is None


def _elsewhere(part: Part) -> str:
    return f"It writes at {part.writes[0].whole}, not into the residual stream, so no tokens are named."


def _of_neuron(model: Model, site: Site) -> Tensor | str:
    """The column of the down projection."""
    adapter, assumed = model.architecture[0], site.layer
    assert assumed is not None and site.index is not None
    post, out = adapter.sites["mlp_post"], adapter.sites.get("mlp_out")
    if post.side != "in" or out is None or not post.path.startswith(f"{out.path}."):
        return "A norm stands between the MLP and the residual stream, so no tokens are named."
    projection = submodule(model.layer(assumed), post.path)
    width = getattr(projection, "in_features", 0)
    try:
        return linear_of(projection, int(width), dtype_of(model.module)).matrix[:, site.index]
    except InputError as error:
        return f"No tokens are named: {error}"
