"""The oracle of training: the losses as the papers write them, dense, by autograd, one latent set after the other.

Shares nothing with the package but the parameters of step 0 and the config.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesalius.dictionaries import TrainConfig
from vesalius.dictionaries.training.fitter import Fitter


class Step(torch.autograd.Function):
    """H(pre - threshold) with a box kernel as the threshold's derivative."""

    @staticmethod
    def forward(ctx: object, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)  # type: ignore[attr-defined]
        ctx.width = width  # type: ignore[attr-defined]
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors  # type: ignore[attr-defined]
        box = ((pre - threshold).abs() < ctx.width / 2).to(pre)  # type: ignore[attr-defined]
        return None, (-box / ctx.width * grad).sum(0), None  # type: ignore[attr-defined]


class Jump(torch.autograd.Function):
    """pre H(pre - threshold), with the straight-through derivative of the threshold."""

    @staticmethod
    def forward(ctx: object, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)  # type: ignore[attr-defined]
        ctx.width = width  # type: ignore[attr-defined]
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors  # type: ignore[attr-defined]
        box = ((pre - threshold).abs() < ctx.width / 2).to(pre)  # type: ignore[attr-defined]
        return grad * (pre > threshold), (-threshold * box / ctx.width * grad).sum(0), None  # type: ignore[attr-defined]


class PlainTraining:
    """Trains a copy of a fitter's parameters."""

    def __init__(self, fitter: Fitter) -> None:
        self.run, self.config = fitter.run, fitter.run.config
        self.values = {n: v.clone().requires_grad_() for n, v in fitter.parameters.values.items()}
        self.optimiser = torch.optim.Adam(self.values.values(), lr=1.0, betas=self.config.betas)
        self.silent = [torch.zeros(self.config.n_latents) for _ in self.run.layout.blocks]
        self.steps = 0

    def step(self, batch: tuple[Tensor, ...]) -> float:
        config = self.config
        layout = self.run.layout
        y = torch.cat([batch[p] * s for p, s in zip(layout.out_numbers, self.run.out_scale, strict=True)], 1)
        x = torch.cat([batch[p] * s for p, s in zip(layout.in_numbers, self.run.in_scale, strict=True)], 1)
        if layout.apply_b_dec_to_input:
            x = x - self.values["b_dec"]
        loss = self.loss(x, y)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._constrain()
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr_at(self.steps)
        self.optimiser.step()
        if config.unit_decoder:
            for name, value in self.values.items():
                if name.endswith("W_dec"):
                    value.data /= value.data.norm(dim=1, keepdim=True)
        self.steps += 1
        return float(loss.detach())

    def _constrain(self) -> None:
        for name, value in self.values.items():
            if self.config.unit_decoder and name.endswith("W_dec"):
                assert value.grad is not None
                along = (value.grad * value.data).sum(1, keepdim=True)
                value.grad -= along * value.data
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.values.values()), self.config.clip_norm)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        config, layout, values = self.config, self.run.layout, self.values
        base = values["b_dec"].expand(len(y), -1)
        if "W_skip" in values:
            base = base + x @ values["W_skip"].T
        full, penalty, second = base.clone(), torch.zeros(()), base.detach().clone()
        prefixes = [base.clone() for _ in config.prefixes]
        pres, latents = [], []
        for number, block in enumerate(layout.blocks):
            own = {n.split(".", 1)[1]: v for n, v in values.items() if n.startswith(f"{number}.")}
            pre = x[:, block.reads] @ own["W_enc"].T + own["b_enc"]
            latent, gate, penalised = self.latents(pre, own, block.out_widths)
            full = _added(full, block.writes, latent @ own["W_dec"])
            for place, size in enumerate(config.prefixes):
                part = latent[:, :size] @ own["W_dec"][:size]
                prefixes[place] = _added(prefixes[place], block.writes, part)
            if gate is not None:
                second = _added(second, block.writes, gate @ own["W_dec"].detach())
            penalty = penalty + penalised
            pres.append(pre)
            latents.append(latent)
        loss = torch.stack([(prefix - y).square().sum(1).mean() for prefix in prefixes]).mean()
        if config.kind == "gated":
            loss = loss + (second - y).square().sum(1).mean()
        loss = loss + config.sparsity_at(self.steps) * penalty
        if config.dead_rule == "auxk":
            loss = loss + self.auxiliary(x, y, full)
        for number, latent in enumerate(latents):
            fired = (latent > 0).any(0)
            self.silent[number] = torch.where(fired, 0, self.silent[number] + len(y))
        return loss

    def latents(
        self, pre: Tensor, own: dict[str, Tensor], widths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Latents, the gate's positive part (gated), and the penalty per row."""
        config: TrainConfig = self.config
        norms = torch.stack([part.norm(dim=1) for part in own["W_dec"].split(list(widths), 1)]).sum(0)
        nothing = torch.zeros(())
        if config.kind == "topk":
            kept = torch.zeros_like(pre).scatter(1, pre.topk(config.k, 1).indices, 1.0)
            return pre.relu() * kept, None, nothing
        if config.kind in ("batchtopk", "matryoshka"):
            least = pre.flatten().topk(config.k * len(pre)).values[-1]
            return pre.relu() * (pre >= least), None, nothing
        if config.kind == "relu":
            return pre.relu(), None, (pre.relu() * norms).sum(1).mean()
        if config.kind == "gated":
            shared = pre - own["b_enc"]
            magnitude = (own["r_mag"].exp() * shared + own["b_mag"]).relu() * (pre > 0).detach()
            return magnitude, pre.relu(), (pre.relu() * norms).sum(1).mean()
        threshold = own["log_threshold"].exp()
        latent = Jump.apply(pre, threshold, config.bandwidth)
        if config.penalty == "tanh":
            return latent, None, (config.tanh_scale * latent * norms).tanh().sum(1).mean()
        return latent, None, Step.apply(pre, threshold, config.bandwidth).sum(1).mean()

    def auxiliary(self, x: Tensor, y: Tensor, full: Tensor) -> Tensor:
        config, total = self.config, torch.zeros(())
        left = (y - full).detach()
        variance = (y - y.mean(0)).square().sum()
        for number, block in enumerate(self.run.layout.blocks):
            dead = (self.silent[number] >= config.dead_after).nonzero()[:, 0]
            if len(dead):
                own = {n.split(".", 1)[1]: v for n, v in self.values.items() if n.startswith(f"{number}.")}
                pre = (x[:, block.reads].detach() @ own["W_enc"][dead].T + own["b_enc"][dead]).relu()
                k = min(config.aux_k, len(dead))
                kept = torch.zeros_like(pre).scatter(1, pre.topk(k, 1).indices, 1.0)
                miss = (pre * kept) @ own["W_dec"][dead] - left[:, block.writes]
                total = total + config.aux_coef * variance / left.square().sum() * miss.square().sum(1).mean()
        return total


def _added(whole: Tensor, where: slice, part: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(part, (where.start, whole.shape[1] - where.stop))
    return whole + padded
