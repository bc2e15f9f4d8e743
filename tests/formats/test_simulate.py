"""The simulated scan: seeds, noise and SNR as promised, masks, flags and counters."""

import itertools
from typing import Any

import numpy as np
import pytest
from ismrmrd import constants
from numpy.typing import NDArray

from voxelsigma.formats.header import Limit, parse_header
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import BANDWIDTH, DWELL_US, NOISE_DWELL_US, SimulatedScan, Simulation, simulate
from voxelsigma.noise.covariance import estimate_covariance, gadgetron_scale, whiten, whitening_matrix

SMALL: dict[str, Any] = {
    "matrix": (1, 32, 32),
    "coils": 4,
    "acceleration": 2,
    "mask": "uniform_1d",
    "reference_lines": 8,
    "noise_samples": 2048,
}


def simulated(**changes: Any) -> SimulatedScan:
    return simulate(Simulation(**{**SMALL, **changes}))


def imaging_only(block: ReadoutBlock) -> NDArray[np.bool_]:
    """Imaging lines `(readouts,)` of a block."""
    return ~block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION)


def lines(block: ReadoutBlock) -> set[tuple[int, int]]:
    counters = block.headers["idx"]
    return {(int(entry["kspace_encode_step_2"]), int(entry["kspace_encode_step_1"])) for entry in counters}


def scale_of_truth() -> float:
    return gadgetron_scale(DWELL_US, NOISE_DWELL_US, BANDWIDTH)


def test_a_seed_names_a_scan() -> None:
    one, other = simulated(seed=5, mask="random_1d"), simulated(seed=5, mask="random_1d")
    assert one.header_xml == other.header_xml
    for ours, theirs in zip(one.blocks, other.blocks, strict=True):
        np.testing.assert_array_equal(ours.headers, theirs.headers)
        np.testing.assert_array_equal(ours.samples, theirs.samples)
    np.testing.assert_array_equal(one.covariance, other.covariance)


def test_another_seed_is_another_scan() -> None:
    one, other = simulated(seed=5, mask="random_1d"), simulated(seed=6, mask="random_1d")
    assert not np.array_equal(one.mask, other.mask)
    assert not np.allclose(one.covariance, other.covariance)
    assert np.abs(one.blocks[0].samples - other.blocks[0].samples).max() > 0.1


def test_the_noise_readouts_have_the_covariance() -> None:
    scan = simulated(noise_samples=200_000)
    noise = scan.blocks[0]
    assert noise.flagged(constants.ACQ_IS_NOISE_MEASUREMENT).all()
    assert (noise.headers["sample_time_us"] == NOISE_DWELL_US).all()
    found = estimate_covariance(noise.samples)
    np.testing.assert_allclose(found, scan.covariance, atol=0.015)


def test_whitening_by_the_noise_readouts_leaves_a_variance_of_two() -> None:
    scan = simulated(noise_samples=200_000, repetitions=40)
    matrix = whitening_matrix(estimate_covariance(scan.blocks[0].samples), scale_of_truth())
    first, *others = (whiten(block.samples, matrix) for block in scan.blocks[1:])
    # one object, other noise: differences have twice the variance
    differences = np.concatenate([other - first for other in others]) / np.sqrt(2)
    samples = np.moveaxis(differences, 1, 0).reshape(4, -1)
    covariance = samples @ samples.conj().T / samples.shape[1]
    # the 39 differences share their first scan: 22 lines of 64 samples, half of the variance known to 2.7 %
    np.testing.assert_allclose(covariance, 2 * np.eye(4), atol=0.08)
    pseudo = samples @ samples.T / samples.shape[1]
    np.testing.assert_allclose(pseudo, 0, atol=0.08)


def test_snr_is_the_mean_magnitude_of_the_unit_norm_image_over_the_noise_of_a_component() -> None:
    scan = simulated(snr=35, matrix=(1, 64, 64))
    matrix = whitening_matrix(scan.covariance, scale_of_truth())
    whitened = np.einsum("ab,bzyx->azyx", matrix, scan.sensitivities[0])
    image = np.linalg.norm(whitened, axis=0) * np.abs(scan.objects[0])
    inside = np.abs(scan.objects[0]) > 0.1 * np.abs(scan.objects[0]).max()
    # the truth is kept on every second voxel of the fine grid that the scale was set on
    assert image[inside].mean() == pytest.approx(35, rel=0.02)


