"""The cfg.json of SAELens, of version 6 and of those before, as one value that says all of it that matters here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius.dictionaries.formats.reading import flag
from vesalius.errors import FileFormatError, InputError

COMPUTED = {
    "activation_fn", "activation_fn_kwargs", "apply_b_dec_to_input", "architecture", "d_in", "d_out", "d_sae",
    "finetuning_scaling_factor", "k", "matryoshka_widths", "metadata", "model_from_pretrained_kwargs",
    "normalize_activations", "rescale_acts_by_decoder_norm", "reshape_activations", "sae_lens_version",
}  # fmt: skip
"""Settings that decide what a dictionary computes, all of which are read."""
KEPT = {
    "context_size", "dataset_path", "exclude_special_tokens", "hf_hook_name", "hf_hook_name_out", "hook_head_index",
    "hook_head_index_out", "hook_layer", "hook_layer_out", "hook_name", "hook_name_out", "hook_point_layer",
    "model_class_name", "model_kwargs", "model_name", "neuronpedia_id", "prepend_bos", "sae_lens_training_version",
    "seqpos_slice",
}  # fmt: skip
"""What says of which activations it is."""
TRAINED = {
    "act_store_device", "activation_save_path", "activations_mixing_fraction", "adam_beta1", "adam_beta2",
    "autocast", "autocast_lm", "aux_loss_coefficient", "b_dec_init_method", "begin_batch_token",
    "begin_sequence_token", "cached_activations_path", "checkpoint_path", "compile_llm", "compile_sae",
    "dataset_trust_remote_code", "dead_feature_estimation_method", "dead_feature_threshold", "dead_feature_window",
    "decoder_heuristic_init", "decoder_heuristic_init_norm", "decoder_init_norm", "decoder_orthogonal_init",
    "device", "disable_concat_sequences", "dtype", "end_pos_offset", "eval_batch_size_prompts",
    "eval_every_n_wandb_logs", "expansion_factor", "feature_reinit_scale", "feature_sampling_method",
    "feature_sampling_window", "finetuning_method", "finetuning_tokens", "from_pretrained_path", "hook_eval",
    "init_encoder_as_decoder_transpose", "is_dataset_tokenized", "jumprelu_bandwidth", "jumprelu_init_threshold",
    "jumprelu_sparsity_loss_mode", "jumprelu_ste_to_input", "jumprelu_tanh_scale", "l0_coefficient", "l0_lambda",
    "l0_warm_up_steps", "l1_coefficient", "l1_warm_up_steps", "l1_warmup_steps", "llm_compilation_mode",
    "llm_device", "log_activations_store_to_wandb", "log_optimizer_state_to_wandb", "log_to_wandb",
    "log_weights_to_wandb", "logger", "lp_norm", "lr", "lr_decay_steps", "lr_end", "lr_scheduler_name",
    "lr_warm_up_steps", "lr_warmup_steps", "mse_loss_normalization", "n_batches_for_norm_estimate",
    "n_batches_in_buffer", "n_checkpoints", "n_eval_batches", "n_restart_cycles", "noise_scale",
    "normalize_sae_decoder", "output_path", "pre_act_loss_coefficient", "prefetch_llm_batches", "resample_batches",
    "resume", "resume_from_checkpoint", "run_name", "sae_class_name", "sae_compilation_mode",
    "save_final_checkpoint", "scale_sparsity_penalty_by_decoder_norm", "seed", "sequence_separator_token",
    "sparsity_coefficient", "start_pos_offset", "store_batch_size", "store_batch_size_prompts", "streaming",
    "target_l0", "tokens_per_buffer", "topk_threshold_lr", "total_training_steps", "total_training_tokens",
    "train_batch_size", "train_batch_size_tokens", "training_tokens", "unique_id", "use_cached_activations",
    "use_chat_formatting", "use_ghost_grads", "use_matryoshka_aux_loss", "use_sparse_activations", "verbose",
    "wandb_entity", "wandb_id", "wandb_log_frequency", "wandb_project", "warm_up_steps",
}  # fmt: skip
"""How it was trained and where its files went, in the versions from 1 on: nothing of it is in what it computes."""
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}
NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
AVERAGE = "expected_average_only_in"


@dataclass(frozen=True)
class SaelensConfig:
    """What a SAELens dictionary computes, and where."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    raw: Mapping[str, Any]
    normalize: str
    said_of_b_dec: Any
    """apply_b_dec_to_input as it stands in the file; None where it does not."""
    rescaled: bool
    """Latents are multiplied by the norm of their decoder rows (TopK)."""
    finetuned: bool
    """The decoder multiplies latents by a factor of their own (before version 6)."""
    model_settings: Mapping[str, Any]
    """How SAELens loaded the model (`model_from_pretrained_kwargs`)."""

    @property
    def apply_b_dec_to_input(self) -> bool:
        """Whether b_dec is subtracted from inputs, which is never so of a transcoder.

        Raises FileFormatError for a transcoder that says it is.
        """
        transcodes = "transcoder" in self.architecture
        found = flag(self.path, {"apply_b_dec_to_input": self.said_of_b_dec}, "apply_b_dec_to_input", not transcodes)
        if found and transcodes:
            raise FileFormatError(f"{self.path} says apply_b_dec_to_input=True, which SAELens's transcoders never do")
        return found

    @property
    def k(self) -> int:
        """Of topk. Raises FileFormatError when there is none."""
        k = self.raw.get("k")
        if not isinstance(k, int | float) or isinstance(k, bool) or k != int(k) or k < 1:
            raise FileFormatError(f"{self.path} says {self.architecture} and gives k={k!r}; a whole number is needed")
        return int(k)

    @property
    def row_norm(self) -> str:
        """Our name for how rows are normalised. Raises FileFormatError for a way that is not read here."""
        if self.normalize == AVERAGE:
            return "none"
        if self.normalize not in NORMS:
            raise FileFormatError(
                f"{self.path}: normalize_activations={self.normalize!r} is not read here; what is: "
                f"{', '.join([*NORMS, AVERAGE])}"
            )
        return NORMS[self.normalize]

    @property
    def groups(self) -> tuple[int, ...]:
        """Nested prefixes that a matryoshka dictionary was trained with."""
        details = self.metadata.get("training_architecture_details")
        widths = details.get("matryoshka_widths") if isinstance(details, dict) else self.raw.get("matryoshka_widths")
        return tuple(int(width) for width in widths or ())


