"""Runnable experiments on the paper (arXiv 2512.22473).

``toy`` is its closed form, ``markov`` its task, ``paper`` its other claims and open questions.
"""
