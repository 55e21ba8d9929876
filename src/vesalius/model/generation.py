"""Generation: a model writes tokens, with edits on the prompt and on the new tokens.

Each token is run once and its keys and values are kept, so an edit at a position acts when that position is run, and
its consequences stay in the cache; a pass without a cache, with the same edits, gives the same logits. Positions are
token numbers in each prompt's own sequence, new tokens after the prompt, whatever the padding. Internally prompts are
padded on the left: a sliding window counts columns, so that the tokens of a prompt have to be adjacent.

An encoder-decoder writes without a cache: each new token is one whole run of both stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.activations import Activations
from vesalius.errors import InputError, NotFiniteError
from vesalius.inputs import Tokens
from vesalius.intervention import Intervention, NamedPositions, Place, Positions, mask_of, place_of
from vesalius.site import ATTENTION, Site


@dataclass(frozen=True, eq=False)
class Step:
    """One pass. logits: [batch, pos, vocab], or [batch, vocab] once only the last is kept. captured: by site."""

    logits: Tensor
    cache: Any
    captured: Mapping[Site, Tensor]
    diagnostics: tuple[Mapping[str, Any], ...]


@runtime_checkable
class Pass(Protocol):
    """Runs the tokens ids [batch, pos] after those in the cache. real: [batch, key], every column so far."""

    def __call__(self, ids: Tensor, real: Tensor, index: Tensor, cache: Any, places: Sequence[Place]) -> Step: ...


@runtime_checkable
class Decode(Protocol):
    """Runs an encoder-decoder on prompts and on the decoder's tokens so far."""

    def __call__(self, tokens: Tokens, places: Sequence[Place]) -> Step: ...


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: the most likely one, or one drawn at a temperature, by seed.

    Every prompt has a generator of its own, so that its text does not depend on the other prompts of the batch. Raises
    InputError for a negative temperature, or a positive one without seed.
    """

    temperature: float = 0.0
    seed: int | None = None
    stop: int | None = None
    """Token after which a prompt is finished."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature must be 0 (the most likely token) or more; got {self.temperature}")
        if self.temperature > 0 and self.seed is None:
            raise InputError("sampling needs seed=, so that the same text can be made again")

    def picker(self, batch: int) -> Callable[[Tensor], Tensor]:
        """Next tokens [batch] from logits [batch, vocab]."""
        if self.temperature == 0:
            return lambda logits: logits.argmax(-1)
        assert self.seed is not None
        draws = [torch.Generator().manual_seed((self.seed * 1_000_003 + row) % 2**63) for row in range(batch)]

        def draw(logits: Tensor) -> Tensor:
            # In double precision on the cpu: the same draws on every device.
            probabilities = (logits.double().cpu() / self.temperature).softmax(-1)
            drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, draws, strict=True)]
            return torch.cat(drawn).to(logits.device)

        return draw


@dataclass(frozen=True, eq=False, repr=False)
class Generation:
    """What a model wrote."""

    tokens: Tokens
    """Prompts and new tokens, right-padded; of an encoder-decoder the new ones are in `tokens.decoder`."""
    new: tuple[tuple[int, ...], ...]
    """The new tokens of each prompt; a stop token is the last of them."""
    logits: Float[Tensor, "batch new vocab"]
    """What each new token was chosen from."""
    activations: Activations
    """Captured sites over prompt and new tokens, by token number; the last new token was never run."""
    diagnostics: tuple[Mapping[str, Any], ...]
    """One entry for each intervention and pass in which it acted, with the number of the pass (0: the prompt)."""
    texts: tuple[str, ...] = ()
    """The new tokens as text, when the model has a tokenizer."""

    @property
    def written(self) -> tuple[str, ...]:
        """The new tokens of each prompt as text; without a tokenizer their numbers."""
        return self.texts or tuple(" ".join(map(str, row)) for row in self.new)

    def __repr__(self) -> str:
        texts = f": {', '.join(map(repr, self.texts))}" if self.texts else ""
        return f"Generation({len(self.new)} prompts, up to {max(map(len, self.new))} new tokens{texts})"

    def __getitem__(self, key: Site | str) -> Tensor:
        return self.activations[key]


def generated(forward: Pass, prompts: Tokens, edits: Sequence[Intervention], steps: int, choice: Choice) -> Generation:
    """Up to `steps` new tokens for each prompt.

    Raises InputError for no steps and for positions that are never run, NotFiniteError when logits are NaN.
    """
    if steps < 1:
        raise InputError(f"max_new_tokens must be at least 1; got {steps}")
    rows = [row[real].tolist() for row, real in zip(prompts.ids, prompts.real, strict=True)]
    masks = [edited_tokens(edit.positions, prompts.lengths, steps, prompts.named_positions) for edit in edits]
    prompts = Tokens.from_rows(rows)
    written = _write(forward, _left_padded(prompts), masks, steps, choice)
    return _result(written, rows, prompts, steps, choice.stop)


