"""The variance of whitened data without object, and when nothing can be said of it."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from voxelsigma.noise.fourier import fft_centred
from voxelsigma.noise.whitened_variance import OuterLines, whitened_variance

Complex = npt.NDArray[np.complexfloating[Any, Any]]

LINES, COILS, LENGTH = 160, 8, 256


def white(seed: int, lines: int = LINES, variance: float = 2.0) -> Complex:
    parts = np.random.default_rng(seed).standard_normal((2, lines, COILS, LENGTH)) * math.sqrt(variance / 2)
    return np.asarray(parts[0] + 1j * parts[1])


def box(width: float, height: float = 300.0) -> Complex:
    """K-space of an object over a part of the readout, smooth along the lines: (lines, coils, k0)."""
    x = (np.arange(LENGTH) - LENGTH // 2) / LENGTH
    y = (np.arange(LINES) - LINES // 2) / (LINES // 2)
    along = np.where(np.abs(x) < width / 2, height, 0) * np.ones(COILS)[:, None]
    return np.asarray(fft_centred(along.astype(complex))) * np.exp(-((8 * y) ** 2))[:, None, None]


def judged(samples: Complex, *, oversampled: bool = True) -> Any:
    lines = OuterLines()
    lines.add(samples, np.abs(np.arange(len(samples)) - len(samples) // 2) / len(samples))
    return whitened_variance(*lines.split(), oversampled=oversampled)


@pytest.mark.parametrize("variance", [1.0, 2.0, 4.0])
def test_the_variance_is_found_beside_an_object(variance: float) -> None:
    found = judged(white(1, variance=variance) + box(0.45))
    # 8 lines of about 52 empty positions of 8 coils: an error of 1.7 %; five of these
    assert found.samples > 3000
    assert found.value == pytest.approx(variance, rel=5 / math.sqrt(found.samples))


def test_noise_alone_has_its_variance() -> None:
    found = judged(white(2))
    assert found.value == pytest.approx(2, rel=5 / math.sqrt(found.samples))


def test_an_object_that_fills_the_readout_gives_no_verdict() -> None:
    found = judged(white(3) + box(1.2))
    assert found.value is None
    assert "no part of the readout is free of object" in found.reason


def test_too_few_samples_give_no_verdict() -> None:
    found = judged(white(4, lines=10))
    assert found.value is None
    assert f"{found.samples} samples without object in the outermost lines; 1112 are needed" == found.reason
    assert whitened_variance(*OuterLines().split(), oversampled=False).reason == "no lines"


def test_data_of_zeros_give_no_verdict() -> None:
    assert judged(np.zeros((LINES, COILS, LENGTH), complex)).value is None


def test_memory_is_bounded_and_the_right_lines_are_kept() -> None:
    lines = OuterLines(most_bytes=20 * COILS * LENGTH * 16)
    rng = np.random.default_rng(5)
    order = rng.permutation(4000)
    for part in np.split(order, 80):
        # each line holds its own number
        lines.add(np.ones((len(part), COILS, LENGTH)) * (part[:, None, None] + 0j), part.astype(np.float64))
        assert sum(map(len, lines._samples)) <= 4 * 20 + len(part)
    outer, central = lines.split()
    assert outer[:, 0, 0].real.tolist() == list(range(3999, 3979, -1))
    assert central[:, 0, 0].real.tolist() == list(range(20))


def test_all_lines_count_where_memory_allows() -> None:
    lines = OuterLines()
    lines.add(np.ones((100, COILS, 8)) * (np.arange(100)[:, None, None] + 0j), np.arange(100.0))
    outer, central = lines.split()
    assert outer[:, 0, 0].real.tolist() == [99, 98, 97, 96, 95]
    assert central[:, 0, 0].real.tolist() == list(range(25))
