"""What a study keeps of its search, as blocks: edges, descriptions and claims.

Claims are sealed with every digit of their figures. A study that is resumed on another machine, or with another number
of threads, must find the very same ones, so they are read back and never made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.circuits import Edge
from vesalius.describe import Behaviour, Descriptions, Estimate, RoleFit
from vesalius.protocol import Claim, canonical_json

Arrays = dict[str, NDArray[Any]]


def edges_to_arrays(edges: Sequence[Edge]) -> Arrays:
    """Edges as arrays by name."""
    return {
        "source": np.array([edge.source for edge in edges], dtype=np.str_),
        "target": np.array([edge.target for edge in edges], dtype=np.str_),
        "weight": np.array([edge.weight for edge in edges], dtype=np.float64),
    }


def edges_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> tuple[Edge, ...]:
    """The edges that `edges_to_arrays` gave."""
    rows = zip(arrays["source"], arrays["target"], arrays["weight"], strict=True)
    return tuple(Edge(str(source), str(target), float(weight)) for source, target, weight in rows)


def found_to_arrays(found: Descriptions, claims: Sequence[Claim]) -> Arrays:
    """Descriptions, and the claims to be sealed, as one array of JSON bytes."""
    # JSON objects are sorted; members and claims have an order that must stay.
    data = {"fits": list(found.fits.items()), "scores": list(found.scores.items()), "claims": list(claims)}
    return {"json": np.frombuffer(canonical_json(data).encode("ascii"), dtype=np.uint8)}


def found_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> tuple[Descriptions, tuple[Claim, ...]]:
    """What `found_to_arrays` was given."""
    data = json.loads(arrays["json"].tobytes())
    fits = {name: None if fit is None else _fit(fit) for name, fit in data["fits"]}
    return Descriptions(fits, dict(data["scores"])), tuple(Claim.from_json(claim) for claim in data["claims"])


def _fit(data: Mapping[str, Any]) -> RoleFit:
    behaviours = tuple(Estimate(Behaviour(**each["behaviour"]), each["mean"]) for each in data["behaviours"])
    claims = tuple(Claim.from_json(claim) for claim in data["claims"])
    return RoleFit(data["role"], data["score"], behaviours, data["description"], claims)
