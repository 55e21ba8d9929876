"""docs/activations.md: its example runs and gives what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors import safe_open

import tiny
import vesalius as vs
from vesalius.data.harvest import SHARD_BYTES
from vesalius.data.outliers import MAX_NORM
from vesalius.data.store import POOL_BYTES

PAGE = (Path(__file__).parent.parent / "docs" / "activations.md").read_text("utf-8")


@pytest.mark.demo_model
def test_the_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code.replace("mkdtemp()", repr(str(tmp_path))), "activations.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    store = names["store"]
    assert isinstance(store, vs.data.ActivationStore)
    assert printed[0] == f"{store.n_rows} (576, 576) ['layers.3.mlp_in', 'layers.3.mlp_out']"
    assert printed[1] == "torch.Size([4, 576]) torch.Size([4, 576])"
    assert printed[2].startswith("1 ")
    assert printed[3] == "(576,) (576,) None"


def test_defaults_are_those_on_the_page() -> None:
    assert f"shards of about {SHARD_BYTES / 1e6:.0f} MB" in PAGE
    assert f"by default {POOL_BYTES / 1e6:.0f} MB" in PAGE
    assert f"over `max_norm` ({MAX_NORM:g}) medians" in PAGE


def test_a_shard_holds_what_the_page_lists(tmp_path: Path) -> None:

    vs.data.harvest(tiny.model("llama"), [[5, 6, 7]], sites=["embed"], out=tmp_path, context=16)
    with safe_open(tmp_path / "shard-00000.safetensors", framework="pt") as file:
        names = set(file.keys()) - {"embed", "blocks.crc32", "contexts.crc32"}
    assert names == set(re.findall(r"`((?:rows|contexts)\.\w+)`", PAGE))
