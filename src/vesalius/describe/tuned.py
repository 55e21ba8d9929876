"""The tuned lens: residual vectors are translated, layer by layer, before they are read (Belrose et al. 2023).

Each site has an affine map h + A h + b that begins as the identity and is trained to make what the lens says equal what
the model ends up saying: the mean over tokens of KL(model || lens) (their section 3). What it finds that the logit lens
does not is what only stood in other coordinates. A map that did not get better than the identity on rows that it was
never trained on is dropped, and the last layer's output has none: there both lenses are the model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.data import Source, as_source, stream
from vesalius.describe.lenses import LensReading, last_site, read_lens, residual_sites
from vesalius.dictionaries.training.run_files import Checkpoints
from vesalius.errors import FileFormatError, InputError, NotFiniteError, UnknownNameError
from vesalius.jobs import Event, Sink, write_atomic
from vesalius.jobs.cache import file_sha256
from vesalius.jobs.progress import Estimate, resident, shown
from vesalius.jobs.untrusted import read_json, read_safetensors, understood
from vesalius.model import Model
from vesalius.model.readout import unembedded
from vesalius.protocol import content_hash
from vesalius.protocol.canonical import plain
from vesalius.site import Site

TASK = "tuned lens"
CONFIG, WEIGHTS = "config.json", "lens.safetensors"
FORMAT, VERSION = "vesalius-tuned-lens", 1
BUFFER = 65_536
"""Rows that are shuffled together, at most."""
DECAY, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam (Kingma & Ba 2015)."""


