"""Patchscopes: nothing is changed by a state that is put back where it was, and others go where they are said to go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import families
import tiny
import vesalius as vs
from vesalius.describe import FEW_SHOT, TOKEN_IDENTITY, AffineFitter, fit_map, patchscope
from vesalius.errors import InputError, NotFiniteError


def prompts(seed: int = 0) -> vs.Tokens:
    return vs.Tokens(torch.randint(2, tiny.VOCAB, (4, 7), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
@pytest.mark.parametrize("position", [0, 3, "last"])
def test_a_state_put_back_where_it_was_changes_nothing_to_the_bit(name: str, position: Any) -> None:
    model, same = families.model(name), prompts()
    found = patchscope(model, same, sites="layers.*.resid_post", position=position, into=same, into_position=position)
    plain = model.run(same).logits[:, -1].float()
    assert all(torch.equal(one, plain) for one in found.logits)
    assert all(d["norm_ratio"] == 1.0 for one in found.diagnostics for d in one)
    other = patchscope(model, prompts(1), sites="layers.*.resid_post", position=position, into=same,
                       into_position=position)  # fmt: skip
    assert not torch.equal(other.logits[0], plain)


def test_any_state_goes_to_any_layer_and_position_as_raw_hooks_put_it_there() -> None:
    net = tiny.llama()
    model, source, target = vs.Model(net), prompts(), prompts(1)
    found = patchscope(model, source, sites=["layers.0.resid_post", "layers.2.resid_pre"], position=4, into=target,
                       into_site="layers.1.resid_post", into_position=2)  # fmt: skip
    with torch.no_grad():
        hidden = net(source.ids, output_hidden_states=True).hidden_states
    for number, layer in enumerate((1, 2)):
        state = hidden[layer][:, 4]

        def hook(_module: Any, _args: Any, out: Any, state: torch.Tensor = state) -> Any:
            value = out[0] if isinstance(out, tuple) else out
            value = value.clone()
            value[:, 2] = state
            return (value, *out[1:]) if isinstance(out, tuple) else value

        handle = net.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            expected = net(target.ids).logits[:, -1]
        handle.remove()
        assert torch.allclose(found.logits[number], expected, atol=1e-5)
    assert [str(site) for site in found.targets] == ["layers.1.resid_post"] * 2


def test_at_the_last_layer_and_token_it_says_what_the_source_would_have_said() -> None:
    model = tiny.model("gpt2")
    found = patchscope(model, prompts(), sites="layers.*.resid_post", into=prompts(1))
    assert float(found.precision()[-1]) == 1.0
    assert torch.allclose(found.logits[-1], found.own, atol=1e-4)
    with pytest.raises(InputError, match="k is between 1 and the 5 likeliest"):
        found.precision(9)


def test_what_is_written_is_what_is_written_with_the_edit() -> None:
    model, target = tiny.model("llama"), prompts(1)
    found = patchscope(model, prompts(), sites="layers.1.resid_post", into=target, new_tokens=3)
    state = model.run(prompts(), "layers.1.resid_post")["layers.1.resid_post"][:, -1:]
    edit = vs.Interchange("layers.1.resid_post", source=state, source_positions=0, positions=6)
    made = model.generate(target, 3, interventions=edit)
    assert found.texts == (tuple(" ".join(map(str, row)) for row in made.new),)
    frame = found.to_frame()
    assert len(frame) == 4
    assert frame.text[0] == found.texts[0][0]
    assert found.texts[0][1] in found._repr_html_()


def test_a_planted_map_is_found_and_one_of_fewer_rows_than_unknowns_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 7, generator=generator), torch.randn(5, generator=generator)
    fitter = AffineFitter()
    for _ in range(4):
        x = torch.randn(20, 7, generator=generator) + 3.0
        fitter.update(x, x @ weight.T + bias)
    found = fitter.fitted()
    assert torch.allclose(found.weight, weight, atol=1e-5)
    assert torch.allclose(found.bias, bias, atol=1e-4)
    assert found.fvu < 1e-9
    noise = AffineFitter().update(torch.randn(4000, 7, generator=generator), torch.randn(4000, 5, generator=generator))
    assert noise.fitted().fvu == pytest.approx(1.0, abs=0.02)
    with pytest.raises(InputError, match="at least 8 rows; there are 5: give more text"):
        AffineFitter().update(x[:5], x[:5]).fitted()
    with pytest.raises(NotFiniteError):
        AffineFitter().update(x * torch.nan, x)


def test_across_models_by_a_fitted_map() -> None:
    """The second model is the first with a rotated residual stream, so that a linear map is exact."""
    net, other = tiny.llama(), tiny.llama(hidden_size=48)
    generator = torch.Generator().manual_seed(1)
    text = vs.Tokens(torch.randint(2, tiny.VOCAB, (24, 9), generator=generator))
    # The same network: the map has to come out as the identity, and the patched run as the one within one model.
    first, second = vs.Model(net), vs.Model(other)
    mapping = fit_map(first, "layers.1.resid_post", second, "layers.1.resid_post", text)
    assert mapping.fvu < 1e-6
    across = patchscope(first, prompts(), sites="layers.1.resid_post", into=prompts(1), target=second, mapping=mapping)
    within = patchscope(first, prompts(), sites="layers.1.resid_post", into=prompts(1))
    assert torch.allclose(across.logits, within.logits, atol=1e-3)
    narrow = vs.Model(tiny.llama(seed=2, hidden_size=24))
    with pytest.raises(
        InputError, match=r"states of width 48 do not fit LlamaForCausalLM, whose width is 24; give mapp"
    ):
        patchscope(first, prompts(), sites="layers.1.resid_post", into=prompts(1), target=narrow)
    fitted = fit_map(first, "layers.1.resid_post", narrow, "layers.1.resid_post", text)
    assert 0.0 < fitted.fvu < 1.0
    there = patchscope(first, prompts(), sites="layers.1.resid_post", into=prompts(1), target=narrow, mapping=fitted)
    assert there.logits.shape == (1, 4, tiny.VOCAB)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny.model("llama")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"sites": "layers.1.z"}, r"residual stream, and layers\.1\.z is not of it"),
        ({"into_site": "layers.1.mlp_out"}, r"layers\.1\.mlp_out is not of it"),
        ({"into": prompts().take(torch.arange(2))}, "2 inspection prompts for 4 prompts"),
        ({"position": [1, 2]}, "one token of each prompt"),
        ({"into": torch.zeros(1, 3)}, "int64"),
    ]
    for how, message in bad:
        with pytest.raises(InputError, match=message):
            patchscope(model, prompts(), **{"sites": "layers.1.resid_post", "into": prompts(1), **how})


@pytest.mark.demo_model
def test_on_the_demo_model_late_states_are_read_as_tokens(demo: vs.Model) -> None:
    texts = ["The capital of France is", "The opposite of hot is", "One, two, three,"]
    found = patchscope(demo, texts, sites=["layers.2.resid_post", "layers.27.resid_post", "layers.29.resid_post"],
                       into=TOKEN_IDENTITY)  # fmt: skip
    assert float(found.precision()[-1]) == 1.0
    described = patchscope(demo, ["I have been to Paris"], sites="layers.4.resid_post", into=FEW_SHOT, new_tokens=4)
    assert described.texts[0][0]
    assert demo.tokens(FEW_SHOT).ids[0, -1] == demo.tokens("a, x").ids[0, -1]
