"""Activations: a read-only mapping from Site to tensor, with the tokens that made it; and a Run, which gave them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vesalius.errors import NotFiniteError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.site import ATTENTION, INDEX_AXIS, Site, summary

MANY = 8
"""Sites that a printed mapping or a message names one by one."""


class Activations(Mapping[Site, Tensor]):
    """Tensors captured by a run. Keys are Sites or their names; an index in brackets takes that slice."""

    def __init__(self, tensors: Mapping[Site, Tensor], tokens: Tokens | None = None) -> None:
        self._tensors = dict(tensors)
        self.tokens = tokens

    def __getitem__(self, key: Site | str) -> Tensor:
        site = Site.parse(key)
        if site in self._tensors:
            return self._tensors[site]
        if site.index is not None and site.whole in self._tensors:
            return self._tensors[site.whole].select(INDEX_AXIS[site.kind], site.index)
        known = summary(self) if len(self) > MANY else map(str, self)
        raise UnknownNameError("captured site", str(site), known, "Add it to capture=.")

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except Exception:  # anything that is not a captured site is simply not in here
            return False
        return True

    def __iter__(self) -> Iterator[Site]:
        return iter(sorted(self._tensors, key=lambda site: site.order))

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        named = [f"{site} {list(self._tensors[site].shape)}" for site in self]
        more = [f"... ({len(named)} sites)"] if len(named) > MANY else []
        return f"Activations({', '.join([*named[: MANY - 1 if more else MANY], *more])})"


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """What a run gave: logits [batch, pos, vocab], captured activations (also by `run["layers.5.z"]`), diagnostics."""

    logits: Tensor
    activations: Activations
    diagnostics: tuple[Mapping[str, Any], ...] = field(default=())
    """One entry per intervention: how unnatural the edited values were (norm_ratio, z_rms)."""

    def __getitem__(self, key: Site | str) -> Tensor:
        return self.activations[key]

    def __repr__(self) -> str:
        shape = list(self.logits.shape) if isinstance(self.logits, Tensor) else type(self.logits).__name__
        edits = f", {len(self.diagnostics)} interventions" if self.diagnostics else ""
        return f"Run(logits {shape}, {self.activations}{edits})"


def refuse_nonfinite(site: Site, tensor: Tensor, real: Tensor | None) -> None:
    """Raise NotFiniteError naming site, example and position; padding is not looked at."""
    bad = ~torch.isfinite(tensor)
    if real is not None and tensor.shape[:2] == real.shape:
        bad &= real.to(bad.device).view(*real.shape, *[1] * (tensor.ndim - 2))
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        what = "NaN" if bool(tensor[tuple(where)].isnan()) else "infinity"
        at = f"example {where[0]}" + (f", position {where[1]}" if len(where) > 1 and site.kind not in ATTENTION else "")
        raise NotFiniteError(f"{site} is the first site with {what}: {at}")
