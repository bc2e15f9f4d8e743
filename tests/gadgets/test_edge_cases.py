"""Scans that are legal but unusual, and what must not slip through."""

import dataclasses
import gc
from typing import Any

import numpy as np
import pytest
from ismrmrd import Image, constants
from numpy.typing import NDArray

from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.gadgets.items import Sensitivities
from voxelsigma.gadgets.volume import LineBuffer

CHAIN: tuple[tuple[str, dict[str, str]], ...] = (
    ("prewhiten", {}),
    ("accumulate", {}),
    ("coil_maps", {"kernel": "4"}),
    ("reconstruct", {}),
    ("sketch", {"maps": "magnitude gfactor", "seed": "1", "probes": "256"}),
)


def full_scan(**changes: Any) -> SimulatedScan:
    values = {"matrix": (1, 32, 32), "coils": 4, "acceleration": 1, "mask": "uniform_1d", "reference_lines": 16}
    return simulate(Simulation(**{**values, "snr": 200, "noise_samples": 400_000, **changes}))


def maps_of(run: Any, scan: SimulatedScan) -> tuple[NDArray[Any], NDArray[Any], Image]:
    image, sigma, ratio = run(scan.header_xml, scan.blocks, *CHAIN)
    return sigma.data[0], ratio.data[0], image


def with_recon(scan: SimulatedScan, old: bytes, new: bytes) -> SimulatedScan:
    start = scan.header_xml.index(b"<reconSpace>")
    return dataclasses.replace(scan, header_xml=scan.header_xml[:start] + scan.header_xml[start:].replace(old, new, 1))


def flagged(block: ReadoutBlock, chosen: Any, number: int) -> ReadoutBlock:
    headers = block.headers.copy()
    headers["flags"][chosen] |= np.uint64(1 << (number - 1))
    return dataclasses.replace(block, headers=headers)


def test_a_coarser_readout_of_a_volume_averages_its_noise(run: Any) -> None:
    scan = with_recon(full_scan(matrix=(16, 16, 32), reference_lines=8), b"<x>32</x>", b"<x>16</x>")
    sigma, ratio, _ = maps_of(run, scan)
    assert sigma.shape == (16, 16, 16)
    np.testing.assert_allclose(sigma, np.sqrt(0.5), rtol=1e-3)
    np.testing.assert_allclose(ratio, 1, rtol=1e-3)


def test_a_coarser_slice_has_less_noise_but_no_g_below_one(run: Any) -> None:
    sigma, ratio, _ = maps_of(run, with_recon(full_scan(), b"<y>32</y>", b"<y>16</y>"))
    np.testing.assert_allclose(sigma, np.sqrt(0.5), rtol=1e-3)
    np.testing.assert_allclose(ratio, 1, rtol=1e-3)


def test_an_asymmetric_echo_of_a_volume_has_no_g_below_one(run: Any) -> None:
    scan = full_scan(matrix=(16, 16, 32), reference_lines=8)
    headers = scan.blocks[1].headers.copy()
    headers["discard_pre"] = 16
    cut = dataclasses.replace(scan, blocks=[scan.blocks[0], dataclasses.replace(scan.blocks[1], headers=headers)])
    sigma, ratio, _ = maps_of(run, cut)
    # 24 of 32 samples on a grid of their own: white but for the crop's edges
    np.testing.assert_allclose(sigma, 1, atol=0.03)
    np.testing.assert_allclose(ratio, 1, atol=0.03)


def test_an_image_never_claims_more_than_was_encoded(run: Any) -> None:
    _, _, image = maps_of(run, with_recon(full_scan(), b"<y>240.0</y>", b"<y>300.0</y>"))
    assert list(image.field_of_view) == [240, 240, 5]


def test_reverse_readouts_with_the_centre_in_the_middle(run: Any) -> None:
    scan = full_scan()
    block = scan.blocks[1]
    odd = np.arange(len(block)) % 2 == 1
    samples = block.samples.copy()
    samples[odd] = samples[odd][..., ::-1]
    turned = flagged(block.with_samples(samples), odd, constants.ACQ_IS_REVERSE)
    accumulate = ("accumulate", {"prewhitened": "true"})
    (expected,) = run(scan.header_xml, [block], accumulate)
    (found,) = run(scan.header_xml, [turned], accumulate)
    np.testing.assert_array_equal(found.data, expected.data)


