"""What no implementation of the statistics can do without: matrix products and exponentials of all pairs."""

from __future__ import annotations

import torch

from benchmarks.attention import WIDTH, Attention

TILE = (256, 512)


class Floor:
    """Two products (scores, and errors with values) and one exp2 per pair, tile by tile, and nothing else."""

    def __init__(self, attention: Attention) -> None:
        query, key, value = (tensor.detach().flatten(0, 1) for tensor in attention.inputs)
        error = attention.upstream.flatten(0, 1)
        self.items, tokens = query.shape[:2]
        self.elements = self.items * tokens * tokens
        self.flops = 4 * WIDTH * self.elements
        self.left = [(query * WIDTH**-0.5).split(TILE[0], 1), error.split(TILE[0], 1)]
        self.right = [[block.mT for block in tensor.split(TILE[1], 1)] for tensor in (key, value)]
        shape = min(TILE[0], tokens), min(TILE[1], tokens)
        self.scores, self.weights, self.products = (torch.zeros(shape) for _ in range(3))

    def run(self, products: bool = True, exponentials: bool = True) -> None:
        """Both, or one of them alone."""
        for query, error in zip(*self.left, strict=True):
            for key, value in zip(*self.right, strict=True):
                for item in range(self.items):
                    if products:
                        torch.mm(query[item], key[item], out=self.scores)
                    if exponentials:
                        torch.exp2(self.scores, out=self.weights)
                    if products:
                        torch.mm(error[item], value[item], out=self.products)
