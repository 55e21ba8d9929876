"""From sites to hooks: how captures and interventions become taps on a model's modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from vesalius.activations import refuse_nonfinite
from vesalius.adapters import Access, Adapter, Layout, Stack, submodule
from vesalius.adapters.base import join_heads, split_heads
from vesalius.adapters.experts import contributions, rerouted, routed_by
from vesalius.errors import InterventionError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.intervention import Edits, Intervention, Place, joint, reads_of
from vesalius.model.attention import Plain, attending
from vesalius.model.hooks import OutputTap, Tap, Visit, tapped
from vesalius.site import ATTENTION, RESULTS, SCORES, Site

# Scores hold minus infinity by right; experts' shares are costly to make, and show in mlp_out.
UNWATCHED = (*RESULTS, *ATTENTION, "router", "expert_out")


@runtime_checkable
class Host(Protocol):
    """What taps need of a model."""

    module: nn.Module
    adapter: Adapter | None
    layout: Layout | None

    def layer(self, number: int, stack: str = "") -> nn.Module: ...
    def check_site(self, site: Site) -> None: ...
    def heads_of(self, site: Site, z: Tensor) -> Tensor: ...


class Recorder:
    """Taps of one run, and what they saw. Edits of one site act in the order given.

    places: one per intervention, which tokens this pass holds and which of them are edited; default all of `tokens`,
    and each intervention's own positions. watch: sites where NaN or infinity is refused. copies: what is kept is
    copied, for a model that changes its tensors in place (see `overwritten`).
    """

    def __init__(
        self,
        host: Host,
        capture: Sequence[Site],
        interventions: Sequence[Intervention],
        tokens: Tokens | None,
        grad: bool,
        places: Sequence[Place] = (),
        watch: Sequence[Site] = (),
        copies: bool = False,
    ) -> None:
        self._host = host
        self._copies = copies
        self._versions: dict[Site, int] = {}
        self._tokens = tokens
        self._grad = grad
        self._seen: dict[Site, Tensor] = {}
        self._fired: set[Site] = set()
        self._capture = list(dict.fromkeys(capture))
        self._edits = Edits(interventions, tokens, places)
        self._read: set[Site] = set()
        for edit in interventions:
            self._check_editable(edit)
            self._read.update(self._checked_reads(edit))
        self._read.update(_z_of(site) for site in self._capture if site.kind in RESULTS)
        asked = [*self._edits.by_site, *self._read, *(s for s in self._capture if s.kind not in RESULTS)]
        # In the order of the forward pass: two sites can share a module's tensor (attn_out, and the sum resid_mid).
        self._all = sorted(dict.fromkeys(asked), key=_forward_order)
        through = [site for site in self._all if self._through_attention(site)]
        self._refuse_nan = bool(watch)
        # Only watched: what some module has, so that looking at it costs nothing.
        only = [s for s in watch if s not in self._all and s.kind not in UNWATCHED and not self._through_attention(s)]
        every = sorted((*self._all, *only), key=_forward_order)
        self._direct = [(site, site in only) for site in every if site not in through]
        self.needs_attention = bool(through)
        self._heard: Counter[int] = Counter()
        self._attention = self._attention_sites() if through else {}

    @property
    def taps(self) -> list[Tap | OutputTap]:
        """Made anew for a pass: kept here, they and the recorder's tensors would wait for the garbage collector."""
        return [tap for site, only in self._direct for tap in self._counted(site, only)]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Taps and attention in place for the length of a `with` block."""
        with ExitStack() as stack:
            stack.enter_context(tapped(self.taps))
            if self.needs_attention:
                stack.enter_context(attending(self._host.module, Plain(self.visit_attention)))
            yield

    def _check_editable(self, edit: Intervention) -> None:
        for site in edit.part.writes:
            if site.kind in RESULTS:
                raise InterventionError(
                    f"{site} is computed for reading and cannot be edited; edit {_z_of(site)} instead"
                )
            self._host.check_site(site)
        if joint(edit.part):
            raise InterventionError(
                f"{edit.part} is written before all of it can be read, which takes a run of its own: use Model.run"
            )

    def _checked_reads(self, edit: Intervention) -> tuple[Site, ...]:
        for site in reads_of(edit):
            if site.kind in RESULTS:
                raise InterventionError(f"{site} is no tensor of the pass, so no edit can read it; read {_z_of(site)}")
            self._host.check_site(site)
        return reads_of(edit)

    def _through_attention(self, site: Site) -> bool:
        """Scores and patterns are reached in our attention function, unless a module of the model returns them."""
        return site.kind in ATTENTION and site.kind not in self._stack(site).sites

    def _counted(self, site: Site, only: bool) -> list[Tap | OutputTap]:
        """A site's taps (only: its lookout); where all layers are one module, they act in one of its calls."""
        adapter, taps = self._host.adapter, self._lookout(site) if only else self._taps(site)
        if adapter is None or not adapter.shared or site.layer is None:
            return taps
        return [Tap(tap.module, tap.side, _nth(tap.visit, site.layer)) for tap in taps if isinstance(tap, Tap)]

    def _taps(self, site: Site) -> list[Tap | OutputTap]:
        if site.kind == "module":
            return [Tap(submodule(self._host.module, site.module), site.side, self._visitor(site, None))]
        access, root = self._access(site), self._root(site)
        if site.kind in ("router", "expert_out"):
            return [OutputTap(submodule(root, access.path), self._expert_visitor(site, access))]
        if not access.delta or site not in self._edits:
            return [Tap(submodule(root, access.path), access.side, self._visitor(site, access))]
        return self._delta_taps(site, access, root)

    def _lookout(self, site: Site) -> list[Tap | OutputTap]:
        """Taps that only refuse NaN and infinity."""
        if site.kind == "module":
            module = submodule(self._host.module, site.module)
            return [OutputTap(module, lambda _, output: self._check_all(site, output))]
        access = self._access(site)

        def visit(tensor: Tensor) -> None:
            refuse_nonfinite(site, self._split(tensor, access), self._real_at(site))

        return [Tap(submodule(self._root(site), access.path), access.side, visit)]

    def _check_all(self, site: Site, output: Any) -> None:
        """Every floating-point tensor a module returns."""
        for item in output if isinstance(output, tuple | list) else [output]:
            if isinstance(item, Tensor) and item.dtype.is_floating_point:
                refuse_nonfinite(site, item, self._real_at(site))

    def _access(self, site: Site) -> Access:
        table = self._stack(site).outside if site.layer is None else self._stack(site).sites
        if site.kind not in table:
            raise UnknownNameError("site", str(site), table)
        return table[site.kind]

    def _stack(self, site: Site) -> Stack:
        assert self._host.adapter is not None
        return self._host.adapter.stack(site.stack)

    def _root(self, site: Site) -> nn.Module:
        """What the site's paths start from."""
        return self._host.module if site.layer is None else self._host.layer(site.layer, site.stack)

    def _delta_taps(self, site: Site, access: Access, root: nn.Module) -> list[Tap | OutputTap]:
        """A sum no module returns (resid_mid): edited by adding the change to its last summand, read where used."""
        before: list[Tensor] = []

        def remember(tensor: Tensor) -> None:
            before[:] = [tensor.clone()]  # the model may go on in place

        scale = 1.0 if self._host.layout is None else self._host.layout.residual_scale

        def add_change(tensor: Tensor) -> Tensor:
            total = before[0] + tensor * scale
            return tensor + (self._edits.at(site, total, self._seen) - total) / scale

        read = self._reader(site, access)
        return [
            Tap(root, "in", remember),
            Tap(submodule(root, access.delta), "out", add_change),
            Tap(submodule(root, access.path), access.side, read),
        ]

    def _reader(self, site: Site, access: Access) -> Callable[[Tensor], None]:
        def visit(tensor: Tensor) -> None:
            self._keep(site, self._split(tensor, access))

        return visit

    def _split(self, tensor: Tensor, access: Access | None) -> Tensor:
        layout = self._host.layout
        if access is None or layout is None:
            return tensor
        return split_heads(tensor, access, layout, self._batch())

    def _visitor(self, site: Site, access: Access | None) -> Callable[[Tensor], Tensor | None]:
        layout = self._host.layout

        def visit(tensor: Tensor) -> Tensor | None:
            here = self._split(tensor, access)
            if access is not None and here.shape[0] == 1:
                # Position embeddings are made once for the whole batch.
                here = here.expand(self._batch(), *here.shape[1:])
            edited = self._edits.at(site, here, self._seen)
            edited = self._keep(site, edited)
            if edited is here and not self._grad:
                return None
            # A copy: what an edit gives may be another run's tensor, and the model may go on in place.
            edited = edited.clone()
            return edited if access is None or layout is None else join_heads(tensor, edited, access, layout)

        return visit

    def _expert_visitor(self, site: Site, access: Access) -> Callable[[tuple[Any, ...], Any], Any]:
        """Router logits, whose edit reroutes; or what each expert adds, whose edit is added to the experts' sum."""

        def route(args: tuple[Any, ...], output: Any) -> Any:
            here = self._split(routed_by(gate, args[0], output[0]), access)
            edited = self._keep(site, self._edits.at(site, here, self._seen))
            return None if edited is here and not self._grad else rerouted(gate, edited.flatten(0, 1))

        def add(args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            here = self._split(contributions(gate, *args[:3]), access)
            edited = self._keep(site, self._edits.at(site, here, self._seen))
            if self._grad:
                # The same value, with the gradient through the contributions.
                return edited.sum(2).flatten(0, 1) + (output - here.sum(2).flatten(0, 1)).detach()
            return None if edited is here else output + (edited - here).sum(2).flatten(0, 1)

        gate = submodule(self._root(site), access.path)
        return route if site.kind == "router" else add

    def _attention_sites(self) -> dict[int, list[Site]]:
        """The scores sites that each attention module makes, in its calls' order: several when layers share it."""
        found: dict[int, list[Site]] = {}
        adapter, layout = self._host.adapter, self._host.layout
        assert adapter is not None
        assert layout is not None
        for name in adapter.stack_names:
            stack = adapter.stack(name)
            for kind, path in (("scores", stack.attention), ("cross_scores", stack.cross_attention)):
                for layer in range(layout.layers_of(name) if path else 0):
                    module = submodule(self._host.layer(layer, name), path)
                    found.setdefault(id(module), []).append(Site(kind, layer, stack=name))
        return found

    def visit_attention(self, kind: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
        """Called by our attention function with scores and pattern [batch, head, query_pos, key_pos]."""
        sites, past = self._attention.get(id(module), []), self._heard[id(module)]
        self._heard[id(module)] += kind == "pattern"
        if not sites:
            return None
        made = sites[min(past, len(sites) - 1)]
        site = replace(made, kind=made.kind.replace("scores", kind))
        if site not in self._all:
            return None
        return self._keep(site, self._edits.at(site, tensor, self._seen))

    def _real_at(self, site: Site) -> Tensor | None:
        return None if self._tokens is None else self._tokens.real_at(site)

    def _batch(self) -> int:
        """Examples in this pass; 1 when nothing says so."""
        return 1 if self._tokens is None else len(self._tokens)

    def _keep(self, site: Site, tensor: Tensor) -> Tensor:
        self._fired.add(site)
        if self._refuse_nan and site.kind not in SCORES:
            refuse_nonfinite(site, tensor, self._real_at(site))
        if self._grad and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
        if site in self._capture or site in self._read:
            self._seen[site] = kept = tensor.clone() if self._copies and not self._grad else tensor
            self._versions[site] = version_of(kept)
        return tensor

    def overwritten(self) -> bool:
        """Whether the model changed in place what was kept. Then the pass has to be made again, with copies."""
        return any(version_of(tensor) != self._versions[site] for site, tensor in self._seen.items())

    def check_fired(self) -> None:
        """Raise InterventionError when a site that was asked for never fired."""
        silent = [str(site) for site in self._all if site not in self._fired]
        if silent:
            raise InterventionError(
                f"{', '.join(silent)} never fired in this run, so nothing was read or edited there; "
                "the module is not called with these inputs"
            )

    def captured(self) -> Mapping[Site, Tensor]:
        return {
            site: self._host.heads_of(site, self._seen[_z_of(site)]) if site.kind in RESULTS else self._seen[site]
            for site in self._capture
        }

    def diagnostics(self) -> tuple[Mapping[str, Any], ...]:
        """One entry per intervention that acted, in the order given."""
        return self._edits.diagnostics()


def version_of(tensor: Tensor) -> int:
    """How often a tensor, or what it is a view of, was changed in place; 0 where inference_mode does not tell."""
    return 0 if tensor.is_inference() else tensor._version


def _z_of(result: Site) -> Site:
    """What a head's result is computed from."""
    return replace(result.whole, kind=result.kind.replace("result", "z"))


def _nth(visit: Visit, number: int) -> Visit:
    """Acts in call `number` only."""
    calls = count()
    return lambda tensor: visit(tensor) if next(calls) == number else None


def _forward_order(site: Site) -> tuple[int, ...]:
    return (1, *site.order) if site.kind == "module" else (0, *site.order)
