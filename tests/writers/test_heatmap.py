"""Pictures without a plotting library."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sample_reports import head_map

from attnprobe.report import HeadMap
from attnprobe.writers.heatmap import SIDE, beside, colourize, glyphs, head_picture, panel, png


def test_png_is_what_another_decoder_reads() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 13, 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(png(pixels)))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_pixel_is_a_square_of_one_colour_and_nan_is_grey() -> None:
    values = np.array([[0.0, 1.0], [math.nan, 0.5]])
    image = panel(values)
    half = SIDE // 2
    corners = [
        image[i * half : (i + 1) * half, j * half : (j + 1) * half].reshape(-1, 3) for i in (0, 1) for j in (0, 1)
    ]
    assert all((corner == corner[0]).all() for corner in corners)
    assert [corner[0].tolist() for corner in corners] == [[68, 1, 84], [253, 231, 37], [176] * 3, [33, 145, 140]]


def test_the_signed_scale_is_centred_at_zero() -> None:
    image = panel(np.array([[-2.0, 0.0, 1.0]]), diverging=True)
    negative, zero, positive = (image[0, column].astype(int) for column in (10, SIDE // 2, SIDE - 10))
    assert zero.min() > 240
    assert negative[2] > negative[0]
    assert positive[0] > positive[2]
    assert negative.sum() < positive.sum(), "half as far from zero is paler"


def test_the_colour_bar_runs_over_the_whole_scale() -> None:
    image = panel(np.zeros((1, 1)))
    assert image[SIDE + 10, 0].tolist() == [68, 1, 84]
    assert image[SIDE + 10, SIDE - 1].tolist() == [253, 231, 37]


def test_magnitudes_grow_lighter() -> None:
    light = colourize(np.linspace(0, 1, 50), ("440154", "21918c", "fde725")).astype(int) @ [299, 587, 114]
    assert (np.diff(light) >= 0).all()


@pytest.mark.parametrize(
    ("rows", "columns", "forward_only", "size"),
    [
        (64, 64, False, (4 * 12 + 3 * 256, 24 + 256 + 30)),
        (64, 64, True, (2 * 12 + 256, 24 + 256 + 30)),
        (1, 1, False, (4 * 12 + 3 * 256, 24 + 256 + 30)),
        (5, 40, False, (4 * 12 + 3 * 256, 24 + 5 * 6 + 30)),
        (60, 3, True, (2 * 12 + 256, 24 + 60 * 4 + 30)),
    ],
)
def test_size(rows: int, columns: int, forward_only: bool, size: tuple[int, int]) -> None:
    image = head_picture(head_map(rows=rows, columns=columns, forward_only=forward_only))
    assert (image.shape[1], image.shape[0]) == size


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf, 1e300, 1e-300])
def test_any_number_can_be_drawn(value: float) -> None:
    values = torch.full((3, 3), value, dtype=torch.float64)
    for dtype in (torch.float64, torch.bfloat16):
        picture = HeadMap("a", 0, values.to(dtype), values.to(dtype), -values.to(dtype), torch.ones(1, 2), (0,))
        assert head_picture(picture).dtype == np.uint8
    assert beside([panel(np.empty((0, 0)))]).size


def test_glyphs_tell_numbers_apart() -> None:
    numbers = [f"{value:.3g}" for value in (0, 1, 0.42, -0.42, 3.21e-9, 1.5e10, 0.0107, -765000.0, 8.9)]
    drawn = [glyphs(number) for number in numbers]
    assert len({mask.tobytes() for mask in drawn}) == len(numbers)
    assert {mask.shape[0] for mask in drawn} == {10}
    assert max(mask.shape[1] for mask in drawn) < SIDE // 3
