"""Interventions: values that say which Part to change, where, and how.

Patch, Freeze, Interchange   the value of another run, of a recorded run of the same prompts, of a source example
Ablate, Project, Steer       take information away, keep or remove a subspace, add a vector
Erase                        take out what some directions read and others write, such as a concept (LEACE)
Noise                        Gaussian, independent for every example and token
Replace                      what a function makes of another site of the same run

Edits of one site are applied in the order given, edits of different sites in the order of the forward pass.
"""

from __future__ import annotations

from vesalius.directions import digest
from vesalius.intervention.apply import (
    Edits,
    Intervention,
    Reader,
    apply,
    joint,
    listed,
    off_distribution,
    reads_of,
    writes_of,
)
from vesalius.intervention.basic import (
    Ablate,
    Freeze,
    Interchange,
    Patch,
    Steer,
    as_patches,
    derangement,
    is_number,
    long_enough,
)
from vesalius.intervention.edits import Erase, Noise, Project, Replace
from vesalius.intervention.form import Recorded, Source
from vesalius.intervention.place import NamedPositions, Place, Positions, mask_of, place_of, token_axis
from vesalius.intervention.stored import from_json, load, save, tensors_of

__all__ = [
    "Ablate",
    "Edits",
    "Erase",
    "Freeze",
    "Interchange",
    "Intervention",
    "NamedPositions",
    "Noise",
    "Patch",
    "Place",
    "Positions",
    "Project",
    "Reader",
    "Recorded",
    "Replace",
    "Source",
    "Steer",
    "apply",
    "as_patches",
    "derangement",
    "digest",
    "from_json",
    "is_number",
    "joint",
    "listed",
    "load",
    "long_enough",
    "mask_of",
    "off_distribution",
    "place_of",
    "reads_of",
    "save",
    "tensors_of",
    "token_axis",
    "writes_of",
]
