"""Any list of interventions run together equals the same list applied in a forward pass written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
import vesalius as vs
from reference_forward import FORWARDS, KINDS, Plan, by_hand, vector_of

MODELS = {family: vs.Model(build(0, 2).double()) for family, build in tiny.FAMILIES.items()}
IDS = torch.randint(2, tiny.VOCAB, (3, 6), generator=torch.Generator().manual_seed(1))
SITES = {
    family: {str(site): run[site] for site in run.activations if site.kind not in ("result",)}
    for family, run in ((family, model.run(IDS, capture=["*"])) for family, model in MODELS.items())
}


def reference(family: str, plans: list[Plan]) -> Tensor:
    def edit(site: str, tensor: Tensor) -> Tensor:
        for plan in plans:
            if plan.site == site:
                tensor = by_hand(plan, tensor)
        return tensor

    with torch.no_grad():
        return FORWARDS[family](MODELS[family].module, IDS, edit)


def intervention(plan: Plan) -> Any:
    """The package's edit that the plan stands for."""
    name = plan.site if plan.index is None else f"{plan.site}[{plan.index}]"
    site, positions = vs.Site.parse(name), plan.positions
    source = vs.Activations({site.whole: plan.a})
    direction = vs.Direction(site, vector_of(plan.a)) if plan.kind in ("project", "keep") else None
    made: dict[str, Any] = {
        "patch": lambda: vs.Patch(name, source=source, positions=positions),
        "zero": lambda: vs.Ablate(name, positions=positions),
        "steer": lambda: vs.Steer(name, scale=0.5, vector=vector_of(plan.a), positions=positions),
        "project": lambda: vs.Project(direction, positions=positions),  # type: ignore[arg-type]
        "keep": lambda: vs.Project(direction, keep=True, positions=positions),  # type: ignore[arg-type]
        "interchange": lambda: vs.Interchange(
            name, source=source, examples=torch.tensor([2, 1, 0]), positions=positions
        ),
        "replace": lambda: vs.Replace(name, name, lambda x: torch.tanh(x) + 0.1, "tanh", positions=positions),
        "noise": lambda: vs.Noise(name, scale=1.4, std=0.5, seed=11, positions=positions),
    }
    return made[plan.kind]()


def fits(kind: str, name: str) -> bool:
    """A projection mixes keys, and the scores of hidden ones are minus infinity; noise is drawn token by token."""
    return not (kind == "noise" and name.endswith(("scores", "pattern"))) and not (
        kind in ("project", "keep") and name.endswith("scores")
    )


@st.composite
def plans(draw: Any, family: str) -> list[Plan]:
    """Up to six edits; half of them fall on the same two sites, so that order matters."""
    names = sorted(SITES[family])
    favourites = [draw(st.sampled_from(names)) for _ in range(2)]
    found = []
    for _ in range(draw(st.integers(1, 6))):
        name = draw(st.one_of(st.sampled_from(favourites), st.sampled_from(names)))
        kind = draw(st.sampled_from(sorted(KINDS)))
        shape = SITES[family][name].shape
        attention = name.endswith(("scores", "pattern"))
        kind = kind if fits(kind, name) else "zero"
        indexed = len(shape) == 4 and kind != "noise" and draw(st.booleans())
        index = draw(st.integers(0, shape[1 if attention else 2] - 1)) if indexed else None
        seed = draw(st.integers(0, 10_000))
        a = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=18, max_size=18))).view(3, 6)
        found.append(Plan(kind, name, mask | draw(st.booleans()), a, index))
    return found


def agree(family: str, listed: list[Plan]) -> None:
    expected = reference(family, listed)
    run = MODELS[family].run(IDS, capture=["layers.0.pattern"], interventions=[intervention(plan) for plan in listed])
    # Llama's norm rounds to float32 inside an otherwise float64 model; a sum is edited by adding the change to it.
    allowed = max(2e-5 * float(expected.max() - expected.min()), 1e-7)
    assert float((run.logits - expected).abs().max()) <= allowed


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_the_reference_forward_is_the_model(family: str) -> None:
    agree(family, [])
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        FORWARDS[family](MODELS[family].module, IDS, lambda site, tensor: seen.setdefault(site, tensor))
    assert sorted(seen) == sorted(SITES[family])
    for name, tensor in SITES[family].items():
        real = torch.isfinite(tensor) & (tensor > -1e30)
        assert torch.allclose(seen[name][real], tensor[real], atol=1e-5), name


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_list_of_edits_equals_the_same_list_by_hand(family: str, data: Any) -> None:
    agree(family, data.draw(plans(family)))


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_kind_at_every_site_equals_the_edit_by_hand_and_is_felt(family: str) -> None:
    # Not everywhere: what is added to all keys alike, softmax takes away again.
    some, plain = (torch.arange(6) % 2 == 1).expand(3, -1), reference(family, [])
    for name, tensor in SITES[family].items():
        for kind in KINDS:
            if not fits(kind, name):
                continue
            a = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            plan = Plan(kind, name, some, a)
            agree(family, [plan])
            assert not torch.allclose(reference(family, [plan]), plain), (kind, name)
