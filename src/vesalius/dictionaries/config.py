"""TrainConfig: what is trained, and how. One value, checked where it is made, hashed and stored with the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vesalius.errors import InputError, UnknownNameError


@dataclass(frozen=True)
class KindDefaults:
    """What a kind does where the config leaves it open."""

    sparsity: float
    """Coefficient of the sparsity penalty, for activations of mean norm sqrt(width)."""
    decoder_norm: str
    dead: str


KINDS = {
    "relu": KindDefaults(sparsity=2.0, decoder_norm="free", dead="resample"),
    "gated": KindDefaults(sparsity=4.0, decoder_norm="unit", dead="none"),
    "jumprelu": KindDefaults(sparsity=0.5, decoder_norm="unit", dead="auxk"),
    "topk": KindDefaults(sparsity=0.0, decoder_norm="unit", dead="auxk"),
    "batchtopk": KindDefaults(sparsity=0.0, decoder_norm="unit", dead="auxk"),
    "matryoshka": KindDefaults(sparsity=0.0, decoder_norm="unit", dead="auxk"),
}
CODERS = ("auto", "sae", "transcoder", "crosscoder", "cross_layer")
PRECISIONS = ("fp32", "bf16-screen", "bf16")
_CHOICES = {
    "coder": CODERS,
    "precision": PRECISIONS,
    "penalty": ("l0", "tanh"),
    "decoder_norm": ("unit", "free"),
    "dead": ("auxk", "resample", "none"),
}
_MATRYOSHKA_SHARES = (32, 16, 8, 4)
"""Of the default prefixes: one in so many latents; half of them and all follow."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train a dictionary.

    kind: `relu` (L1 penalty), `gated`, `jumprelu`, `topk`, `batchtopk`, `matryoshka`. n_latents: per layer for a
    cross-layer transcoder. k: latents active per row (topk; on average for batchtopk and matryoshka; jumprelu begins
    with twice as many).

    Raises InputError naming the field for values out of range, UnknownNameError listing the known ones for names.
    """

    kind: str = "topk"
    n_latents: int = 8192
    k: int = 32
    batch_size: int = 4096
    """Rows per step, over all processes and micro-batches."""
    steps: int = 5000
    lr: float = 1e-3
    seed: int = 0
    coder: str = "auto"
    """`sae`, `transcoder`, `crosscoder` or `cross_layer`; auto: one site is a sae, plain (x, y) a transcoder."""
    in_sites: tuple[str, ...] = ()
    """Sites that are read, of those the source has; default: what the coder implies."""
    out_sites: tuple[str, ...] = ()
    """Sites that are reconstructed."""
    skip: bool = False
    """A linear map from input to output beside the latents (transcoders)."""
    apply_b_dec_to_input: bool | None = None
    """Subtract the decoder's bias from the input before encoding; default: wherever inputs and outputs are the same."""
    normalise: bool = True
    """Scale each site to mean norm sqrt(width) while training."""
    fold: bool | None = None
    """Put those scales into the saved weights; default: for one site, not for crosscoders and cross-layer coders,
    whose decoder norms are compared between sites."""
    warmup: int | None = None
    """Steps in which the learning rate rises linearly; default: the smaller of 1000 and a twentieth of all."""
    decay: float = 0.2
    """Last share of the steps, in which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam (Kingma and Ba 2015)."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient of all parameters together."""
    accumulate: int = 1
    """Micro-batches a batch is cut into, to save memory; batchtopk then chooses within each."""
    precision: str = "fp32"
    """`bf16-screen`: latents are proposed in bfloat16 and computed in float32; the same latents as `fp32`, by a bound.
    `bf16`: encoder products in bfloat16 (mixed precision; weights, sums and Adam stay in float32)."""
    sparsity: float | None = None
    """Coefficient of the sparsity penalty (relu, gated, jumprelu)."""
    sparsity_warmup: int | None = None
    """Steps in which the penalty rises linearly; default: a twentieth of all."""
    penalty: str = "l0"
    """jumprelu: `l0` (Rajamanoharan et al. 2024, eq. 9) or `tanh` (Anthropic, January 2025)."""
    bandwidth: float = 0.5
    """jumprelu: width of the straight-through kernel, in units of pre-activations."""
    tanh_scale: float = 4.0
    """jumprelu with `tanh`: factor on latent times decoder norm inside the tanh."""
    groups: tuple[int, ...] = ()
    """matryoshka: sizes of the nested prefixes, the last one n_latents; default doubling from n_latents / 32."""
    decoder_norm: str | None = None
    """`unit` (rows of unit norm, gradients along them removed) or `free`; default by kind."""
    dead: str | None = None
    """What is done for dead latents: `auxk` (Gao et al. 2024, A.2), `resample` (Bricken et al. 2023), `none`."""
    dead_after: int = 1_000_000
    """Rows without firing after which a latent counts as dead."""
    aux_k: int = 256
    """auxk: dead latents of a row that reconstruct the error."""
    aux_coef: float = 1 / 32
    """auxk: weight of its loss, where the variance weighs 1."""
    resample_every: int = 1000
    """resample: steps between resamplings."""
    checkpoint_every: int = 500
    """Steps between checkpoints, when there is a folder to keep them in."""
    held_out: float = 0.05
    """Share of a store's rows, whole documents from its end, that is left out, for `quality` to measure on."""

    def __post_init__(self) -> None:
        for name in ("in_sites", "out_sites", "groups", "betas"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in KINDS:
            raise UnknownNameError("kind of dictionary", str(self.kind), KINDS)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UnknownNameError(name, str(value), known)
        for name, (holds, wanted) in _RULES.items():
            if not holds(getattr(self, name)):
                raise InputError(f"TrainConfig.{name} must be {wanted}; got {getattr(self, name)!r}")
        self._check_together()

    def _check_together(self) -> None:
        if self.sparse_by_count and self.k > self.n_latents:
            raise InputError(f"TrainConfig.k is {self.k}, more than n_latents ({self.n_latents})")
        if self.warmup is not None and self.warmup > self.steps:
            raise InputError(f"TrainConfig.warmup is {self.warmup}, more than steps ({self.steps})")
        if self.accumulate > self.batch_size:
            raise InputError(f"TrainConfig.accumulate is {self.accumulate}, more than batch_size ({self.batch_size})")
        if self.groups and (self.groups[-1] != self.n_latents or list(self.groups) != sorted(set(self.groups))):
            raise InputError(f"TrainConfig.groups must rise to n_latents ({self.n_latents}); got {list(self.groups)}")
        if self.groups and self.kind != "matryoshka":
            raise InputError(f"TrainConfig.groups is for kind='matryoshka'; kind is {self.kind!r}")

    @property
    def sparse_by_count(self) -> bool:
        """Whether k decides how many latents are active, and no penalty."""
        return self.kind in ("topk", "batchtopk", "matryoshka")

    @property
    def sparsity_coefficient(self) -> float:
        """`sparsity`, or the kind's own."""
        return KINDS[self.kind].sparsity if self.sparsity is None else self.sparsity

    @property
    def unit_decoder(self) -> bool:
        """Whether rows of the decoder keep unit norm."""
        return (self.decoder_norm or KINDS[self.kind].decoder_norm) == "unit"

    @property
    def dead_rule(self) -> str:
        """`dead`, or the kind's own."""
        return self.dead or KINDS[self.kind].dead

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Ends of the nested groups of latents; a single one for kinds without groups."""
        if self.kind != "matryoshka":
            return (self.n_latents,)
        # Small dictionaries have fewer prefixes: shares that come to no latent are left out.
        halving = [self.n_latents // share for share in _MATRYOSHKA_SHARES if self.n_latents // share]
        return self.groups or tuple(sorted({*halving, self.n_latents // 2 or 1, self.n_latents}))

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (numbered from 0): linear warm-up, constant, linear decay to zero."""
        rise = min(1000, self.steps // 20) if self.warmup is None else self.warmup
        fall = round(self.decay * self.steps)
        # Never zero: the first step and the last one move the weights too.
        up = min(1.0, (step + 1) / (rise + 1))
        down = min(1.0, (self.steps - step) / (fall + 1))
        return self.lr * min(up, down)

    def sparsity_at(self, step: int) -> float:
        """Coefficient of the sparsity penalty at a step: a linear rise, then constant."""
        rise = self.steps // 20 if self.sparsity_warmup is None else self.sparsity_warmup
        return self.sparsity_coefficient * min(1.0, (step + 1) / (rise + 1))


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _least(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: _whole(value, least), f"a whole number, at least {least}"


def _optional(rule: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or None"


_POSITIVE = (lambda value: _number(value) and value > 0, "a positive number")
_NOT_NEGATIVE = (lambda value: _number(value) and value >= 0, "zero or a positive number")
_FLAG = (lambda value: isinstance(value, bool), "True or False")
_NAMES = (lambda value: all(isinstance(name, str) for name in value), "names of sites")
_COUNTS = (
    "n_latents",
    "k",
    "steps",
    "accumulate",
    "dead_after",
    "aux_k",
    "resample_every",
    "checkpoint_every",
)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_COUNTS, _least(1)),
    # One row has no variance, of which the error could be a share.
    "batch_size": _least(2),
    "seed": _least(0),
    "warmup": _optional(_least(0)),
    "sparsity_warmup": _optional(_least(0)),
    **dict.fromkeys(("lr", "bandwidth", "tanh_scale"), _POSITIVE),
    "clip_norm": _optional(_POSITIVE),
    "aux_coef": _NOT_NEGATIVE,
    "sparsity": _optional(_NOT_NEGATIVE),
    **dict.fromkeys(("skip", "normalise"), _FLAG),
    **dict.fromkeys(("apply_b_dec_to_input", "fold"), _optional(_FLAG)),
    "decay": (lambda value: _number(value) and 0 <= value <= 1, "a share between 0 and 1"),
    "held_out": (lambda value: _number(value) and 0 <= value < 1, "a share from 0 to under 1"),
    "betas": (lambda value: len(value) == 2 and all(_number(b) and 0 <= b < 1 for b in value), "two numbers in [0, 1)"),
    "groups": (lambda value: all(_whole(size, 1) for size in value), "whole numbers, at least 1"),
    **dict.fromkeys(("in_sites", "out_sites"), _NAMES),
}
"""Of every field that is a number, a flag or names: what holds of its values, and the same in words."""
