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
from torch import Tensor, nn

from vesalius.adapters import submodule
from vesalius.adapters.base import join_heads, split_heads
from vesalius.errors import InterventionError
from vesalius.model.attention import attending, capped, weighted
from vesalius.model.hooks import Tap, tapped
from vesalius.model.products import computing
from vesalius.patching.edits import Edits
from vesalius.patching.flat import Flat, Rows
from vesalius.patching.record import Record, holds_tensor, untold
from vesalius.patching.spare import Spared
from vesalius.site import Site


class _Attention:
    """Attention of flattened rows: each token attends to its own row's live tokens and to the base run before them."""

    def __init__(
        self, record: Record, flat: Flat, watch: Mapping[Site, list[Tensor]], patterns: bool, spared: Spared
    ) -> None:
        self._record = record
        self._spared = spared
        self._flat = flat
        self._watch = watch
        self._patterns = patterns
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
        needed = self._spared.attending(layer, len(rows))
        if needed is None:
            return self._attended(layer, q, k, v, (rows, index, mask, row_of, pos_of, within), scaling)
        out = v.new_zeros(1, len(row_of), q.shape[1], v.shape[3])
        if bool(needed.any()):
            token, number = needed[row_of], needed.cumsum(0) - 1
            # Tokens keep their places in the batch; rows are numbered anew.
            some = (
                rows.take(needed.nonzero()[:, 0]), index[needed], mask[needed], number[row_of[token]], pos_of[token],
                within[token],
            )  # fmt: skip
            out[:, token] = self._attended(layer, q, k[:, :, token], v[:, :, token], some, scaling)
        return out

    def _attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor, place: Any, scaling: float) -> Tensor:
        """Of some rows: k and v of their own tokens, q of all of the batch (`index` says where theirs are)."""
        rows, index, mask, row_of, pos_of, within = place
        width, n_kv = mask.shape[-1], k.shape[1]
        keys = self._record.keys[layer][rows.example, :, :width]
        values = self._record.values[layer][rows.example, :, :width]
        values[row_of, :, pos_of] = v[0].transpose(0, 1)
        if not self._patterns:
            keys[row_of, :, pos_of] = k[0].transpose(0, 1)
        # Query heads that share a key-value head are stacked along the query axis, so keys are never repeated.
        n_heads, depth = q.shape[1], q.shape[3]
        padded = self._queries(layer, q, rows, index).view(len(rows), index.shape[1], n_kv, n_heads // n_kv, depth)
        stacked = padded.permute(0, 2, 3, 1, 4).reshape(len(rows), n_kv, -1, depth)
        tiled = mask.repeat(1, n_heads // n_kv, 1)[:, None]
        out = weighted(stacked, keys, values, tiled, scaling, self._record.caps[layer])
        if Site("pattern", layer) in self._watch:
            self._look(layer, padded, keys, mask, scaling)
        spread = out.view(len(rows), n_kv, n_heads // n_kv, -1, out.shape[-1]).permute(0, 3, 1, 2, 4)
        return spread[row_of, within].reshape(1, len(row_of), n_heads, -1)

    def _queries(self, layer: int, q: Tensor, rows: Rows, index: Tensor) -> Tensor:
        """[row, step, head, d_head]; with patterns held, who attends to whom is the base run's: its queries."""
        if not self._patterns:
            return q[0].transpose(0, 1)[index]
        pos = (rows.start[:, None] + torch.arange(index.shape[1])).clamp_max(self._record.tokens.ids.shape[1] - 1)
        return self._record.queries[layer][rows.example[:, None], pos]

    def _layout(self, layer: int) -> Any:
        count, tokens = self._flat.active(layer)
        window = self._record.windows[layer]
        if (count, window) not in self._geometry:
            rows = self._flat.rows.take(torch.arange(count))
            steps = torch.arange(int(rows.sizes.max()))
            index = (self._flat.offset[:count, None] + steps).clamp_max(tokens - 1)
            back = (rows.start[:, None] + steps)[..., None] - torch.arange(int(rows.end.max()))
            reach = back >= 0 if window is None else (back >= 0) & (back < window)
            row_of, pos_of = self._flat.row_of[:tokens], self._flat.pos_of[:tokens]
            within = pos_of - rows.start[row_of]
            self._geometry[count, window] = (rows, index, reach, row_of, pos_of, within)
        return self._geometry[count, window]

    def _look(self, layer: int, padded: Tensor, keys: Tensor, mask: Tensor, scaling: float) -> None:
        """Attention pattern of each row's last token: [row, head, key_pos]."""
        rows = torch.arange(len(padded))
        at = self._flat.rows.sizes[: len(padded)] - 1
        scores = capped(torch.einsum("rkgd,rksd->rkgs", padded[rows, at], keys) * scaling, self._record.caps[layer])
        scores = scores.masked_fill(~mask[rows, at][:, None, None], float("-inf"))
        pattern = scores.softmax(-1).flatten(1, 2)
        full = pattern.new_zeros(*pattern.shape[:2], self._record.tokens.ids.shape[1])
        full[..., : pattern.shape[-1]] = pattern
        self._watch[Site("pattern", layer)].append(full)


class Replay:
    """One batch of rows through the model's layers."""

    def __init__(
        self,
        record: Record,
        rows: Rows,
        edits: Edits,
        watch: Sequence[Site] = (),
        *,
        patterns: bool = False,
        compute: str = "float32",
        heard: Sequence[Site] = (),
    ) -> None:
        """patterns: attention patterns are the base run's. compute: see `products.computing`. heard: sites that taps
        of the caller look at, so that they must be computed."""
        self._patterns, self._compute = patterns, compute
        self._record = record
        self._model = record.model
        self._flat = Flat(rows)
        self._edits = edits
        self._seen: dict[Site, list[Tensor]] = {site.whole: [] for site in watch}
        self._layout = self._model.architecture[1]
        self._spared = Spared(self._model, self._flat, edits, [*self._seen, *heard])

    def run(self) -> tuple[Tensor, dict[Site, Tensor]]:
        """Last layer's output at each row's last position [row, d_model], and watched sites there [row, ...]."""
        hidden = self._record.resid[0].new_empty(1, 0, self._layout.d_model)
        attend = _Attention(self._record, self._flat, self._seen, self._patterns, self._spared)
        taps, compute = tapped([*self._spared.taps(), *self._taps()]), computing(self._compute)
        with torch.no_grad(), taps, attending(self._model.module, attend), compute:
            for layer in range(int(self._flat.rows.layer.min()), self._layout.n_layers):
                hidden = self._step(layer, hidden)
        hidden = self._join(self._layout.n_layers, hidden)
        return hidden[0, self._flat.last], self._watched()

    def _join(self, layer: int, hidden: Tensor) -> Tensor:
        """Append the rows that start at this layer, then apply edits of the residual stream here."""
        tokens = self._flat.active(layer)[1]
        before = hidden.shape[1]
        if tokens > before:
            row_of, pos = self._flat.row_of[before:tokens], self._flat.pos_of[before:tokens]
            fresh = self._record.resid[layer][self._flat.rows.example[row_of], pos]
            hidden = torch.cat([hidden, fresh[None]], 1)
        return self._edits.apply(Site("resid_pre", layer), hidden, self._flat)

    def _step(self, layer: int, hidden: Tensor) -> Tensor:
        hidden = self._join(layer, hidden)
        if not hidden.shape[1]:
            return hidden
        out = self._model.layer(layer)(hidden, **self._arguments(layer, hidden.shape[1]))
        return out[0] if isinstance(out, tuple) else out

    def _arguments(self, layer: int, tokens: int) -> dict[str, Any]:
        rules = self._model.architecture[0].replay
        pos = self._flat.pos_of[:tokens]
        example = self._flat.rows.example[self._flat.row_of[:tokens]]
        built: dict[str, Any] = {}
        for name, value in self._record.calls[layer].items():
            rule = rules.get(name)
            if rule is None and holds_tensor(value):
                raise InterventionError(untold(layer, name))
            built[name] = _rebuilt(rule, value, example, pos)
        return built

    def _taps(self) -> list[Tap]:
        adapter = self._model.architecture[0]
        kinds = {site for site in [*self._edits.sites, *self._seen] if site.kind not in ("resid_pre", "pattern")}
        taps = []
        for site in sorted(kinds, key=lambda site: site.order):
            access = adapter.sites[site.kind]
            if access.delta:
                raise InterventionError(f"{site} cannot be swept; edit attn_out or resid_post instead")
            assert site.layer is not None
            module = submodule(self._model.layer(site.layer), access.path)
            taps.append(Tap(module, access.side, self._visitor(site)))
        return taps

    def _visitor(self, site: Site) -> Any:
        access = self._model.architecture[0].sites[site.kind]

        def visit(tensor: Tensor) -> Tensor | None:
            here = split_heads(tensor, access, self._layout)
            edited = self._edits.apply(site, here, self._flat)
            if site in self._seen:
                assert site.layer is not None
                self._seen[site].append(edited[0, self._flat.last[: self._flat.active(site.layer)[0]]])
            return None if edited is here else join_heads(tensor, edited, access, self._layout)

        return visit

    def _watched(self) -> dict[Site, Tensor]:
        """Watched values per row; a row that joined after a layer has the base run's value there."""
        return {site: self._filled(site, seen[0] if seen else None) for site, seen in self._seen.items()}

    def _filled(self, site: Site, seen: Tensor | None) -> Tensor:
        count = 0 if seen is None else len(seen)
        late = self._flat.rows.take(torch.arange(count, len(self._flat.rows)))
        if not len(late):
            assert seen is not None
            return seen
        base = (
            base_pattern(self._record, site, late)
            if site.kind == "pattern"
            else self._record.at(site)[late.example, late.end - 1]
        )
        return base if seen is None else torch.cat([seen, base])


def base_pattern(record: Record, site: Site, rows: Rows) -> Tensor:
    """The base run's pattern of each row's last position: [row, head, key_pos]."""
    assert site.layer is not None
    keys = record.keys[site.layer][rows.example]
    query = record.queries[site.layer][rows.example, rows.end - 1]
    spread = query.view(len(rows), keys.shape[1], -1, query.shape[-1])
    scores = torch.einsum("rkgd,rksd->rkgs", spread, keys) * record.scaling[site.layer]
    scores, window = capped(scores, record.caps[site.layer]), record.windows[site.layer]
    back = rows.end[:, None] - 1 - torch.arange(keys.shape[2])
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    return scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1).flatten(1, 2)


def _rebuilt(rule: str | None, value: Any, example: Tensor, pos: Tensor) -> Any:
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
