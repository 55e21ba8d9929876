"""How a module is called: its arguments from the user's inputs, and the logits among what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.adapters import Adapter, Layout
from vesalius.errors import InputError
from vesalius.inputs import Raw, Tokens


@dataclass(frozen=True)
class Caller:
    """How one model is called. name: for messages."""

    adapter: Adapter | None
    layout: Layout | None
    name: str
    device: torch.device
    masked: bool = False
    """Of a module without adapter: whether it takes attention_mask."""
    positions: int | None = None
    """Tokens that the module has positions for, see `positions_of`."""

    def arguments(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tokens | None]:
        """Positional and keyword arguments of the module, and the tokens when there are any."""
        if isinstance(inputs, Raw):
            inputs = self._values_of(inputs)
        if self.adapter is None:
            if not isinstance(inputs, Tokens):
                return *_plain_arguments(inputs, self.device), None
            mask = (
                {} if inputs.mask is None or not self.masked else {"attention_mask": inputs.mask.long().to(self.device)}
            )
            return (inputs.ids.to(self.device),), mask, inputs
        if self.adapter.input != "input_ids":
            return (
                (),
                {self.adapter.input: _floats(inputs, self.adapter.input).to(self.device), **self.adapter.call},
                None,
            )
        if isinstance(inputs, Tensor):
            inputs = Tokens(inputs)
        if isinstance(inputs, Mapping):
            inputs = Tokens.from_encoding(inputs)
        if not isinstance(inputs, Tokens):
            raise InputError(
                "inputs must be Tokens, int64 ids [batch, pos], a tokenizer's output or text; got "
                f"{type(inputs).__name__}"
            )
        tokens = self.begun(inputs)
        return (), self.of_tokens(tokens), tokens

    def _values_of(self, inputs: Raw) -> Tensor:
        if self.adapter is not None and self.adapter.input == "input_ids":
            raise InputError(f"{self.name} takes int64 token ids [batch, pos]; got {inputs!r}")
        return inputs.values

    def begun(self, tokens: Tokens) -> Tokens:
        """The tokens with the decoder's input of an encoder-decoder model; default its start token.

        Raises InputError for decoder tokens that the model has no place for.
        """
        has_decoder = self.adapter is not None and bool(self.adapter.stacks)
        if tokens.decoder is not None and not has_decoder:
            raise InputError(f"{self.name} is no encoder-decoder, so Tokens(decoder=...) means nothing to it")
        if tokens.decoder is not None or not has_decoder:
            return tokens
        start = None if self.layout is None else self.layout.start
        if start is None:
            raise InputError(f"{self.name} names no start token: give its decoder's input, Tokens(decoder=ids)")
        return replace(tokens, decoder=torch.full((len(tokens), 1), start))

    def check_length(self, longest: int) -> None:
        """Raises InputError for a sequence that goes past the module's table of positions."""
        if self.positions is not None and longest > self.positions:
            raise InputError(
                f"{longest} tokens are more than the {self.positions} that {self.name} has positions for; give shorter "
                "prompts, or cut them: data.harvest(context=...) and vs.Tokens take what fits"
            )

    def of_tokens(self, tokens: Tokens) -> dict[str, Any]:
        """Keyword arguments for tokens. Raises InputError for an id outside the vocabulary."""
        adapter, layout = self.adapter, self.layout
        assert adapter is not None
        assert layout is not None
        highest = max(int(ids.max()) for ids in (tokens.ids, tokens.decoder) if ids is not None)
        if highest >= layout.vocab:
            raise InputError(
                f"token id {highest} is outside {self.name}'s vocabulary of {layout.vocab}; is this its tokenizer?"
            )
        self.check_length(int(tokens.real.sum(1).max()))
        call: dict[str, Any] = {adapter.input: tokens.ids.to(self.device), **adapter.call}
        if tokens.decoder is not None:
            call["decoder_input_ids"] = tokens.decoder.to(self.device)
        if tokens.mask is None:
            return call
        mask = tokens.mask.to(self.device)
        call["attention_mask"] = mask.long()
        # Padding on the right numbers nothing that is real, and the call stays as it would be without us.
        if layout.padding is not None and not bool(mask[:, 0].all()):
            call[adapter.input] = call[adapter.input].masked_fill(~mask, layout.padding)
        if adapter.positions and not bool(mask[:, 0].all()):
            # Left padding: real tokens keep the positions they would have alone.
            call["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        return call


def positions_of(module: nn.Module, adapter: Adapter | None) -> int | None:
    """Tokens that a table of positions reaches; None where positions are computed (rotary, ALiBi) and go on."""
    if adapter is None or adapter.input != "input_ids":
        return None
    most = getattr(adapter.config_of(module), "max_position_embeddings", None)
    for name, part in module.named_modules():
        table = getattr(part, "embed_positions", None)
        if isinstance(table, Tensor) and len(table) == most:  # GPT-J
            return most
        if isinstance(part, nn.Embedding) and name.endswith(("wpe", "embed_positions", "position_embeddings")):
            # OPT and RoBERTa start behind rows that no token takes.
            spare = getattr(part, "offset", 0) + (0 if part.padding_idx is None else part.padding_idx + 1)
            return part.num_embeddings - spare
    return None


def _plain_arguments(inputs: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A mapping holds keywords, a tuple several arguments; anything else is the only argument."""
    if isinstance(inputs, Mapping):
        return (), {name: _on(device, value) for name, value in inputs.items()}
    return tuple(_on(device, value) for value in (inputs if isinstance(inputs, tuple) else (inputs,))), {}


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _floats(inputs: Any, name: str) -> Tensor:
    """What a model that takes no tokens is given: images, or the features of sounds."""
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return inputs
    if isinstance(inputs, Mapping) and list(inputs) == [name]:
        return _floats(inputs[name], name)
    given = f"{inputs.dtype} tensor" if isinstance(inputs, Tensor) else type(inputs).__name__
    what = "images [batch, channel, height, width]" if name == "pixel_values" else f"{name} [batch, feature, pos]"
    raise InputError(f"this model takes {what} as a float tensor; got {given}")


def logits_of(output: Any) -> Any:
    """A module's result: its logits where it names them, the first of several, or what it returns."""
    if isinstance(output, Mapping) and ("logits" in output or "last_hidden_state" in output):
        return output["logits"] if "logits" in output else output["last_hidden_state"]
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    return getattr(output, "logits", output)
