"""One model of every file of timm, and torchvision's, without weights and with small images."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from torchvision import models

from benchmarks.zoo.cases import Built, Case, NotRun, building, run, seed, short, wake

SIZES = (32, 64, 96, 128, 192, 224, 256)
"""Sides of images, tried in turn."""
MOST_PARAMETERS = 140_000_000
BATCH = 2


def _first_that_runs(make: Callable[[int], nn.Module], sizes: tuple[int, ...], note: str) -> Built:
    """Return the model with the smallest images that it runs with."""
    reasons = []
    for size in sizes:
        try:
            seed()
            model = wake(make(size).float().eval())
            seed()
            built = Built(model, (torch.randn(BATCH, 3, size, size),), note=note)
            with torch.no_grad():
                run(built)
        except Exception as error:
            reasons.append(f"images of {size}: {short(error)}")
            continue
        return built
    raise NotRun("; ".join(reasons[-2:]))


# --- timm ----------------------------------------------------------------------------------------


def _timm(module: str) -> Built:
    names = timm.list_models(module=module)
    sized: list[tuple[int, str]] = []
    with torch.device("meta"):
        for name in names:
            try:
                model = timm.create_model(name)
            except Exception:
                continue
            sized.append((sum(p.numel() for p in model.parameters()), name))
            if sized[-1][0] < 8_000_000:
                break  # small enough
    if not sized:  # what can't be made without memory
        sized = [(0, names[0])]
    count, name = min(sized)
    less = {"depth": 2} if count > MOST_PARAMETERS else {}

    def make(size: int) -> nn.Module:
        try:
            return timm.create_model(name, img_size=size, num_classes=5, **less)
        except TypeError:  # takes images of any size
            return timm.create_model(name, num_classes=5, **less)

    default = timm.create_model(name, num_classes=5, **less).default_cfg
    own = default.get("input_size", (3, 224, 224))[-1]
    return _first_that_runs(make, tuple(dict.fromkeys((64, 96, 128, 224, own))), name)


# --- torchvision ---------------------------------------------------------------------------------

TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_32",
    "wide_resnet50_2", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50",
    "lraspp_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50_fpn", "fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large", "mc3_18", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d",
    "swin3d_t", "raft_small",
)  # fmt: skip
VIDEO = ("mc3_18", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")


def _torchvision(name: str) -> Built:
    fixed: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        fixed["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        fixed["init_weights"] = True
    if name.startswith(("fasterrcnn", "fcos", "keypoint", "maskrcnn", "retinanet")):
        # Random scores would leave nothing to look at.
        fixed.update(min_size=96, max_size=96)

    def make(size: int) -> nn.Module:
        more = {"image_size": size} if name.startswith("vit_") else {}
        if name == "maxvit_t":
            return models.MaxVit(
                input_size=(64, 64), stem_channels=16, partition_size=4, block_channels=[16, 32],
                block_layers=[1, 1], head_dim=16, stochastic_depth_prob=0.0,
            )  # fmt: skip
        return models.get_model(name, **fixed, **more)

    detector = hasattr(models.detection, name)
    if not (name == "raft_small" or name in VIDEO or detector):
        return _first_that_runs(make, (64, 128, 224, 299), name)
    seed()
    model = wake(make(0).eval())
    if name == "raft_small":
        pair = (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
        return _checked(Built(model, pair, {"num_flow_updates": 2}, note=name))
    if detector:
        size = 300 if name == "ssd300_vgg16" else 96
        return _checked(Built(_Losses(model), (torch.rand(1, 3, size, size),), note=name))
    size = 224 if name in ("mvit_v2_s", "s3d") else 64
    return _checked(Built(model, (torch.randn(1, 3, 16, size, size),), note=name))


class _Losses(nn.Module):
    """A detector up to its raw predictions: what follows sorts and drops boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> Any:
        """Return features and predictions; boxes too, where two stages make them."""
        detector: Any = self.detector
        features = detector.backbone(images)
        features = list(features.values()) if isinstance(features, dict) else [features]
        if hasattr(detector, "head"):
            return features, detector.head(features)
        scores, deltas = detector.rpn.head(features)
        heads = detector.roi_heads
        boxes = [torch.tensor([[5.0, 5.0, 60.0, 60.0], [20.0, 10.0, 90.0, 80.0]])]
        names = list(detector.backbone(images))
        maps = dict(zip(names, features, strict=True))
        outputs = [scores, deltas]
        size = [tuple(images.shape[-2:])]
        pooled = heads.box_head(heads.box_roi_pool(maps, boxes, size))
        outputs.append(heads.box_predictor(pooled))
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"{kind}_head", None) is not None:
                pooled = getattr(heads, f"{kind}_roi_pool")(maps, boxes, size)
                found = getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled))
                outputs.append(found)
        return outputs


def _checked(built: Built) -> Built:
    with building(), torch.no_grad():
        run(built)
    return built


def cases() -> list[Case]:
    """Return a case for every file of timm and for the models of torchvision."""
    return [
        *(Case("timm", name, partial(_timm, name)) for name in sorted(timm.list_modules())),
        *(Case("torchvision", name, partial(_torchvision, name)) for name in TORCHVISION),
    ]
