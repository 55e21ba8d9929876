"""Site: the name of one tensor of a forward pass, and its axes.

    layers.5.resid_post          residual stream after layer 5
    layers.5.z[3]                head 3's output before the output projection (on k and v: key-value head 3)
    encoder.layers.2.z           an encoder's site in an encoder-decoder model
    decoder.layers.2.cross_z     the decoder's attention to the encoder: cross_q, cross_k, cross_v, cross_scores, ...
    embed, final_norm, logits    sites outside the layers
    module:features.3|out        output (or |in, input) of a module by path, for models without an adapter
    module:lstm|out.1.0          one of several outputs, by number or name (of an LSTM: the last hidden state); |in.mask
    base/layers.5.mlp_out        with a model tag, when two models are in play

Words follow TransformerLens: q, k and v are the projections' outputs (before any rotation), z the weighted values per
head, result each head's contribution to the residual stream, mlp_post the neurons (what the down projection reads).
In a mixture of experts router holds the router's logits and expert_out what each expert adds. Cross-attention writes
cross_attn_out; resid_mid is the stream before it, resid_mid_cross after it. cross_k and cross_v count the encoder's
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from vesalius.errors import InputError, UnknownNameError

RESIDUAL = ("batch", "pos", "d_model")
LAYER_KINDS: dict[str, tuple[str, ...]] = {
    "resid_pre": RESIDUAL,
    "resid_mid": RESIDUAL,
    "resid_post": RESIDUAL,
    "attn_out": RESIDUAL,
    "mlp_out": RESIDUAL,
    "mlp_in": RESIDUAL,
    "mlp_post": ("batch", "pos", "d_mlp"),
    "q": ("batch", "pos", "head", "d_head"),
    "k": ("batch", "pos", "kv_head", "d_head"),
    "v": ("batch", "pos", "kv_head", "d_head"),
    "z": ("batch", "pos", "head", "d_head"),
    "result": ("batch", "pos", "head", "d_model"),
    "scores": ("batch", "head", "query_pos", "key_pos"),
    "pattern": ("batch", "head", "query_pos", "key_pos"),
    "cross_q": ("batch", "pos", "head", "d_head"),
    "cross_k": ("batch", "source_pos", "kv_head", "d_head"),
    "cross_v": ("batch", "source_pos", "kv_head", "d_head"),
    "cross_z": ("batch", "pos", "head", "d_head"),
    "cross_result": ("batch", "pos", "head", "d_model"),
    "cross_scores": ("batch", "head", "query_pos", "source_pos"),
    "cross_pattern": ("batch", "head", "query_pos", "source_pos"),
    "cross_attn_out": RESIDUAL,
    "resid_mid_cross": RESIDUAL,
    "router": ("batch", "pos", "expert"),
    "expert_out": ("batch", "pos", "expert", "d_model"),
}
GLOBAL_KINDS: dict[str, tuple[str, ...]] = {
    "embed": RESIDUAL,
    "pos_embed": RESIDUAL,
    "final_norm": RESIDUAL,
    "logits": ("batch", "pos", "vocab"),
}
# The axis an index in brackets selects.
INDEX_AXIS = {
    "q": 2, "k": 2, "v": 2, "z": 2, "result": 2, "scores": 1, "pattern": 1, "mlp_post": 2, "mlp_in": 2,
    "resid_pre": 2, "resid_mid": 2, "resid_post": 2, "attn_out": 2, "mlp_out": 2, "embed": 2, "router": 2,
    "expert_out": 2, "cross_q": 2, "cross_k": 2, "cross_v": 2, "cross_z": 2, "cross_result": 2, "cross_scores": 1,
    "cross_pattern": 1, "cross_attn_out": 2, "resid_mid_cross": 2,
}  # fmt: skip
SCORES, PATTERNS, RESULTS = ("scores", "cross_scores"), ("pattern", "cross_pattern"), ("result", "cross_result")
ATTENTION = (*SCORES, *PATTERNS)
# Order within one layer, in which a forward pass makes them.
STEP = {
    kind: step
    for step, kind in enumerate(
        ["resid_pre", "q", "k", "v", "scores", "pattern", "z", "result", "attn_out", "resid_mid", "cross_q", "cross_k",
         "cross_v", "cross_scores", "cross_pattern", "cross_z", "cross_result", "cross_attn_out", "resid_mid_cross",
         "mlp_in", "router", "expert_out", "mlp_post", "mlp_out", "resid_post"]
    )
}  # fmt: skip

_PATTERN = re.compile(
    r"^(?:(?P<tag>[\w.-]+)/)?"
    r"(?:module:(?P<module>[^|]*)\|(?P<side>(?:in|out)(?:\.\w+)*)"
    r"|(?:(?P<stack>encoder|decoder)\.)?(?:layers\.(?P<layer>\d+)\.)?(?P<kind>[a-z_]+)(?:\[(?P<index>\d+)\])?)$"
)


@dataclass(frozen=True, repr=False)
class Site:
    """One tensor of a forward pass. Build with `Site.parse`; `str(site)` gives the name back."""

    kind: str
    """`z`, `mlp_out`, ... or `module` for a module path."""
    layer: int | None = None
    index: int | None = None
    """Head, key-value head, expert, neuron or dimension; None for the whole tensor."""
    stack: str = ""
    """`encoder` or `decoder` in models that have both, else empty."""
    module: str = ""
    side: str = "out"
    """`out` or `in`: the first tensor. `out.1.0`: that item of what is returned; `in.0`, `in.mask`: that argument."""
    tag: str = ""

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Site from its name. Raises InputError for a malformed name, UnknownNameError for an unknown kind."""
        if isinstance(text, Site):
            return text
        match = _PATTERN.match(text)
        if match is None:
            raise InputError(
                f"{text!r} is not a site name. Examples: layers.5.resid_post, layers.5.z[3], embed, "
                "module:features.3|out."
            )
        found = match.groupdict()
        if found["module"] is not None:
            return cls("module", module=found["module"], side=found["side"], tag=found["tag"] or "")
        layer, index = found["layer"], found["index"]
        return cls(
            kind=found["kind"],
            layer=None if layer is None else int(layer),
            index=None if index is None else int(index),
            stack=found["stack"] or "",
            tag=found["tag"] or "",
        )

    def __str__(self) -> str:
        tag = f"{self.tag}/" if self.tag else ""
        if self.kind == "module":
            return f"{tag}module:{self.module}|{self.side}"
        stack = f"{self.stack}." if self.stack else ""
        layer = "" if self.layer is None else f"layers.{self.layer}."
        index = "" if self.index is None else f"[{self.index}]"
        return f"{tag}{stack}{layer}{self.kind}{index}"

    def __repr__(self) -> str:
        return f"Site({str(self)!r})"

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names of the tensor; an index removes its axis. A module path has none that are known."""
        full = (LAYER_KINDS | GLOBAL_KINDS).get(self.kind, ())
        if self.index is None:
            return full
        dropped = INDEX_AXIS[self.kind]
        return tuple(axis for number, axis in enumerate(full) if number != dropped)

    @property
    def whole(self) -> Site:
        """The same tensor without the index."""
        return replace(self, index=None)

    def __getitem__(self, index: int) -> Site:
        return replace(self, index=index)

    @property
    def cross(self) -> bool:
        """Part of a decoder's attention to its encoder."""
        return self.kind.startswith("cross_")

    @property
    def of_encoder(self) -> bool:
        """Its tokens are the encoder's, in a model that has one."""
        return self.stack == "encoder" or self.kind in ("cross_k", "cross_v")

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sort key: the order in which a forward pass makes the tensors."""
        # The logits of an encoder-decoder come after its decoder.
        stack = 3 if self.kind == "logits" else {"encoder": 0, "": 1, "decoder": 2}[self.stack]
        if self.layer is None:
            outside = {"embed": -2, "pos_embed": -1, "final_norm": 1 << 30, "logits": (1 << 30) + 1}
            return (stack, outside.get(self.kind, 0), 0, self.index or 0)
        return (stack, self.layer, STEP[self.kind], self.index or 0)


def _check(site: Site) -> None:
    if site.kind == "module":
        return
    known = LAYER_KINDS if site.layer is not None else GLOBAL_KINDS
    if site.kind not in known:
        if site.kind in LAYER_KINDS:
            raise InputError(f"{site.kind!r} needs a layer: layers.<number>.{site.kind}")
        where = "site inside a layer" if site.layer is not None else "site"
        raise UnknownNameError(where, site.kind, LAYER_KINDS if site.layer is not None else LAYER_KINDS | GLOBAL_KINDS)
    if site.index is not None and site.kind not in INDEX_AXIS:
        raise InputError(f"{site.kind!r} takes no index in brackets")


def select(pattern: str | Site, known: Iterable[Site]) -> list[Site]:
    """Sites that a name or glob stands for, in forward order. `layers.*.z[3]` keeps the index.

    In a module's path `*` stays within one name and `**` does not: `module:blocks.*|out` has no module inside a block.

    Raises UnknownNameError when nothing matches.
    """
    if isinstance(pattern, Site):
        pattern = str(pattern)
    name, index = _strip_index(pattern)
    sites = list(known)
    found = [site for site in sites if _fits(str(site), name)]
    if not found:
        raise UnknownNameError("site", pattern, summary(sites))
    return sorted((replace(site, index=index) if index is not None else site for site in found), key=lambda s: s.order)


def _fits(site: str, pattern: str) -> bool:
    if not pattern.startswith("module:"):
        return fnmatchcase(site, pattern)
    pieces = (re.escape(piece).replace(r"\*", "[^.|]*") for piece in pattern.split("**"))
    return re.fullmatch(".*".join(pieces), site) is not None


def _strip_index(pattern: str) -> tuple[str, int | None]:
    match = re.match(r"^(.*)\[(\d+)\]$", pattern)
    return (match.group(1), int(match.group(2))) if match else (pattern, None)


def summary(sites: Iterable[Site]) -> set[str]:
    """Layer sites with the number starred out, so that an error lists kinds and not hundreds of names."""
    return {re.sub(r"layers\.\d+\.", "layers.*.", str(site)) for site in sites}
