"""The paper's gradients (arXiv 2512.22473) written out by hand, without autograd: ``loss``, ``attention``, ``layer``.

Shapes: ``B`` batch, ``H`` query heads, ``G`` key/value heads (query head ``h`` reads ``h // (H / G)``), ``T`` queries,
``S`` keys, ``N`` input width, ``D`` query and key width, ``E`` value width, ``C`` classes or output width. Vectors are
rows and weight matrices ``[in, out]``. ``...`` may be nothing at all: the smallest case is one head, ``[T, D]``.
"""