def decoded(forward: Decode, prompts: Tokens, edits: Sequence[Intervention], steps: int, choice: Choice) -> Generation:
    """Up to `steps` new tokens of an encoder-decoder model, after its decoder's input (prompts.decoder).

    Every pass runs the encoder and all of the decoder's tokens so far; edits act in each, at the positions of their
    stack. Raises as `generated`.
    """
    if steps < 1:
        raise InputError(f"max_new_tokens must be at least 1; got {steps}")
    assert prompts.decoder is not None
    given, pick = prompts.decoder.shape[1], choice.picker(len(prompts))
    spans = torch.full((len(prompts),), given)
    masks = [
        mask_of(edit.positions, prompts.real, prompts.named_positions)
        if edit.part.writes[0].of_encoder
        else edited_tokens(edit.positions, spans, steps)
        for edit in edits
    ]
    made, logits, unfinished = prompts, [], torch.ones(len(prompts), dtype=torch.bool)
    diagnostics: list[Mapping[str, Any]] = []
    for number in range(steps):
        places = [
            _decoder_place(made, given, edit.part.writes[0], mask) for edit, mask in zip(edits, masks, strict=True)
        ]
        step, ran = forward(made, places), made
        last = step.logits[:, -1]
        _refuse_nan(last, number)
        chosen = pick(last).cpu()
        assert made.decoder is not None
        made = replace(made, decoder=torch.cat([made.decoder, chosen[:, None]], 1))
        logits.append(last)
        diagnostics += [{**entry, "pass": number} for entry in step.diagnostics]
        unfinished &= chosen != (-1 if choice.stop is None else choice.stop)
        if not bool(unfinished.any()):
            break
    assert made.decoder is not None
    new = tuple(_until(row, choice.stop) for row in made.decoder[:, given:].tolist())
    return Generation(made, new, torch.stack(logits, 1), Activations(step.captured, ran), tuple(diagnostics))


def _decoder_place(tokens: Tokens, given: int, site: Site, mask: Tensor | None) -> Place:
    """The tokens of a site's stack, in a pass with the decoder's tokens so far, of which some were given."""
    real = tokens.real_at(site)
    if site.of_encoder:
        return replace(place_of(tokens, site, tokens.ids), chosen=mask)
    number = torch.arange(real.shape[1]).expand_as(real)
    keys = torch.arange(tokens.ids.shape[1]).expand_as(tokens.ids) if site.cross else number
    chosen = None if mask is None else mask[:, : real.shape[1]]
    return Place(real, number, chosen, keys=keys, ends=torch.full((len(real),), given - 1))


def _left_padded(prompts: Tokens) -> Tokens:
    """The same prompts with their padding moved from the right to the left."""
    width = prompts.ids.shape[1]
    column = (torch.arange(width)[None] - (width - prompts.lengths)[:, None]) % width
    return Tokens(prompts.ids.gather(1, column), prompts.real.gather(1, column))


@dataclass(eq=False)
class _Written:
    """All passes; of each the token numbers [batch, pos] that it ran, and the tokens [batch] chosen from it."""

    passes: list[Step]
    index: list[Tensor]
    chosen: list[Tensor]


def _write(forward: Pass, prompts: Tokens, masks: Sequence[Tensor], steps: int, choice: Choice) -> _Written:
    """prompts: padded on the left. Padding gets the token number `nowhere`, behind every token that is run."""
    lengths, pick, width = prompts.lengths, choice.picker(len(prompts)), prompts.ids.shape[1]
    nowhere = width + steps - 1
    ids, real, cache = prompts.ids, prompts.real, None
    index = torch.where(real, torch.arange(width)[None] - (width - lengths)[:, None], nowhere)
    columns, kept, unfinished = real, _Written([], [], []), torch.ones(len(prompts), dtype=torch.bool)
    for number in range(steps):
        keys = torch.cat([*kept.index, index], 1)
        chosen = [mask.gather(1, index.clamp_max(nowhere - 1)) & real for mask in masks]
        places = [Place(real, index, mask, keys=keys, ends=lengths - 1) for mask in chosen]
        step = forward(ids, columns, index, cache, places)
        last = step.logits[:, -1]
        _refuse_nan(last, number)
        cache, ids = step.cache, pick(last)[:, None].cpu()
        kept.passes.append(Step(last, None, step.captured, step.diagnostics))
        kept.index.append(index)
        kept.chosen.append(ids[:, 0])
        unfinished &= ids[:, 0] != (-1 if choice.stop is None else choice.stop)
        if not bool(unfinished.any()):
            break
        index, real = (lengths + number)[:, None], torch.ones_like(ids, dtype=torch.bool)
        columns = torch.cat([columns, real], 1)
    return kept


def _refuse_nan(logits: Tensor, number: int) -> None:
    if bool(logits.isnan().any()):
        raise NotFiniteError(f"the logits of new token {number} are NaN; run(..., check_finite=True) says where from")


