"""DESCRIBE: what each member of a circuit does, as an executable prediction from which claims are made."""

from __future__ import annotations

from vesalius.describe.context import FITS, Behaviour, Context, Estimate, Role, RoleFit
from vesalius.describe.fitting import NO_ROLE, Descriptions, best_of, describe
from vesalius.describe.matching import Matched, matched_controls
from vesalius.describe.measures import MEASURES, figure, measure_shifts
from vesalius.describe.roles import ROLES

__all__ = [
    "FITS",
    "MEASURES",
    "NO_ROLE",
    "ROLES",
    "Behaviour",
    "Context",
    "Descriptions",
    "Estimate",
    "Matched",
    "Role",
    "RoleFit",
    "best_of",
    "describe",
    "figure",
    "matched_controls",
    "measure_shifts",
]
