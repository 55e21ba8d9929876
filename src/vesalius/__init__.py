"""Mechanistic interpretability that tests every description before calling it a finding.

Names load on first use (PEP 562), so that `import vesalius` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Ablate": "intervention",
    "Activations": "activations",
    "Adapter": "adapters",
    "Agreement": "sweeps.scores",
    "Claim": "records",
    "Direction": "parts",
    "Evidence": "records",
    "Family": "records",
    "Freeze": "intervention",
    "Generation": "generation",
    "Interchange": "intervention",
    "Ledger": "ledger",
    "Measurement": "stats",
    "Metric": "metric",
    "Model": "model",
    "Needs": "metric",
    "Noise": "intervention",
    "Pairs": "inputs",
    "Patch": "intervention",
    "Project": "intervention",
    "Replace": "intervention",
    "Run": "activations",
    "Scores": "sweeps.scores",
    "Site": "site",
    "Steer": "intervention",
    "Subspace": "parts",
    "Tokens": "inputs",
    "Tracing": "sweeps.tracing",
    "TrainConfig": "dictionaries",
    "Unit": "parts",
    "Verdict": "records",
    "answer_logprob": "metric",
    "attribution_patching": "sweeps.attribution",
    "causal_tracing": "sweeps.tracing",
    "head": "parts",
    "kl_divergence": "metric",
    "load": "loading",
    "logit_diff": "metric",
    "neuron": "parts",
    "next_token_loss": "metric",
    "path_patching": "sweeps.paths",
    "silent": "jobs",
    "sweep": "sweeps.sweep",
}
_ROOMS = ("circuits", "data", "describe", "dictionaries", "report", "stats", "studies", "toys", "validate")

__all__ = sorted([*_HOME, *_ROOMS])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"vesalius.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"vesalius.{name}")
    raise AttributeError(f"module 'vesalius' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from vesalius.activations import Activations as Activations
    from vesalius.activations import Run as Run
    from vesalius.adapters import Adapter as Adapter
    from vesalius.dictionaries import TrainConfig as TrainConfig
    from vesalius.generation import Generation as Generation
    from vesalius.inputs import Pairs as Pairs
    from vesalius.inputs import Tokens as Tokens
    from vesalius.intervention import Ablate as Ablate
    from vesalius.intervention import Freeze as Freeze
    from vesalius.intervention import Interchange as Interchange
    from vesalius.intervention import Noise as Noise
    from vesalius.intervention import Patch as Patch
    from vesalius.intervention import Project as Project
    from vesalius.intervention import Replace as Replace
    from vesalius.intervention import Steer as Steer
    from vesalius.jobs import silent as silent
    from vesalius.ledger import Ledger as Ledger
    from vesalius.loading import load as load
    from vesalius.metric import Metric as Metric
    from vesalius.metric import Needs as Needs
    from vesalius.metric import answer_logprob as answer_logprob
    from vesalius.metric import kl_divergence as kl_divergence
    from vesalius.metric import logit_diff as logit_diff
    from vesalius.metric import next_token_loss as next_token_loss
    from vesalius.model import Model as Model
    from vesalius.parts import Direction as Direction
    from vesalius.parts import Subspace as Subspace
    from vesalius.parts import Unit as Unit
    from vesalius.parts import head as head
    from vesalius.parts import neuron as neuron
    from vesalius.records import Claim as Claim
    from vesalius.records import Evidence as Evidence
    from vesalius.records import Family as Family
    from vesalius.records import Verdict as Verdict
    from vesalius.site import Site as Site
    from vesalius.stats import Measurement as Measurement
    from vesalius.sweeps.attribution import attribution_patching as attribution_patching
    from vesalius.sweeps.paths import path_patching as path_patching
    from vesalius.sweeps.scores import Agreement as Agreement
    from vesalius.sweeps.scores import Scores as Scores
    from vesalius.sweeps.sweep import sweep as sweep
    from vesalius.sweeps.tracing import Tracing as Tracing
    from vesalius.sweeps.tracing import causal_tracing as causal_tracing
