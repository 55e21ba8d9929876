"""What path patching freezes and where it looks, and its three runs by ordinary hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vesalius.activations import Activations
from vesalius.errors import InputError, UnknownNameError
from vesalius.intervention import Patch
from vesalius.model import Model
from vesalius.parts import Part, Unit
from vesalius.patching.record import Recording
from vesalius.patching.sources import Source
from vesalius.patching.targets import normal
from vesalius.site import Site

Named = str | Site | Part
LOGITS = Site("logits")
SENDERS, RECEIVERS = ("embed", "z", "attn_out", "mlp_out"), ("q", "k", "v", "mlp_in", "logits")


@dataclass(frozen=True)
class Paths:
    """Receivers, and what is frozen between sender and receivers."""

    receivers: tuple[Site, ...]
    freeze_mlps: bool
    freeze_norm: bool

    @property
    def to_logits(self) -> bool:
        return self.receivers == (LOGITS,)

    def reached(self, sender: Site) -> tuple[Site, ...]:
        """Receivers that come after the sender in the pass."""
        return tuple(site for site in self.receivers if sender.order < site.order and _later(sender, site))

    def frozen(self, sender: Site, n_layers: int) -> list[Site]:
        """Whole sites kept at the base run once the sender has its source value."""
        first = -1 if sender.layer is None else sender.layer
        heads = [Site("z", layer) for layer in range(first + 1, n_layers)]
        after = first + 1 if sender.kind in ("mlp_out", "embed") else first
        return heads + ([Site("mlp_out", layer) for layer in range(after, n_layers)] if self.freeze_mlps else [])


def _later(sender: Site, receiver: Site) -> bool:
    if sender.layer is None or receiver.layer is None or receiver.layer > sender.layer:
        return True
    return receiver.kind == "mlp_in" and sender.kind in ("z", "attn_out")


def _listed(model: Model, given: Named | Sequence[Named]) -> list[Site]:
    names = [given] if isinstance(given, str | Site | Part) else list(given)
    found: list[Site] = []
    for name in names:
        if isinstance(name, Part) and not isinstance(name, Unit):
            raise InputError(f"path patching goes from and to whole sites and heads; {name} is none of them")
        site = name.site if isinstance(name, Unit) else name
        found += model.sites(str(site)) if "*" in str(site) else [Site.parse(site)]
    for site in found:
        model.check_site(site)
    return list(dict.fromkeys(found))


def receiving(model: Model, given: Named | Sequence[Named]) -> tuple[Site, ...]:
    found = _listed(model, given)
    for site in found:
        if site.kind not in RECEIVERS:
            raise InputError(f"{site} does not receive; receivers are {', '.join(RECEIVERS)}")
    if not found:
        raise InputError("path patching needs at least one receiver")
    if LOGITS in found and len(found) > 1:
        raise InputError("logits receive alone: their input holds what every other receiver did")
    return tuple(found)


def sending(model: Model, given: Named | Sequence[Named], each: str | None) -> list[Site]:
    if each not in (None, "head"):
        raise UnknownNameError("each", str(each), ["head"], "None takes the senders as they are named.")
    found = _listed(model, given)
    for site in found:
        if site.kind not in SENDERS:
            raise InputError(f"{site} does not send; senders are {', '.join(SENDERS)}")
    if not found:
        raise InputError("path patching needs at least one sender")
    n_heads = model.architecture[1].n_heads
    split: list[Site] = []
    for site in found:
        split += [site[h] for h in range(n_heads)] if each and site.kind == "z" and site.index is None else [site]
    return split


def plain_path(base: Recording, other: Recording, source: Source, paths: Paths, sender: Site) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3 for one sender on every example, by ordinary runs.

    Logits [example, pos, vocab] of the last run, and the last layer's output [example, pos, d_model] of step 2.
    """
    model, n_layers = base.model, base.model.architecture[1].n_layers
    pos = torch.arange(base.tokens.ids.shape[1])
    live = (pos >= source.first[:, None]) & base.tokens.real
    frozen = [Patch(site, source=base[site], positions=live) for site in paths.frozen(sender, n_layers)]
    site, index = normal(sender)
    sent = Patch(site if index < 0 else site[index], source=Activations({site: other[site]}), positions=live)
    last = Site("resid_post", n_layers - 1)
    receivers = [part for part in paths.reached(sender) if part != LOGITS]
    first = model.run(base.tokens, capture=[last, *receivers], interventions=[*frozen, sent])
    if paths.to_logits or not receivers:
        return first.logits, first[last]
    edits = [Patch(part, source=first.activations, positions=live) for part in receivers]
    return model.run(base.tokens, interventions=edits).logits, first[last]
