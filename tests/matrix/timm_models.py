"""Models of timm, with torch's fused attention and with attention written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm.layers
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.cait import Cait
from timm.models.eva import Eva, EvaBlock
from timm.models.nest import Nest
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.twins import Block as TwinsBlock
from timm.models.twins import Twins
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.matrix.checkpoints import checkpoint_blocks
from tests.matrix.fresh import fresh
from tests.matrix.images import CLASSES, DEPTH, HEADS, PATCH, SIDE, WIDTH, images, loss
from tests.matrix.variant import Variant

_ALL = {"img_size": SIDE, "num_classes": CLASSES}
_PLAIN = {**_ALL, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "global_pool": "avg"}
#: Six by six tokens in windows of three by three, half of the blocks shifted; then one window.
_WINDOWS = {
    **_ALL,
    "patch_size": 2,
    "embed_dim": WIDTH,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 3,
    "drop_path_rate": 0.0,
}
#: The first stage attends from 36 tokens to 9 made of them; the second to all of its 9.
_PYRAMID = {
    "num_classes": CLASSES,
    "depths": (1, 1),
    "embed_dims": (16, 32),
    "num_heads": (2, 4),
    "sr_ratios": (2, 1),
    "mlp_ratios": (2, 2),
}
#: Within windows of two by two, then to one token for each of them.
_TWINS = {
    **_ALL,
    "patch_size": 2,
    "embed_dims": (WIDTH,),
    "num_heads": (HEADS,),
    "mlp_ratios": (2,),
    "depths": (2,),
    "sr_ratios": (2,),
    "wss": (2,),
}
#: Four blocks of nine tokens, then one block of nine: ``[B, H, blocks, T, D]``.
_NEST = {
    **_ALL,
    "patch_size": 2,
    "num_levels": 2,
    "embed_dims": (16, 32),
    "num_heads": (2, 4),
    "depths": (1, 1),
    "drop_path_rate": 0.0,
}
_SWIN_ROWS = {f"layers.{stage}.blocks.{block}.attn": 2 * stage + 2 for stage in range(2) for block in range(2)}
_BLOCKS = {f"blocks.{block}.attn": HEADS for block in range(DEPTH)}


def _variants(
    name: str,
    cls: type[nn.Module],
    config: Mapping[str, Any],
    layers: Mapping[str, int],
    kinds: Sequence[str],
    *,
    side: int = SIDE,
    block: type[nn.Module] | None = None,
) -> list[Variant]:
    return [
        Variant(
            name=f"timm-{name}-{'fused' if kind == 'sdpa' else 'unfused'}",
            library="timm",
            kind=kind,
            make=partial(_make, cls, config, kind == "sdpa"),
            batch=partial(images, side=side),
            loss=loss,
            layers=layers,
            checkpoint=_checkpoint if block is None else partial(checkpoint_blocks, block),
        )
        for kind in kinds
    ]


def _make(cls: type[nn.Module], config: Mapping[str, Any], fused: bool, dropout: float) -> nn.Module:
    model = fresh(lambda: cls(**config, attn_drop_rate=dropout))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def _checkpoint(model: Any, use_reentrant: bool) -> None:
    """Which kind timm uses is one setting for all models, read as they run.

    The reentrant kind refuses blocks that are called with keyword arguments; such models are wrapped instead.
    """
    timm.layers.set_reentrant_ckpt(use_reentrant)
    model.set_grad_checkpointing()


_BOTH = ("sdpa", "softmax")

VARIANTS: tuple[Variant, ...] = (
    *_variants("vit", VisionTransformer, _PLAIN, _BLOCKS, _BOTH),
    *_variants("vit-qk-norm", VisionTransformer, {**_PLAIN, "qk_norm": True}, _BLOCKS, _BOTH),
    *_variants("vit-map", VisionTransformer, {**_PLAIN, "global_pool": "map"}, {**_BLOCKS, "attn_pool": HEADS}, _BOTH),
    *_variants("beit", Beit, {**_PLAIN, "use_rel_pos_bias": True}, _BLOCKS, _BOTH, block=BeitBlock),
    *_variants(
        "eva",
        Eva,
        {**_PLAIN, "use_rot_pos_emb": True, "qkv_fused": False, "swiglu_mlp": True},
        _BLOCKS,
        _BOTH,
        block=EvaBlock,
    ),
    *_variants("swin", SwinTransformer, _WINDOWS, _SWIN_ROWS, _BOTH),
    *_variants("swin-v2", SwinTransformerV2, _WINDOWS, _SWIN_ROWS, ["softmax"]),
    *_variants(
        "pvt",
        PyramidVisionTransformerV2,
        _PYRAMID,
        {f"stages.{stage}.blocks.0.attn": heads for stage, heads in ((0, 2), (1, 4))},
        _BOTH,
        side=2 * SIDE,
    ),
    *_variants(
        "twins", Twins, _TWINS, {f"blocks.0.{block}.attn": HEADS for block in range(2)}, _BOTH, block=TwinsBlock
    ),
    *_variants(
        "nest", Nest, _NEST, {f"levels.{i}.transformer_encoder.0.attn": heads for i, heads in ((0, 2), (1, 4))}, _BOTH
    ),
)

#: Heads are mixed after the softmax: in ``blocks`` no head's weights are a softmax, so these cannot be measured.
ALTERED: tuple[Variant, ...] = tuple(
    _variants(
        "cait",
        Cait,
        {**_PLAIN, "global_pool": "token", "depth_token_only": 1, "init_values": 1.0},
        {**_BLOCKS, "blocks_token_only.0.attn": HEADS},
        _BOTH,
    )
)
