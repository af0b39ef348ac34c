"""Content-based value routing beyond softmax: layers ``o_i = sum_j M_ij v_j`` and what their gradients do to ``M``.

``linear`` and ``selective`` derive the analogue of the paper's advantage (arXiv 2512.22473) for linear attention and
for a selective state-space layer; ``layers`` trains them, ``observe`` measures. ``docs/beyond-softmax.md`` has the
derivation. Shapes: ``T`` tokens, ``N`` input width, ``K`` width of queries and keys (the state of a state-space layer),
``E`` value width; ``...`` are batch, heads or seeds. All layers are causal: ``M_ij = 0`` for ``j > i``.
"""
