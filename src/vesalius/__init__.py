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
    "AdapterCheck": "patching.adapter_check",
    "Agreement": "patching.agreement",
    "Channel": "parts",
    "Claim": "protocol",
    "Concept": "concepts",
    "Contrast": "quantities",
    "Corpus": "inputs",
    "Description": "describe",
    "Direction": "directions",
    "Edge": "parts",
    "Erase": "intervention",
    "Evidence": "protocol",
    "Family": "protocol",
    "Freeze": "intervention",
    "Generation": "model.generation",
    "Group": "parts",
    "Interchange": "intervention",
    "Ledger": "protocol.ledger",
    "Measurement": "stats",
    "Metric": "metric",
    "Model": "model",
    "Needs": "metric",
    "Noise": "intervention",
    "Pairs": "inputs",
    "Part": "parts",
    "Patch": "intervention",
    "Project": "intervention",
    "Replace": "intervention",
    "Run": "activations",
    "Runs": "quantities",
    "Scores": "patching.scores",
    "Site": "site",
    "Steer": "intervention",
    "Subspace": "directions",
    "Table": "inputs",
    "Together": "parts",
    "Tokens": "inputs",
    "Tracing": "patching.tracing",
    "TrainConfig": "dictionaries",
    "Unit": "parts",
    "Verdict": "protocol",
    "answer_logprob": "metric",
    "attribution_patching": "patching.attribution",
    "causal_tracing": "patching.tracing",
    "check_adapter": "patching.adapter_check",
    "decide": "protocol.verdict",
    "explain": "attribution",
    "head": "parts",
    "kl_divergence": "metric",
    "latent": "refs",
    "load": "model.loading",
    "logit_diff": "metric",
    "neuron": "parts",
    "next_token_loss": "metric",
    "path_patching": "patching.paths",
    "resolve": "refs",
    "silent": "jobs",
    "sweep": "patching.sweep",
}
_ROOMS = (
    "agents",
    "attribution",
    "circuits",
    "concepts",
    "data",
    "describe",
    "dictionaries",
    "images",
    "interpretable",
    "quantities",
    "report",
    "stats",
    "studies",
    "toys",
    "validate",
)

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
    from vesalius.attribution import explain as explain
    from vesalius.concepts import Concept as Concept
    from vesalius.describe import Description as Description
    from vesalius.dictionaries import TrainConfig as TrainConfig
    from vesalius.directions import Direction as Direction
    from vesalius.directions import Subspace as Subspace
    from vesalius.inputs import Corpus as Corpus
    from vesalius.inputs import Pairs as Pairs
    from vesalius.inputs import Table as Table
    from vesalius.inputs import Tokens as Tokens
    from vesalius.intervention import Ablate as Ablate
    from vesalius.intervention import Erase as Erase
    from vesalius.intervention import Freeze as Freeze
    from vesalius.intervention import Interchange as Interchange
    from vesalius.intervention import Noise as Noise
    from vesalius.intervention import Patch as Patch
    from vesalius.intervention import Project as Project
    from vesalius.intervention import Replace as Replace
    from vesalius.intervention import Steer as Steer
    from vesalius.jobs import silent as silent
    from vesalius.metric import Metric as Metric
    from vesalius.metric import Needs as Needs
    from vesalius.metric import answer_logprob as answer_logprob
    from vesalius.metric import kl_divergence as kl_divergence
    from vesalius.metric import logit_diff as logit_diff
    from vesalius.metric import next_token_loss as next_token_loss
    from vesalius.model import Model as Model
    from vesalius.model.generation import Generation as Generation
    from vesalius.model.loading import load as load
    from vesalius.parts import Channel as Channel
    from vesalius.parts import Edge as Edge
    from vesalius.parts import Group as Group
    from vesalius.parts import Part as Part
    from vesalius.parts import Together as Together
    from vesalius.parts import Unit as Unit
    from vesalius.parts import head as head
    from vesalius.parts import neuron as neuron
    from vesalius.patching.adapter_check import AdapterCheck as AdapterCheck
    from vesalius.patching.adapter_check import check_adapter as check_adapter
    from vesalius.patching.agreement import Agreement as Agreement
    from vesalius.patching.attribution import attribution_patching as attribution_patching
    from vesalius.patching.paths import path_patching as path_patching
    from vesalius.patching.scores import Scores as Scores
    from vesalius.patching.sweep import sweep as sweep
    from vesalius.patching.tracing import Tracing as Tracing
    from vesalius.patching.tracing import causal_tracing as causal_tracing
    from vesalius.protocol import Claim as Claim
    from vesalius.protocol import Evidence as Evidence
    from vesalius.protocol import Family as Family
    from vesalius.protocol import Verdict as Verdict
    from vesalius.protocol.ledger import Ledger as Ledger
    from vesalius.protocol.verdict import decide as decide
    from vesalius.quantities import Contrast as Contrast
    from vesalius.quantities import Runs as Runs
    from vesalius.refs import latent as latent
    from vesalius.refs import resolve as resolve
    from vesalius.site import Site as Site
    from vesalius.stats import Measurement as Measurement
