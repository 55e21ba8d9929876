"""What an intervention is, how one is applied to the tensors of a run, and how unnatural it made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.errors import InputError, InterventionError
from vesalius.inputs import Tokens
from vesalius.intervention.place import Place, Positions, place_of, spread, token_axis
from vesalius.parts import At, Part, Unit
from vesalius.site import ATTENTION, Site


@runtime_checkable
class Intervention(Protocol):
    """Something that gives a part another value."""

    @property
    def part(self) -> Part: ...

    @property
    def positions(self) -> Positions: ...

    def value(self, present: Tensor, place: Place) -> Tensor:
        """The part's new value, broadcastable to its present one, over the tokens of `place`."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@runtime_checkable
class Reader(Protocol):
    """An intervention whose value depends on other sites of the same run; `given` makes the edit once they are read."""

    @property
    def reads(self) -> tuple[Site, ...]: ...

    def given(self, at: At) -> Intervention:
        """The edit, now that the sites of `reads` have these whole tensors."""
        ...


@runtime_checkable
class ByPart(Protocol):
    """An intervention that can be split, where its part is several."""

    def by_part(self) -> list[Intervention]: ...


def listed(interventions: Sequence[Intervention] | Intervention) -> list[Intervention]:
    """One intervention or several as a list. Raises InputError for what are none."""
    given = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    found: list[Intervention] = []
    for one in given:
        if not isinstance(one, Intervention):
            raise InputError(f"interventions= takes edits such as vs.Ablate(site); got {type(one).__name__}")
        # An edit of several parts together is one edit of each.
        found += one.by_part() if isinstance(one, ByPart) else [one]
    return found


def writes_of(part: Part) -> tuple[Site, ...]:
    """Whole sites that a part writes, each once."""
    return tuple(dict.fromkeys(site.whole for site in part.writes))


def reads_of(edit: Intervention) -> tuple[Site, ...]:
    """Whole sites that an edit needs to have been read in the same run, beside what its part itself writes."""
    elsewhere = [site.whole for site in edit.part.reads if site.whole not in writes_of(edit.part)]
    given = [site.whole for site in edit.reads] if isinstance(edit, Reader) else []
    return tuple(dict.fromkeys([*elsewhere, *given]))


def joint(part: Part) -> bool:
    """Whether a part has to be written before its value is known: it writes several sites, or reads a later one."""
    first = part.writes[0]
    return len(writes_of(part)) > 1 or any(site.order > first.order for site in part.reads)


def apply(edit: Intervention, at: At, place: Place) -> dict[Site, Tensor]:
    """The whole tensors at the sites that one edit writes; positions outside the choice keep their value bit for bit.

    at: whole tensors at the sites that the edit's part reads and writes. An edit is computed in the tensors' own
    precision, also under autocast.
    """
    part = edit.part
    place = place.choosing(edit.positions)
    with _own_precision(at[part.writes[0].whole]):
        present = part.value(at)
        new = edit.value(present, place)
        try:
            new = new.to(present).expand_as(present)
        except RuntimeError:
            raise InterventionError(
                f"{type(edit).__name__} at {part.writes[0]}: the new value has shape {tuple(new.shape)}, "
                f"the present one {tuple(present.shape)}"
            ) from None
        edited = part.written(at, new)
    if place.chosen is None:
        return edited
    return {site: _only_at(place.chosen, edited[site], at[site], site) for site in edited}


def _only_at(chosen: Bool[Tensor, "batch pos"], edited: Tensor, whole: Tensor, site: Site) -> Tensor:
    return torch.where(spread(chosen.to(whole.device), whole, site), edited, whole)


def _own_precision(whole: Tensor) -> AbstractContextManager[Any]:
    kind = whole.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


