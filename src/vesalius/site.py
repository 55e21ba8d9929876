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
head, result each head's contribution to the residual stream, mlp_in what the MLP reads (after the norm), mlp_post the
neurons (what the down projection reads). In a mixture of experts router holds the router's logits and expert_out what
each expert adds. Cross-attention writes cross_attn_out; resid_mid is the stream before it, resid_mid_cross after it.
The positions of cross_k and cross_v are the encoder's tokens.

TransformerLens's own names are understood wherever a site is (`blocks.5.attn.hook_z[3]`, `blocks.*.hook_resid_post`).
One that means something else here, or nothing, is refused with the name to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from vesalius.errors import InputError, UnknownNameError

RESIDUAL = ("batch", "pos", "d_model")
# Axes of every kind of site inside a layer, in the order in which a forward pass makes them.
LAYER_KINDS: dict[str, tuple[str, ...]] = {
    "resid_pre": RESIDUAL,
    "q": ("batch", "pos", "head", "d_head"),
    "k": ("batch", "pos", "kv_head", "d_head"),
    "v": ("batch", "pos", "kv_head", "d_head"),
    "scores": ("batch", "head", "query_pos", "key_pos"),
    "pattern": ("batch", "head", "query_pos", "key_pos"),
    "z": ("batch", "pos", "head", "d_head"),
    "result": ("batch", "pos", "head", "d_model"),
    "attn_out": RESIDUAL,
    "resid_mid": RESIDUAL,
    "cross_q": ("batch", "pos", "head", "d_head"),
    "cross_k": ("batch", "source_pos", "kv_head", "d_head"),
    "cross_v": ("batch", "source_pos", "kv_head", "d_head"),
    "cross_scores": ("batch", "head", "query_pos", "source_pos"),
    "cross_pattern": ("batch", "head", "query_pos", "source_pos"),
    "cross_z": ("batch", "pos", "head", "d_head"),
    "cross_result": ("batch", "pos", "head", "d_model"),
    "cross_attn_out": RESIDUAL,
    "resid_mid_cross": RESIDUAL,
    "mlp_in": RESIDUAL,
    "router": ("batch", "pos", "expert"),
    "expert_out": ("batch", "pos", "expert", "d_model"),
    "mlp_post": ("batch", "pos", "d_mlp"),
    "mlp_out": RESIDUAL,
    "resid_post": RESIDUAL,
}
GLOBAL_KINDS: dict[str, tuple[str, ...]] = {
    "embed": RESIDUAL,
    "pos_embed": RESIDUAL,
    "final_norm": RESIDUAL,
    "logits": ("batch", "pos", "vocab"),
}
STEP = {kind: step for step, kind in enumerate(LAYER_KINDS)}
_INDEXED = ("head", "kv_head", "expert", "d_mlp", "d_model")
# The axis that an index in brackets selects: the first of these.
INDEX_AXIS = {
    kind: next(number for number, axis in enumerate(axes) if axis in _INDEXED)
    for kind, axes in {**LAYER_KINDS, "embed": RESIDUAL}.items()
}
SCORES, PATTERNS, RESULTS = ("scores", "cross_scores"), ("pattern", "cross_pattern"), ("result", "cross_result")
ATTENTION = (*SCORES, *PATTERNS)
# TransformerLens's names: what follows `blocks.<layer>.`, or stands alone outside the layers.
HOOKS: Mapping[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_in": "ln2.hook_normalized",
    "mlp_post": "mlp.hook_post",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "result": "attn.hook_result",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "final_norm": "ln_final.hook_normalized",
}
_KIND_OF_HOOK = {hook: kind for kind, hook in HOOKS.items()}
_ROTATED = "queries and keys are read before rotation, as layers.{0}.q and layers.{0}.k"
_PER_HEAD = (
    "it is a copy of the residual stream per head, which is layers.{0}.resid_pre here; to change what some heads alone "
    "read, use vs.path_patching"
)
_BEFORE_ACTIVATION = (
    "neurons are read after their activation, as layers.{0}.mlp_post; the output of any module is module:<path>|out"
)
_ROUTING = "it follows from the router's logits, layers.{0}.router"
_NORM_SCALE = (
    "a norm's scale follows from the residual stream that the norm reads, such as layers.{0}.resid_pre or "
    "layers.{0}.resid_mid"
)
# TransformerLens's names that are no site, or whose word means another tensor here: what to write instead.
_NO_SITE = {
    "attn.hook_rot_q": _ROTATED,
    "attn.hook_rot_k": _ROTATED,
    "hook_attn_in": _PER_HEAD,
    "hook_q_input": _PER_HEAD,
    "hook_k_input": _PER_HEAD,
    "hook_v_input": _PER_HEAD,
    "hook_mlp_in": "it is the residual stream before the MLP's norm: write layers.{0}.resid_mid, or "
    "layers.{0}.resid_pre where attention and MLP run in parallel (mlp_in here is what the MLP reads, after its norm)",
    "mlp.hook_pre": _BEFORE_ACTIVATION,
    "mlp.hook_pre_linear": _BEFORE_ACTIVATION,
    "mlp.hook_gate": _ROUTING,
    "mlp.hook_expert_weights": _ROUTING,
    "mlp.hook_expert_indices": _ROUTING,
    "ln1.hook_normalized": "what attention reads is the output of its norm: write module:<path of the norm>|out",
    "ln1.hook_scale": _NORM_SCALE,
    "ln2.hook_scale": _NORM_SCALE,
    "ln_final.hook_scale": _NORM_SCALE,
    "hook_tokens": "token ids are no activation; a run keeps its tokens in run.activations.tokens",
}

