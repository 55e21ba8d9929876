"""`vesalius sites`: every axis that the model fixes is a number; layers that are alike are starred, others told."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import families
import tiny
import vesalius as vs
from test_adapters import vit
from test_encoder_decoder import t5
from tiny_folder import tiny_folder
from vesalius.cli.sites import measured, ranges, rows, windows
from vesalius.model.loading import without_weights


def shown(model: vs.Model) -> dict[str, tuple[str, ...]]:
    return {label: shape for label, _, shape in rows(measured(model), model)}


def test_neurons_experts_and_vocabulary_are_numbers() -> None:
    found = shown(families.model("mistral"))
    assert found["layers.*.mlp_post"] == ("batch", "pos", "40")
    assert found["layers.*.k"] == ("batch", "pos", "2", "8")
    assert found["layers.*.result"] == ("batch", "pos", "6", "48")
    assert found["layers.*.pattern"] == ("batch", "6", "query_pos", "key_pos")
    assert found["logits"] == ("batch", "pos", "61")
    mixture = shown(families.model("qwen2_moe"))
    assert mixture["layers.*.router"] == ("batch", "pos", "5")
    assert mixture["layers.*.expert_out"] == ("batch", "pos", "5", "48")


@pytest.mark.parametrize("name", ["llama", "bloom", "albert", "modernbert", "opt", "gemma3"])
def test_each_kind_has_one_row_and_no_word_is_left_for_a_size(name: str) -> None:
    model = families.model(name)
    found = shown(model)
    assert len(found) == len({(site.layer is None, site.kind) for site in model.sites()})
    free = {"batch", "pos", "query_pos", "key_pos"}
    assert all(size in free or size.isdigit() for shape in found.values() for size in shape)


def test_both_stacks_and_images_are_shown() -> None:
    found = shown(t5())
    assert found["decoder.layers.*.cross_pattern"] == ("batch", "4", "query_pos", "source_pos")
    assert found["encoder.layers.*.mlp_post"] == ("batch", "pos", "40")
    assert shown(vit())["layers.*.z"] == ("batch", "pos", "6", "8")


def test_layers_of_other_shapes_have_rows_of_their_own() -> None:
    model = tiny.model("llama")
    shapes = measured(model)
    wider = {**shapes, vs.Site("mlp_post", 1): ("batch", "pos", "99")}
    found = {label: shape for label, _, shape in rows(wider, model)}
    assert found["layers.0,2.mlp_post"] == ("batch", "pos", "80")
    assert found["layers.1.mlp_post"] == ("batch", "pos", "99")
    assert found["layers.*.mlp_in"] == ("batch", "pos", "48")


def test_shapes_from_the_config_alone_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    bare, loaded = without_weights(folder, sink=vs.silent), vs.load(folder, sink=vs.silent)
    assert measured(bare) == measured(loaded)
    assert bare.name == loaded.name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "from_pretrained", None)
        assert measured(without_weights(folder, sink=vs.silent)) == measured(loaded)


def test_numbers_are_told_as_ranges() -> None:
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2,4,6-7"


def test_layers_that_look_back_differently_are_told() -> None:
    assert windows(families.model("gemma3")) == ["sliding attention (3 tokens): layers 0", "full attention: layers 1"]
    assert windows(families.model("llama")) == []
