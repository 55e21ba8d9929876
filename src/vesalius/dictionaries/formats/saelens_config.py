"""The cfg.json of SAELens, of version 6 and of those before, as one value that says all of it that matters here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius.errors import FileFormatError, InputError

_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
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
    apply_b_dec_to_input: bool
    rescaled: bool
    """Latents are multiplied by the norm of their decoder rows (TopK)."""
    finetuned: bool
    """The decoder multiplies latents by a factor of their own (before version 6)."""

    @property
    def k(self) -> int:
        """Of topk. Raises FileFormatError when there is none."""
        k = self.raw.get("k")
        if not isinstance(k, int | float) or k != int(k) or k < 1:
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
    version = raw.get("sae_lens_version") or metadata.get("sae_lens_version")
    if not isinstance(version, str) or not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        raw, metadata = _as_of_version_6(path, raw)
    return SaelensConfig(
        path,
        str(raw.get("architecture", "standard")),
        metadata,
        raw,
        str(raw.get("normalize_activations") or "none"),
        bool(raw.get("apply_b_dec_to_input", True)),
        bool(raw.get("rescale_acts_by_decoder_norm", False)),
        bool(raw.get("finetuning_scaling_factor", False)),
    )


def _as_of_version_6(path: Path, old: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An older cfg.json with the names and defaults of version 6; all of it counts as metadata too."""
    raw = {_OLD_NAMES.get(name, name): value for name, value in old.items()}
    function, keywords = raw.get("activation_fn") or "relu", raw.get("activation_fn_kwargs") or {}
    if function == "topk":
        if keywords.get("signed"):
            raise FileFormatError(f"{path}: a signed topk, whose latents can be negative, is not read here")
        raw |= {"architecture": "topk", "k": keywords.get("k")}
    elif function != "relu":
        raise FileFormatError(f"{path}: activation_fn={function!r} is not read here; what is: relu, topk")
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
    if given is None and isinstance(found, int | float):
        return float(found)
    if given is None:
        raise FileFormatError(
            f"{config.path}: normalize_activations={AVERAGE!r}, so it was trained on activations times a factor, "
            "sqrt(d_in) / their mean norm, which is not in the folder. Give it as in_scale=; in_scale=1.0 takes the "
            "weights as they are, which is what SAELens does"
        )
    return float(given)