_HOOK_NAME = re.compile(
    r"^(?:(?P<tag>[\w.-]+)/)?(?:blocks\.(?P<layer>\d+)\.)?(?P<hook>(?:\w+\.)*hook_\w+)(?:\[(?P<index>\d+)\])?$"
)
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
        """Site from its name, or from TransformerLens's.

        Raises InputError for a malformed name, UnknownNameError for an unknown kind.
        """
        if isinstance(text, Site):
            return text
        hook = _HOOK_NAME.match(text)
        if hook is not None:
            return _from_hook_name(text, hook)
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
    def hook_name(self) -> str:
        """TransformerLens's name of the whole tensor; empty where it has none."""
        hook = "" if self.stack else HOOKS.get(self.kind, "")
        return f"blocks.{self.layer}.{hook}" if hook and self.layer is not None else hook

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


def _from_hook_name(text: str, match: re.Match[str]) -> Site:
    found = match.groupdict()
    hook, layer, index = found["hook"], found["layer"], found["index"]
    _check_hook(text, hook, layer)
    return Site(
        _KIND_OF_HOOK[hook],
        layer=None if layer is None else int(layer),
        index=None if index is None else int(index),
        tag=found["tag"] or "",
    )


def _check_hook(text: str, hook: str, layer: str | None) -> None:
    """Refuse a TransformerLens name that stands for no site, saying what to write instead."""
    if hook in _NO_SITE:
        raise InputError(f"{text!r} stands for no site: {_NO_SITE[hook].format(layer or '<number>')}.")
    kind = _KIND_OF_HOOK.get(hook)
    if kind is None or (kind in GLOBAL_KINDS and layer is not None):
        known = [hook if kind in GLOBAL_KINDS else f"blocks.<number>.{hook}" for kind, hook in HOOKS.items()]
        raise UnknownNameError("TransformerLens name", text, known, "model.sites() lists ours.")
    if kind in LAYER_KINDS and layer is None:
        raise InputError(f"{text!r} needs a layer: blocks.<number>.{hook}, here layers.<number>.{kind}")


def select(pattern: str | Site, known: Iterable[Site]) -> list[Site]:
    """Sites that a name or glob stands for, in forward order. `layers.*.z[3]` keeps the index.

    TransformerLens's names may have globs too: `blocks.*.attn.hook_z`. In a module's path `*` stays within one name
    and `**` does not: `module:blocks.*|out` has no module inside a block.

    Raises UnknownNameError when nothing matches, InputError for a TransformerLens name that is no site.
    """
    if isinstance(pattern, Site):
        pattern = str(pattern)
    name, index = _strip_index(pattern)
    sites = list(known)
    # A store or a dictionary may know one head of a site, and not the whole.
    own = [site for site in sites if index is not None and site.index == index and _fits(site.whole, name)]
    if own:
        return sorted(own, key=lambda site: site.order)
    found = [site for site in sites if _fits(site, name)]
    if not found:
        hook = _HOOK_NAME.match(name.replace("blocks.*.", "blocks.0."))
        if hook is not None:
            _check_hook(name, hook["hook"], "*" if "*" in name else hook["layer"])
        raise UnknownNameError("site", pattern, summary(sites))
    return sorted((replace(site, index=index) if index is not None else site for site in found), key=lambda s: s.order)


def _fits(site: Site, pattern: str) -> bool:
    if not pattern.startswith("module:"):
        by_hook = pattern.startswith("blocks.") or "hook_" in pattern
        return fnmatchcase(site.hook_name if by_hook else str(site), pattern)
    pieces = (re.escape(piece).replace(r"\*", "[^.|]*") for piece in pattern.split("**"))
    return re.fullmatch(".*".join(pieces), str(site)) is not None


def _strip_index(pattern: str) -> tuple[str, int | None]:
    match = re.match(r"^(.*)\[(\d+)\]$", pattern)
    return (match.group(1), int(match.group(2))) if match else (pattern, None)


def summary(sites: Iterable[Site]) -> set[str]:
    """Layer sites with the number starred out, so that an error lists kinds and not hundreds of names."""
    return {re.sub(r"layers\.\d+\.", "layers.*.", str(site)) for site in sites}
