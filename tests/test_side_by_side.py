"""Two batches side by side give what one after the other gives, and only where nobody can tell the difference."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import families
import tiny
import vesalius as vs
from test_forward import alone, group, rows
from vesalius.data import side_by_side as module
from vesalius.data.forward import forward_for
from vesalius.data.side_by_side import side_by_side
from vesalius.errors import NotFiniteError
from vesalius.model.hooks import Tap, tapped


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The suite runs on one, which leaves nothing to divide."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def threads_of(models: Any, batches: list[int]) -> list[tuple[str, bool]]:
    """Per batch the thread it ran in, and whether it ran through the models themselves."""
    meeting = threading.Barrier(2)

    def run(given: Any, _: int) -> tuple[str, bool]:
        if threading.current_thread() is not threading.main_thread():
            meeting.wait(10)  # both batches are at work, or this breaks
        return threading.current_thread().name, given is models

    return list(side_by_side(run, models, batches))


def test_pairs_of_batches_meet_and_the_odd_one_runs_alone() -> None:
    models = {"": tiny.model("llama")}
    found = threads_of(models, [0, 1, 2, 3, 4])
    assert all(name.startswith("vesalius") for name, _ in found[:4])
    assert sorted(own for _, own in found[:4]) == [False, False, True, True]
    assert found[4] == (threading.current_thread().name, True)
    assert threads_of(models, [0]) == [(threading.current_thread().name, True)]
    assert threads_of(models, []) == []


@pytest.mark.parametrize("name", families.distinct(families.FAMILIES))
def test_every_family_gives_the_same_rows(name: str) -> None:
    model, chosen = families.model(name), group()
    site = str(model.sites("layers.*.resid_post")[-1])
    assert len(module._copies({"": model})) == 2
    (beside,) = rows(model, [site], chosen, batch_tokens=20)
    torch.testing.assert_close(beside, alone(model, site, chosen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_rows_are_bit_for_bit_those_of_one_batch_after_the_other(compute: torch.dtype | None) -> None:
    sites = ["a/layers.1.mlp_out", "b/layers.2.resid_post"]
    models = [tiny.model("llama"), tiny.model("llama")]
    beside = rows(models, sites, group(), batch_tokens=20, compute=compute)
    torch.set_num_threads(1)
    after = rows(models, sites, group(), batch_tokens=20, compute=compute)
    assert all(torch.equal(one, other) for one, other in zip(beside, after, strict=True))


def test_a_copy_has_the_same_weights_and_no_hook_in_common() -> None:
    model = tiny.model("llama")
    (_, copied) = module._copies({"": model})
    own, others = (dict(m.module.named_parameters()) for m in (model, copied[""]))
    assert all(others[name] is weight for name, weight in own.items())
    seen: list[int] = []
    with tapped([Tap(model.layer(0), "out", lambda t: seen.append(1))]):
        copied[""].run(vs.Tokens(torch.tensor([[2, 3, 4]])))
        assert seen == []
        model.run(vs.Tokens(torch.tensor([[2, 3, 4]])))
        assert seen == [1]


def test_weights_changed_between_two_calls_count() -> None:
    model, chosen = tiny.model("llama"), group()
    forward = forward_for(model, ["layers.0.mlp_out"], None, 20)
    (before,) = forward.rows(chosen, torch.float32)
    model.module.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
        model.module.model.layers[0].mlp.down_proj.weight.detach() * 2
    )
    (after,) = forward.rows(chosen, torch.float32)
    torch.testing.assert_close(after, before * 2)


def test_what_others_hung_on_a_model_is_called_for_every_batch() -> None:
    model, called = tiny.model("llama"), []
    handle = model.module.model.layers[0].register_forward_pre_hook(lambda *_: called.append(threading.get_ident()))
    rows(model, ["layers.2.resid_post"], group(), batch_tokens=20)
    assert len(called) > 2
    assert set(called) == {threading.get_ident()}
    handle.remove()
    assert len(module._copies({"": model})) == 2
    layer = model.module.model.layers[0]
    layer.forward = layer.forward  # an attribute now, such as those that wrap a forward leave behind
    assert len(module._copies({"": model})) == 1


def test_unknown_modules_autocast_and_one_thread_go_one_after_the_other() -> None:
    plain = vs.Model(torch.nn.Sequential(torch.nn.Embedding(9, 4)), adapter=None)
    assert len(module._copies({"": plain})) == 1
    model = tiny.model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert len(module._copies({"": model})) == 1
    torch.set_num_threads(1)
    assert len(module._copies({"": model})) == 1


def test_a_model_that_cannot_be_copied_is_run_one_batch_after_the_other() -> None:
    model, chosen = tiny.model("llama"), group()
    model.module.model.layers[0].guard = threading.Lock()
    assert len(module._copies({"": model})) == 1
    (found,) = rows(model, ["layers.1.resid_post"], chosen, batch_tokens=20)
    torch.testing.assert_close(found, alone(model, "layers.1.resid_post", chosen), rtol=1e-4, atol=1e-5)


def test_an_error_of_who_listens_ends_both_batches() -> None:
    forward = forward_for(tiny.model("llama"), ["layers.1.resid_post"], None, 4)

    def done(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forward.rows(group(), torch.float32, done)
    assert not [one for one in threading.enumerate() if one.name.startswith("vesalius")]


def test_an_error_in_one_of_them_is_raised_and_leaves_no_hook() -> None:
    model, chosen = tiny.model("llama"), group()
    with torch.no_grad():
        model.module.model.embed_tokens.weight[int(chosen.contexts[-1].ids[-1])] = float("nan")
    with pytest.raises(NotFiniteError, match="holds NaN or infinity, first at position"):
        rows(model, ["layers.1.resid_post"], chosen, batch_tokens=20)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.module.modules())
