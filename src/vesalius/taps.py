"""From sites to hooks: how captures and interventions become taps on a model's modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vesalius.adapters import Access, Adapter, Layout, submodule
from vesalius.errors import InterventionError, UnknownNameError
from vesalius.hooks import Tap
from vesalius.inputs import Tokens
from vesalius.intervention import Intervention, apply, off_distribution
from vesalius.site import Site

READ_ONLY = ("result",)
ATTENTION = ("scores", "pattern")


@runtime_checkable
class Host(Protocol):
    """What taps need of a model."""

    module: nn.Module
    adapter: Adapter | None
    layout: Layout | None

    def layer(self, number: int) -> nn.Module: ...
    def check_site(self, site: Site) -> None: ...
    def W_O(self, layer: int) -> Tensor: ...  # noqa: N802


def split_heads(tensor: Tensor, access: Access, layout: Layout) -> Tensor:
    """A module's tensor as the site names it: its part of the last axis, with a head axis when there is one."""
    if access.part is not None:
        number, of = access.part
        tensor = tensor.chunk(of, -1)[number]
    if not access.heads:
        return tensor
    heads = layout.n_heads if access.heads == "head" else layout.n_kv_heads
    return tensor.unflatten(-1, (heads, -1))


def join_heads(whole: Tensor, site_tensor: Tensor, access: Access) -> Tensor:
    """Inverse of `split_heads`: the module's tensor with the site's new value in its place."""
    flat = site_tensor.flatten(-2) if access.heads else site_tensor
    if access.part is None:
        return flat
    pieces = list(whole.chunk(access.part[1], -1))
    pieces[access.part[0]] = flat
    return torch.cat(pieces, -1)


class Recorder:
    """Taps of one run, and what they saw."""

    def __init__(
        self,
        host: Host,
        capture: Sequence[Site],
        interventions: Sequence[Intervention],
        tokens: Tokens | None,
        grad: bool,
    ) -> None:
        self._host = host
        self._real = tokens.real if tokens is not None else None
        self._grad = grad
        self._seen: dict[Site, Tensor] = {}
        self._fired: set[Site] = set()
        self._capture = list(dict.fromkeys(capture))
        self._edits: dict[Site, list[Intervention]] = {}
        self._diagnostics: dict[int, dict[str, Any]] = {}
        for edit in interventions:
            self._check_editable(edit)
            self._edits.setdefault(edit.part.site.whole, []).append(edit)
        self._order = list(interventions)
        hidden = [Site("z", site.layer) for site in self._capture if site.kind == "result"]
        self._all = list(dict.fromkeys([*self._edits, *(s for s in self._capture if s.kind not in READ_ONLY), *hidden]))
        self.taps = [tap for site in self._all if site.kind not in ATTENTION for tap in self._taps(site)]
        self.needs_attention = any(site.kind in ATTENTION for site in self._all)

    def _check_editable(self, edit: Intervention) -> None:
        site = edit.part.site
        if site.kind in READ_ONLY:
            raise InterventionError(
                f"{site} is computed for reading and cannot be edited; edit layers.{site.layer}.z instead"
            )
        if site.kind != "module":
            self._host.check_site(site)

    def _taps(self, site: Site) -> list[Tap]:
        if site.kind == "module":
            return [Tap(submodule(self._host.module, site.module), site.side, self._visitor(site, None))]
        access = self._access(site)
        root = self._host.module if site.layer is None else self._host.layer(site.layer)
        if not access.delta or site not in self._edits:
            return [Tap(submodule(root, access.path), access.side, self._visitor(site, access))]
        return self._delta_taps(site, access, root)

    def _access(self, site: Site) -> Access:
        adapter = self._host.adapter
        assert adapter is not None
        table = adapter.outside if site.layer is None else adapter.sites
        if site.kind not in table:
            raise UnknownNameError("site", str(site), table)
        return table[site.kind]

    def _delta_taps(self, site: Site, access: Access, root: nn.Module) -> list[Tap]:
        """A sum no module returns (resid_mid): edited by adding the change to its last summand, read where used."""
        before: list[Tensor] = []

        def remember(tensor: Tensor) -> None:
            before[:] = [tensor]

        def add_change(tensor: Tensor) -> Tensor:
            total = before[0] + tensor
            return tensor + (self._edited(site, total) - total)

        read = self._reader(site)
        return [
            Tap(root, "in", remember),
            Tap(submodule(root, access.delta), "out", add_change),
            Tap(submodule(root, access.path), access.side, read),
        ]

    def _reader(self, site: Site) -> Callable[[Tensor], None]:
        def visit(tensor: Tensor) -> None:
            self._keep(site, tensor)

        return visit

    def _visitor(self, site: Site, access: Access | None) -> Callable[[Tensor], Tensor | None]:
        layout = self._host.layout

        def visit(tensor: Tensor) -> Tensor | None:
            here = tensor if access is None or layout is None else split_heads(tensor, access, layout)
            if self._real is not None and access is not None and here.shape[0] == 1:
                # Position embeddings are made once for the whole batch.
                here = here.expand(len(self._real), *here.shape[1:])
            edited = self._edited(site, here) if site in self._edits else here
            edited = self._keep(site, edited)
            if edited is here and not self._grad:
                return None
            return edited if access is None else join_heads(tensor, edited, access)

        return visit

    def visit_attention(self, kind: str, layer: int, tensor: Tensor) -> Tensor | None:
        """Called by our attention function with scores and pattern [batch, head, query_pos, key_pos]."""
        site = Site(kind, layer)
        if site not in self._all:
            return None
        edited = self._edited(site, tensor) if site in self._edits else tensor
        return self._keep(site, edited)

    def _edited(self, site: Site, tensor: Tensor) -> Tensor:
        real = self._real_like(tensor)
        for edit in self._edits[site]:
            changed = apply(edit, tensor, real)
            self._diagnostics[id(edit)] = {
                "intervention": edit.to_json(),
                **(off_distribution(tensor, changed, real, edit.part.site) if self._real is not None else {}),
            }
            tensor = changed
        return tensor

    def _real_like(self, tensor: Tensor) -> Tensor:
        if self._real is not None:
            return self._real.to(tensor.device)
        shape = tensor.shape[:2] if tensor.ndim > 1 else (tensor.shape[0], 1)
        return torch.ones(shape, dtype=torch.bool, device=tensor.device)

    def _keep(self, site: Site, tensor: Tensor) -> Tensor:
        self._fired.add(site)
        if self._grad and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
        if site in self._capture or site.kind == "z":
            self._seen[site] = tensor
        return tensor

    def check_fired(self) -> None:
        """Raise InterventionError when a site that was asked for never fired."""
        silent = [str(site) for site in self._all if site not in self._fired]
        if silent:
            raise InterventionError(
                f"{', '.join(silent)} never fired in this run, so nothing was read or edited there; "
                "the module is not called with these inputs"
            )

    def captured(self) -> Mapping[Site, Tensor]:
        found = {site: self._seen[site] for site in self._capture if site.kind not in READ_ONLY}
        for site in self._capture:
            if site.kind == "result":
                assert site.layer is not None
                z = self._seen[Site("z", site.layer)]
                found[site] = torch.einsum("bphd,hdm->bphm", z, self._host.W_O(site.layer).to(z))
        return found

    def diagnostics(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(self._diagnostics[id(edit)] for edit in self._order if id(edit) in self._diagnostics)