class Edits:
    """The interventions of one pass, applied site by site as the pass comes to them, in the order they were given.

    places: one per intervention, which tokens this pass holds and which of them are edited; default all of `tokens`,
    and each intervention's own positions.
    """

    def __init__(
        self, interventions: Sequence[Intervention], tokens: Tokens | None = None, places: Sequence[Place] = ()
    ) -> None:
        self._tokens, self._places = tokens, places
        self._figures: dict[int, tuple[Intervention, dict[str, float]]] = {}
        self.by_site: dict[Site, list[tuple[int, Intervention]]] = {}
        for number, edit in enumerate(interventions):
            self.by_site.setdefault(writes_of(edit.part)[0], []).append((number, edit))

    def __contains__(self, site: Site) -> bool:
        return site in self.by_site

    def at(self, site: Site, tensor: Tensor, seen: Mapping[Site, Tensor]) -> Tensor:
        """The site's whole tensor after its edits. seen: what was read elsewhere in this pass."""
        for number, edit in self.by_site.get(site, ()):
            place = self._places[number] if self._places else place_of(self._tokens, site, tensor)
            if place.chosen is not None and not bool(place.chosen.any()):
                continue
            at = _at(edit, site, tensor, seen)
            changed = apply(edit.given(at) if isinstance(edit, Reader) else edit, at, place)[site]
            counted = place.real if self._tokens is not None or self._places else None
            self._figures[number] = (edit, off_distribution(tensor, changed, counted, edit.part.writes[0]))
            tensor = changed
        return tensor

    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """One entry per intervention that acted, in the order given."""
        return tuple(Diagnostic(*self._figures[number]) for number in sorted(self._figures))


class Diagnostic(Mapping[str, Any]):
    """How unnatural the values of one edit were, and which edit that was. The edit is put into words when asked for."""

    def __init__(self, edit: Intervention, figures: Mapping[str, float]) -> None:
        self._edit, self._figures = edit, figures

    def __getitem__(self, key: str) -> Any:
        if key != "intervention":
            return self._figures[key]
        return getattr(self._edit, "describe", self._edit.to_json)()

    def __iter__(self) -> Iterator[str]:
        return iter(("intervention", *self._figures))

    def __len__(self) -> int:
        return 1 + len(self._figures)


def _at(edit: Intervention, site: Site, tensor: Tensor, seen: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """The tensors that an edit at this site reads and writes."""
    wanted = [read for read in reads_of(edit) if read != site]
    late = [read for read in wanted if read not in seen]
    if late:
        raise InterventionError(
            f"{type(edit).__name__} reads {late[0]}, which this pass makes only after {site}; "
            "an edit can read the same site or an earlier one"
        )
    return {**{read: seen[read] for read in wanted}, site: tensor}


# Scores of keys that may not be seen; the mask adds the lowest number there is.
_HIDDEN = -1e30
_SHARED = 0.01


def off_distribution(
    before: Tensor, after: Tensor, real: Bool[Tensor, "batch pos"] | None, site: Site
) -> dict[str, float]:
    """How unnatural an edit is, against the same tensor's natural values in the same run.

    norm_ratio: mean norm of the edited vectors over the mean norm of the natural ones. z_rms: root mean square of the
    edited values' per-dimension z-scores (1 for natural values; large means low density); a hundredth of the mean
    variance is added to every dimension's, so that one that hardly varies does not decide alone. There is one vector
    per real token; for attention the query's row of keys, all heads together; for a tensor that does not count tokens
    one per example. real: None in a run without tokens.
    """
    natural, edited = (_vectors(tensor.detach(), real, site) for tensor in (before, after))
    changed = (natural != edited).any(1)
    if not bool(changed.any()):
        return {"norm_ratio": 1.0, "z_rms": 1.0}
    variance = natural.var(0) if len(natural) > 1 else natural.var(unbiased=False).expand(natural.shape[1])
    spread = (variance + _SHARED * variance.mean()).sqrt().clamp_min(1e-12)
    z = (edited[changed] - natural.mean(0)) / spread
    ratio = edited[changed].norm(dim=1).mean() / natural.norm(dim=1).mean().clamp_min(1e-12)
    return {"norm_ratio": float(ratio), "z_rms": float(z.pow(2).mean().sqrt())}


def _vectors(whole: Tensor, real: Bool[Tensor, "batch pos"] | None, site: Site) -> Float[Tensor, "row width"]:
    """In float32 or wider."""
    value = Unit(site).read(whole)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if site.kind in ATTENTION:
        value = value.masked_fill(value < _HIDDEN, 0.0).movedim(token_axis(site), 1)
    if real is not None and value.shape[:2] == real.shape:
        value = value[real.to(value.device)]
    return value.reshape(len(value) if value.ndim else 1, -1)
