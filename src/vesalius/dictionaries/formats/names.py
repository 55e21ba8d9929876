"""From other libraries' names for tensors of a network to Sites, and back.

A name that stands for no Site is kept as one that no model has (`module:?<name>|out`): the dictionary computes on plain
tensors, and says which name it was when a site is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vesalius.dictionaries.unknown_sites import name_of, unknown_site
from vesalius.site import Site

# TransformerLens: what stands after `blocks.<layer>.`. Its hook_mlp_in is the stream before the norm;
# ln*.hook_normalized is the normed stream before the norm's weight, which no site here is.
LAYER_HOOKS: Mapping[str, str] = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out", "hook_mlp_in": "resid_mid", "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_post", "attn.hook_q": "q", "attn.hook_k": "k", "attn.hook_v": "v", "attn.hook_z": "z",
    "attn.hook_result": "result", "attn.hook_pattern": "pattern", "attn.hook_attn_scores": "scores",
}  # fmt: skip
OUTER_HOOKS: Mapping[str, str] = {"hook_embed": "embed", "hook_pos_embed": "pos_embed"}
# Modules of transformers, after the layer, by their output or input. In Gemma and OLMo 2 a norm follows attention and
# MLP, so that the modules' outputs are not what is added to the stream.
_MODULES: Mapping[tuple[str, str], str] = {
    ("", "out"): "resid_post", ("", "in"): "resid_pre", ("mlp", "out"): "mlp_out", ("mlp", "in"): "mlp_in",
    ("attn", "out"): "attn_out", ("self_attn", "out"): "attn_out", ("attention", "out"): "attn_out",
    ("self_attn.o_proj", "in"): "z",
}  # fmt: skip
_POST_NORMED: Mapping[tuple[str, str], str] = {
    ("", "out"): "resid_post", ("", "in"): "resid_pre", ("mlp", "in"): "mlp_in", ("self_attn.o_proj", "in"): "z",
    ("pre_feedforward_layernorm", "out"): "mlp_in", ("post_feedforward_layernorm", "out"): "mlp_out",
    ("post_attention_layernorm", "out"): "attn_out",
}  # fmt: skip
_LAYER = re.compile(r"^(?:(?:model|transformer|gpt_neox|language_model)\.)*(?:layers|h)\.(\d+)(?:\.(.+))?$")
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")


def post_normed(model: str) -> bool:
    """Whether a model of this name puts a norm after attention and MLP."""
    # Not gemma-2b, which is of the first generation.
    return bool(re.search(r"gemma[-_]?v?[23](?![\w.]*b\b)|olmo[-_]?2", model.lower()))


def from_hook(name: str | None, head: int | None = None, model: str = "") -> Site:
    """The Site of a TransformerLens hook name. head: the head that was read there."""
    block = _BLOCK.match(name or "")
    if block and block[2] == "mlp.hook_out":
        return from_module(f"layers.{block[1]}.mlp", model)
    if block and block[2] in LAYER_HOOKS:
        return Site(LAYER_HOOKS[block[2]], layer=int(block[1]), index=head)
    if name in OUTER_HOOKS:
        return Site(OUTER_HOOKS[str(name)], index=head)
    return unknown_site(name)


def from_module(name: str, model: str = "", side: str = "out") -> Site:
    """The Site of a module's output or input; a path that stands for no named Site is a `module:` one."""
    layer = _LAYER.match(name)
    if layer:
        known = _POST_NORMED if post_normed(model) else _MODULES
        kind = known.get((layer[2] or "", side))
        if kind is not None:
            return Site(kind, layer=int(layer[1]))
    if name in ("embed_tokens", "wte", "embed_in") and side == "out" and not post_normed(model):
        return Site("embed")
    # A path without a dot is more likely a nickname than a module.
    return Site("module", module=name, side=side) if "." in name else unknown_site(name)


def two_sites(read: Site, written: Site) -> tuple[Site, Site]:
    """Both sites of a transcoder, which are never the same, whatever its file calls them."""
    return read, unknown_site(f"{name_of(read)} (output)".strip()) if written == read else written


def from_module_end(name: str, model: str = "") -> Site:
    """The Site of a name like `model.layers.3.mlp.output`, or of a module alone, which stands for its output."""
    path, _, end = name.rpartition(".")
    sides = {"output": "out", "input": "in"}
    return from_module(path, model, sides[end]) if end in sides else from_module(name, model)


def to_hook(site: Site) -> str | None:
    """The TransformerLens name of a Site, without its head; None where there is none."""
    back = {kind: hook for hook, kind in LAYER_HOOKS.items() if hook != "hook_mlp_in"}
    outer = {kind: hook for hook, kind in OUTER_HOOKS.items()}
    if site.stack or site.tag:
        return None
    if site.layer is not None:
        return f"blocks.{site.layer}.{back[site.kind]}" if site.kind in back else None
    return outer.get(site.kind)
