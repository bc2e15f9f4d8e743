"""Whitening of a stream: order, scale, provenance, and bad noise."""

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest

from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.noise.covariance import NoiseCovariance


def whitened_noise(scan: SimulatedScan, seed: int) -> ReadoutBlock:
    """Imaging readouts that hold noise alone, as the scan's covariance and dwell times make it."""
    rng = np.random.default_rng(seed)
    block = scan.blocks[-1]
    white = (rng.standard_normal(block.samples.shape) + 1j * rng.standard_normal(block.samples.shape)) / np.sqrt(2)
    factor = np.sqrt(10 / (5 * 0.793)) * np.linalg.cholesky(scan.covariance)
    return block.with_samples(np.einsum("ab,nbk->nak", factor, white).astype(np.complex64))


def test_whitened_noise_has_unit_deviation_per_component(scan: SimulatedScan, run: Any) -> None:
    (found,) = run(scan.header_xml, [scan.blocks[0], whitened_noise(scan, 1)], ("prewhiten", {}))
    samples = np.moveaxis(found.samples, 1, 0).reshape(4, -1)
    covariance = samples @ samples.conj().T / samples.shape[1]
    # 1,408 samples and a covariance from 4,096: relative deviations of 0.03 and 0.016; five of both are 0.17
    np.testing.assert_allclose(covariance, 2 * np.eye(4), atol=0.35)
    assert np.trace(covariance).real / 4 == pytest.approx(2, rel=0.08)


def test_the_covariance_is_forwarded_only_where_asked(scan: SimulatedScan, run: Any) -> None:
    quiet = run(scan.header_xml, scan.blocks, ("prewhiten", {}))
    assert [type(item) for item in quiet] == [ReadoutBlock]
    covariance, _ = run(scan.header_xml, scan.blocks, ("prewhiten", {"forward": "covariance"}))
    assert isinstance(covariance, NoiseCovariance)
    assert covariance.samples == 4096
    assert covariance.applied_scale == pytest.approx(np.sqrt(2 * 5 / 10 * 0.793))
    assert covariance.labels == ("SIM000", "SIM001", "SIM002", "SIM003")
    np.testing.assert_allclose(covariance.matrix, scan.covariance, atol=0.15 * np.abs(scan.covariance).max())


def test_data_before_the_noise_wait_for_it(scan: SimulatedScan, run: Any) -> None:
    noise, block = scan.blocks
    early = run(
        scan.header_xml,
        [block.select(slice(0, 5)), "mark", noise, block.select(slice(5, None))],
        ("prewhiten", {}),
    )
    usual = run(scan.header_xml, [noise, block], ("prewhiten", {}))
    assert early[1] == "mark"
    joined = np.concatenate([early[0].samples, early[2].samples])
    np.testing.assert_allclose(joined, usual[0].samples, rtol=1e-6)


def test_noise_at_the_end_is_used(scan: SimulatedScan, run: Any) -> None:
    noise, block = scan.blocks
    late = run(scan.header_xml, [block, noise], ("prewhiten", {}))
    usual = run(scan.header_xml, [noise, block], ("prewhiten", {}))
    np.testing.assert_array_equal(late[0].samples, usual[0].samples)


def test_without_noise_the_edge_is_used_and_said_so(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    scan = simulate(Simulation(matrix=(1, 96, 96), coils=4, acceleration=1, mask="uniform_1d", noise_samples=0, snr=30))
    with caplog.at_level(logging.WARNING, logger="voxelsigma"):
        covariance, _block = run(scan.header_xml, scan.blocks, ("prewhiten", {"forward": "covariance"}))
    assert not covariance.calibrated
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "uncalibrated" in caplog.text
    assert covariance.applied_scale == pytest.approx(np.sqrt(2))
    # what the imaging noise really is; 5 lines of some 50 empty positions: five deviations are 0.3
    truth = 10 / (5 * 0.793) * scan.covariance
    assert np.trace(np.linalg.solve(truth, covariance.matrix)).real / 4 == pytest.approx(1, abs=0.3)


def test_a_missing_bandwidth_is_gadgetrons(scan: SimulatedScan, run: Any) -> None:
    xml = scan.header_xml.replace(b"<relativeReceiverNoiseBandwidth>0.793</relativeReceiverNoiseBandwidth>", b"")
    covariance, _ = run(xml, scan.blocks, ("prewhiten", {"forward": "covariance"}))
    assert covariance.bandwidth == 0.793


def test_unknown_dwell_times_scale_by_one(scan: SimulatedScan, run: Any, caplog: pytest.LogCaptureFixture) -> None:
    headers = scan.blocks[0].headers.copy()
    headers["sample_time_us"] = 0
    noise = dataclasses.replace(scan.blocks[0], headers=headers)
    covariance, _ = run(scan.header_xml, [noise, scan.blocks[1]], ("prewhiten", {"forward": "covariance"}))
    assert covariance.applied_scale == 1
    assert "0 is unknown" in caplog.text


def test_too_few_noise_samples_are_refused(scan: SimulatedScan, run: Any) -> None:
    noise = scan.blocks[0].select(slice(0, 1))
    short = dataclasses.replace(noise, samples=noise.samples[..., :4])
    with pytest.raises(ValueError, match="4 noise samples for 4 coils"):
        run(scan.header_xml, [short, scan.blocks[1]], ("prewhiten", {}))


def test_few_noise_samples_are_warned_of(scan: SimulatedScan, run: Any, caplog: pytest.LogCaptureFixture) -> None:
    noise = scan.blocks[0].select(slice(0, 1))
    short = dataclasses.replace(noise, samples=noise.samples[..., :20])
    run(scan.header_xml, [short, scan.blocks[1]], ("prewhiten", {}))
    assert "only 20 noise samples for 4 coils" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(scan: SimulatedScan, run: Any, value: float) -> None:
    samples = scan.blocks[1].samples.copy()
    samples[7, 2, 9] = value
    scan_counter = int(scan.blocks[1].headers["scan_counter"][7])
    with pytest.raises(ValueError, match=f"readout {scan_counter} holds NaN or Inf"):
        run(scan.header_xml, [scan.blocks[0], scan.blocks[1].with_samples(samples)], ("prewhiten", {}))


def test_a_dead_coil_is_refused(scan: SimulatedScan, run: Any) -> None:
    samples = scan.blocks[0].samples.copy()
    samples[:, 1] = 0
    with pytest.raises(ValueError, match="not positive definite"):
        run(scan.header_xml, [scan.blocks[0].with_samples(samples), scan.blocks[1]], ("prewhiten", {}))


def test_another_number_of_channels_is_refused(scan: SimulatedScan, run: Any) -> None:
    fewer = dataclasses.replace(scan.blocks[1], samples=scan.blocks[1].samples[:, :3])
    with pytest.raises(ValueError, match="has 3 channels, the noise covariance 4"):
        run(scan.header_xml, [scan.blocks[0], fewer], ("prewhiten", {}))


def test_noise_alone_is_refused(scan: SimulatedScan, run: Any) -> None:
    with pytest.raises(ValueError, match=r"noise readouts only \(64\)"):
        run(scan.header_xml, scan.blocks[:1], ("prewhiten", {}))
