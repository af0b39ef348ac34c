import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from attnprobe.alarms.losses import ENOUGH, INFORMED, LATELY, LossHistory
from attnprobe.errors import ConfigurationError
from tests.reproducible import reproducible


def history(losses, uninformed=None):
    result = LossHistory(uninformed)
    for step, loss in enumerate(losses):
        result.observe(step, loss)
    return result


@reproducible(300)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2 * ENOUGH, max_size=60))
@example([10.0] * 3 + [0.0] * 9 + [-422.0] + [0.0] * 9 + [-423.0])  # falls by less than a hundredth of the first losses
@example([10.0] * 5 + [-422.0] + [0.0] * 4 + [-9.0])  # an odd number of losses
def test_average_and_trend_agree_with_numpy(losses):
    result = history(losses)
    weights = 0.9 ** np.arange(len(losses))[::-1]
    np.testing.assert_allclose(result.average(), np.average(losses, weights=weights), rtol=1e-9, atol=1e-9)
    seen = np.array(losses[-20:])
    before, last = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    error = np.sqrt(before.var(ddof=1) / len(before) + last.var(ddof=1) / len(last))
    fall, material = before.mean() - last.mean(), 0.01 * abs(np.median(losses[:5]))
    assume(error > 1e-6 and abs(fall - material) > 1e-9)
    expected = 0.0 if 0 < fall < material else fall / error
    np.testing.assert_allclose(result.trend(), expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_known_of_a_short_history():
    assert history([2.0] * 4, uninformed=2.0).progress() is None
    assert history([2.0] * 5, uninformed=2.0).progress() is False
    assert history([2.0] * (2 * ENOUGH - 1)).progress() is None
    assert history([2.0] * (2 * ENOUGH - 1)).trend() is None
    assert history([2.0] * 2 * ENOUGH).progress() is False
    assert history([2.0] * 2 * ENOUGH).trend() == 0.0


def test_progress_against_the_uninformed_loss():
    assert history([1.97] * 5, uninformed=2.0).progress() is False
    assert history([1.95] * 5, uninformed=2.0).progress() is True


def test_a_bad_first_loss_is_soon_forgotten():
    assert history([10.0] + [1.5] * 20, uninformed=2.0).progress() is True


def test_trend_of_losses_without_noise():
    assert history([2.0] * 10 + [1.0] * 10).trend() == math.inf
    assert history([1.0] * 10 + [2.0] * 10).trend() == -math.inf
    assert history([1.0] * 20).trend() == 0.0


def test_three_standard_errors_are_a_trend():
    noise = [-1.0, 1.0] * 5
    error = math.sqrt(2 * np.var(noise, ddof=1) / 10)

    def falling(z):
        return history([100 + z * error + x for x in noise] + [100 + x for x in noise])

    assert falling(2.9).progress() is False
    assert falling(3.1).progress() is True


def test_a_converged_run_has_learned():
    assert history([4.0] * 10 + [0.5] * 100).progress() is True
    assert history([4.0] * 10 + [4.0 * (INFORMED - 0.01)] * 100).progress() is True  # and one that came a little way
    assert history([4.0] * 10 + [4.0 * (INFORMED + 0.01)] * 100).progress() is False
    assert history([4.0] + [3.0] * 100).progress() is True  # most of the way was gone at once
    assert history([3.0] + [4.0] * 100).progress() is False
    assert history([-4.0] * 100).progress() is False
    assert history([0.0] * 100).progress() is False


def test_a_loss_that_fell_below_zero_has_fallen():
    assert history([2.3] * 10 + [-5.0] * 100).progress() is True
    assert history([-1.0] * 10 + [-5.0] * 100).progress() is True
    assert history([-5.0] * 10 + [-1.0] * 100).progress() is False
    assert history([0.0] * 10 + [-1.0] * 100).progress() is True


def test_the_uninformed_loss_alone_tells_who_learned_nothing_but_frequencies():
    losses = [4.0] * 10 + [2.0] * 100
    assert history(losses).progress() is True
    assert history(losses, uninformed=2.0).progress() is False


def test_fall_is_a_share_of_the_first_losses():
    assert history([4.0] * (2 * LATELY - 1)).fall() is None
    assert history([4.0] * 2 * LATELY).fall() == 0.0
    assert history([4.0] * LATELY + [3.0] * LATELY).fall() == pytest.approx(0.25)
    assert history([4.0] * LATELY + [5.0] * LATELY).fall() == pytest.approx(-0.25)
    assert history([4.0] * 50 + [2.0] * LATELY + [1.0] * LATELY).fall() == pytest.approx(0.25)


def test_fall_sees_only_the_last_losses():
    assert history([4.0] * LATELY + [1.0] * 2 * LATELY).fall() == 0.0


def test_one_bad_first_loss_is_no_scale():
    assert history([1e6] + [4.0] * (2 * LATELY - 1) + [3.0] * LATELY).fall() == pytest.approx(0.25)


def test_negative_losses_fall_too():
    assert history([-4.0] * LATELY + [-5.0] * LATELY).fall() == pytest.approx(0.25)
    assert history([-4.0] * LATELY + [-3.0] * LATELY).fall() == pytest.approx(-0.25)


def test_losses_that_begin_at_zero_have_no_scale():
    assert history([0.0] * ENOUGH + [1.0] * LATELY).fall() is None


def test_losses_that_are_not_finite_do_not_poison():
    clean, dirty = history([2.0] * 20), history([2.0] * 10 + [math.nan, math.inf, -math.inf] + [2.0] * 10)
    assert (dirty.average(), dirty.trend()) == pytest.approx((clean.average(), clean.trend()))


def test_memory_is_bounded():
    assert len(history([1.0] * 1000).recent) == 20


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_an_uninformed_loss_must_be_a_positive_number(value):
    with pytest.raises(ConfigurationError, match="uninformed_loss"):
        LossHistory(value)