def edited_tokens(
    positions: Positions, lengths: Int[Tensor, " batch"], steps: int, named_positions: NamedPositions | None = None
) -> Bool[Tensor, "batch token"]:
    """Positions as a mask over prompt and new tokens, except the last new one, which is never run.

    A mask may cover the prompts only; "last" is the last token of the prompt. Raises InputError for a position that is
    never run, or is counted from the end.
    """
    width, total = int(lengths.max()), int(lengths.max()) + steps - 1
    run = torch.arange(total)[None] < (lengths + steps - 1)[:, None]
    if positions is None:
        return run
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.shape == (len(lengths), width):
            positions = torch.nn.functional.pad(positions, (0, total - width))
        if positions.shape != run.shape:
            raise InputError(
                f"a position mask must be {(len(lengths), width)} (the prompts) or {tuple(run.shape)} (with the new "
                f"tokens that are run); got {tuple(positions.shape)}"
            )
        return positions.cpu() & run
    prompt = torch.arange(total)[None] < lengths[:, None]
    for position in positions.tolist() if isinstance(positions, Tensor) else _listed(positions):
        if isinstance(position, str):
            continue
        if position < 0:
            raise InputError(f"position {position}: while a model writes, positions count from the start of the prompt")
        if position >= total:
            raise InputError(
                f"position {position} is never run: prompts of {width} tokens and {steps} new ones are run up to "
                f"position {total - 1} (the last new token is not run)"
            )
    number = torch.arange(total)
    if isinstance(positions, Tensor):
        if positions.shape != lengths.shape:
            raise InputError(f"per-example positions must be [{len(lengths)}]; got {tuple(positions.shape)}")
        return run & (number == positions.cpu()[:, None])
    names = [position for position in _listed(positions) if isinstance(position, str)]
    numbers = [position for position in _listed(positions) if not isinstance(position, str)]
    # Names belong to the prompts; numbers go on into the new tokens.
    named = mask_of(names, prompt, named_positions)
    assert named is not None
    return named | (torch.isin(number, torch.tensor(numbers, dtype=torch.long)) & run)


def _listed(positions: int | str | Sequence[int | str]) -> list[int | str]:
    return [positions] if isinstance(positions, int | str) else list(positions)


def _result(written: _Written, rows: list[list[int]], prompts: Tokens, steps: int, stop: int | None) -> Generation:
    new = tuple(_until(row, stop) for row in torch.stack(written.chosen, 1).tolist())
    full = [row + list(more) for row, more in zip(rows, new, strict=True)]
    ran = Tokens.from_rows([row[:-1] for row in full])
    nowhere = prompts.ids.shape[1] + steps - 1
    sites = list(written.passes[0].captured)
    cut = {site: _cut(site, _assembled(site, written, nowhere), ran.ids.shape[1]) for site in sites}
    diagnostics = [
        {**entry, "pass": number} for number, step in enumerate(written.passes) for entry in step.diagnostics
    ]
    return Generation(
        Tokens.from_rows(full),
        new,
        torch.stack([step.logits for step in written.passes], 1),
        Activations(cut, ran),
        tuple(diagnostics),
    )


def _cut(site: Site, tensor: Tensor, width: int) -> Tensor:
    return tensor[:, :, :width, :width] if site.kind in ATTENTION else tensor[:, :width]


def _until(row: list[int], stop: int | None) -> tuple[int, ...]:
    return tuple(row[: row.index(stop) + 1]) if stop in row else tuple(row)


def _assembled(site: Site, written: _Written, nowhere: int) -> Tensor:
    """A captured site over all passes, by token number; padding goes to one more column at the end, to be cut off."""
    pieces = [step.captured[site] for step in written.passes]
    if site.kind in ATTENTION:
        return _assembled_attention(pieces, written.index, nowhere)
    first = pieces[0]
    whole = first.new_zeros(first.shape[0], nowhere + 1, *first.shape[2:])
    for piece, index in zip(pieces, written.index, strict=True):
        whole[torch.arange(len(whole))[:, None], index.to(whole.device)] = piece
    return whole


def _assembled_attention(pieces: Sequence[Tensor], index: Sequence[Tensor], nowhere: int) -> Tensor:
    """[batch, head, query, key]; keys that a pass did not have yet are 0."""
    batch, heads = pieces[0].shape[:2]
    whole = pieces[0].new_zeros(batch, nowhere + 1, nowhere + 1, heads)
    row = torch.arange(batch)[:, None, None]
    keys = torch.empty(batch, 0, dtype=torch.long)
    for piece, query in zip(pieces, index, strict=True):
        keys = torch.cat([keys, query], 1)
        # The cache of a layer with a sliding window holds the last keys only.
        held = keys[:, -piece.shape[-1] :]
        whole[row, query[:, :, None], held[:, None]] = piece.permute(0, 2, 3, 1)
    return whole.permute(0, 3, 1, 2)