@dataclass(frozen=True, eq=False)
class Translator:
    """h -> h + weight h + bias."""

    weight: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"]

    def __call__(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
        return (wide + wide @ self.weight.to(wide).T + self.bias.to(wide)).to(residual)


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens:
    """A fitted tuned lens of one model. translators: by site; a site without one is read as it is.

    metadata: how it was trained, and for each site the KL of both lenses on rows that were not trained on.
    """

    model: Model
    sites: tuple[Site, ...]
    translators: Mapping[Site, Translator]
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __repr__(self) -> str:
        return f"TunedLens({self.model.name}, {len(self.sites)} sites, {len(self.translators)} translated)"

    def logits(self, site: Site | str, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any vocab"]:
        """Logits of residual vectors of one of its sites. Raises UnknownNameError for another."""
        where = Site.parse(site)
        if where not in self.sites:
            raise UnknownNameError("site of this lens", str(site), map(str, self.sites))
        translator = self.translators.get(where)
        return unembedded(self.model, residual if translator is None else translator(residual))

    def read(self, inputs: Any, **how: Any) -> LensReading:
        """See `read_lens`."""
        return read_lens(self, inputs, **how)

    def save(self, out: str | Path) -> Path:
        """Writes `lens.safetensors` and `config.json`, which is written last, to a folder."""
        folder = Path(out)
        tensors = {f"{site}.{name}": getattr(one, name).detach().cpu().contiguous()
                   for site, one in self.translators.items() for name in ("weight", "bias")}  # fmt: skip
        write_atomic(folder / WEIGHTS, safetensors.torch.save(tensors))
        config = {
            "format": FORMAT,
            "version": VERSION,
            "model": {"name": self.model.name, "sha256": self.model.content_hash},
            "sites": [str(site) for site in self.sites],
            "sha256": file_sha256(folder / WEIGHTS),
            "metadata": plain(self.metadata, "metadata"),
        }
        write_atomic(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")
        return folder

    @classmethod
    def load(cls, where: str | Path, model: Model) -> TunedLens:
        """The lens in a folder, for the model that it was trained on.

        Raises FileFormatError for what is missing, altered or of another kind, InputError for another model.
        """
        folder = Path(where)
        with understood(f"{folder} holds no tuned lens as it was written"):
            config = _config(folder)
            if config["model"]["sha256"] != model.content_hash:
                raise InputError(
                    f"the tuned lens in {folder} belongs to {config['model']['name']} with weights "
                    f"{config['model']['sha256'][:12]}; {model.name} has {model.content_hash[:12]}. Train one for it: "
                    "vs.describe.fit_tuned_lens"
                )
            sites = residual_sites(model, config["sites"])
            tensors = read_safetensors(folder / WEIGHTS)
            return cls(model, sites, _translators(tensors, model.architecture[1].d_model), config["metadata"])


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = read_json(folder / CONFIG)
        known = config["format"] == FORMAT and config["version"] == VERSION
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FileFormatError(f"{folder / CONFIG} is not the description of a tuned lens ({error})") from error
    if not known:
        raise FileFormatError(f"{folder / CONFIG} is not of format {FORMAT!r}, version {VERSION}")
    if file_sha256(folder / WEIGHTS) != config["sha256"]:
        raise FileFormatError(f"{folder / WEIGHTS} is truncated or was altered: its hash is not the one in {CONFIG}")
    return dict(config)


def _translators(tensors: Mapping[str, Tensor], width: int) -> dict[Site, Translator]:
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    found = {Site.parse(name): Translator(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names}
    for site, one in found.items():
        if one.weight.shape != (width, width) or one.bias.shape != (width,):
            shape = list(one.weight.shape)
            raise FileFormatError(f"the translator of {site} has {shape}; the model's width is {width}")
    return found


class TunedLensFitter:
    """What is being trained: one translator per site. `update` takes rows, `fitted` gives the lens.

    scale: root mean square of the values at each site, the unit of its biases, so that one learning rate suits all
    layers. It falls linearly to zero over `total` steps.
    """

    def __init__(
        self, model: Model, sites: Sequence[Site], scale: Float[Tensor, " site"], lr: float, total: int
    ) -> None:
        width = model.architecture[1].d_model
        shape, self.scale, self.lr, self.total = (len(sites), width, width + 1), scale.to(model.device), lr, total
        self.model, self.sites, self.steps = model, tuple(sites), 0
        # The last column is the bias.
        self.weight, self._first, self._second = (torch.zeros(shape, device=model.device) for _ in range(3))

    def update(
        self, rows: Sequence[Float[Tensor, "row d_model"]], final: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, " site"]:
        """One step. rows: of each site; final: the same tokens' last residual vectors. Gives KL before the step, nats.

        Raises NotFiniteError when it is NaN or infinite.
        """
        target, found = _log_softmax(self.model, final), []
        self.steps += 1
        for number, row in enumerate(rows):
            weight = self.weight[number].requires_grad_()
            loss = _kl(target, _log_softmax(self.model, self._translated(number, weight, row)))
            (gradient,) = torch.autograd.grad(loss, weight)
            weight.requires_grad_(False)
            self._step(number, gradient)
            found.append(loss.detach())
        kl = torch.stack(found).cpu()
        if not bool(kl.isfinite().all()):
            where = self.sites[int((~kl.isfinite()).nonzero()[0])]
            raise NotFiniteError(f"step {self.steps}: KL at {where} is not finite; lower lr ({self.lr})")
        return kl

    def _translated(self, number: int, weight: Tensor, row: Tensor) -> Tensor:
        row = row.to(weight)
        scale = self.scale[number]
        return row + row @ weight[:, :-1].T + scale * weight[:, -1]

    def _step(self, number: int, gradient: Tensor) -> None:
        first, second = self._first[number], self._second[number]
        first.lerp_(gradient, 1 - DECAY[0])
        second.lerp_(gradient.square(), 1 - DECAY[1])
        rate = self.lr * (1 - (self.steps - 1) / self.total)
        size = (second / (1 - DECAY[1] ** self.steps)).sqrt_().add_(EPSILON)
        self.weight[number] -= rate * first / (1 - DECAY[0] ** self.steps) / size

    def kl(self, rows: Sequence[Tensor], final: Tensor, identity: bool = False) -> Float[Tensor, " site"]:
        """Mean KL on rows, in nats. identity: of the logit lens."""
        with torch.no_grad():
            target = _log_softmax(self.model, final)
            weight = torch.zeros_like(self.weight) if identity else self.weight
            read = [_log_softmax(self.model, self._translated(n, weight[n], row)) for n, row in enumerate(rows)]
            return torch.stack([_kl(target, one) for one in read]).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step depends on."""
        moments = {"first": self._first, "second": self._second}
        return {"weight": self.weight, **moments, "scale": self.scale, "steps": torch.tensor([self.steps])}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self.weight, self._first, self._second, self.scale = (
            tensors[name].to(self.model.device) for name in ("weight", "first", "second", "scale")
        )
        self.steps = int(tensors["steps"])

    def fitted(
        self, sites: Sequence[Site], rows: Sequence[Tensor], final: Tensor, metadata: Mapping[str, Any]
    ) -> TunedLens:
        """The lens at `sites`. rows, final: not trained on; a translator no better than none there is dropped."""
        logit, tuned = self.kl(rows, final, identity=True), self.kl(rows, final)
        weight, bias = self.weight[..., :-1].cpu(), (self.scale[:, None] * self.weight[..., -1]).cpu()
        better = [n for n in range(len(self.sites)) if float(tuned[n]) < float(logit[n])]
        found = {self.sites[n]: Translator(weight[n].clone(), bias[n].clone()) for n in better}
        check = {
            str(site): {"logit_lens": float(logit[n]), "tuned_lens": float(min(logit[n], tuned[n]))}
            for n, site in enumerate(self.sites)
        }
        return TunedLens(self.model, tuple(sites), found, {**metadata, "steps": self.steps, "kl_of_unseen_rows": check})


def _log_softmax(model: Model, residual: Tensor) -> Tensor:
    weights = next(iter(model.module.parameters()))
    return unembedded(model, residual.to(model.device, weights.dtype)).float().log_softmax(-1)


def _kl(target: Float[Tensor, "row vocab"], found: Float[Tensor, "row vocab"]) -> Float[Tensor, ""]:
    return (target.exp() * (target - found)).sum(-1).mean()


def fit_tuned_lens(
    model: Model,
    texts: Any,
    *,
    sites: str | Site | Sequence[Site | str] = "layers.*.resid_post",
    steps: int = 250,
    batch_size: int = 256,
    lr: float = 1e-3,
    context: int = 128,
    seed: int = 0,
    out: str | Path | None = None,
    checkpoint_every: int = 25,
    sink: Sink | None = None,
) -> TunedLens:
    """Train a tuned lens on text: `steps` steps of `batch_size` tokens each.

    texts: as `vs.data.stream` takes them (they are run as they are needed), or a store or stream of activations with
    the sites and the last layer's output. out: a folder for the lens; an interrupted run goes on there, and a finished
    one is read. sink: hears the expected cost, then progress; None shows both on standard error.

    Raises InputError for a source of other sites or of another model, and for a folder of another run; NotFiniteError
    when training diverges.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise InputError(f"{name} must be at least 1; got {value}")
    wanted, last = residual_sites(model, sites), last_site(model)
    trained = [site for site in wanted if site != last]
    if not trained:
        raise InputError(f"nothing to train: at {last} every lens is the model")
    source = _source(model, texts, [*trained, last], context, (1 + steps) * batch_size)
    plan = content_hash({
        "model": model.content_hash, "rows": source.content_hash, "sites": [str(s) for s in wanted], "steps": steps,
        "batch_size": batch_size, "lr": lr, "seed": seed,
    })  # fmt: skip
    folder = None if out is None else Path(out)
    if folder is not None and (folder / CONFIG).exists():
        return _finished(folder, model, plan)
    with shown(sink) as screen:
        at = [source.sites.index(site) for site in (*trained, last)]
        # The first batch is for telling at the end whether a translator is better than none.
        batches = source.batches(batch_size, seed=seed)
        first = next(batches)
        unseen = [first[n].float() for n in at]
        scale = torch.stack([row.square().mean().sqrt() for row in unseen[:-1]])
        fitter, checkpoints = TunedLensFitter(model, trained, scale, lr, steps), Checkpoints(folder, plan, screen, TASK)
        checkpoints.resume(fitter)
        if fitter.steps:
            batches = source.batches(batch_size, seed=seed, start=1 + fitter.steps)
        _train(fitter, ([rows[n] for n in at] for rows in batches), checkpoints, checkpoint_every, screen)
        metadata = {"plan": plan, "batch_size": batch_size, "lr": lr, "seed": seed, "rows": source.content_hash}
        lens = fitter.fitted(wanted, unseen[:-1], unseen[-1], metadata)
    if folder is not None:
        lens.save(folder)
        checkpoints.remove()
    return lens


def _source(model: Model, texts: Any, sites: Sequence[Site], context: int, rows: int) -> Source:
    """Rows at the sites, of this model; of texts no more are run at a time than are wanted."""
    if not (hasattr(texts, "batches") and hasattr(texts, "sites")):
        return stream(model, texts, sites=list(sites), context=context, buffer=min(rows, BUFFER))
    source = as_source(texts)
    missing = [str(site) for site in sites if site not in source.sites]
    if missing:
        known = ", ".join(map(str, source.sites))
        raise InputError(f"these activations lack {', '.join(missing[:4])}; they are of {known}")
    plan = getattr(getattr(source, "manifest", None), "plan", {})
    of = getattr(source, "models", None) or plan.get("models", [])
    if any(one["sha256"] != model.content_hash for one in of):
        raise InputError(f"these activations are of {of[0]['name']} with other weights than those of {model.name}")
    return source


def _finished(folder: Path, model: Model, plan: str) -> TunedLens:
    lens = TunedLens.load(folder, model)
    if lens.metadata.get("plan") != plan:
        raise InputError(f"{folder} holds a lens of another run; read it with TunedLens.load, or choose another folder")
    return lens


def _train(fitter: TunedLensFitter, batches: Any, checkpoints: Checkpoints, every: int, sink: Sink) -> None:
    sink(Event("start", TASK, fitter.steps, fitter.total))
    first = fitter.steps
    for *rows, final in islice(batches, fitter.total - fitter.steps):
        began = time.perf_counter()
        kl = fitter.update(rows, final)
        if fitter.steps == first + 1:
            # Running the texts, which comes before, costs little beside reading every row at every site.
            cost = Estimate((time.perf_counter() - began) * (fitter.total - first), memory_bytes=resident())
            sink(Event("note", TASK, message=f"expected cost: {cost.describe()}"))
        sink(Event("advance", TASK, fitter.steps, fitter.total, f"mean KL {float(kl.mean()):.3f} nats"))
        if fitter.steps % every == 0:
            checkpoints.save(fitter)
    sink(Event("end", TASK, fitter.steps, fitter.total))
