"""Replay: many edited runs as few forwards, exactly.

Each row is one edited run of one example. It joins at the first layer its edits touch, carries only the positions that
can change (a suffix: attention is causal), and attends to the base run's recorded keys and values before that suffix.
All rows of a batch are laid end to end, [1, tokens, d_model], and go through the model's own layer modules; only the
attention function is ours, because it must know which token belongs to which row.

Traps this design avoids: the recorded attention mask is never replayed on a suffix (it would be silently wrong), keys
and values are our own read-only copies (caches drop and mutate), and a layer keyword that is a tensor with no stated
rule is refused instead of guessed at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vesalius.adapters import submodule
from vesalius.adapters.base import join_heads, split_heads
from vesalius.errors import InterventionError
from vesalius.model.attention import attending, capped, softmaxed, weighted
from vesalius.model.hooks import Tap, tapped
from vesalius.model.products import computing
from vesalius.patching.edits import Edits, Flat, Rows
from vesalius.patching.plan import Needed
from vesalius.patching.record import Recording, holds_tensor, no_rule
from vesalius.site import Site


class _Attention:
    """Attention of flattened rows: each token attends to its own row's live tokens and to the base run before them."""

    understands = ("s_aux",)

    def __init__(
        self,
        base: Recording,
        flat: Flat,
        step: Int[Tensor, " row"],
        watch: Mapping[Site, list[Tensor]],
        patterns: bool,
        needed: Needed,
    ) -> None:
        """step: the watched token of each row, counted from its first live one."""
        self._base, self._needed = base, needed
        self._flat, self._step = flat, step
        self._watch, self._patterns = watch, patterns
        self._geometry: dict[tuple[int, int | None], Any] = {}

    def __call__(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _mask: Tensor | None,
        scaling: float,
        _options: dict[str, Any],
    ) -> Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        rows, index, mask, row_of, pos_of, within = self._layout(layer)
        needed = self._needed.attending(layer, len(rows))
        if needed is None:
            return self._attended(layer, q, k, v, (rows, index, mask, row_of, pos_of, within), scaling)
        out = v.new_zeros(1, len(row_of), q.shape[1], v.shape[3])
        if bool(needed.any()):
            owner = self._flat.row_of[: len(row_of)]
            chosen, number = needed[owner], needed.cumsum(0) - 1
            renumbered = number[owner[chosen]].to(q.device)
            kept, token = (one.nonzero()[:, 0].to(q.device) for one in (needed, chosen))
            # Tokens keep their places in the batch; rows are numbered anew.
            some = (rows.take(kept), index[kept], mask[kept], renumbered, pos_of[token], within[token])
            out[:, token] = self._attended(layer, q, k[:, :, token], v[:, :, token], some, scaling)
        return out

    def _attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor, place: Any, scaling: float) -> Tensor:
        """Of some rows: k and v of their own tokens, q of all of the batch (`index` says where theirs are)."""
        rows, index, mask, row_of, pos_of, within = place
        width, n_kv = mask.shape[-1], k.shape[1]
        # Indexing by a tensor copies, so writing into these leaves the recording as it is.
        keys = self._base.keys[layer][rows.example, :, :width]
        values = self._base.values[layer][rows.example, :, :width]
        values[row_of, :, pos_of] = v[0].transpose(0, 1)
        if not self._patterns:
            keys[row_of, :, pos_of] = k[0].transpose(0, 1)
        # Query heads that share a key-value head are stacked along the query axis, so keys are never repeated.
        n_heads, depth = q.shape[1], q.shape[3]
        padded = self._queries(layer, q, rows, index).view(len(rows), index.shape[1], n_kv, n_heads // n_kv, depth)
        stacked = padded.permute(0, 2, 3, 1, 4).reshape(len(rows), n_kv, -1, depth)
        tiled = mask.repeat(1, n_heads // n_kv, 1)[:, None]
        sinks = self._base.sinks[layer]
        if sinks is not None:
            sinks = sinks.view(n_kv, -1, 1).expand(-1, -1, index.shape[1]).reshape(n_kv, -1, 1)
        out = weighted(stacked, keys, values, tiled, scaling, self._base.caps[layer], sinks)
        if Site("pattern", layer) in self._watch:
            self._look(layer, padded, keys, mask, scaling)
        spread = out.view(len(rows), n_kv, n_heads // n_kv, -1, out.shape[-1]).permute(0, 3, 1, 2, 4)
        return spread[row_of, within].reshape(1, len(row_of), n_heads, -1)

    def _queries(self, layer: int, q: Tensor, rows: Rows, index: Tensor) -> Tensor:
        """[row, step, head, d_head]; with patterns held, who attends to whom is the base run's: its queries."""
        if not self._patterns:
            return q[0].transpose(0, 1)[index]
        pos = (rows.start[:, None] + torch.arange(index.shape[1], device=q.device)).clamp_max(
            self._base.tokens.ids.shape[1] - 1
        )
        return self._base.queries[layer][rows.example[:, None], pos]

    def _layout(self, layer: int) -> Any:
        """Rows, [row, step] tokens, [row, step, key] mask, and each token's row, position and step; on the device."""
        count, tokens = self._flat.active(layer)
        window = self._base.windows[layer]
        # Between two layers at which rows join nothing changes, so most layers find theirs made.
        if (count, window) not in self._geometry:
            joined, where = self._flat.rows.take(torch.arange(count)), self._base.resid[0].device
            rows = joined.to(where)
            steps = torch.arange(int(joined.sizes.max()), device=where)
            index = (self._flat.offset[:count, None].to(where) + steps).clamp_max(tokens - 1)
            back = (rows.start[:, None] + steps)[..., None] - torch.arange(int(joined.end.max()), device=where)
            reach = back >= 0 if window is None else (back >= 0) & (back < window)
            row_of, pos_of = self._flat.row_of[:tokens].to(where), self._flat.pos_of[:tokens].to(where)
            within = pos_of - rows.start[row_of]
            self._geometry[count, window] = (rows, index, reach, row_of, pos_of, within)
        return self._geometry[count, window]

    def _look(self, layer: int, padded: Tensor, keys: Tensor, mask: Tensor, scaling: float) -> None:
        """Attention pattern of each row's watched token: [row, head, key_pos]."""
        rows = torch.arange(len(padded), device=padded.device)
        at = self._step[: len(padded)].to(padded.device)
        scores = capped(torch.einsum("rkgd,rksd->rkgs", padded[rows, at], keys) * scaling, self._base.caps[layer])
        scores = scores.masked_fill(~mask[rows, at][:, None, None], float("-inf"))
        pattern = softmaxed(scores.flatten(1, 2), sink_column(self._base, layer))
        full = pattern.new_zeros(*pattern.shape[:2], self._base.tokens.ids.shape[1])
        full[..., : pattern.shape[-1]] = pattern
        self._watch[Site("pattern", layer)].append(full)


class Replay:
    """One batch of rows through the model's layers."""

    def __init__(
        self,
        base: Recording,
        rows: Rows,
        edits: Edits,
        watch: Sequence[Site] = (),
        *,
        read: Int[Tensor, "row read"] | None = None,
        patterns: bool = False,
        compute: str = "float32",
        tapped_sites: Sequence[Site] = (),
        grad: bool = False,
    ) -> None:
        """read: positions whose final residual vector is returned, default each row's last one. patterns: attention
        patterns are the base run's. compute: see `products.computing`. tapped_sites: sites that taps of the caller
        look at, so that they must be computed. grad: keep the graph, from the edits' values on."""
        self._base, self._model = base, base.model
        self._patterns, self._compute, self._grad = patterns, compute, grad
        self._flat = Flat(rows)
        self._edits = edits
        self._seen: dict[Site, list[Tensor]] = {site.whole: [] for site in watch}
        self._read_again: dict[Site, Tensor] = {}
        self._layout = self._model.architecture[1]
        self._read = (rows.end - 1)[:, None] if read is None else read
        # Of a read position before the row's first live one the base run's vector is returned.
        self._token = (self._flat.offset - rows.start)[:, None] + self._read.clamp_min(rows.start[:, None])
        looked_at = [*self._seen, *edits.reads, *tapped_sites]
        self._needed = Needed(self._model, self._flat, edits, looked_at, self._token.flatten())

    def run(self) -> tuple[Float[Tensor, "row read d_model"], dict[Site, Tensor]]:
        """Last layer's output at the positions read, and watched sites at the first of them [row, ...]."""
        # Rows join later, each at its own layer.
        hidden = self._base.resid[0].new_empty(1, 0, self._layout.d_model)
        step = self._token[:, 0] - self._flat.offset
        attend = _Attention(self._base, self._flat, step, self._seen, self._patterns, self._needed)
        taps, compute = tapped([*self._needed.taps(), *self._taps()]), computing(self._compute)
        with torch.set_grad_enabled(self._grad), taps, attending(self._model.module, attend), compute:
            for layer in range(int(self._flat.rows.layer.min()), self._layout.n_layers):
                hidden = self._step(layer, hidden)
        hidden = self._join(self._layout.n_layers, hidden)
        return self._final(hidden[0]), self._watched()

    def _final(self, hidden: Float[Tensor, "token d_model"]) -> Float[Tensor, "row read d_model"]:
        rows = self._flat.rows
        found = hidden[self._token]
        early = self._read < rows.start[:, None]
        if not bool(early.any()):
            return found
        return torch.where(
            early[..., None].to(found.device), self._base.resid[-1][rows.example[:, None], self._read], found
        )

    def _join(self, layer: int, hidden: Tensor) -> Tensor:
        """Append the rows that start at this layer, then apply edits of the residual stream here."""
        tokens = self._flat.active(layer)[1]
        before = hidden.shape[1]
        if tokens > before:
            row_of, pos = self._flat.row_of[before:tokens], self._flat.pos_of[before:tokens]
            fresh = self._base.resid[layer][self._flat.rows.example[row_of], pos]
            hidden = torch.cat([hidden, fresh[None]], 1)
        hidden = self._edits.apply(Site("resid_pre", layer), hidden, self._flat, self._read_again)
        for name in (Site("resid_pre", layer), Site("resid_post", layer - 1) if layer else Site("embed")):
            self._keep(name, hidden)
        return hidden

    def _keep(self, site: Site, tensor: Tensor) -> None:
        """Keep what an edit at a later site reads here."""
        if site in self._edits.reads:
            self._read_again[site] = tensor

    def _step(self, layer: int, hidden: Tensor) -> Tensor:
        hidden = self._join(layer, hidden)
        if not hidden.shape[1]:
            return hidden
        out = self._model.layer(layer)(hidden, **self._arguments(layer, hidden.shape[1]))
        return out[0] if isinstance(out, tuple) else out

    def _arguments(self, layer: int, tokens: int) -> dict[str, Any]:
        rules, where = self._model.architecture[0].replay, self._base.resid[0].device
        pos = self._flat.pos_of[:tokens].to(where)
        example = self._flat.rows.example[self._flat.row_of[:tokens]].to(where)
        built: dict[str, Any] = {}
        for name, value in self._base.calls[layer].items():
            rule = rules.get(name)
            # A mask or a cache of the recorded run would be wrong here without an error: refuse what is not known.
            if rule is None and holds_tensor(value):
                raise InterventionError(no_rule(layer, name))
            built[name] = _argument(rule, value, example, pos)
        return built

    def _taps(self) -> list[Tap]:
        adapter = self._model.architecture[0]
        looked_at = [*self._edits.sites, *self._edits.reads, *self._seen]
        kinds = {site for site in looked_at if site.kind not in ("resid_pre", "resid_post", "embed", "pattern")}
        taps = []
        for site in sorted(kinds, key=lambda site: site.order):
            access = adapter.sites[site.kind]
            if access.delta and site in self._edits.sites:
                raise InterventionError(f"{site} cannot be swept; edit attn_out or resid_post instead")
            assert site.layer is not None
            module = submodule(self._model.layer(site.layer), access.path)
            taps.append(Tap(module, access.side, self._visitor(site)))
        return taps

    def _visitor(self, site: Site) -> Any:
        access = self._model.architecture[0].sites[site.kind]

        def visit(tensor: Tensor) -> Tensor | None:
            here = split_heads(tensor, access, self._layout)
            edited = self._edits.apply(site, here, self._flat, self._read_again)
            self._keep(site, edited)
            if site in self._seen:
                assert site.layer is not None
                self._seen[site].append(edited[0, self._token[: self._flat.active(site.layer)[0], 0]])
            return None if edited is here else join_heads(tensor, edited, access, self._layout)

        return visit

    def _watched(self) -> dict[Site, Tensor]:
        """Watched values per row; the base run's where the row joined after the layer, or after the position."""
        return {site: self._filled(site, seen[0] if seen else None) for site, seen in self._seen.items()}

    def _filled(self, site: Site, seen: Tensor | None) -> Tensor:
        rows, at = self._flat.rows, self._read[:, 0]
        missing = (torch.arange(len(rows)) >= (0 if seen is None else len(seen))) | (at < rows.start)
        if not bool(missing.any()):
            assert seen is not None
            return seen
        example, at = rows.example[missing], at[missing]
        base = base_pattern(self._base, site, example, at) if site.kind == "pattern" else self._base[site][example, at]
        found = base.new_zeros(len(rows), *base.shape[1:])
        if seen is not None:
            found[: len(seen)] = seen
        found[missing] = base
        return found


def base_pattern(
    base: Recording, site: Site, example: Int[Tensor, " row"], at: Int[Tensor, " row"]
) -> Float[Tensor, "row head key_pos"]:
    """The base run's attention pattern of some examples at these query positions."""
    assert site.layer is not None
    keys = base.keys[site.layer][example]
    query = base.queries[site.layer][example, at]
    by_group = query.view(len(example), keys.shape[1], -1, query.shape[-1])
    scores = torch.einsum("rkgd,rksd->rkgs", by_group, keys) * base.scaling[site.layer]
    scores, window = capped(scores, base.caps[site.layer]), base.windows[site.layer]
    back = (at[:, None] - torch.arange(keys.shape[2])).to(scores.device)
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    scores = scores.masked_fill(hidden[:, None, None], float("-inf")).flatten(1, 2)
    return softmaxed(scores, sink_column(base, site.layer))


def sink_column(base: Recording, layer: int) -> Tensor | None:
    """A layer's attention sinks beside scores [..., head, key_pos]: [head, 1]."""
    sinks = base.sinks[layer]
    return None if sinks is None else sinks[:, None]


def _argument(rule: str | None, value: Any, example: Tensor, pos: Tensor) -> Any:
    if rule == "drop":
        return None
    if rule == "false":
        return False
    if rule == "positions" and isinstance(value, Tensor):
        return (
            value.expand(int(example.max()) + 1, -1)[example, pos][None]
            if value.shape[0] == 1
            else value[example, pos][None]
        )
    if rule == "rotary" and value is not None:
        return tuple(part[0, pos][None] if part.shape[0] == 1 else part[example, pos][None] for part in value)
    return value
