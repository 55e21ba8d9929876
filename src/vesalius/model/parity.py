"""The probe of a newly opened model: a few tokens, what is captured against the module's own output.

Attention is looked up by name, caches and masks are passed on, and modules are called as one release of transformers
does it. Another release may do it otherwise; then opening the model is an error that names the release, and never a
wrong number later. Also the one change that is made to a module: `keep_cap`.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vesalius.adapters import Adapter
from vesalius.errors import InputError, InterventionError, SelfCheckError, UnknownArchitectureError
from vesalius.inputs import Tokens
from vesalius.model.calls import logits_of
from vesalius.model.taps import UNWATCHED, Host, Recorder
from vesalius.site import SCORES, Site

# Prompts of the probe, unequal so that padding and its mask take part.
_LENGTHS = (5, 3)


class Probed(Host, Protocol):
    """What the probe needs of a model."""

    name: str

    def sites(self, pattern: str = "*") -> list[Site]: ...
    def token_call(self, tokens: Tokens) -> dict[str, Any]: ...
    def begun(self, tokens: Tokens) -> Tokens: ...
    def takes(self, argument: str) -> bool: ...


def refuse_compiled(module: nn.Module) -> None:
    """Raise InputError for a compiled module: hooks that are registered after compiling may never be called."""
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        raise InputError(
            f"this module was compiled by torch.compile, and hooks are passed over in compiled code: give the module "
            f"that was compiled, vs.Model(net._orig_mod), a {type(module._orig_mod).__name__}"
        )
    for name, part in module.named_modules():
        if getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod"):
            raise InputError(
                f"{name or 'this module'} ({type(part).__name__}) was compiled in place, and hooks are passed over in "
                "compiled code: load the model again without .compile()"
            )


def refuse_training(module: nn.Module, name: str) -> None:
    """Raise InputError for a module in training mode, two runs of which differ by themselves (dropout)."""
    # Layers of the user's own, put in after eval(), are in training mode by default; most do the same in either.
    if any(part.training and _differs(part) for part in module.modules()):
        raise InputError(
            f"{name} is in training mode, in which two runs of the same prompts differ by themselves; call "
            "model.module.eval() first"
        )


def _differs(part: nn.Module) -> bool:
    """Whether a module does something else in training than in evaluation."""
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    known = type(part).__module__.startswith("transformers.")  # they ask for the mode themselves
    batch_norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
    return known or batch_norm or (isinstance(part, nn.RNNBase) and part.dropout > 0)


def keep_cap(module: nn.Module, adapter: Adapter) -> str:
    """Switch a model whose attention scores are bounded from SDPA, which leaves the bound out, to eager attention.

    SDPA is what transformers before 5.18 takes for Gemma 2 by default, although its logits are then others than those
    of the model that was trained. Returns what was done in words, for the model's note; empty when nothing was.
    """
    bound = adapter.attention_cap and getattr(adapter.config_of(module), adapter.attention_cap, None)
    if not bound or getattr(module.config, "_attn_implementation", None) != "sdpa":
        return ""
    module.set_attn_implementation("eager")  # type: ignore[operator]
    return f"attention set to eager: SDPA leaves out {adapter.attention_cap}={bound}"


def release() -> str:
    return f"transformers {version('transformers')}"


def check_parity(model: Probed) -> None:
    """Compare a few tokens' captured run, and a run from a cache, with the module's own output.

    A module in training mode is not probed, nor one whose weights are not in memory. Raises SelfCheckError when outputs
    differ beyond rounding, UnknownArchitectureError when a site's module is not there or not called, or attention is
    called with something unknown.
    """
    assert model.adapter is not None
    if model.module.training or any(weight.is_meta for weight in model.module.parameters()):
        return
    tokens = probe_tokens(model)
    if tokens is None:
        return
    try:
        _compare(model, tokens)
    except (AttributeError, InputError, InterventionError, KeyError, TypeError, IndexError) as error:
        raise UnknownArchitectureError(
            f"{model.name} ({type(model.module).__name__}) in {release()} is not called as the {model.adapter.family} "
            f"adapter says: {error}. See all that holds and fails with vs.check_adapter(vs.Model(net, probe=False)), "
            "or take another release"
        ) from error


def probe_tokens(model: Probed) -> Tokens | None:
    """Prompts of unequal lengths for a model of tokens; None for another."""
    adapter, layout = model.adapter, model.layout
    assert adapter is not None
    if adapter.input != "input_ids" or layout is None or layout.vocab < 3:
        return None
    # RoBERTa numbers positions by which tokens are padding, so that one must not stand among the others.
    padding = getattr(adapter.config_of(model.module), "pad_token_id", None)
    step = max(1, layout.vocab // (sum(_LENGTHS) + 1))
    ids = [number for number in range(1, layout.vocab, step) if number != padding]
    ids = (ids * sum(_LENGTHS))[: sum(_LENGTHS)]
    return model.begun(Tokens.from_rows([ids[: _LENGTHS[0]], ids[_LENGTHS[0] :]]))


def _compare(model: Probed, tokens: Tokens) -> None:
    call = model.token_call(tokens)
    with torch.no_grad():
        own = logits_of(model.module(**call))
        if not isinstance(own, Tensor):
            return
        sites = [site for site in model.sites() if site.kind in SCORES or site.kind not in UNWATCHED]
        recorder = Recorder(model, sites, [], tokens, grad=False)
        with recorder.listening():
            captured = logits_of(model.module(**call))
        recorder.check_fired()
        # A decoder's logits, or a classifier's, do not count the prompts' tokens.
        real = tokens.real.to(own.device) if own.shape[:2] == tokens.real.shape else slice(None)
        _refuse_difference(model, own[real], captured[real], "with every site captured")
        if model.adapter is not None and model.adapter.causal and model.takes("past_key_values"):
            _refuse_difference(model, own[0, -1], _from_cache(model, tokens), "from a cache of keys and values")


def _from_cache(model: Probed, tokens: Tokens) -> Tensor:
    """Logits of the first prompt's last token, run after the others."""
    first, last = (model.token_call(Tokens(ids)) for ids in (tokens.ids[:1, :-1], tokens.ids[:1, -1:]))
    cache = model.module(**{**first, "use_cache": True}).past_key_values
    output = model.module(**{**last, "use_cache": True, "past_key_values": cache})
    logits: Tensor = logits_of(output)[0, -1]
    return logits


def _refuse_difference(model: Probed, own: Tensor, other: Tensor, how: str) -> None:
    if not bool(torch.isfinite(own).all()):
        return  # weights that are not finite are refused elsewhere, by the site where they show
    spread, worst = float(own.max() - own.min()), float((own - other).abs().max())
    if worst <= rounding(model, own) * spread:
        return
    assert model.adapter is not None
    raise SelfCheckError(
        f"{model.name}: logits {how} differ by {worst:.3g} from the module's own, which span {spread:.3g}. {release()} "
        f"calls {type(model.module).__name__} otherwise than the {model.adapter.family} adapter says; see what holds "
        "with vs.check_adapter(vs.Model(net, probe=False)), or take another release"
    )


def rounding(model: Probed, logits: Tensor) -> float:
    """What rounding may make of logits, as a share of their span."""
    if logits.dtype in (torch.float32, torch.float64):
        return 1e-2 if logits.is_cuda and torch.backends.cuda.matmul.allow_tf32 else 2e-4
    # Rounding can send a token of a mixture to another expert, which is no small difference.
    mixture = model.layout is not None and model.layout.n_experts
    return 0.15 if mixture else 16 * torch.finfo(logits.dtype).eps
