"""Which config fields an adapter understands; any other field that could change the forward pass is refused.

That holds for the fields of the config class, and for fields in a config file that the class does not know: the class
never reads those, but whoever wrote them meant a different computation.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

from torch import nn

from vesalius.adapters.base import Adapter, submodule
from vesalius.errors import InputError, UnknownArchitectureError

# Sizes, activations and epsilons: whatever they are, the sites and their sums mean the same.
SIZES = frozenset(
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "layer_norm_eps"]
)  # fmt: skip
ROTARY = frozenset(["rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"])
# Windows restrict the mask, which is recorded; they change no site.
WINDOWS = frozenset(["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"])
# About training, generation and files: they change nothing in a forward pass in evaluation mode.
_OUTSIDE_FORWARD = frozenset(
    ["initializer_range", "initializer_factor", "init_std", "use_cache", "pad_token_id", "bos_token_id",
     "eos_token_id", "cls_token_id", "sep_token_id", "unk_token_id", "tie_word_embeddings", "attention_dropout",
     "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "resid_pdrop",
     "embd_pdrop", "attn_pdrop", "classifier_dropout", "classifier_dropout_prob", "dropout", "dropout_rate",
     "embedding_dropout", "mlp_dropout", "layerdrop", "router_aux_loss_coef", "router_jitter_noise",
     "output_router_logits", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
     "summary_first_dropout", "architectures", "chunk_size_feed_forward", "dtype", "torch_dtype", "id2label",
     "label2id", "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
     "ignore_keys_at_rope_validation", "transformers_version", "name_or_path", "model_type", "auto_map",
     "quantization_config", "cache_implementation", "task_specific_params", "prefix", "gradient_checkpointing",
     "gradient_checkpointing_use_reentrant", "transformers.js_config", "is_llama_config", "unsloth_fixed",
     "unsloth_version", "original_architecture",
     "attn_implementation", "experts_implementation", "n_ctx", "seq_length"]
)  # fmt: skip

# How the library spreads a model over several devices: `base_model_tp_plan` and whatever follows it.
_PLANS = re.compile(r"base_model_\w+_plan")


def check_config(adapter: Adapter, module: nn.Module) -> None:
    """Refuse a config this adapter does not understand, naming the field and its value.

    Raises UnknownArchitectureError: for a value outside `accepts`, for a field that differs from the one it must equal,
    and for any other field that is not understood and not at its default.
    """
    config, name = adapter.config_of(module), type(module).__name__
    known_names = {*adapter.understood, *adapter.accepts, *adapter.same, *adapter.config.values(), adapter.text}
    known_names |= {adapter.cap, adapter.attention_cap, adapter.logits_over}
    found = _unknown_field(config, known_names)
    if found is None and adapter.text:
        found = _unknown_field(module.config, known_names)
    if found is not None:
        raise UnknownArchitectureError(
            f"{name} has config.{found[0]}={found[1]!r}, a field that the {adapter.family} adapter does not "
            f"understand. If it changes nothing in the forward pass, say so: vs.Model(net, adapter=adapter) takes "
            f"an adapter without this check"
        )
    for one, other in adapter.same.items():
        if getattr(config, one, None) != getattr(config, other, None):
            raise UnknownArchitectureError(
                f"{name} has config.{one}={getattr(config, one, None)!r}; the {adapter.family} adapter understands "
                f"only the value of config.{other}, {getattr(config, other, None)!r}"
            )
    for field_name, known in adapter.accepts.items():
        value = getattr(config, field_name, known[0])
        if value not in known:
            raise UnknownArchitectureError(
                f"{name} has config.{field_name}={value!r}; the {adapter.family} adapter understands {known}"
            )


def check_modules(adapter: Adapter, module: nn.Module) -> None:
    """Refuse a module that lacks what this adapter names, as one of another release of transformers may.

    Raises UnknownArchitectureError naming the first path that is missing and the release.
    """
    layout = adapter.layout(module)
    tops = [adapter.final_norm, adapter.unembed, *(access.path for access in adapter.outside.values())]
    try:
        for path in filter(None, tops):
            submodule(module, path)
        for name in adapter.stack_names:
            stack = adapter.stack(name)
            if layout.layers_of(name):
                layer = submodule(module, stack.layers if adapter.shared else f"{stack.layers}.0")
                submodule(layer, stack.o_proj)
    except InputError as missing:
        raise UnknownArchitectureError(
            f"{type(module).__name__} of transformers {version('transformers')} is built otherwise than the "
            f"{adapter.family} adapter says: {missing}"
        ) from missing


def _unknown_field(config: Any, understood: Collection[str]) -> tuple[str, Any] | None:
    """Name and value of the first config field that is neither understood nor at its default, if there is one."""
    defaults = _defaults(config)
    for name, value in vars(config).items():
        if name.startswith("_") or name in _OUTSIDE_FORWARD or name in understood:
            continue
        if name in defaults and value == defaults[name]:
            continue
        if _PLANS.fullmatch(name):
            continue
        if name not in defaults and not value:
            continue  # an unknown switch that is off
        return name, value
    return None


def _defaults(config: Any) -> Mapping[str, Any]:
    """Fields of the config class with their defaults."""
    if dataclasses.is_dataclass(config):
        return {field.name: _default(field) for field in dataclasses.fields(config)}
    parameters = inspect.signature(type(config).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