def read_config(path: Path, raw: Mapping[str, Any]) -> SaelensConfig:
    """From the object in cfg.json. Raises FileFormatError for fields of another type than they should be."""
    metadata = raw.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{path}: metadata should be an object, it is {metadata!r}")
    if _said(raw, "reshape_activations") not in ("none", "hook_z"):
        raise FileFormatError(
            f"{path}: reshape_activations={raw['reshape_activations']!r} is not read here; what is: none, hook_z"
        )
    version = raw.get("sae_lens_version") or metadata.get("sae_lens_version")
    if not isinstance(version, str) or not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        raw, metadata = _as_of_version_6(path, raw)
    return SaelensConfig(
        path,
        str(raw.get("architecture", "standard")),
        metadata,
        raw,
        _said(raw, "normalize_activations"),
        raw.get("apply_b_dec_to_input"),
        _rescaled(path, raw),
        flag(path, raw, "finetuning_scaling_factor", False),
        _model_settings(path, raw, metadata),
    )


def _said(raw: Mapping[str, Any], name: str) -> str:
    return "none" if raw.get(name) is None else str(raw[name])


_WITH_RESCALING = ("topk", "batchtopk", "matryoshka_batchtopk")


def _rescaled(path: Path, raw: Mapping[str, Any]) -> bool:
    found, architecture = flag(path, raw, "rescale_acts_by_decoder_norm", False), str(raw.get("architecture"))
    if found and architecture not in _WITH_RESCALING:
        raise FileFormatError(
            f"{path} says rescale_acts_by_decoder_norm=True, which architecture={architecture!r} has not; SAELens has "
            f"it of {', '.join(_WITH_RESCALING)}"
        )
    return found


def _model_settings(path: Path, raw: Mapping[str, Any], metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the model was loaded, which is among the metadata from version 6 on and beside them before."""
    found = metadata.get("model_from_pretrained_kwargs", raw.get("model_from_pretrained_kwargs"))
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise FileFormatError(f"{path}: model_from_pretrained_kwargs should be an object, it is {found!r}")
    return found


def _as_of_version_6(path: Path, old: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An older cfg.json with the names and defaults of version 6; all of it counts as metadata too."""
    raw = {_OLD_NAMES.get(name, name): value for name, value in old.items()}
    function, keywords = raw.get("activation_fn"), raw.get("activation_fn_kwargs")
    function, keywords = "relu" if function is None else function, {} if keywords is None else dict(keywords)
    if function == "topk":
        if keywords.get("signed"):
            raise FileFormatError(f"{path}: a signed topk, whose latents can be negative, is not read here")
        raw |= {"architecture": "topk", "k": keywords.get("k")}
    elif function != "relu":
        raise FileFormatError(f"{path}: activation_fn={function!r} is not read here; what is: relu, topk")
    # Of relu, k is left over from another activation function; SAELens passes it on to nobody.
    others = {name: value for name, value in keywords.items() if name not in ("k", "signed")}
    if others:
        raise FileFormatError(f"{path}: activation_fn_kwargs={others!r} of {function} are not read here")
    if isinstance(raw.get("normalize_activations"), bool):
        raw["normalize_activations"] = AVERAGE if raw["normalize_activations"] else "none"
    return raw, raw


def scale_needed(config: SaelensConfig, given: float | None, scaler: Mapping[str, Any]) -> float:
    """The factor on inputs: 1 unless the dictionary was trained on activations scaled to a mean norm.

    Raises FileFormatError when that factor is neither in the folder nor given, InputError for one that nothing needs.
    """
    if config.normalize != AVERAGE:
        if given is not None:
            raise InputError(
                f"in_scale is for dictionaries with normalize_activations={AVERAGE!r}; {config.path} has "
                f"{config.normalize!r}"
            )
        return 1.0
    found = scaler.get("scaling_factor")
    if given is None and found is not None:
        if not isinstance(found, int | float) or isinstance(found, bool) or not found > 0:
            raise FileFormatError(
                f"the scaling_factor beside {config.path} should be a number above 0, it is {found!r}"
            )
        return float(found)
    if given is None:
        raise FileFormatError(
            f"{config.path}: normalize_activations={AVERAGE!r}, so it was trained on activations times a factor, "
            "sqrt(d_in) / their mean norm, which is not in the folder. Give it as in_scale=; in_scale=1.0 takes the "
            "weights as they are, which is what SAELens does"
        )
    return float(given)
