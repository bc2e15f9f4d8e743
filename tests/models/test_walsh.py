"""Walsh's adaptive maps against the truth of a simulation."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelsigma.formats.phantom import head_phantom
from voxelsigma.models.espirit import principal_coil
from voxelsigma.models.fourier import fft_centred
from voxelsigma.models.walsh import walsh

MapMaker = Callable[[int, int, int], Tensor]
Normal = Callable[..., Tensor]

SIZE, COILS = 80, 8


def head() -> Tensor:
    axis = (np.arange(SIZE) - SIZE // 2) / (SIZE / 2)
    return torch.from_numpy(head_phantom(0.0, axis[:, None], axis))


@pytest.fixture(scope="module")
def maps(smooth_maps: MapMaker) -> Tensor:
    return smooth_maps(COILS, SIZE, SIZE)


@pytest.fixture(scope="module")
def reference(maps: Tensor, complex_normal: Normal) -> Tensor:
    kspace = fft_centred(maps * head()) + 0.01 * complex_normal(COILS, SIZE, SIZE, seed=1)
    return kspace[:, 28:52, 28:52]


@pytest.fixture(scope="module")
def estimate(reference: Tensor) -> Tensor:
    return walsh(reference, (SIZE, SIZE))


def likeness(first: Tensor, second: Tensor) -> Tensor:
    return (first.conj() * second).sum(dim=-3).abs()


def without_common_phase(first: Tensor, second: Tensor) -> Tensor:
    product = torch.vdot(first.flatten(), second.flatten())
    return first * product / product.abs()


def test_maps_are_those_of_the_simulation(estimate: Tensor, maps: Tensor) -> None:
    found = likeness(estimate, maps)[head() > 0.1]
    assert float(found.median()) >= 0.985
    assert float(found.quantile(0.02)) >= 0.93


def test_maps_have_unit_norm_everywhere(estimate: Tensor) -> None:
    norm = estimate.abs().square().sum(dim=0)
    torch.testing.assert_close(norm, torch.ones(SIZE, SIZE, dtype=torch.float64))


def test_maps_are_relative_to_the_phase_of_the_principal_coil(estimate: Tensor, reference: Tensor) -> None:
    projection = torch.einsum("c,cyx->yx", principal_coil(reference).conj(), estimate)
    assert float(projection.imag.abs().max()) < 1e-10
    assert float(projection.real.min()) >= 0
    given = torch.zeros(COILS, dtype=torch.complex128)
    given[5] = 1
    turned = walsh(reference, (SIZE, SIZE), phase=given)
    assert float(turned[5].imag.abs().max()) < 1e-10
    assert float(turned[5].real.min()) >= 0


def test_maps_are_leading_eigenvectors_of_local_covariances(reference: Tensor) -> None:
    found = walsh(reference, (SIZE, SIZE), iterations=200)
    # the low-resolution coil images, by zero-filling instead of a matrix
    hann = torch.hann_window(26, periodic=False, dtype=torch.float64)[1:-1]
    padded = torch.zeros(COILS, SIZE, SIZE, dtype=torch.complex128)
    padded[:, 28:52, 28:52] = reference * hann.unsqueeze(1) * hann
    images = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(padded, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))
    for row, column in ((40, 40), (20, 50), (61, 33), (3, 40)):
        near = images[:, max(row - 3, 0) : row + 4, column - 3 : column + 4].flatten(1)
        values, vectors = torch.linalg.eigh(near @ near.mH)
        assert float(values[-2]) < 0.9 * float(values[-1])
        product = torch.vdot(vectors[:, -1], found[:, row, column]).abs()
        assert float(product) == pytest.approx(1, abs=1e-6)


def test_mixed_coils_have_mixed_maps(estimate: Tensor, reference: Tensor, complex_normal: Normal) -> None:
    unitary = torch.linalg.qr(complex_normal(COILS, COILS, seed=2))[0]
    mixed = walsh(torch.einsum("ab,byx->ayx", unitary, 7j * reference), (SIZE, SIZE))
    expected = torch.einsum("ab,byx->ayx", unitary, estimate)
    torch.testing.assert_close(without_common_phase(mixed, expected), expected, atol=1e-6, rtol=0)


def test_batch_equals_each(reference: Tensor, complex_normal: Normal) -> None:
    batch = torch.stack([reference, reference + 0.05 * complex_normal(*reference.shape, seed=3)])
    phase = principal_coil(batch)
    together = walsh(batch, (30, 26), phase=phase)
    assert together.shape == (2, COILS, 30, 26)
    for plane, maps in zip(batch, together, strict=True):
        torch.testing.assert_close(walsh(plane, (30, 26), phase=phase), maps)


def test_few_reference_lines_and_single_precision_will_do(reference: Tensor, maps: Tensor) -> None:
    found = walsh(reference[:, 6:18, 6:18].to(torch.complex64), (SIZE, SIZE))
    assert found.dtype == torch.complex64
    assert float(likeness(found.to(torch.complex128), maps)[head() > 0.1].median()) > 0.96


def test_nothing_measured_gives_finite_maps() -> None:
    found = walsh(torch.zeros(3, 8, 8, dtype=torch.complex64), (12, 12))
    assert bool(found.isfinite().all())
