"""One micro-batch: encode, decode, and the gradients of all parameters, by hand.

For rows x (scaled, b_dec subtracted), targets y, latents v with decoder rows d_j and error e = v D + b - y, the loss is
the mean over rows of |e|^2 plus penalties. Only latents that take part are ever touched: dL/dv_j = 2 e.d_j / n,
dL/dd_j = sum over rows of v_j 2e / n, dL/dw_j = sum over rows of (dL/dpre_j) x. With prefixes (matryoshka) there is one
error per prefix, and a latent gets the sum of those it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.dictionaries.kinds import Entries, Gradients
from vesalius.dictionaries.training.encode import Chunk, Encoder, codes_of, encode
from vesalius.dictionaries.training.parameters import Parameters, site_norms, squared_norm, weighs_norms
from vesalius.dictionaries.training.run import LATENTS, Processes, Run
from vesalius.model.products import linear

SmallGradients = dict[str, Tensor]
"""By name, in float64: what a chunk adds to the gradients of vectors, and to the sums that those of matrices need."""


@dataclass
class StepTotals:
    """What a step measured, summed over rows, micro-batches and processes, in float64."""

    rows: Tensor
    squared_error: Tensor
    """Of the full code."""
    loss: Tensor
    """Error as the loss counts it (mean over prefixes, with the gate's), and penalty per row."""
    outputs: Tensor
    """[d_out] sum of the outputs."""
    output_squares: Tensor
    fired: list[Tensor]
    """Per block, [latent] rows in which each was active."""

    @classmethod
    def added(cls, parts: Sequence[StepTotals]) -> StepTotals:
        """The sum, in the order given."""
        add = lambda name: torch.stack([getattr(part, name) for part in parts]).sum(0)  # noqa: E731
        fired = [torch.stack(list(block)).sum(0) for block in zip(*(part.fired for part in parts), strict=True)]
        return cls(add("rows"), add("squared_error"), add("loss"), add("outputs"), add("output_squares"), fired)

    def over(self, processes: Processes) -> StepTotals:
        """The sum over processes, sent as one message."""
        scalars = (self.rows, self.squared_error, self.loss, self.output_squares)
        parts = [*(scalar[None] for scalar in scalars), self.outputs, *self.fired]
        if processes.size > 1:
            flat = processes.sum(torch.cat(parts))
            parts = list(flat.split([len(part) for part in parts]))
        rows, squared_error, loss, output_squares, outputs, *fired = parts
        return StepTotals(rows[0], squared_error[0], loss[0], outputs, output_squares[0], fired)

    @property
    def variance(self) -> float:
        """Squared deviation of the outputs from their mean, summed over rows."""
        return float(self.output_squares - self.outputs.square().sum() / self.rows)

    @property
    def fvu(self) -> float:
        """Fraction of the variance that the error is; 0 / 0 counts as 0."""
        variance = self.variance
        return float(self.squared_error) / variance if variance > 0 else float(self.squared_error > 0)

    @property
    def l0(self) -> float:
        """Active latents per row, of all blocks."""
        return float(sum(block.sum() for block in self.fired) / self.rows)


class MicroBatch:
    """Rows of one process that are encoded and decoded together.

    rows: [row, width] for each site of the source. weight: one over the rows of the whole batch, which each row counts
    in the loss. sparsity: coefficient of the penalty.
    """

    def __init__(
        self, run: Run, parameters: Parameters, rows: Sequence[Tensor], weight: float, sparsity: float
    ) -> None:
        self.run, self.parameters, self.weight, self.sparsity = run, parameters, weight, sparsity * weight
        self.blocks = [parameters.block(number) for number in range(len(run.layout.blocks))]
        self.cuts = run.cuts(len(rows[0]))
        self.x, self.y = self._prepared(rows)
        self.smallest_chosen: Tensor | None = None
        # Filled chunk by chunk: the gradient of the loss with respect to the reconstruction [row, prefix, d_out].
        self._output_gradient = torch.empty(len(rows[0]), len(run.config.prefixes), run.layout.d_out, device=run.device)
        self.error = torch.empty(len(rows[0]), run.layout.d_out, device=run.device)
        """Reconstruction less target, of the full code."""
        self._norms = [self._decoder_norms(number) for number in range(len(self.blocks))]

    def forward(self) -> StepTotals:
        """Encode and decode every row, and find what each entry's gradient is."""
        encoded = [self._encoded(number) for number in range(len(self.blocks))]
        self.chunks = [chunks for chunks, _ in encoded]
        self.smallest_chosen = next((smallest for _, smallest in encoded if smallest is not None), None)
        parts = self.run.workers.map(self._decode_chunk, range(len(self.cuts)))
        small = [gradients for _, gradients in parts]
        self._small = {name: torch.stack([each[name] for each in small]).sum(0) for name in small[0]}
        return StepTotals.added([totals for totals, _ in parts])

    def backward(self, add: bool) -> None:
        """Put the gradients into the parameters (or add them to what is there)."""
        for name, gradient in self._small_gradients().items():
            into = self.parameters.gradients[name]
            into.add_(gradient) if add else into.copy_(gradient)
        for number in range(len(self.blocks)):
            self._matrix_gradients(number, add)

    def _prepared(self, rows: Sequence[Tensor]) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]:
        """Inputs and outputs side by side, scaled; b_dec subtracted from the inputs when the layout says so."""
        layout, bias = self.run.layout, self.parameters.values["b_dec"]
        x, y = (torch.empty(len(rows[0]), width, device=self.run.device) for width in (layout.d_in, layout.d_out))

        def fill(cut: slice) -> None:
            side_by_side(y[cut], [rows[number][cut] for number in layout.out_numbers], self.run.out_scale)
            if layout.apply_b_dec_to_input:
                torch.sub(y[cut], bias, out=x[cut])
            else:
                side_by_side(x[cut], [rows[number][cut] for number in layout.in_numbers], self.run.in_scale)

        # Each chunk is prepared by the thread pool, so that its memory is touched in parallel.
        self.run.workers.map(fill, self.cuts)
        return x, y

    def _encoded(self, number: int) -> tuple[list[Chunk], Tensor | None]:
        run, block = self.run, self.blocks[number]
        reads = run.layout.blocks[number].reads
        # Made in every step, because the weights have changed since the last.
        encoder = Encoder.of(block["W_enc"], block["b_enc"], run.config.precision, run.workers)
        rows = [self.x[cut, reads].contiguous() for cut in self.cuts]
        return encode(encoder, rows, run.kind, block, run.config, run.workers, run.processes)

    def _decoder_norms(self, number: int) -> Float[Tensor, " latent"] | None:
        block = self.run.layout.blocks[number]
        if not weighs_norms(block, self.run.config):
            return None
        return site_norms(self.blocks[number]["W_dec"], block.out_widths).sum(1)

    def _entries(self, number: int, chunk: Chunk) -> Entries:
        return Entries(
            chunk.pre, chunk.per_entry, self.blocks[number], self.run.config, self.sparsity, self._norms[number]
        )

    def _decode_chunk(self, at: int) -> tuple[StepTotals, SmallGradients]:
        """Everything about one chunk of rows: reconstruction, error, and the gradient of every entry."""
        cut, kind = self.cuts[at], self.run.kind
        chunks = [chunks[at] for chunks in self.chunks]
        entries = [self._entries(number, chunk) for number, chunk in enumerate(chunks)]
        values = [kind.values(each) for each in entries]
        error = self._decoded(chunks, values, cut) - self.y[cut][:, None]
        self.error[cut] = error[:, -1]
        output_gradient = error * (2 * self.weight / error.shape[1])
        # A latent of group g has a part in the errors of prefix g and of all longer ones.
        for prefix in reversed(range(error.shape[1] - 1)):
            output_gradient[:, prefix] += output_gradient[:, prefix + 1]
        self._output_gradient[cut] = output_gradient
        gate_gradient, gate_loss = self._gate_gradient(chunks, [kind.gate(each) for each in entries], cut)
        small: SmallGradients = {"b_dec": self._output_gradient[cut][:, 0].sum(0).double()}
        loss = squared_norm(error) / error.shape[1] + gate_loss
        for number, chunk in enumerate(chunks):
            found = self._entry_gradients(number, chunk, entries[number], gate_gradient, cut)
            chunk.keep(values[number], found.pre)
            small |= self._summed(number, chunk, found)
            loss += found.penalty / self.weight
        return self._totals(cut, loss, chunks, values), small

    def _decoded(
        self, chunks: Sequence[Chunk], values: Sequence[Tensor], cut: slice
    ) -> Float[Tensor, "row prefix d_out"]:
        """Reconstruction by each prefix of the latents."""
        base = self.parameters.values["b_dec"].expand(cut.stop - cut.start, -1)
        if "W_skip" in self.parameters.values:
            base = base + linear(self.x[cut], self.parameters.values["W_skip"])
        outputs = base[:, None].repeat(1, len(self.run.config.prefixes), 1)
        for number, (chunk, weights) in enumerate(zip(chunks, values, strict=True)):
            added = chunk.decode(weights, self.blocks[number]["W_dec"]).view(len(outputs), outputs.shape[1], -1)
            # Bags hold one group each; a prefix is the sum of the groups up to its own.
            for prefix in range(1, added.shape[1]):
                added[:, prefix] += added[:, prefix - 1]
            outputs[:, :, self.run.layout.blocks[number].writes] += added
        return outputs

    def _gate_gradient(
        self, chunks: Sequence[Chunk], gates: Sequence[Tensor | None], cut: slice
    ) -> tuple[Float[Tensor, "row d_out"] | None, Tensor]:
        """Gradient of the gate's own error with respect to its reconstruction, and that error."""
        found = [gate for gate in gates if gate is not None]
        # A kind has a gate for every block or for none.
        if len(found) != len(chunks):
            return None, self.y.new_zeros((), dtype=torch.float64)
        error = self._decoded(chunks, found, cut)[:, -1] - self.y[cut]
        return error * (2 * self.weight), squared_norm(error)

    def _entry_gradients(
        self, number: int, chunk: Chunk, entries: Entries, gate_gradient: Tensor | None, cut: slice
    ) -> Gradients:
        writes, decoder = self.run.layout.blocks[number].writes, self.blocks[number]["W_dec"]
        dvalues = chunk.dots(self._output_gradient[cut][:, :, writes].reshape(-1, decoder.shape[1]), decoder)
        dgate = None if gate_gradient is None else chunk.dots(gate_gradient[:, writes].contiguous(), decoder)
        return self.run.kind.gradients(entries, dvalues, dgate)

    def _summed(self, number: int, chunk: Chunk, found: Gradients) -> SmallGradients:
        """[latent] sums over the entries of a block; `pre` and `norm` are no gradients, but needed for some."""
        small = {f"{number}.{name}": chunk.sum_per_latent(values) for name, values in found.vectors.items()}
        small[f"{number}.pre"] = chunk.sum_per_latent(found.pre)
        if self._norms[number] is not None and found.norm is not None:
            small[f"{number}.norm"] = chunk.sum_per_latent(found.norm)
        return small

    def _totals(self, cut: slice, loss: Tensor, chunks: Sequence[Chunk], values: Sequence[Tensor]) -> StepTotals:
        y = self.y[cut]
        fired = [chunk.sum_per_latent((weights > 0).to(weights)) for chunk, weights in zip(chunks, values, strict=True)]
        rows = torch.tensor(float(len(y)), dtype=torch.float64, device=y.device)
        return StepTotals(rows, squared_norm(self.error[cut]), loss, y.sum(0).double(), squared_norm(y), fired)

    def _small_gradients(self) -> SmallGradients:
        """Of everything but encoders and decoders."""
        gradients = {name: value for name, value in self._small.items() if not name.endswith((".pre", ".norm"))}
        for number, block in enumerate(self.blocks):
            through = self._small[f"{number}.pre"]
            # Unless the kind says otherwise, the bias moves as the pre-activation does.
            gradients.setdefault(f"{number}.b_enc", through)
            if self.run.layout.apply_b_dec_to_input:
                reads = self.run.layout.blocks[number].reads
                pull = partial(torch.matmul, through.to(block["W_enc"]))
                gradients["b_dec"][reads] -= self.run.workers.map(pull, [block["W_enc"]])[0].double()
        if "W_skip" in self.parameters.values:
            # By rows and on the workers, whose products don't depend on how many there are.
            errors, cuts = self._output_gradient[:, 0], self.run.cuts(self.run.layout.d_out, LATENTS)
            parts = self.run.workers.map(lambda cut: errors[:, cut].T @ self.x, cuts)
            gradients["W_skip"] = torch.cat(parts)
        return gradients

    def _matrix_gradients(self, number: int, add: bool) -> None:
        block, into = self.run.layout.blocks[number], self.parameters.block_gradients(number)
        codes = codes_of(self.chunks[number], len(self.run.config.prefixes))
        outputs = self._output_gradient[:, :, block.writes].reshape(-1, into["W_dec"].shape[1])
        inputs = self.x[:, block.reads].contiguous()

        def fill(cut: slice) -> None:
            # Latent by latent: no two threads write to the same rows, and no dense gradient is made for them to add up.
            decoder = codes.outer("values", outputs, cut.start, cut.stop)
            encoder = codes.outer("dpre", inputs, cut.start, cut.stop)
            decoder = self._with_penalty(number, decoder, cut)
            for name, gradient in (("W_dec", decoder), ("W_enc", encoder)):
                into[name][cut].add_(gradient) if add else into[name][cut].copy_(gradient)

        self.run.workers.map(fill, self.run.cuts(self.run.config.n_latents, LATENTS))

    def _with_penalty(self, number: int, gradient: Tensor, cut: slice) -> Float[Tensor, "latent d"]:
        """The penalty's gradient goes along the decoder row at each site."""
        if f"{number}.norm" not in self._small:
            return gradient
        widths, rows = list(self.run.layout.blocks[number].out_widths), self.blocks[number]["W_dec"][cut]
        norms = site_norms(rows, widths).clamp(min=1e-12)
        pull = self._small[f"{number}.norm"][cut].to(rows)[:, None] / norms
        pieces = [part * pull[:, site : site + 1] for site, part in enumerate(rows.split(widths, dim=1))]
        return gradient + torch.cat(pieces, 1)


def side_by_side(into: Tensor, tensors: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Writes the tensors of several sites beside each other, each times its scale."""
    at = 0
    for tensor, scale in zip(tensors, scales, strict=True):
        torch.mul(tensor.to(into), scale, out=into[:, at : at + tensor.shape[1]])
        at += tensor.shape[1]
