"""Tiny random Hugging Face image classifiers of many architectures, saved as a person would have them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZE, N_CLASSES = 32, 5
_ENDS = {"num_labels": N_CLASSES, "num_channels": 3, "image_size": SIZE}
_STAGES = {**_ENDS, "hidden_sizes": [8, 16], "depths": [1, 1]}

_VIT = {
    **_ENDS, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip
_PYRAMID = {
    **_STAGES, "image_size": SIZE, "num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [3, 3],
    "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
_WINDOWS = {
    **_ENDS, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "resnet": ("ResNet", {**_STAGES, "embedding_size": 8, "layer_type": "basic"}, "batch norm, residual"),
    "bit": (
        "Bit", {**_STAGES, "embedding_size": 8, "hidden_sizes": [32, 64], "num_groups": 4},
        "group norm, standardised weights",
    ),
    "regnet": (
        "RegNet", {**_STAGES, "embedding_size": 8, "groups_width": 4, "layer_type": "y"},
        "grouped convolutions, squeeze-excite",
    ),
    "mobilenet-v1": ("MobileNetV1", {**_ENDS, "depth_multiplier": 0.125, "min_depth": 4}, "depthwise convolutions"),
    "mobilenet-v2": (
        "MobileNetV2", {**_ENDS, "depth_multiplier": 0.125, "min_depth": 4, "depth_divisible_by": 4},
        "inverted bottlenecks",
    ),
    "efficientnet": (
        "EfficientNet",
        {
            **_ENDS, "width_coefficient": 0.25, "depth_coefficient": 0.25, "depth_divisor": 4, "hidden_dim": 320,
            "num_block_repeats": [1, 1], "kernel_sizes": [3, 5], "in_channels": [32, 16], "out_channels": [16, 24],
            "strides": [1, 2], "expand_ratios": [1, 6], "depthwise_padding": [],
        },
        "depthwise, squeeze-excite, swish",
    ),
    "hgnet-v2": (
        "HGNetV2",
        {
            **_STAGES, "embedding_size": 8, "stem_channels": [3, 4, 8], "stage_in_channels": [8, 8],
            "stage_mid_channels": [4, 4], "stage_out_channels": [8, 16], "stage_num_blocks": [1, 1],
            "stage_downsample": [False, True], "stage_light_block": [False, True], "stage_kernel_size": [3, 5],
            "stage_numb_of_layers": [2, 2],
        },
        "dense concatenations",
    ),
    "convnext": ("ConvNext", {**_STAGES, "num_stages": 2, "patch_size": 2}, "layer norm over channels"),
    "convnext-v2": ("ConvNextV2", {**_STAGES, "num_stages": 2, "patch_size": 2}, "global response norm"),
    "poolformer": (
        "PoolFormer",
        {
            **_STAGES, "num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1],
        },
        "pooling in the place of attention",
    ),
    "textnet": ("TextNet", {**_ENDS, "stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 16, 16]}, "asymmetric kernels"),
    "focalnet": (
        "FocalNet",
        {
            **_ENDS, "patch_size": 4, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
            "focal_levels": [2, 2], "focal_windows": [3, 3],
        },
        "products of maps, channels last",
    ),
    "swiftformer": (
        "SwiftFormer", {**_ENDS, "depths": [1, 1], "embed_dims": [8, 16], "mlp_ratio": 2}, "additive attention",
    ),
    "mobilevit": (
        "MobileViT",
        {
            **_ENDS, "patch_size": 2, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 8, 8, 12, 16, 16, 20],
            "num_attention_heads": 2,
        },
        "convolutions and attention on unfolded patches",
    ),
    "levit": (
        "Levit",
        {
            **_ENDS, "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1], "key_dim": [8, 8, 8], "patch_size": 16,
        },
        "batch norm in attention",
    ),
    "cvt": (
        "Cvt",
        {
            **_ENDS, "embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3],
            "patch_sizes": [3, 3, 3], "patch_stride": [2, 2, 2], "patch_padding": [1, 1, 1],
        },
        "convolutions make queries and keys",
    ),
    "pvt-v2": ("PvtV2", _PYRAMID, "keys of fewer positions"),
    "segformer": ("Segformer", _PYRAMID, "keys of fewer positions"),
    "swin": ("Swin", _WINDOWS, "attention in shifted windows"),
    "swin-v2": ("Swinv2", _WINDOWS, "cosine attention"),
    "hiera": (
        "Hiera",
        {
            **_ENDS, "image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4],
            "patch_padding": [3, 3], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
            "embed_dim_multiplier": 2.0, "num_query_pool": 1, "query_stride": [2, 2], "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
        },
        "pooled queries, reordered tokens",
    ),
    "vit": ("ViT", _VIT, "class token"),
    "deit": ("DeiT", _VIT, "class and distillation tokens"),
    "beit": ("Beit", {**_VIT, "use_relative_position_bias": True, "out_indices": [0, 1]}, "relative positions"),
    "dinov2": ("Dinov2", {**_VIT, "mlp_ratio": 2}, "layer scale"),
}  # fmt: skip
"""By name: the beginning of its classes' names, the configuration of a tiny model, and what is special about it."""


def huggingface_classifier(family: str) -> Any:
    """The Hugging Face model in evaluation mode, with random weights."""
    import transformers

    kind, config, _ = FAMILIES[family]
    with warnings.catch_warnings(action="ignore"):
        made = getattr(transformers, f"{kind}Config")(**config)
        inner: Any = getattr(transformers, f"{kind}ForImageClassification")(made).eval()
    redraw(inner, sum(map(ord, family)))
    return inner


def image_size(family: str) -> int:
    """The height and width of its images."""
    size = FAMILIES[family][1].get("image_size", SIZE)
    return size if isinstance(size, int) else SIZE


def save_classifier(inner: Any, folder: Path, size: int) -> None:
    """Save a model and how its images are prepared."""
    inner.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )  # fmt: skip


def redraw(module: nn.Module, seed: int) -> None:
    """Draw all weights at random, so large that signals neither vanish nor explode, and all statistics as well.

    Weights have the variance 2 / fan-in (He et al. 2015); gains are near 1 and biases differ from 0, so that nothing
    that is left out of a computation goes unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            drawn = torch.randn(tensor.shape, generator=generator)
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + drawn.abs())
            elif tensor.ndim < 2:
                tensor.copy_(
                    0.3 * drawn + (1 if name.endswith(("weight", "lambda1", "gamma")) else 0)
                )
            else:
                tensor.copy_(drawn * (2 / tensor[0].numel()) ** 0.5)
