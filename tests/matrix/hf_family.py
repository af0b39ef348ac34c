"""Transformers architectures: one variant of the matrix for each attention implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tests.matrix.fresh import VOCABULARY, Draw, fresh, lengths_mask
from tests.matrix.variant import Batch, Variant

TOKENS, SEQUENCES, PADDED_LENGTHS, PROMPT = 10, 2, (10, 6), 4
DEPTH, HEADS, GROUPS, WIDTH = 2, 4, 2, 32
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SIZES = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
KINDS = {"eager": "softmax", "sdpa": "sdpa", "flex_attention": "flex"}


def rows(*templates: str, heads: int = HEADS, depth: int = DEPTH) -> dict[str, int]:
    """Layer by layer, the modules that ``templates`` name, with their number of heads."""
    return {template.format(layer): heads for layer in range(depth) for template in templates}


def checkpoint(model: Any, use_reentrant: bool) -> None:
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()


def same(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        name: beginning of the variants' names.
        auto: the ``Auto...`` class that builds it.
        model_type: of its configuration.
        config: options of its configuration, beside which every dropout is 0.
        layers: as in ``Variant``.
        batch: as in ``Variant``.
        implementations: those that it has.
        single: those whose softmax is float32 whatever the model is.
        dropout: the configuration's options for dropout on the attention weights, dotted where nested.
        after: what becomes of the model just built.
        loss_options: for the forward pass.
        checkpoint: as in ``Variant``.
        generate: as in ``Variant``.
    """

    name: str
    auto: Any
    model_type: str
    config: Mapping[str, Any]
    layers: Mapping[str, int]
    batch: Callable[[int], Batch]
    implementations: Sequence[str] = ("eager", "sdpa", "flex_attention")
    single: Sequence[str] = ()
    dropout: Sequence[str] = ("attention_dropout",)
    after: Callable[[PreTrainedModel], nn.Module] = same
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Callable[[nn.Module, bool], object] = checkpoint
    generate: Callable[[nn.Module, Batch], object] | None = None

    def variant(self, implementation: str) -> Variant:
        return Variant(
            name=f"{self.name}-{implementation.removesuffix('_attention')}",
            library="transformers",
            kind=KINDS[implementation],
            make=partial(self._make, implementation),
            batch=self.batch,
            loss=self._loss,
            layers=self.layers,
            checkpoint=self.checkpoint,
            dropout=bool(self.dropout) and implementation != "flex_attention",  # which refuses it
            double=implementation not in self.single,
            generate=self.generate,
            padded="attention_mask" in self.batch(0),
        )

    def _make(self, implementation: str, dropout: float) -> nn.Module:
        config = AutoConfig.for_model(self.model_type, **self.config)
        config.use_cache = False
        without_dropout(config)
        for path in self.dropout:
            *parents, name = path.split(".")
            setattr(reduce(getattr, parents, config), name, dropout)
        # Grouped products of experts are not there in float64.
        options = {"attn_implementation": implementation, "experts_implementation": "eager"}
        return fresh(lambda: self.after(self.auto.from_config(config, **options)))

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch, **self.loss_options).loss


def variants(families: Sequence[Family], *implementations: str) -> tuple[Variant, ...]:
    return tuple(f.variant(i) for f in families for i in f.implementations if i in implementations)


def without_dropout(config: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


# Batches


def text(seed: int, *, padded: bool = False) -> Batch:
    draw = Draw(seed)
    ids, labels = draw.ids(SEQUENCES, TOKENS), draw.ids(SEQUENCES, TOKENS)
    if not padded:
        return {"input_ids": ids, "labels": labels}
    mask = lengths_mask(PADDED_LENGTHS, TOKENS)
    labels = labels.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def text_pairs(seed: int, *, padded: bool = False) -> Batch:
    """A source for the encoder, and the decoder's targets, which are shorter."""
    targets = Draw(seed + 1).ids(SEQUENCES, TOKENS - 2)
    return {**text(seed, padded=padded), "labels": targets}


def speech(seed: int, *, bins: int = 8) -> Batch:
    """As Whisper wants it: two frames for each of the encoder's tokens."""
    draw = Draw(seed)
    return {"input_features": draw.normal(SEQUENCES, bins, 2 * TOKENS), "labels": draw.ids(SEQUENCES, TOKENS - 2)}


def images(seed: int, *, size: int = 12) -> Batch:
    draw = Draw(seed)
    return {"pixel_values": draw.normal(SEQUENCES, 3, size, size), "labels": draw.classes(2, SEQUENCES)}


def images_and_text(seed: int) -> Batch:
    """As CLIP wants it: the text's last token says that it ends."""
    both = {**images(seed), **text(seed, padded=True)}
    del both["labels"]
    both["input_ids"][range(SEQUENCES), [length - 1 for length in PADDED_LENGTHS]] = IDS["eos_token_id"]
    return both


# Inference


def continue_text(model: Any, batch: Batch) -> object:
    prompt = batch["input_ids"][:, :PROMPT]
    return model.generate(prompt, max_new_tokens=3, do_sample=False, use_cache=True)


def decode(model: Any, batch: Batch) -> object:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=True)
