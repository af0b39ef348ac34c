"""The retrieval task: every answer is there to be found, and what is measured on it."""

import math

import torch

from attnprobe.experiments.ensemble.model import IGNORED, Ensemble
from attnprobe.experiments.retrieval import CLASSES, FORM, KEYS, asked_keys, correct_weight, look, retrieval


def test_the_answer_is_the_class_of_the_key_that_is_asked_for():
    task = retrieval((0, 1), sequences=5, batch=4)
    assert task.x.shape == (5, 2, 16, FORM.width)
    assert task.held_x.shape[0] == 4
    for sequence in range(5):
        for seed in range(2):
            x, y = task.x[sequence, seed], task.y[sequence, seed]
            assert (y[:KEYS] == IGNORED).all()
            classes = {int(token[:KEYS].argmax()): int(token[KEYS : KEYS + CLASSES].argmax()) for token in x[:KEYS]}
            assert sorted(classes) == list(range(KEYS))
            asked = [int(token[KEYS + CLASSES :].argmax()) for token in x[KEYS:]]
            assert asked_keys(x).tolist() == asked
            assert y[KEYS:].tolist() == [classes[key] for key in asked]
    assert (x.sum(-1) == torch.tensor([2.0] * KEYS + [1.0] * KEYS)).all()


def test_kinds_of_queries():
    for kinds in (1, 3):
        assert set(asked_keys(retrieval((0,), kinds=kinds).x).unique().tolist()) == set(range(kinds))


def test_seeds_have_sequences_of_their_own_and_keep_them():
    one, two = retrieval((4, 5), sequences=6), retrieval((5,), sequences=6)
    assert torch.equal(one.x[:, 1], two.x[:, 0])
    assert not torch.equal(one.x[:, 0], one.x[:, 1])
    assert not torch.equal(one.x[0], one.x[1])


def test_a_head_that_looks_the_key_up_is_seen_to():
    """Queries and keys that hold the key make attention as sharp as one likes."""
    task = retrieval((0, 1), sequences=2, batch=8)
    model = Ensemble(FORM, (0, 1))
    layer = model.attention[0]
    with torch.no_grad():
        layer.W_Q.zero_()
        layer.W_K.zero_()
        layer.W_Q[0, 0, KEYS + CLASSES :, :KEYS] = 100 * torch.eye(KEYS)
        layer.W_K[0, 0, :KEYS, :KEYS] = torch.eye(KEYS)
    weights, entropy = look(model, task.held_x)
    torch.testing.assert_close(weights[0], torch.ones(1, KEYS))
    assert float(entropy[0]) < 1e-6
    # The other seed has no queries: uniform attention over 16 tokens.
    torch.testing.assert_close(weights[1], torch.full((1, KEYS), 1 / 16))
    torch.testing.assert_close(entropy[1], torch.ones(1))


def test_kinds_that_are_never_asked_for_are_unknown():
    weights, _ = look(Ensemble(FORM, (0,)), retrieval((0,), kinds=2, sequences=2).held_x)
    assert weights[0, 0].isnan().tolist() == [False] * 2 + [True] * 6


def test_correct_weight_of_several_heads():
    x = retrieval((0, 1), sequences=3).x[:3]
    random = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 2 * 2, 16, 16, generator=random).softmax(-1)
    found = correct_weight(attention, x)
    for sequence, seed, head, query in ((0, 0, 0, 0), (2, 1, 0, 3), (1, 1, 1, 7)):
        key = int(asked_keys(x)[sequence, seed, query])
        token = int(x[sequence, seed, :KEYS, key].argmax())
        assert found[sequence, seed, head, query] == attention[sequence, 2 * seed + head, KEYS + query, token]
    assert math.isclose(float(found.mean()), 1 / 16, rel_tol=0.1)