def test_snr_scales_the_object_and_not_the_noise() -> None:
    faint, bright = simulated(snr=10), simulated(snr=30)
    np.testing.assert_allclose(bright.objects, 3 * faint.objects, rtol=1e-5)
    np.testing.assert_array_equal(bright.blocks[0].samples, faint.blocks[0].samples)


def test_the_readouts_are_of_the_object_and_the_coils() -> None:
    scan = simulated(acceleration=1, snr=1e5, reference_lines=0, matrix=(1, 64, 64))
    kspace = np.moveaxis(scan.blocks[1].samples, 1, 0)
    images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=(1, 2)), norm="ortho"), axes=(1, 2))
    cropped = images[:, :, 32:96]
    expected = scan.sensitivities[0, :, 0] * scan.objects[0, 0]
    # the same intensity and phase in every coil, up to how a grid sees edges
    np.testing.assert_allclose(cropped.mean(axis=(1, 2)), expected.mean(axis=(1, 2)), rtol=0.02)
    residual = np.linalg.norm(cropped - expected) / np.linalg.norm(expected)
    assert residual < 0.2
    # nothing but ringing lies in the field of view that only oversampling sees
    assert np.linalg.norm(images[:, :, :32]) < 0.01 * np.linalg.norm(images)


@pytest.mark.parametrize(
    ("mask", "matrix", "acceleration"),
    [
        ("uniform_1d", (1, 64, 32), 4),
        ("random_1d", (1, 64, 32), 4),
        ("uniform_1d", (16, 32, 16), 2),
        ("random_2d", (24, 32, 16), 4),
        ("poisson_disc", (24, 32, 16), 4),
    ],
)
def test_the_mask_is_what_was_sampled(mask: str, matrix: tuple[int, int, int], acceleration: float) -> None:
    scan = simulated(mask=mask, matrix=matrix, acceleration=acceleration)
    (block,) = scan.blocks[1:]
    assert scan.mask.shape == matrix[:2]
    assert scan.mask.size / scan.mask.sum() == pytest.approx(acceleration, rel=0.1)
    imaged = block.select(imaging_only(block))
    assert lines(imaged) == {tuple(position) for position in np.argwhere(scan.mask).tolist()}
    assert len(imaged) == scan.mask.sum()
    wanted = parse_header(scan.header_xml).encodings[0].acceleration
    assert max(wanted) > 1


@pytest.mark.parametrize("mask", ["uniform_1d", "random_1d"])
def test_reference_lines_are_the_centre(mask: str) -> None:
    scan = simulated(mask=mask, matrix=(1, 64, 32), reference_lines=8)
    block = scan.blocks[1]
    both = block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
    only = block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION)
    assert not (both & only).any()
    assert lines(block.select(both | only)) == {(0, line) for line in range(28, 36)}
    sampled = {(0, int(line)) for line in np.flatnonzero(scan.mask[0])}
    assert lines(block.select(only)) == {(0, line) for line in range(28, 36)} - sampled


def test_the_reference_of_a_volume_is_a_square() -> None:
    scan = simulated(mask="random_2d", matrix=(24, 32, 16), acceleration=4)
    block = scan.blocks[1]
    reference = block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION, constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
    assert lines(block.select(reference)) == set(itertools.product(range(8, 16), range(12, 20)))


def test_counters_and_flags() -> None:
    scan = simulated(slices=3, repetitions=2, averages=2)
    assert len(scan.blocks) == 1 + 3 * 2 * 2
    order = [tuple(block.headers["idx"][["repetition", "slice", "average"]][0].tolist()) for block in scan.blocks[1:]]
    assert order == list(itertools.product(range(2), range(3), range(2)))
    counters = np.concatenate([block.headers["scan_counter"] for block in scan.blocks])
    np.testing.assert_array_equal(counters, np.arange(len(counters)) + 1)
    for block, (repetition, number, average) in zip(scan.blocks[1:], order, strict=True):
        last = len(block) - 1
        ends = {
            constants.ACQ_FIRST_IN_SLICE: [0],
            constants.ACQ_LAST_IN_SLICE: [last],
            constants.ACQ_LAST_IN_REPETITION: [last] if (number, average) == (2, 1) else [],
            constants.ACQ_LAST_IN_MEASUREMENT: [last] if (repetition, number, average) == (1, 2, 1) else [],
        }
        for flag, expected in ends.items():
            assert np.flatnonzero(block.flagged(flag)).tolist() == expected
        assert (block.headers["position"][:, 2] == 5 * (number - 1)).all()
        # reference lines once a repetition and slice are enough
        assert block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION).any() == (average == 0)


