"""The peers of the engine benchmark, each doing the same edits in the way its own documentation shows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import nnsight
import pyvene
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import vesalius as vs

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
Score = Callable[[Tensor], Tensor]


class Hooks:
    """PyTorch's own hooks on the `transformers` model: one whole forward per patch."""

    name = "plain hooks"

    def __init__(self, model: vs.Model) -> None:
        self.net = model.module
        self.layers = model.module.model.layers
        self.heads, self.width = 9, 64

    def cache(self, ids: Tensor, sites: Sequence[str]) -> dict[tuple[str, int], Tensor]:
        """Activations by (kind, layer)."""
        kept: dict[tuple[str, int], Tensor] = {}
        handles = [handle for kind in sites for handle in self._keep(kind, kept)]
        with torch.no_grad():
            self.net(ids)
        for handle in handles:
            handle.remove()
        return kept

    def _keep(self, kind: str, kept: dict[tuple[str, int], Tensor]) -> list[Any]:
        handles = []
        for number, layer in enumerate(self.layers):

            def out(_: Any, __: Any, output: Any, key: tuple[str, int] = (kind, number)) -> None:
                kept[key] = output[0] if isinstance(output, tuple) else output

            def into(_: Any, args: Any, key: tuple[str, int] = (kind, number)) -> None:
                kept[key] = args[0]

            place = {"resid": layer, "attn": layer.self_attn, "mlp": layer.mlp, "z": layer.self_attn.o_proj}[kind]
            handles.append(place.register_forward_pre_hook(into) if kind == "z" else place.register_forward_hook(out))
        return handles

    def patched(self, ids: Tensor, kind: str, layer: int, where: int, value: Tensor) -> Tensor:
        """Logits with one position of the residual stream, or one head, patched."""
        block = self.layers[layer]

        def position(_: Any, __: Any, output: Tensor) -> Tensor:
            edited = output.clone()
            edited[:, where] = value[:, where]
            return edited

        def head(_: Any, args: Any) -> Any:
            edited, columns = args[0].clone(), slice(where * self.width, (where + 1) * self.width)
            edited[..., columns] = value[..., columns]
            return (edited, *args[1:])

        hook = block.register_forward_hook(position) if kind == "resid" else (
            block.self_attn.o_proj.register_forward_pre_hook(head)
        )  # fmt: skip
        with torch.no_grad():
            logits: Tensor = self.net(ids).logits
        hook.remove()
        return logits

    def gradients(self, ids: Tensor, score: Score) -> list[Tensor]:
        """Of the summed score at every layer's output, by plain autograd."""
        kept: list[Tensor] = []

        def keep(_: Any, __: Any, output: Tensor) -> None:
            kept.append(output)

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        logits = self.net(ids).logits
        found = torch.autograd.grad(score(logits).sum(), kept)
        for handle in handles:
            handle.remove()
        return [gradient.detach() for gradient in found]


class Lens:
    """TransformerLens."""

    name = "TransformerLens"
    KINDS: ClassVar = {"resid": "hook_resid_post", "attn": "hook_attn_out", "mlp": "hook_mlp_out", "z": "attn.hook_z"}

    def __init__(self, model: vs.Model) -> None:
        self.net = TransformerBridge.boot_transformers(
            HUB_NAME, hf_model=copy.deepcopy(model.module), tokenizer=model.tokenizer
        )

    def cache(self, ids: Tensor, sites: Sequence[str]) -> dict[tuple[str, int], Tensor]:
        wanted = {f"blocks.{layer}.{self.KINDS[kind]}": (kind, layer) for kind in sites for layer in range(30)}
        with torch.no_grad():
            _, cache = self.net.run_with_cache(ids, names_filter=lambda name: name in wanted)
        return {wanted[name]: cache[name] for name in wanted}

    def patched(self, ids: Tensor, kind: str, layer: int, where: int, value: Tensor) -> Tensor:
        def position(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            tensor[:, where] = value[:, where]
            return tensor

        def head(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            tensor[:, :, where] = value[:, :, where]
            return tensor

        edit = position if kind == "resid" else head
        with torch.no_grad():
            logits: Tensor = self.net.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.{self.KINDS[kind]}", edit)])
        return logits


class Sight:
    """nnsight."""

    name = "nnsight"

    def __init__(self, model: vs.Model) -> None:
        self.net = nnsight.TransformersModel(copy.deepcopy(model.module), tokenizer=model.tokenizer)
        self.width = 64

    def cache(self, ids: Tensor, sites: Sequence[str]) -> dict[tuple[str, int], Tensor]:
        kept = {}
        net = self.net
        with torch.no_grad(), net.trace(ids):
            for layer in range(30):
                block = net.model.layers[layer]
                # In the order of the forward pass: nnsight takes no other.
                if "z" in sites:
                    kept["z", layer] = block.self_attn.o_proj.input.save()
                if "attn" in sites:
                    kept["attn", layer] = block.self_attn.output[0].save()
                if "mlp" in sites:
                    kept["mlp", layer] = block.mlp.output.save()
                if "resid" in sites:
                    kept["resid", layer] = block.output.save()
        return kept

    def patched(self, ids: Tensor, kind: str, layer: int, where: int, value: Tensor) -> Tensor:
        net = self.net
        columns = slice(where * self.width, (where + 1) * self.width)
        with torch.no_grad(), net.trace(ids):
            block = net.model.layers[layer]
            if kind == "resid":
                block.output[:, where] = value[:, where]
            else:
                block.self_attn.o_proj.input[..., columns] = value[..., columns]
            logits: Tensor = net.output.logits.save()
        return logits


class Vene:
    """pyvene; patches of the residual stream (it knows heads for GPT-2 only)."""

    name = "pyvene"

    def __init__(self, model: vs.Model) -> None:
        self.net = copy.deepcopy(model.module)
        self.made: dict[int, Any] = {}

    def patched(self, ids: Tensor, kind: str, layer: int, where: int, value: Tensor) -> Tensor:
        assert kind == "resid"
        for number in [number for number in self.made if number != layer]:
            self.made.pop(number)
        if layer not in self.made:
            self.made[layer] = pyvene.IntervenableModel(
                pyvene.IntervenableConfig(
                    [{"layer": layer, "component": "block_output", "intervention_type": pyvene.VanillaIntervention}]
                ),
                model=self.net,
            )
        net = self.made[layer]
        sources = {net.sorted_keys[0]: value[:, where : where + 1]}
        place = [[[where]] * len(ids)]
        with torch.no_grad():
            _, output = net(
                base={"input_ids": ids},
                source_representations=sources,
                unit_locations={"sources->base": (place, place)},
            )
        logits: Tensor = output.logits
        return logits
