"""Models of torchvision, and with them those of timm and x-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from tests.matrix import timm_models, xtransformers_models
from tests.matrix.checkpoints import checkpoint_blocks
from tests.matrix.fresh import fresh
from tests.matrix.images import CLASSES, DEPTH, HEADS, PATCH, SIDE, WIDTH, images, loss
from tests.matrix.variant import Variant

_PLAIN = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_layers": DEPTH,
    "num_heads": HEADS,
    "hidden_dim": WIDTH,
    "mlp_dim": WIDTH,
    "num_classes": CLASSES,
}
_WINDOWS = {
    "patch_size": [2, 2],
    "embed_dim": WIDTH,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [3, 3],
    "stochastic_depth_prob": 0.0,
    "num_classes": CLASSES,
}
_WINDOWS_V2 = {**_WINDOWS, "block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
_SWIN_ROWS = {f"features.{stage}.{block}.attn": heads for stage, heads in ((1, 2), (3, 4)) for block in range(2)}


def _make(cls: type[nn.Module], config: Mapping[str, Any], dropout: float) -> nn.Module:
    return fresh(lambda: cls(**config, attention_dropout=dropout))


def _variant(
    name: str,
    kind: str,
    cls: type[nn.Module],
    config: Mapping[str, Any],
    layers: Mapping[str, int],
    block: type[nn.Module],
) -> Variant:
    return Variant(
        name=f"torchvision-{name}",
        library="torchvision",
        kind=kind,
        make=partial(_make, cls, config),
        batch=images,
        loss=loss,
        layers=layers,
        checkpoint=partial(checkpoint_blocks, block),
    )


_TORCHVISION = (
    _variant(
        "vit",
        "multihead",
        VisionTransformer,
        _PLAIN,
        {f"encoder.layers.encoder_layer_{layer}.self_attention": HEADS for layer in range(DEPTH)},
        EncoderBlock,
    ),
    _variant("swin", "softmax", SwinTransformer, _WINDOWS, _SWIN_ROWS, SwinTransformerBlock),
    _variant("swin-v2", "softmax", SwinTransformer, _WINDOWS_V2, _SWIN_ROWS, SwinTransformerBlockV2),
)

VARIANTS: tuple[Variant, ...] = (*_TORCHVISION, *timm_models.VARIANTS, *xtransformers_models.VARIANTS)

#: The weights that multiply the values are no softmax any more: such layers cannot be measured, and say so.
ALTERED: tuple[Variant, ...] = (*timm_models.ALTERED, *xtransformers_models.ALTERED)
