"""Attribution: what each token of some inputs contributed, as it is read, compared and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.errors import InputError
from vesalius.jobs.frames import data_frame
from vesalius.patching.agreement import Agreement, agreement
from vesalius.patching.plan import Cost

if TYPE_CHECKING:
    import pandas

SHOWN = 20


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Shares of tokens in a part's activation or a metric; nothing is averaged.

    values: [example, pos], zero on padding and after what is read. at: [example] the position that was read; None for a
    sum over positions, or a metric. ends: [example] position after the last one that can matter. value: [example] of
    the inputs as they are. at_baseline: the same with every token replaced by the baseline. off_distribution: how
    unnatural embeddings of the baseline are (norm_ratio, z_rms). agreement: of a gradient method with what ablating
    each token really changes; None where it was not measured.
    """

    values: Float[Tensor, "example pos"]
    tokens: tuple[tuple[str, ...], ...]
    target: str
    unit: str
    method: str
    baseline: str
    at: Int[Tensor, " example"] | None
    ends: Int[Tensor, " example"]
    value: Float[Tensor, " example"]
    at_baseline: Float[Tensor, " example"]
    cost: Cost
    off_distribution: Mapping[str, float]
    agreement: Agreement | None = None

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def mask(self) -> Bool[Tensor, "example pos"]:
        """True on tokens, False on padding."""
        lengths = torch.tensor([len(row) for row in self.tokens])
        return torch.arange(self.values.shape[1]) < lengths[:, None]

    @property
    def gap(self) -> Float[Tensor, " example"]:
        """Completeness gap: value - at_baseline less the sum of the tokens' shares.

        Of integrated gradients it is the error of the integral, and tends to zero with more steps. The other methods
        promise no such sum.
        """
        return self.value - self.at_baseline - self.values.sum(1)

    @property
    def relative_gap(self) -> Float[Tensor, " example"]:
        """Size of the gap over that of the change from the baseline, or of all shares together if that is larger."""
        whole = torch.maximum((self.value - self.at_baseline).abs(), self.values.abs().sum(1))
        return self.gap.abs() / whole.clamp_min(1e-12)

    def against(self, other: Attribution) -> Agreement:
        """How the shares agree with another method's, over all tokens and within each example.

        Raises InputError for an attribution of other inputs or another target.
        """
        if (self.tokens, self.target) != (other.tokens, other.target):
            raise InputError(f"attributions of {self.target} and {other.target}, or of other inputs, do not compare")
        # A position of one input is not the same thing in another one: every cell stands for itself.
        reached = torch.arange(self.values.shape[1]) < torch.minimum(self.ends, other.ends)[:, None]
        return agreement(self.values.T, other.values.T, (self.mask & reached).T, range(len(self)))

    def __repr__(self) -> str:
        return f"Attribution({self.target}, {len(self)} inputs, {self.method}; {'; '.join(self._facts)})"

    @property
    def _facts(self) -> list[str]:
        facts = [f"baseline {self.baseline}"]
        if self.method == "integrated_gradients":
            facts.append(f"largest completeness gap {float(self.relative_gap.max()):.1%}")
        if self.agreement is not None:
            rank = float(self.agreement.rank_per_example.nanmedian())
            facts.append(f"rank correlation with ablation {rank:.2f} (median)")
        return facts

    def to_frame(self) -> pandas.DataFrame:
        """One row per token: example, position, token, share, read. Raises InputError where pandas is not installed."""
        rows = [
            {
                "example": example,
                "position": position,
                "token": token,
                "share": float(self.values[example, position]),
                "read": self.at is not None and int(self.at[example]) == position,
            }
            for example, tokens in enumerate(self.tokens)
            for position, token in enumerate(tokens)
        ]
        return data_frame(rows)

    def _repr_html_(self) -> str:
        head = f"<h3>{escape(self.target)}</h3><p>{escape(self.method)}; {escape('; '.join(self._facts))}</p>"
        more = f"<p>and {len(self) - SHOWN} more</p>" if len(self) > SHOWN else ""
        return head + "".join(self._line(example) for example in range(min(len(self), SHOWN))) + more

    def _line(self, example: int) -> str:
        top = float(self.values[example].abs().max()) or 1.0
        read = -1 if self.at is None else int(self.at[example])
        cells = "".join(
            _tinted(token, float(self.values[example, position]), top, position == read)
            for position, token in enumerate(self.tokens[example])
        )
        return f"<p><b>{float(self.value[example]):.3g}</b> {cells}</p>"


def _tinted(token: str, share: float, top: float, read: bool) -> str:
    """Orange raises, blue lowers; the token that is read is underlined."""
    tint = "255,140,0" if share >= 0 else "33,102,172"
    line = ";border-bottom:2px solid" if read else ""
    style = f"background:rgba({tint},{0.7 * abs(share) / top:.2f}){line}"
    return f"<span style='{style}' title='{share:+.3g}'>{escape(token)}</span>"
