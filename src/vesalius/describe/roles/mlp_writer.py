"""MLPs by what they write straight onto the logit difference: toward the answer, or toward the distractor."""

from __future__ import annotations

from dataclasses import dataclass

from vesalius.describe.context import Context, RoleFit, is_mlp
from vesalius.describe.ingredients import role_fit, writes
from vesalius.site import Site


@dataclass(frozen=True)
class MlpWriter:
    """sign +1: toward the answer; -1: toward the distractor."""

    name: str
    sign: int

    def applies(self, component: Site) -> bool:
        return is_mlp(component)

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        return role_fit(context, component, self.name, [writes(context, component, self.sign)])


TOWARD_ANSWER = MlpWriter("MLP writes toward the answer", 1)
TOWARD_DISTRACTOR = MlpWriter("MLP writes toward the distractor", -1)
