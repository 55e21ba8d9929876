"""What holds of a model's adapter, one line per promise: sites, sums, attention, sweeps, direct effects.

For an adapter of your own, and for a release of transformers that no one has tried. Everything is run on a few tokens;
a promise that a family does not make (direct effects of BERT) is said not to apply.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.adapters import submodule
from vesalius.adapters.base import parameter
from vesalius.errors import InputError, VesaliusError
from vesalius.inputs import Pairs
from vesalius.intervention import Patch
from vesalius.model import Model
from vesalius.model.attention import capped
from vesalius.model.calls import logits_of
from vesalius.model.direct import direct_effects
from vesalius.model.hooks import Tap, tapped
from vesalius.model.parity import check_parity, probe_tokens, release, rounding
from vesalius.patching.record import record
from vesalius.patching.sweep import sweep
from vesalius.site import ATTENTION, RESULTS, Site

# Edits of these make no sense one by one, or take a pass of their own.
_DERIVED = (*RESULTS, *ATTENTION, "router", "expert_out")


@dataclass(frozen=True)
class Promise:
    """One thing that an adapter says. holds: None where it does not apply."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True)
class AdapterCheck:
    """What was found of one model's adapter, under one release of transformers."""

    model: str
    family: str
    release: str
    promises: tuple[Promise, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return all(promise.holds is not False for promise in self.promises)

    def __getitem__(self, name: str) -> Promise:
        return next(promise for promise in self.promises if promise.name == name)

    def __repr__(self) -> str:
        width = max(len(promise.name) for promise in self.promises)
        lines = [f"  {_MARKS[p.holds]:4} {p.name:{width}}  {p.detail}".rstrip() for p in self.promises]
        return "\n".join([f"{self.model}, {self.family} adapter, {self.release}", *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{_MARKS[p.holds]}</td><th>{html.escape(p.name)}</th><td>{html.escape(p.detail)}</td></tr>"
            for p in self.promises
        )
        caption = html.escape(f"{self.model}, {self.family} adapter, {self.release}")
        return f"<table><caption>{caption}</caption>{rows}</table>"


_MARKS = {True: "yes", False: "NO", None: "-"}


def check_adapter(model: Model | nn.Module, inputs: Any = None) -> AdapterCheck:
    """Try everything that an adapter says on a few tokens, and tell what holds; printed, one line per promise.

    model: a Model, made with probe=False when opening it fails; a bare module is opened so. inputs: for a model that
    takes no tokens, some of what it takes: images [2, channel, height, width]. Raises InputError without them, or for a
    model that has no adapter or is in training mode.
    """
    model = model if isinstance(model, Model) else Model(model, probe=False)
    adapter, _ = model.architecture
    model.check_evaluating()
    bench = _Bench(model, inputs)
    found = [_tried(name, check, bench) for name, check in _CHECKS.items()]
    return AdapterCheck(model.name, adapter.family, release(), tuple(found))


class _DoesNotApplyError(Exception):
    """This family does not promise it."""


def _tried(name: str, check: Callable[[_Bench], str], bench: _Bench) -> Promise:
    try:
        return Promise(name, True, check(bench))
    except _DoesNotApplyError as reason:
        return Promise(name, None, str(reason))
    except (VesaliusError, RuntimeError, AttributeError, KeyError, TypeError, IndexError) as error:
        return Promise(name, False, f"{type(error).__name__}: {error}")


class _Bench:
    """Inputs of two examples, and the run that captures every site there is."""

    def __init__(self, model: Model, inputs: Any) -> None:
        self.model = model
        self.tokens = probe_tokens(model)
        if self.tokens is None and inputs is None:
            raise InputError(f"{model.name} takes no tokens: give some of what it takes, check_adapter(model, images)")
        self.inputs = self.tokens if inputs is None else inputs

    def run(self, *sites: Site, **more: Any) -> Any:
        return self.model.run(self.inputs, capture=sites, **more)

    def layers(self) -> Iterator[tuple[str, int]]:
        adapter, layout = self.model.architecture
        for stack in adapter.stack_names:
            yield from ((stack, layer) for layer in range(layout.layers_of(stack)))

    def has(self, site: Site) -> bool:
        return site in self.model.sites()

    def close(self, one: Tensor, other: Tensor, what: str) -> float:
        """The difference as a share of the values' size; SelfCheckError-like InputError when beyond rounding."""
        size = max(float(one.abs().max()), 1e-12)
        off = float((one - other).abs().max()) / size
        if off > max(rounding(self.model, one), 1e-4):
            raise InputError(f"{what}: off by {off:.2g} of its size")
        return off

    def pairs(self) -> Pairs:
        if self.tokens is None or self.model.architecture[0].stacks:
            raise _DoesNotApplyError("checked for prompts")
        ids, lengths = self.tokens.ids, self.tokens.real.sum(1)
        corrupted = ids.clone()
        corrupted[:, 1] = ids.flip(0)[:, 1]
        return Pairs(clean=ids, corrupted=corrupted, answer=ids[:, 0], distractor=ids[:, 1], lengths=lengths)


def _identical(bench: _Bench) -> str:
    args, call, _ = bench.model.called_with(bench.inputs)
    with torch.no_grad():
        own = logits_of(bench.model.module(*args, **call))
    if not torch.equal(bench.run().logits, own):
        raise InputError("its logits are not bit by bit the module's own")
    return "bit by bit the module's own logits"


def _parity(bench: _Bench) -> str:
    if bench.tokens is None:
        raise _DoesNotApplyError("checked for prompts")
    check_parity(bench.model)
    return "captured, and from a cache: the module's own logits"


def _sites(bench: _Bench) -> str:
    """Every site by a hook on its module, without the machinery of captures."""
    model = bench.model
    adapter, layout = model.architecture
    raw: dict[Site, Tensor] = {}
    taps: dict[Site, Tap] = {}
    for site in model.sites():
        table = adapter.stack(site.stack)
        access = (table.outside if site.layer is None else table.sites).get(site.kind)
        if access is None or access.part or adapter.shared or site.kind in _DERIVED:
            continue
        root = model.module if site.layer is None else model.layer(site.layer, site.stack)
        scale = layout.residual_scale if access.scaled else 1.0

        def keep(tensor: Tensor, site: Site = site, scale: float = scale) -> None:
            raw.setdefault(site, tensor * scale)

        taps[site] = Tap(submodule(root, access.path), access.side, keep)
    with tapped(list(taps.values())):
        bench.run()
    missing = next((site for site in taps if site not in raw), None)
    if missing is not None:
        raise InputError(f"the module of {missing} is not called")
    run = bench.run(*raw)
    for site, seen in raw.items():
        found = run[site]
        rows = seen.expand(found.numel() // seen[0].numel(), *seen.shape[1:])
        if not torch.equal(found.reshape(-1), rows.reshape(-1)):
            raise InputError(f"{site} is not what a hook on its module sees")
    return f"{len(taps)} sites are what hooks on their modules see"


def _stream(bench: _Bench) -> str:
    """What is written to the stream adds up; each layer gets what the one before gave."""
    worst = 0.0
    for stack, layer in bench.layers():
        names = ("resid_pre", "attn_out", "mlp_out", "resid_mid", "resid_post")
        sites = {kind: Site(kind, layer, stack=stack) for kind in names}
        if not all(bench.has(sites[kind]) for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")) or stack:
            raise _DoesNotApplyError("its layers write more than attention and MLP")
        run = bench.run(*(site for site in sites.values() if bench.has(site)))
        if not bench.model.architecture[0].direct and not _adds_up(run, sites):
            raise _DoesNotApplyError("norms stand on the stream itself")
        middle = run[sites["resid_pre"]] + run[sites["attn_out"]]
        worst = max(worst, bench.close(run[sites["resid_post"]], middle + run[sites["mlp_out"]], f"layer {layer}"))
        if bench.has(sites["resid_mid"]):
            worst = max(worst, bench.close(run[sites["resid_mid"]], middle, str(sites["resid_mid"])))
    return f"resid_pre + attn_out + mlp_out = resid_post, off by {worst:.1g} of its size"


def _adds_up(run: Any, sites: dict[str, Site]) -> bool:
    total = run[sites["resid_pre"]] + run[sites["attn_out"]] + run[sites["mlp_out"]]
    return bool((total - run[sites["resid_post"]]).abs().max() < 0.05 * run[sites["resid_post"]].abs().max())


def _attention(bench: _Bench) -> str:
    """z is the pattern times the values, and the pattern what the scores give."""
    layout, worst, seen = bench.model.architecture[1], 0.0, 0
    for stack, layer in bench.layers():
        pattern, v, z = (Site(kind, layer, stack=stack) for kind in ("pattern", "v", "z"))
        if not (bench.has(pattern) and bench.has(v)):
            continue
        run = bench.run(pattern, v, z)
        values = run[v].repeat_interleave(layout.n_heads // layout.n_kv_heads, dim=2)
        worst = max(worst, bench.close(run[z], torch.einsum("bhqk,bkhd->bqhd", run[pattern], values), str(z)))
        seen += 1
    if not seen:
        raise _DoesNotApplyError("no sites for both pattern and values")
    return f"pattern times v is z in {seen} layers, off by {worst:.1g} of its size"


def _heads(bench: _Bench) -> str:
    """The heads' results sum to attn_out less the output's bias."""
    adapter, layout = bench.model.architecture
    if adapter.stacks or adapter.attn_norm:
        raise _DoesNotApplyError("a norm stands after attention" if adapter.attn_norm else "checked for one stack")
    worst = 0.0
    for _, layer in bench.layers():
        result, out = Site("result", layer), Site("attn_out", layer)
        run = bench.run(result, out)
        bias = parameter(submodule(bench.model.layer(layer), adapter.o_proj), "bias")
        total = run[result].sum(2) + (0.0 if bias is None else bias * layout.residual_scale)
        worst = max(worst, bench.close(run[out], total, str(out)))
    return f"heads sum to attn_out, off by {worst:.1g} of its size"


def _logits(bench: _Bench) -> str:
    """The run's logits are the unembedding's, with scales and cap."""
    adapter, layout = bench.model.architecture
    site = Site("logits")
    if not bench.has(site):
        raise _DoesNotApplyError("no site for the unembedding's output")
    run = bench.run(site)
    bound = getattr(adapter.config_of(bench.model.module), adapter.cap) if adapter.cap else None
    off = bench.close(run.logits, capped(run[site] * layout.logit_scale, bound), "the logits with the adapter's scales")
    return f"the unembedding's output with scales and cap, off by {off:.1g} of its size"


def _edits(bench: _Bench) -> str:
    """A patch of a site's own values changes nothing, one of zeros something."""
    base, count = bench.run().logits, 0
    for site in bench.model.sites():
        if site.kind in _DERIVED or site.kind == "pos_embed" or site.layer not in (None, 0):
            continue
        values = bench.run(site)[site]
        same = bench.run(interventions=[Patch(site, source=values)]).logits
        bench.close(base, same, f"{site} patched with its own values")
        if torch.equal(bench.run(interventions=[Patch(site, source=torch.zeros_like(values))]).logits, base):
            raise InputError(f"{site} set to zero changes nothing")
        count += 1
    return f"{count} sites act when edited, and their own values change nothing"


def _sweep(bench: _Bench) -> str:
    pairs = bench.pairs()
    for pattern, each in (("layers.*.z", "head"), ("layers.*.resid_post", "position")):
        sweep(bench.model, pairs, sites=pattern, each=each, sink=lambda _event: None)
    reason = record(bench.model, pairs.tokens("clean")).reason
    return f"equal plain runs with hooks; {f'whole runs: {reason}' if reason else 'layers are replayed'}"


def _direct(bench: _Bench) -> str:
    if not bench.model.architecture[0].direct:
        raise _DoesNotApplyError("the logits are no sum of what parts wrote")
    pairs = bench.pairs()
    direct_effects(bench.model, pairs, pairs.tokens("clean"))
    return "sum to the run's own logits"


_CHECKS: dict[str, Callable[[_Bench], str]] = {
    "run": _identical,
    "parity": _parity,
    "sites": _sites,
    "stream": _stream,
    "attention": _attention,
    "heads": _heads,
    "logits": _logits,
    "edits": _edits,
    "sweeps": _sweep,
    "direct effects": _direct,
}
