"""The same training step, observed by different tools: how each comes by every head's entropy and error.

Every function builds a step that trains once and returns what it learned of the heads: the entropy of their attention
and the size of the gradient at their outputs, ``[layers, heads]`` each, or None for what it does not give. What is
written here is what the tools' own documentation shows.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpt2 import Sizes, Trainer
from benchmarks.options import silent_probe

Numbers = list[list[float]]
Observed = tuple[Numbers | None, Numbers | None]
Observer = Callable[[], Observed]


def entropy(weights: Tensor) -> list[float]:
    """Per head, mean over the queries that see more than their own key, of causal ``[B, H, T, S]``."""
    numbers: list[float] = torch.special.entr(weights.detach()).sum(-1)[..., 1:].mean((0, 2)).tolist()
    return numbers


def error_norm(gradient: Tensor, heads: int) -> list[float]:
    """Per head, root mean square over queries, of ``[B, T, H * D]`` or ``[B, T, H, D]``."""
    vectors = gradient.reshape(*gradient.shape[:2], heads, -1)
    numbers: list[float] = vectors.square().sum(-1).mean((0, 1)).sqrt().tolist()
    return numbers


def plain(sizes: Sizes, tokens: int) -> Observer:
    """SDPA, nobody looks."""
    trainer = Trainer(sizes, tokens)

    def step() -> Observed:
        trainer.step()
        return None, None

    return step


def attnprobe(sizes: Sizes, tokens: int, statistics: str) -> Observer:
    trainer = Trainer(sizes, tokens)
    probe = silent_probe(trainer.model, statistics=statistics)

    def step() -> Observed:
        probe.begin()
        report = probe.step(trainer.step())
        assert report is not None
        assert not report.invalid, report.invalid
        probe.discard()
        return report["entropy"].tolist(), report["error_norm"].tolist()

    return step


def eager(sizes: Sizes, tokens: int) -> Observer:
    """Transformers alone: attention written out, its weights returned and kept with their gradients."""
    trainer = Trainer(sizes, tokens, "eager")
    errors: dict[int, Tensor] = {}

    def watch(index: int, module: nn.Module, inputs: tuple[Tensor]) -> None:
        inputs[0].register_hook(partial(errors.__setitem__, index))

    for index, block in enumerate(trainer.model.transformer.h):
        block.attn.c_proj.register_forward_pre_hook(partial(watch, index))

    def step() -> Observed:
        output = trainer.forward(output_attentions=True)
        for weights in output.attentions:
            weights.retain_grad()
        output.loss.backward()
        trainer.update()
        found = [entropy(weights) for weights in output.attentions]
        return found, [error_norm(errors[index], sizes.heads) for index in range(sizes.layers)]

    return step


def nnsight(sizes: Sizes, tokens: int) -> Observer:
    trainer = Trainer(sizes, tokens, "eager")
    package: Any = importlib.import_module("nnsight")
    traced, save = package.NNsight(trainer.model), package.save

    def step() -> Observed:
        with traced.trace(trainer.batch, labels=trainer.batch):
            contexts, found, errors = [], save([]), save([])
            for block in traced.transformer.h:
                contexts.append(block.attn.c_proj.input)
                found.append(entropy(block.attn.output[1]))
            with traced.output.loss.backward():
                for context in reversed(contexts):
                    errors.append(error_norm(context.grad, sizes.heads))
        trainer.update()
        return found, errors[::-1]

    return step


class Loss(nn.Module):
    """A model whose output is its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(batch, labels=batch).loss
        return loss


def torchlens(sizes: Sizes, tokens: int) -> Observer:
    lens: Any = importlib.import_module("torchlens")
    trainer = Trainer(sizes, tokens, "eager")
    model, context = Loss(trainer.model), lens.func("reshape")  # the heads' outputs, put side by side
    saved = lens.func("softmax") | context | lens.func("cross_entropy")

    def step() -> Observed:
        log = lens.trace(model, trainer.batch, save=saved, capture=lens.options.CaptureOptions(save_grads=context))
        log.log_backward(log[log.output_layers[0]].out)
        trainer.update()
        found = [entropy(op.out) for op in log.ops if op.func_name == "softmax"]
        return found, [error_norm(op.grad, sizes.heads) for op in log.ops if op.func_name == "reshape"]

    return step


def transformer_lens(sizes: Sizes, tokens: int) -> Observer:
    builder: Any = importlib.import_module("transformer_lens.model_bridge.sources._bridge_builder")
    model = sizes.model(tokens, "eager")
    bridge = builder.build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)
    optimizer, batch = torch.optim.AdamW(bridge.parameters(), lr=1e-4), sizes.batch(tokens)

    def wanted(name: str) -> bool:
        return name.endswith(("attn.hook_pattern", "attn.o.hook_in"))

    def step() -> Observed:
        _, cache = bridge.run_with_cache(batch, return_type="loss", names_filter=wanted, incl_bwd=True)
        optimizer.step()
        optimizer.zero_grad()
        layers = [f"blocks.{index}.attn" for index in range(sizes.layers)]
        found = [entropy(cache[f"{layer}.hook_pattern"]) for layer in layers]
        return found, [error_norm(cache[f"{layer}.o.hook_in_grad"], sizes.heads) for layer in layers]

    return step


def module_monitor(sizes: Sizes, tokens: int) -> Observer:
    """Its attention monitor is called from the model's attention function, and the gradient logged from a hook."""
    package: Any = importlib.import_module("torch_module_monitor")
    transformers: Any = importlib.import_module("transformers")
    masks: Any = importlib.import_module("transformers.masking_utils")
    sdpa: Any = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    monitor = package.ModuleMonitor(monitor_step_fn=lambda step: True)
    names: dict[nn.Module, str] = {}

    def log_error(name: str, gradient: Tensor) -> None:
        for head, squares in enumerate(gradient.square().sum(-1).unbind(2)):
            monitor.log_tensor(f"error/{name}.head_{head}", squares)

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        output, weights = sdpa(module, query, key, value, mask, **options)
        package.monitor_scaled_dot_product_attention(
            monitor, module, query, key, value, attn_mask=mask, is_causal=mask is None, activation=output.mT
        )
        output.register_hook(partial(log_error, names[module]))
        return output, weights

    transformers.AttentionInterface.register("monitored", attention)
    masks.AttentionMaskInterface.register("monitored", masks.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    trainer = Trainer(sizes, tokens, "monitored")
    monitor.set_module(trainer.model)
    names.update({module: name for name, module in trainer.model.named_modules()})
    layers = [f"transformer.h.{index}.attn" for index in range(sizes.layers)]
    steps = itertools.count()

    def step() -> Observed:
        monitor.begin_step(next(steps))
        trainer.forward().loss.backward()
        trainer.update()
        monitor.end_step()
        metrics = monitor.get_step_metrics()  # means over all queries; the first one's entropy is 0
        keys = [[f"{layer}.head_{head}" for head in range(sizes.heads)] for layer in layers]
        found = [[metrics[f"attention_entropy/{key}"] * tokens / (tokens - 1) for key in row] for row in keys]
        return found, [[metrics[f"error/{key}"] ** 0.5 for key in row] for row in keys]

    return step
