"""Model: a network left as it is, with names for its tensors, and `run`, which reads and edits them.

A run without interventions makes the same call as the wrapped module and is bit-identical to it. Scores and patterns
are reached through our attention function for the length of that one run; the model's own mode is put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.activations import Activations, Run
from vesalius.adapters import Adapter, Layout, adapter_for, submodule
from vesalius.adapters.base import device_of, frozen_scale, gain
from vesalius.errors import InputError
from vesalius.inputs import Tokens
from vesalius.inputs.beginning import encoded, listed_texts
from vesalius.intervention import Intervention, Place, as_patches, joint, listed
from vesalius.model.calls import Caller, logits_of, positions_of
from vesalius.model.family_sites import sites_of
from vesalius.model.generation import Choice, Generation, Step, decoded, generated
from vesalius.model.parity import check_parity, keep_cap, refuse_compiled, refuse_training
from vesalius.model.taps import Recorder
from vesalius.model.weights import Linear, dtype_of, hash_of, linear_of
from vesalius.parts import places
from vesalius.site import Site, select

_GUESS = object()


class Model:
    """A network with a tokenizer and an adapter.

    module: any nn.Module; used in place, never copied. adapter: default, the known one for the module's class; None for
    module:<path> sites only. probe: compare a few tokens' captured run with the module's own output (`model.parity`).
    Raises UnknownArchitectureError for an unknown transformers class, or one that this release calls in another way
    than the adapter says, SelfCheckError when the probe's outputs differ.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        adapter: Any = _GUESS,
        name: str = "",
        note: str = "",
        probe: bool = True,
    ) -> None:
        refuse_compiled(module)
        self.module = module
        self.tokenizer = tokenizer
        self.adapter: Adapter | None = adapter_for(module) if adapter is _GUESS else adapter
        self.name = name or type(module).__name__
        self.note = note
        """What a reader of results should know about these weights (quantised, fine-tuned ...)."""
        self.layout: Layout | None = self.adapter.layout(module) if self.adapter else None
        if self.adapter is not None:
            self.note = "; ".join(filter(None, [note, keep_cap(module, self.adapter)]))
            if probe:
                check_parity(self)

    def __repr__(self) -> str:
        size = f", {self.layout.n_layers} layers, {self.layout.n_heads} heads" if self.layout else ""
        return f"Model({self.name}{size})"

    @property
    def device(self) -> torch.device:
        """Where inputs go; the first weights' in a model that is spread over several."""
        return device_of(self.module)

    @cached_property
    def content_hash(self) -> str:
        """sha256 of every parameter and buffer, by name."""
        return hash_of(self.module)

    @property
    def architecture(self) -> tuple[Adapter, Layout]:
        """Adapter and sizes. Raises InputError for a model without adapter."""
        if self.adapter is None or self.layout is None:
            raise InputError(f"{self.name} has no adapter: only module:<path>|in and |out sites exist. Pass adapter=.")
        return self.adapter, self.layout

    def sites(self, pattern: str = "*") -> list[Site]:
        """Sites that match a name or glob, in forward order. Raises UnknownNameError when there is none."""
        if not pattern.startswith("module:"):
            return select(pattern, self._all_sites)
        side = Site.parse(pattern).side
        return select(pattern, [Site("module", module=name, side=side) for name, _ in self.module.named_modules()])

    @cached_property
    def _all_sites(self) -> list[Site]:
        if self.adapter is None or self.layout is None:
            names = [name for name, _ in self.module.named_modules() if name]
            return [Site("module", module=name) for name in names]
        return sites_of(self.adapter, self.layout)

    @cached_property
    def _site_set(self) -> frozenset[Site]:
        return frozenset(self._all_sites)

    def layer(self, number: int, stack: str = "") -> nn.Module:
        """The module of one layer; of an encoder-decoder's "encoder" or "decoder" stack."""
        adapter, layers = self.architecture[0], self.architecture[0].stack(stack).layers
        return submodule(self.module, layers if adapter.shared else f"{layers}.{number}")

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:  # noqa: N802
        """Output projection of each head. In a model with a norm after attention, what comes before that norm."""
        return self._heads_of(self._linear(submodule(self.layer(layer), self.architecture[0].o_proj)))

    def _linear(self, projection: nn.Module) -> Linear:
        layout = self.architecture[1]
        return linear_of(projection, layout.n_heads * layout.d_head, dtype_of(self.module))

    def _heads_of(self, projection: Linear) -> Float[Tensor, "head d_head d_model"]:
        return projection.matrix.T.unflatten(0, (self.architecture[1].n_heads, -1))

    def heads_of(self, site: Site, z: Tensor) -> Tensor:
        """The heads' result at a `result` or `cross_result` site, from z there."""
        assert site.layer is not None
        if not site.stack:
            return self.head_writes(site.layer, z)
        stack = self.architecture[0].stack(site.stack)
        projection = submodule(self.layer(site.layer, site.stack), stack.cross_o_proj if site.cross else stack.o_proj)
        return torch.einsum("...hd,hdm->...hm", z, self._heads_of(self._linear(projection)).to(z))

    def head_writes(self, layer: int, z: Float[Tensor, "*any head d_head"]) -> Float[Tensor, "*any head d_model"]:
        """What each head adds to the residual stream, from one layer's z.

        The sum over heads is attn_out less the output projection's bias. With a norm after attention its scale is
        held at the value it has for this z, which makes the shares exact. Raises InputError when the output projection
        is not linear.
        """
        return self.attention_shares(layer, z)[0]

    def attention_shares(self, layer: int, z: Float[Tensor, "*any head d_head"]) -> tuple[Tensor, Tensor]:
        """What each head adds, and what the output projection's bias adds [*any, d_model]; see `head_writes`."""
        adapter, layout = self.architecture
        projection = self._linear(submodule(self.layer(layer), adapter.o_proj))
        writes = torch.einsum("...hd,hdm->...hm", z, self._heads_of(projection).to(z)) * layout.residual_scale
        own = 0 * writes[..., 0, :] if projection.bias is None else projection.bias.to(z) * layout.residual_scale
        if not adapter.attn_norm:
            return writes, own.expand_as(writes[..., 0, :])
        norm = submodule(self.layer(layer), adapter.attn_norm)
        scale = frozen_scale(adapter.norm, norm, writes.sum(-2) + own) * gain(adapter.norm, norm).to(z)
        return writes * scale.unsqueeze(-2), own * scale

    @property
    def W_U(self) -> Float[Tensor, "vocab d_model"]:  # noqa: N802
        """Unembedding."""
        return self.unembedding.matrix

    @property
    def unembedding(self) -> Linear:
        """Unembedding with its bias. Raises InputError for one that is not linear."""
        adapter, layout = self.architecture
        return linear_of(submodule(self.module, adapter.unembed), layout.d_model, dtype_of(self.module))

    def tokens(self, texts: str | Sequence[str], bos: str = "tokenizer") -> Tokens:
        """Tokens of texts, as the tokenizer makes them. bos: what stands first, never twice; see `data.bos_token`.

        Raises InputError without tokenizer, or for an empty text; TokenizerError for an unknown bos.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer: pass token ids, or vs.Model(net, tokenizer=...)")
        return Tokens.from_rows([encoded(self.tokenizer, text, bos) for text in listed_texts(texts)])

    def run(
        self,
        inputs: Any,
        capture: Sequence[Site | str] | Site | str = (),
        interventions: Sequence[Intervention] | Intervention = (),
        *,
        grad: bool = False,
        last_logits: bool = False,
        check_finite: bool = False,
    ) -> Run:
        """One forward pass that captures sites and applies interventions, in their order.

        inputs: Tokens, int64 ids [batch, pos], text, a tokenizer's output, or for a module without adapter whatever it
        takes: a tensor, a tuple of arguments, a mapping of keywords. Of several outputs the first is `logits`.
        grad: keep the graph, so that autograd reaches captured tensors. last_logits: only the last position's logits,
        when the model can (saves the unembedding of the rest). A captured site holds the value after interventions.
        check_finite: look at every site (attention's scores and pattern only when they are captured or edited).

        Raises UnknownNameError for an unknown site, InterventionError when an intervention's site never fired, with
        check_finite NotFiniteError naming the first site, in the order of the pass, that holds NaN or infinity.
        """
        args, call, tokens = self.called_with(inputs)
        if last_logits and self.takes("logits_to_keep"):
            call = {**call, "logits_to_keep": 1}
        wanted, watch = self._wanted(capture), self._all_sites if check_finite else ()
        edits = self._separated(inputs, listed(interventions), tokens)
        for copies in (torch.is_inference_mode_enabled(), True):
            recorder = Recorder(self, wanted, edits, tokens, grad, watch=watch, copies=copies)
            with torch.set_grad_enabled(grad), recorder.listening():
                output = self.module(*args, **call)
            if copies or not recorder.overwritten():
                break
        recorder.check_fired()
        return Run(logits_of(output), Activations(recorder.captured(), tokens), recorder.diagnostics())

    def _separated(self, inputs: Any, edits: list[Intervention], tokens: Tokens | None) -> list[Intervention]:
        """Edits of parts that are written before all of them is read take a run of their own, with the other edits."""
        together = [edit for edit in edits if joint(edit.part)]
        if not together:
            return edits
        others = [edit for edit in edits if edit not in together]
        seen = self.run(inputs, capture=places([edit.part for edit in together]), interventions=others).activations
        return [*others, *as_patches(together, seen, tokens)]

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int,
        interventions: Sequence[Intervention] | Intervention = (),
        capture: Sequence[Site | str] | Site | str = (),
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: int | None = None,
    ) -> Generation:
        """Write up to max_new_tokens after each prompt, with interventions on prompt and new tokens.

        Positions of interventions are token numbers from the start of each prompt, new tokens included; default all.
        In an encoder-decoder they are those of the site's own stack, and a token's number in the decoder counts from
        what the decoder is given; each new token is one whole run there.
        Values given for whole sequences (Patch, Freeze ...) must reach as far as they are used. temperature: 0 takes
        the likeliest token, more draws one, by `seed`. stop: token after which a prompt is finished.

        Equals running every longer prompt anew with the same interventions. Raises InputError for a model that keeps
        no keys and values, or positions that are never run.
        """
        tokens = self.called_with(prompts)[2]
        if tokens is None or not self.takes("past_key_values"):
            raise InputError(f"{self.name} does not write here: it takes no past_key_values. Use run")
        edits, wanted, choice = listed(interventions), self._wanted(capture), Choice(temperature, seed, stop)
        if tokens.decoder is None:
            self._caller.check_length(int(tokens.real.sum(1).max()) + max_new_tokens - 1)
            made = generated(partial(self._pass, wanted, edits), tokens, edits, max_new_tokens, choice)
        else:
            made = decoded(partial(self._whole_pass, wanted, edits), tokens, edits, max_new_tokens, choice)
        if self.tokenizer is None:
            return made
        return replace(made, texts=tuple(self.tokenizer.decode(list(row)) for row in made.new))

    def _whole_pass(
        self,
        capture: Sequence[Site],
        interventions: Sequence[Intervention],
        tokens: Tokens,
        places: Sequence[Place],
    ) -> Step:
        """One pass of an encoder-decoder that writes."""
        recorder = Recorder(self, capture, interventions, tokens, False, places, copies=True)
        with torch.no_grad(), recorder.listening():
            output = self.module(**self.token_call(tokens))
        recorder.check_fired()
        return Step(output.logits, None, recorder.captured(), recorder.diagnostics())

    def _pass(
        self,
        capture: Sequence[Site],
        interventions: Sequence[Intervention],
        ids: Tensor,
        real: Tensor,
        index: Tensor,
        cache: Any,
        places: Sequence[Place],
    ) -> Step:
        """One pass of a generation: tokens after those whose keys and values are in the cache."""
        adapter, here = self.architecture[0], real[:, -ids.shape[1] :]
        call: dict[str, Any] = {**self.token_call(Tokens(ids)), "use_cache": True, "past_key_values": cache}
        if not bool(real.all()):
            call["attention_mask"] = real.long().to(self.device)
            if adapter.positions:
                call["position_ids"] = (index * here).to(self.device)
        touched = (*capture, *(site for edit in interventions for site in edit.part.writes))
        if self.takes("logits_to_keep") and not any(site.kind in ("logits", "module") for site in touched):
            call["logits_to_keep"] = 1
        recorder = Recorder(self, capture, interventions, Tokens(ids, here), False, places, copies=True)
        with torch.no_grad(), recorder.listening():
            output = self.module(**call)
        recorder.check_fired()
        return Step(output.logits, output.past_key_values, recorder.captured(), recorder.diagnostics())

    def takes(self, argument: str) -> bool:
        return self.adapter is not None and argument in inspect.signature(self.module.forward).parameters

    def _wanted(self, capture: Sequence[Site | str] | Site | str) -> list[Site]:
        names = [capture] if isinstance(capture, Site | str) else capture
        return [site for name in names for site in self._resolve(name)]

    def _resolve(self, name: Site | str) -> list[Site]:
        if "*" in str(name):
            return [site.whole for site in self.sites(str(name))]
        site = Site.parse(name)
        self.check_site(site)
        return [site.whole]

    def check_site(self, site: Site) -> None:
        """Raise UnknownNameError or InputError when this model has no such site."""
        if site.kind == "module":
            submodule(self.module, site.module)
            return
        adapter, layout = self.architecture
        n_layers = layout.layers_of(site.stack)
        if site.layer is not None and site.layer >= n_layers and site.stack in adapter.stack_names:
            raise InputError(f"{site}: {self.name} has {n_layers} layers, numbered from 0")
        if site.whole not in self._site_set:
            select(str(site.whole), self._all_sites)  # raises, naming the sites there are
        limit, what = layout.limit(site.kind)
        if site.index is not None and limit is not None and site.index >= limit:
            raise InputError(f"{site}: {self.name} has {limit} {what}, numbered from 0")

    def called_with(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tokens | None]:
        """Arguments of the module, and the tokens when there are any."""
        if isinstance(inputs, str) or (isinstance(inputs, list) and inputs and isinstance(inputs[0], str)):
            inputs = self.tokens(inputs)
        return self._caller.arguments(inputs)

    def check_evaluating(self) -> None:
        """Raise InputError for a model in training mode, two runs of which differ by themselves (dropout)."""
        refuse_training(self.module, self.name)

    def token_call(self, tokens: Tokens) -> dict[str, Any]:
        """Keyword arguments the wrapped module is called with for these tokens."""
        _ = self.architecture
        return self._caller.of_tokens(tokens)

    def begun(self, tokens: Tokens) -> Tokens:
        """The tokens with what an encoder-decoder's decoder is given: its start token, if nothing is said."""
        return self._caller.begun(tokens)

    @property
    def _caller(self) -> Caller:
        takes = inspect.signature(self.module.forward).parameters
        masked = "attention_mask" in takes
        return Caller(self.adapter, self.layout, self.name, self.device, masked, self._positions)

    @cached_property
    def _positions(self) -> int | None:
        return positions_of(self.module, self.adapter)
