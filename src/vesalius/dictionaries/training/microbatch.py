"""One micro-batch: encode, rebuild, and the gradients of all parameters, by hand.

For rows x (scaled, centred), targets y, latents v with decoder rows d_j and error e = v D + b - y, the loss is the mean
over rows of |e|^2 plus penalties. Only latents that take part are ever touched: dL/dv_j = 2 e.d_j / n, dL/dd_j =
sum over rows of v_j 2e / n, dL/dw_j = sum over rows of (dL/dpre_j) x. With prefixes (matryoshka) there is one error per
prefix, and a latent gets the sum of those it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds import Entries, Gradients, Kind
from vesalius.dictionaries.training.codes import Piece, codes_of
from vesalius.dictionaries.training.encode import Encoder, encode
from vesalius.dictionaries.training.facts import Facts
from vesalius.dictionaries.training.parameters import Parameters, site_norms, weighs_norms
from vesalius.dictionaries.training.ranks import Ranks
from vesalius.dictionaries.training.wiring import Wiring
from vesalius.jobs.workers import Workers
from vesalius.model.products import linear

PIECE = 3 << 20
"""Pre-activations of a piece of rows: 12 MB, so that those of a few threads stay in cache."""
LATENTS = 512
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step. in_scale, out_scale: one factor per site."""

    wiring: Wiring
    config: TrainConfig
    kind: Kind
    in_scale: tuple[float, ...]
    out_scale: tuple[float, ...]
    workers: Workers
    ranks: Ranks
    device: torch.device

    @property
    def piece_rows(self) -> int:
        """Rows that are encoded together."""
        return max(64, min(1024, PIECE // self.config.n_latents))

    def cuts(self, n: int, size: int | None = None) -> list[slice]:
        """Pieces of n rows (or latents, with a size); other devices than the CPU take all at once."""
        size = (size or self.piece_rows) if self.device.type == "cpu" else max(n, 1)
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class MicroBatch:
    """Rows of one process that are encoded and rebuilt together.

    share: one over the rows of the whole batch. pressure: coefficient of the sparsity penalty.
    """

    def __init__(self, run: Run, parameters: Parameters, rows: Sequence[Tensor], share: float, pressure: float) -> None:
        self.run, self.parameters, self.share, self.pressure = run, parameters, share, pressure * share
        self.blocks = [parameters.block(number) for number in range(len(run.wiring.blocks))]
        self.cuts = run.cuts(len(rows[0]))
        self.x, self.y = self._prepared(rows)
        self.least: Tensor | None = None
        groups = len(run.config.prefixes)
        self._push = torch.empty(len(rows[0]), groups, run.wiring.writes, device=run.device)
        self.error = torch.empty(len(rows[0]), run.wiring.writes, device=run.device)
        self._norms = [self._decoder_norms(number) for number in range(len(self.blocks))]

    def forward(self) -> Facts:
        """Encode and rebuild every row, and find what each entry's gradient is."""
        encoded = [self._encoded(number) for number in range(len(self.blocks))]
        self.pieces = [pieces for pieces, _ in encoded]
        self.least = next((least for _, least in encoded if least is not None), None)
        parts = self.run.workers.map(self._rebuild, range(len(self.cuts)))
        self._sums = _added([sums for _, sums in parts])
        return Facts.total([facts for facts, _ in parts])

    def backward(self, add: bool) -> None:
        """Put the gradients into the parameters (or add them to what is there)."""
        gradients = dict(self._small_gradients())
        for name, gradient in gradients.items():
            held = self.parameters.gradients[name]
            held.add_(gradient) if add else held.copy_(gradient)
        for number in range(len(self.blocks)):
            self._matrix_gradients(number, add)

    def _prepared(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Inputs and outputs side by side, scaled; the inputs centred when the wiring says so."""
        wiring, bias = self.run.wiring, self.parameters.values["b_dec"]
        n = len(rows[0])
        x, y = (torch.empty(n, width, device=self.run.device) for width in (wiring.reads, wiring.writes))

        def fill(cut: slice) -> None:
            side_by_side(y[cut], [rows[place][cut] for place in wiring.out_places], self.run.out_scale)
            if wiring.centred:
                torch.sub(y[cut], bias, out=x[cut])
            else:
                side_by_side(x[cut], [rows[place][cut] for place in wiring.in_places], self.run.in_scale)

        self.run.workers.map(fill, self.cuts)
        return x, y

    def _encoded(self, number: int) -> tuple[list[Piece], Tensor | None]:
        run, block = self.run, self.blocks[number]
        reads = run.wiring.blocks[number].reads
        encoder = Encoder.of(block["W_enc"], block["b_enc"], run.config.precision, run.workers)
        pieces = [self.x[cut, reads].contiguous() for cut in self.cuts]
        return encode(encoder, pieces, run.kind, block, run.config, run.workers, run.ranks)

    def _decoder_norms(self, number: int) -> Tensor | None:
        wiring = self.run.wiring.blocks[number]
        if not weighs_norms(wiring, self.run.config):
            return None
        return site_norms(self.blocks[number]["W_dec"], wiring.out_widths).sum(1)

    def _entries(self, number: int, piece: Piece) -> Entries:
        return Entries(piece.pre, piece.at, self.blocks[number], self.run.config, self.pressure, self._norms[number])

    def _rebuild(self, at: int) -> tuple[Facts, Sums]:
        """Everything about one piece of rows."""
        cut, kind = self.cuts[at], self.run.kind
        pieces = [pieces[at] for pieces in self.pieces]
        entries = [self._entries(number, piece) for number, piece in enumerate(pieces)]
        values = [kind.values(each) for each in entries]
        error = self._decoded(pieces, values, cut) - self.y[cut][:, None]
        self.error[cut] = error[:, -1]
        push = error * (2 * self.share / error.shape[1])
        # What a latent of group g has a part in: the errors of prefix g and of all longer ones.
        for prefix in reversed(range(error.shape[1] - 1)):
            push[:, prefix] += push[:, prefix + 1]
        self._push[cut] = push
        gates = [kind.gate(each) for each in entries]
        gate_push, gate_loss = self._gate_push(pieces, gates, cut)
        sums: Sums = {"b_dec": self._push[cut][:, 0].sum(0).double()}
        loss = _squared(error) / error.shape[1] + gate_loss
        for number, piece in enumerate(pieces):
            found = self._gradients(number, piece, entries[number], gate_push, cut)
            piece.keep(values[number], found.pre)
            sums |= self._block_sums(number, piece, found)
            loss += found.penalty / self.share
        return self._facts(cut, loss, pieces, values), sums

    def _decoded(self, pieces: Sequence[Piece], values: Sequence[Tensor], cut: slice) -> Tensor:
        """[rows, prefix, d_out] rebuilt outputs."""
        base = self.parameters.values["b_dec"].expand(cut.stop - cut.start, -1)
        if "W_skip" in self.parameters.values:
            base = base + linear(self.x[cut], self.parameters.values["W_skip"])
        rebuilt = base[:, None].repeat(1, len(self.run.config.prefixes), 1)
        for number, (piece, weights) in enumerate(zip(pieces, values, strict=True)):
            added = piece.decode(weights, self.blocks[number]["W_dec"]).view(len(rebuilt), rebuilt.shape[1], -1)
            for prefix in range(1, added.shape[1]):
                added[:, prefix] += added[:, prefix - 1]
            rebuilt[:, :, self.run.wiring.blocks[number].writes] += added
        return rebuilt

    def _gate_push(
        self, pieces: Sequence[Piece], gates: Sequence[Tensor | None], cut: slice
    ) -> tuple[Tensor | None, Tensor]:
        """Gradient of the gate's own rebuilding error with respect to what it rebuilds, and that error."""
        found = [gate for gate in gates if gate is not None]
        if len(found) != len(pieces):
            return None, self.y.new_zeros((), dtype=torch.float64)
        error = self._decoded(pieces, found, cut)[:, -1] - self.y[cut]
        return error * (2 * self.share), _squared(error)

    def _gradients(
        self, number: int, piece: Piece, entries: Entries, gate_push: Tensor | None, cut: slice
    ) -> Gradients:
        writes, decoder = self.run.wiring.blocks[number].writes, self.blocks[number]["W_dec"]
        dvalues = piece.dots(self._push[cut][:, :, writes].reshape(-1, decoder.shape[1]), decoder)
        dgate = None if gate_push is None else piece.dots(gate_push[:, writes].contiguous(), decoder)
        return self.run.kind.gradients(entries, dvalues, dgate)

    def _block_sums(self, number: int, piece: Piece, found: Gradients) -> Sums:
        sums = {f"{number}.{name}": piece.sums(values) for name, values in found.vectors.items()}
        sums[f"{number}.pre"] = piece.sums(found.pre)
        if self._norms[number] is not None and found.norm is not None:
            sums[f"{number}.norm"] = piece.sums(found.norm)
        return sums

    def _facts(self, cut: slice, loss: Tensor, pieces: Sequence[Piece], values: Sequence[Tensor]) -> Facts:
        y = self.y[cut]
        fired = [piece.sums((weights > 0).to(weights)) for piece, weights in zip(pieces, values, strict=True)]
        rows = torch.tensor(float(len(y)), dtype=torch.float64, device=y.device)
        return Facts(rows, _squared(self.error[cut]), loss, y.sum(0).double(), _squared(y), fired)

    def _small_gradients(self) -> Sums:
        """Of everything but encoders and decoders."""
        gradients = {name: value for name, value in self._sums.items() if not name.endswith((".pre", ".norm"))}
        for number, block in enumerate(self.blocks):
            through = self._sums[f"{number}.pre"]
            gradients.setdefault(f"{number}.b_enc", through)
            if self.run.wiring.centred:
                writes = self.run.wiring.blocks[number].reads
                gradients["b_dec"][writes] -= (through.to(block["W_enc"]) @ block["W_enc"]).double()
        if "W_skip" in self.parameters.values:
            gradients["W_skip"] = self._push[:, 0].T @ self.x
        return gradients

    def _matrix_gradients(self, number: int, add: bool) -> None:
        wiring, held = self.run.wiring.blocks[number], self.parameters.block_gradients(number)
        codes = codes_of(self.pieces[number], len(self.run.config.prefixes))
        pushes = self._push[:, :, wiring.writes].reshape(-1, held["W_dec"].shape[1])
        inputs = self.x[:, wiring.reads].contiguous()

        def fill(cut: slice) -> None:
            decoder = codes.outer("values", pushes, cut.start, cut.stop)
            encoder = codes.outer("dpre", inputs, cut.start, cut.stop)
            decoder = self._with_penalty(number, decoder, cut)
            for name, gradient in (("W_dec", decoder), ("W_enc", encoder)):
                held[name][cut].add_(gradient) if add else held[name][cut].copy_(gradient)

        self.run.workers.map(fill, self.run.cuts(self.run.config.n_latents, LATENTS))

    def _with_penalty(self, number: int, gradient: Tensor, cut: slice) -> Tensor:
        """The penalty's gradient goes along the decoder row at each site."""
        if f"{number}.norm" not in self._sums:
            return gradient
        widths, rows = list(self.run.wiring.blocks[number].out_widths), self.blocks[number]["W_dec"][cut]
        norms = site_norms(rows, widths).clamp(min=1e-12)
        pull = self._sums[f"{number}.norm"][cut].to(rows)[:, None] / norms
        pieces = [part * pull[:, site : site + 1] for site, part in enumerate(rows.split(widths, dim=1))]
        return gradient + torch.cat(pieces, 1)


def side_by_side(into: Tensor, tensors: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Writes the tensors of several sites beside each other, each times its scale."""
    at = 0
    for tensor, scale in zip(tensors, scales, strict=True):
        torch.mul(tensor.to(into), scale, out=into[:, at : at + tensor.shape[1]])
        at += tensor.shape[1]


def _added(parts: Sequence[Sums]) -> Sums:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def _squared(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat.dot(flat).double()
