"""How alike images and maps are, against their formulas written out."""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from voxelsigma.training.metrics import correlation, normalized_error, object_error, psnr, ssim


def images(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(shape, dtype=torch.complex64, generator=generator) + 3
    return truth + 0.3 * torch.randn(shape, dtype=torch.complex64, generator=generator), truth


def test_psnr_of_a_known_error() -> None:
    reference = torch.tensor([[[3j, 4.0], [0.0, 0.0]], [[10.0, 0.0], [0.0, 0.0]]])
    image = torch.tensor([[[3.0, 4.4], [0.0, 0.0]], [[-10.0, 0.0], [0.0, 2.0]]])
    # peak 4 over 0.4/2; peak 10 over 2/2; phases do not count
    torch.testing.assert_close(psnr(image, reference), torch.tensor([20 * np.log10(20), 20.0]).float())


@pytest.mark.parametrize("seed", [1, 2])
def test_psnr_is_its_formula(seed: int) -> None:
    image, truth = images(seed, 12, 9)
    a, b = np.abs(image.numpy()), np.abs(truth.numpy())
    expected = 10 * np.log10(b.max() ** 2 / np.mean((a - b) ** 2))
    assert float(psnr(image, truth)) == pytest.approx(expected, abs=1e-3)


def test_psnr_of_equal_images_is_infinite() -> None:
    assert torch.isinf(psnr(torch.ones(3, 3), torch.ones(3, 3)))


@pytest.mark.parametrize("seed", [1, 2])
def test_ssim_is_its_formula(seed: int) -> None:
    image, truth = images(seed, 16, 11)
    a, b = (np.abs(one.numpy()).astype(float) for one in (image, truth))
    c1, c2 = (0.01 * b.max()) ** 2, (0.03 * b.max()) ** 2
    found = []
    for one, other in zip(
        sliding_window_view(a, (7, 7)).reshape(-1, 49), sliding_window_view(b, (7, 7)).reshape(-1, 49), strict=True
    ):
        (va, cov), (_, vb) = np.cov(one, other)
        ma, mb = one.mean(), other.mean()
        found.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(image, truth) == pytest.approx(np.mean(found), rel=1e-6)


def test_ssim_of_equal_magnitudes_is_one() -> None:
    image, _ = images(3, 8, 8)
    assert ssim(image * 1j, image) == pytest.approx(1)


def test_correlation_is_numpy_s_and_ignores_offset_and_scale() -> None:
    image, truth = (one.abs() for one in images(4, 10, 7))
    expected = np.corrcoef(image.numpy().ravel().astype(float), truth.numpy().ravel().astype(float))[0, 1]
    assert correlation(image, truth) == pytest.approx(expected, rel=1e-9)
    assert correlation(3 * image + 1, truth) == pytest.approx(expected, rel=1e-5)
    assert correlation(-image, truth) == pytest.approx(-expected, rel=1e-9)


def test_errors_of_a_map_that_is_too_high() -> None:
    truth = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    found = truth + torch.tensor([[0.0, 0.2], [-0.2, 1.0]])
    assert normalized_error(found, truth) == pytest.approx((1.08 / 4) ** 0.5 / 4)
    inside = truth > 0
    assert object_error(found, truth, inside) == pytest.approx((0.08 / 21) ** 0.5)
    # a common factor is that factor's error
    assert object_error(1.1 * truth, truth, inside) == pytest.approx(0.1)