def partitions(scan: SimulatedScan) -> list[ReadoutBlock]:
    """One block a partition, each with LAST_IN_SLICE at its end, as some sequences flag them."""
    block = scan.blocks[1]
    numbers = block.headers["idx"]["kspace_encode_step_2"]
    found = []
    for number in np.unique(numbers):
        part = block.select(numbers == number)
        found.append(flagged(part, [-1], constants.ACQ_LAST_IN_SLICE))
    return found


def test_a_truncated_irregular_volume_is_not_whole_for_its_partitions_flags(run: Any) -> None:
    scan = simulate(
        Simulation(matrix=(16, 32, 16), coils=2, acceleration=3, mask="poisson_disc", reference_lines=8, seed=4)
    )
    parts = partitions(scan)
    accumulate = ("accumulate", {"prewhitened": "true"})
    assert len(run(scan.header_xml, parts, accumulate)) == 1
    with pytest.raises(ValueError, match="no readout flagged as the last one"):
        run(scan.header_xml, parts[:10], accumulate)


def test_missing_corners_of_a_volume_are_said(run: Any) -> None:
    scan = full_scan(matrix=(16, 32, 16), coils=2, reference_lines=8)
    block = scan.blocks[1]
    counters = block.headers["idx"]
    radius = np.hypot(
        (counters["kspace_encode_step_2"].astype(float) - 8) / 8,
        (counters["kspace_encode_step_1"].astype(float) - 16) / 16,
    )
    (kspace,) = run(scan.header_xml, [block.select(radius <= 1)], ("accumulate", {"prewhitened": "true"}))
    assert kspace.partial_fourier == "k2-k1 corners"
    inner = block.select((radius <= 1) & (counters["kspace_encode_step_1"] != 20))
    with pytest.raises(ValueError, match="is incomplete"):
        run(scan.header_xml, [inner], ("accumulate", {"prewhitened": "true"}))


def test_reference_lines_behind_the_last_imaging_line_are_refused(run: Any) -> None:
    scan = simulate(Simulation(matrix=(1, 32, 32), coils=2, acceleration=2, mask="uniform_1d", reference_lines=12))
    block = scan.blocks[1]
    only = block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION)
    with pytest.raises(ValueError, match=r"reference readout \d+ came after the volume slice 0 had ended"):
        run(scan.header_xml, [block.select(~only), block.select(only)], ("accumulate", {"prewhitened": "true"}))


def test_a_fragment_of_the_reference_region_is_refused(run: Any) -> None:
    scan = simulate(Simulation(matrix=(1, 32, 32), coils=2, acceleration=2, mask="uniform_1d", reference_lines=12))
    block = scan.blocks[1]
    kept = block.select(~block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION))
    with pytest.raises(ValueError, match="has only 1 contiguous reference lines, and only 1 fully sampled imaging"):
        run(scan.header_xml, [kept], ("accumulate", {"prewhitened": "true"}), ("coil_maps", {"method": "walsh"}))


def test_averages_that_the_header_does_not_state_are_named(run: Any) -> None:
    scan = full_scan(averages=2)
    stated = b"<average><minimum>0</minimum><maximum>1</maximum><center>0</center></average>"
    with pytest.raises(ValueError, match="the header states 1 averages"):
        run(scan.header_xml.replace(stated, b""), scan.blocks[1:], ("accumulate", {"prewhitened": "true"}))


def test_images_of_others_pass(run: Any) -> None:
    scan = full_scan()
    foreign = Image.from_array(np.ones((1, 4, 4), np.float32), transpose=False, image_series_index=1)
    found = run(scan.header_xml, [foreign, *scan.blocks], *CHAIN)
    assert found[0] is foreign
    assert len(found) == 4


def test_a_long_series_does_not_keep_what_it_is_done_with(run: Any) -> None:
    scan = simulate(
        Simulation(matrix=(1, 32, 32), coils=2, acceleration=2, mask="uniform_1d", reference_lines=12, repetitions=6)
    )
    alive: list[tuple[int, int]] = []

    def watched() -> Any:
        for block in scan.blocks:
            yield block
            gc.collect()
            kinds = [type(item) for item in gc.get_objects() if type(item) in (Sensitivities, LineBuffer)]
            alive.append((kinds.count(Sensitivities), kinds.count(LineBuffer)))

    run(scan.header_xml, watched(), *CHAIN[:-1], ("sketch", {"estimator": "sketch", "probes": "2"}))
    assert alive[-1] == alive[3]