def test_the_header_says_what_the_readouts_are() -> None:
    scan = simulated(matrix=(1, 48, 32), slices=2, repetitions=3, averages=4, coils=5)
    header = parse_header(scan.header_xml)
    (encoding,) = header.encodings
    assert (encoding.encoded_matrix, encoding.recon_matrix) == ((1, 48, 64), (1, 48, 32))
    assert encoding.encoded_fov_mm[2] == 2 * encoding.recon_fov_mm[2]
    assert encoding.line_limit(1) == Limit(minimum=0, maximum=47, center=24)
    assert [encoding.last(name) for name in ("slice", "repetition", "average")] == [1, 2, 3]
    assert (header.noise_bandwidth, len(header.coil_labels)) == (BANDWIDTH, 5)
    block = scan.blocks[1]
    assert block.samples.shape[1:] == (5, 64)
    assert (block.headers["number_of_samples"] == 64).all()
    assert (block.headers["center_sample"] == 32).all()
    assert (block.headers["active_channels"] == 5).all()


def test_without_oversampling_the_readout_is_the_matrix() -> None:
    scan = simulated(oversampling=1)
    assert scan.blocks[1].samples.shape[2] == 32
    (encoding,) = parse_header(scan.header_xml).encodings
    assert encoding.encoded_fov_mm == encoding.recon_fov_mm


def test_without_noise_samples_there_are_no_noise_readouts() -> None:
    scan = simulated(noise_samples=0)
    assert not any(block.flagged(constants.ACQ_IS_NOISE_MEASUREMENT).any() for block in scan.blocks)


@pytest.mark.parametrize(("wanted", "readouts", "samples"), [(3, 1, 3), (64, 1, 64), (65, 2, 64), (2048, 32, 64)])
def test_noise_samples_are_at_least_those_wanted(wanted: int, readouts: int, samples: int) -> None:
    assert simulated(noise_samples=wanted).blocks[0].samples.shape == (readouts, 4, samples)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"coils": 0}, "simulate: coils must be from 1 to 128, got 0"),
        ({"coils": 129}, "simulate: coils must be from 1 to 128, got 129"),
        ({"snr": 0}, "simulate: snr must be from 0.001 to 1e.06, got 0"),
        ({"snr": float("nan")}, "simulate: snr must be from 0.001 to 1e.06, got nan"),
        ({"slices": 0}, "simulate: slices must be from 1 to 1000, got 0"),
        ({"repetitions": -1}, "simulate: repetitions must be from 1 to 1000, got -1"),
        ({"averages": 1001}, "simulate: averages must be from 1 to 1000, got 1001"),
        ({"noise_samples": -1}, "simulate: noise_samples must be from 0 to 1e.07, got -1"),
        ({"oversampling": 3}, "simulate: oversampling must be from 1 to 2, got 3"),
        ({"correlation": 1.0}, "simulate: correlation must be from 0 to 0.99, got 1.0"),
        ({"reference_lines": -2}, "simulate: reference_lines must be from 0 to 65535, got -2"),
        (
            {"matrix": (1, 8, 32)},
            r"matrix must have y and x from 16 to 1024 and z from 1, got .z, y, x. = \(1, 8, 32\)",
        ),
        ({"matrix": (0, 32, 32)}, r"z from 1, got .z, y, x. = \(0, 32, 32\)"),
        ({"matrix": (1, 32, 2048)}, r"got .z, y, x. = \(1, 32, 2048\)"),
        (
            {"mask": "random_2d"},
            "mask 'random_2d' samples two phase encoding axes; the matrix needs z above 1, got 1",
        ),
        ({"mask": "poisson_disc"}, "mask 'poisson_disc' samples two phase encoding axes"),
        ({"matrix": (16, 32, 32), "slices": 2}, "simulate: a 3D scan has one slab, got slices 2"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Simulation(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"mask": "spiral"},
            "mask kind must be one of uniform_1d, random_1d, random_2d, poisson_disc, got 'spiral'",
        ),
        ({"acceleration": 0.5}, "acceleration must be from 1 to 32"),
        ({"acceleration": 2.5}, "acceleration of a uniform mask must be a whole number, got 2.5"),
        ({"acceleration": 4, "mask": "random_1d", "reference_lines": 12}, "centre must be at most the 8 lines of"),
    ],
)
def test_masks_that_cannot_be_made_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        simulated(**changes)
