"""ESPIRiT against the truth of a simulation and against BART."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelsigma.formats.phantom import head_phantom
from voxelsigma.models.espirit import EspiritSettings, espirit, principal_coil
from voxelsigma.models.fourier import fft_centred

MapMaker = Callable[[int, int, int], Tensor]
Normal = Callable[..., Tensor]

SIZE, COILS = 80, 8


def head(size: int = SIZE) -> Tensor:
    axis = (np.arange(size) - size // 2) / (size / 2)
    return torch.from_numpy(head_phantom(0.0, axis[:, None], axis))


@pytest.fixture(scope="module")
def maps(smooth_maps: MapMaker) -> Tensor:
    return smooth_maps(COILS, SIZE, SIZE)


@pytest.fixture(scope="module")
def kspace(maps: Tensor, complex_normal: Normal) -> Tensor:
    """A fully sampled head, SNR about 35 per component where the brain is."""
    return fft_centred(maps * head()) + 0.01 * complex_normal(COILS, SIZE, SIZE, seed=1)


@pytest.fixture(scope="module")
def reference(kspace: Tensor) -> Tensor:
    return central(kspace, 24)


@pytest.fixture(scope="module")
def estimate(reference: Tensor) -> Tensor:
    return espirit(reference, (SIZE, SIZE))


def central(kspace: Tensor, width: int) -> Tensor:
    first = kspace.shape[-1] // 2 - width // 2
    return kspace[..., first : first + width, first : first + width]


def likeness(first: Tensor, second: Tensor) -> Tensor:
    """|⟨a, b⟩| of unit-norm maps, per voxel."""
    return (first.conj() * second).sum(dim=-3).abs()


def without_common_phase(first: Tensor, second: Tensor) -> Tensor:
    """`first`, turned as a whole so that it is as near to `second` as it can be."""
    product = torch.vdot(first.flatten(), second.flatten())
    return first * product / product.abs()


def test_maps_are_those_of_the_simulation(estimate: Tensor, maps: Tensor) -> None:
    inside = head() > 0.1
    found = likeness(estimate, maps)[inside]
    assert float(found.median()) >= 0.995
    assert float(found.quantile(0.02)) >= 0.98


def test_relative_phases_of_neighbouring_voxels_are_smooth(estimate: Tensor, maps: Tensor) -> None:
    # the common phase is free in each voxel, but a map must not add edges: neighbours agree with each other
    inside = head() > 0.1
    both = inside[1:] & inside[:-1]
    inner = (estimate[:, 1:].conj() * estimate[:, :-1]).sum(dim=0)[both]
    assert float(inner.real.quantile(0.02)) > 0.97


def test_maps_have_unit_norm_everywhere(estimate: Tensor) -> None:
    assert estimate.shape == (COILS, SIZE, SIZE)
    norm = estimate.abs().square().sum(dim=0)
    torch.testing.assert_close(norm, torch.ones(SIZE, SIZE, dtype=torch.float64))


def test_maps_are_relative_to_the_phase_of_the_principal_coil(estimate: Tensor, reference: Tensor) -> None:
    virtual = principal_coil(central(reference, 24))
    projection = torch.einsum("c,cyx->yx", virtual.conj(), estimate)
    assert float(projection.imag.abs().max()) < 1e-10
    assert float(projection.real.min()) >= 0
    given = 1j * torch.eye(COILS, dtype=torch.complex128)[2]
    turned = espirit(reference, (SIZE, SIZE), phase=given)
    # relative to i times the third coil: that one is along i now
    assert float((turned[2] / 1j).imag.abs().max()) < 1e-6
    # far from the object power iterations from another start may not have ended yet
    assert float(likeness(turned, estimate)[head() > 0.1].min()) > 0.9999


def test_principal_coil_is_the_first_singular_vector(reference: Tensor) -> None:
    left = torch.linalg.svd(reference.flatten(1), full_matrices=False)[0]
    found = principal_coil(reference)
    assert found.shape == (COILS,)
    assert float(torch.vdot(found, left[:, 0]).abs()) == pytest.approx(1, abs=1e-10)
    # of a batch, over all of its samples
    batch = torch.stack([reference, 2j * reference])
    assert float(torch.vdot(principal_coil(batch), found).abs()) == pytest.approx(1, abs=1e-10)


def test_a_scale_and_a_common_phase_of_the_data_change_nothing(estimate: Tensor, reference: Tensor) -> None:
    scaled = espirit((30 - 40j) * reference, (SIZE, SIZE))
    torch.testing.assert_close(without_common_phase(scaled, estimate), estimate, atol=1e-6, rtol=0)


def test_mixed_coils_have_mixed_maps(estimate: Tensor, reference: Tensor, complex_normal: Normal) -> None:
    unitary = torch.linalg.qr(complex_normal(COILS, COILS, seed=2))[0]
    mixed = espirit(torch.einsum("ab,byx->ayx", unitary, reference), (SIZE, SIZE))
    expected = torch.einsum("ab,byx->ayx", unitary, estimate)
    torch.testing.assert_close(without_common_phase(mixed, expected), expected, atol=1e-6, rtol=0)


def test_batch_equals_each(reference: Tensor, complex_normal: Normal) -> None:
    other = reference + 0.05 * complex_normal(*reference.shape, seed=3)
    batch = torch.stack([reference, other])
    phase = principal_coil(batch)
    together = espirit(batch, (20, 16), phase=phase)
    assert together.shape == (2, COILS, 20, 16)
    for plane, maps in zip(batch, together, strict=True):
        torch.testing.assert_close(espirit(plane, (20, 16), phase=phase), maps)


def test_maps_on_another_matrix_are_the_same_fields(reference: Tensor, estimate: Tensor) -> None:
    # voxel 0 and every second voxel of a field of view of 160 meet those of 80
    fine = espirit(reference, (2 * SIZE, SIZE))
    torch.testing.assert_close(fine[:, ::2], estimate, atol=1e-6, rtol=0)


def test_single_precision_is_close(reference: Tensor, estimate: Tensor) -> None:
    single = espirit(reference.to(torch.complex64), (SIZE, SIZE))
    assert single.dtype == torch.complex64
    inside = head() > 0.1
    assert float(likeness(single.to(torch.complex128), estimate)[inside].min()) > 0.999


def test_cropping_keeps_the_object_and_nothing_far_from_it(reference: Tensor) -> None:
    cropped = espirit(reference, (SIZE, SIZE), EspiritSettings(crop=0.95))
    seen = cropped.abs().square().sum(dim=0) > 0
    axis = torch.arange(SIZE, dtype=torch.float64) - SIZE // 2
    radius = (axis.unsqueeze(1) ** 2 + axis**2).sqrt() / (SIZE / 2)
    assert float(seen[head() > 0.1].double().mean()) > 0.97
    assert float(seen[radius > 1.25].double().mean()) < 0.3


def test_calibration_region_is_the_centre(kspace: Tensor, estimate: Tensor) -> None:
    torch.testing.assert_close(espirit(kspace, (SIZE, SIZE)), estimate, atol=1e-6, rtol=0)
    # a region smaller than the limit is used whole
    small = espirit(central(kspace, 12), (SIZE, SIZE))
    limited = espirit(kspace, (SIZE, SIZE), EspiritSettings(calibration=12))
    torch.testing.assert_close(small, limited)


@pytest.mark.parametrize("shape", [(4, 24), (24, 5), (5, 5)])
def test_too_small_a_region_is_refused(complex_normal: Normal, shape: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError,
        match=rf"the reference region has \({shape[0]}, {shape[1]}\) samples; at least 6 × 6 are needed",
    ):
        espirit(complex_normal(COILS, *shape, seed=4), (16, 16))
    assert espirit(complex_normal(COILS, *shape, seed=4), (16, 16), EspiritSettings(kernel=3)).isfinite().all()


# --- BART


def write_cfl(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.complex64]]) -> None:
    header = " ".join(str(size) for size in array.shape)
    path.with_suffix(".hdr").write_text(f"# Dimensions\n{header}\n", encoding="ascii")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.complex64]]:
    sizes = path.with_suffix(".hdr").read_text(encoding="ascii").splitlines()[1].split()
    shape = tuple(int(size) for size in sizes)
    return np.fromfile(path.with_suffix(".cfl"), dtype=np.complex64).reshape(shape, order="F")


@pytest.mark.skipif(shutil.which("bart") is None, reason="bart is not on PATH")
def test_maps_are_those_of_bart(kspace: Tensor, estimate: Tensor, maps: Tensor, tmp_path: Path) -> None:
    # BART's order is (x, y, z, coils)
    write_cfl(tmp_path / "kspace", kspace.permute(2, 1, 0).unsqueeze(2).numpy().astype(np.complex64))
    command = ["bart", "ecalib", "-m1", "-r24", "-k6", "-t0.001", "kspace", "maps"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    theirs = torch.from_numpy(read_cfl(tmp_path / "maps").reshape(SIZE, SIZE, COILS)).permute(2, 1, 0)
    norm = theirs.abs().square().sum(dim=0).sqrt()
    common = (norm > 0) & (head() > 0.1)
    assert int(common.sum()) > 0.9 * int((head() > 0.1).sum())
    unit = theirs.to(torch.complex128) / norm.clamp_min(1e-6)
    found = likeness(estimate, unit)[common]
    assert float(found.median()) >= 0.99
    assert float(found.quantile(0.02)) >= 0.98
    # neither is nearer to the truth than the other by more than a hair
    ours, bart = (float(likeness(each, maps)[common].mean()) for each in (estimate, unit))
    assert ours > bart - 0.002
