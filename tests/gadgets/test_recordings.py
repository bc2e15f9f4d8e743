"""Against the bytes that a real Gadgetron server sent: whitening, assembled k-space and reference lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from voxelsigma.formats.raw_file import open_raw
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import KSpace, Sensitivities
from voxelsigma.gadgets.mapping import calibration_region
from voxelsigma.gadgets.planes import planes_of
from voxelsigma.gadgets.registry import create
from voxelsigma.gadgets.wire import CONFIG, HEADER, Close, Reader, ReconData, read_message, read_text
from voxelsigma.models.sense import Sense
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.sketch import Stopping, sketch
from voxelsigma.noise.voxels import object_mask


def recorded(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        reader = Reader(file.read)
        read_text(reader, CONFIG, "a configuration")
        read_text(reader, HEADER, "a header")
        while not isinstance(found := read_message(reader), Close):
            yield found


@pytest.fixture(scope="module")
def assembled(shared_data: Path) -> tuple[KSpace, Sensitivities]:
    with open_raw(shared_data / "snr_r3.h5") as raw:
        context = Context(header=raw.header)
        whitened = create("prewhiten", {"forward": "covariance"}, context)(raw.blocks())
        (kspace,) = create("accumulate", {}, context)(whitened)
        (maps,) = create("coil_maps", {}, context)(iter([kspace]))
    return kspace, maps


def test_whitened_readouts_equal_the_servers(shared_data: Path) -> None:
    with open_raw(shared_data / "snr_r3.h5") as raw:
        blocks = create("prewhiten", {}, Context(header=raw.header))(raw.blocks())
        found = np.concatenate([block.samples for block in blocks])
    expected = np.concatenate([block.samples for block in recorded(shared_data / "wire" / "snr_whitened.bin")])
    assert found.shape == expected.shape == (68, 14, 384)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["snr_recondata", "snr_recondata_ref"])
def test_assembled_kspace_equals_the_servers(
    shared_data: Path, assembled: tuple[KSpace, Sensitivities], name: str
) -> None:
    (message,) = recorded(shared_data / "wire" / f"{name}.bin")
    assert isinstance(message, ReconData)
    kspace, bit = assembled[0], message.bits[0]
    assert bit.reference is not None
    assert kspace.reference is not None
    expected = bit.data.data[0, 0, 0]
    np.testing.assert_allclose(kspace.data, expected, atol=1e-5 * np.abs(expected).max())
    reference = bit.reference.data[0, 0, 0]
    found = kspace.reference if reference.shape == kspace.reference.shape else calibration_region(kspace)
    np.testing.assert_allclose(found, reference, atol=1e-5 * np.abs(reference).max())
    limits = tuple((entry.min, entry.max) for entry in bit.data.sampling.sampling_limits)[::-1]
    assert kspace.limits == limits
    headers = bit.data.headers[0, 0, 0]
    sampled = headers["number_of_samples"] > 0
    for field in ("number_of_samples", "center_sample", "scan_counter", "position", "idx", "flags"):
        np.testing.assert_array_equal(kspace.headers[sampled][field], headers[sampled][field])


def test_sense_sigma_of_a_real_scan(assembled: tuple[KSpace, Sensitivities]) -> None:
    (plane,) = planes_of(*assembled, torch.device("cpu"))
    assert plane.problem.acceleration() == pytest.approx(3)
    reconstruction = Sense().bind(plane.problem)
    assert (reconstruction.windows[0].start, reconstruction.windows[0].size) == (18, 108)
    exact = reconstruction.exact_variance()
    assert exact is not None
    linearization = linearize(reconstruction, plane.kspace)
    result = sketch(linearization, plane.probes(1), Stopping(probes=256), covariate=plane.problem.covariate())
    found = result.map("magnitude")
    ratio = found.sigma.square() / (exact / 2)
    # 27,648 voxels that share some 6,000 independent values of relative deviation 0.06: the mean is good to 0.001
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01)
    stated = float(found.relative_error().median())
    assert float(ratio.sqrt().std()) == pytest.approx(stated, rel=0.15)
    lower, upper = found.interval(0.95)
    inside = (lower <= (exact / 2).sqrt()) & ((exact / 2).sqrt() <= upper)
    assert float(inside.double().mean()) == pytest.approx(0.95, abs=0.02)


def test_the_background_of_a_real_scan_is_rayleigh(assembled: tuple[KSpace, Sensitivities]) -> None:
    (plane,) = planes_of(*assembled, torch.device("cpu"))
    reconstruction = Sense().bind(plane.problem)
    exact = reconstruction.exact_variance()
    assert exact is not None
    quotient = reconstruction(plane.kspace).abs().double() / (exact / 2).sqrt()
    blocks = quotient.unfold(0, 12, 12).unfold(1, 12, 12).flatten(2)
    medians = blocks.median(dim=-1).values.flatten().sort().values / 1.1774
    # the quietest twentieth of the blocks: no object and little of its ringing
    assert 0.95 <= float(medians[: len(medians) // 20].median()) <= 1.4
    inside = object_mask(reconstruction(plane.kspace))
    assert float(quotient[inside].median()) > 30


def test_the_edge_of_kspace_is_a_fair_covariance(shared_data: Path) -> None:
    with open_raw(shared_data / "snr_r3.h5") as raw:
        blocks = [block.select(block.headers["sample_time_us"] < 10) for block in raw.blocks()]
        context = Context(header=raw.header)
        found = list(create("prewhiten", {"forward": "covariance"}, context)(block for block in blocks if len(block)))
        measured = list(create("prewhiten", {"forward": "covariance"}, context)(raw.blocks()))
    estimated, reference = found[0], measured[0]
    assert not estimated.calibrated
    # the variance that the edge finds in data whitened with the noise scan: 2 is right
    scale = reference.applied_scale
    whitened = scale**2 * np.trace(np.linalg.solve(reference.matrix, estimated.matrix)).real / 14
    assert whitened == pytest.approx(2.05, abs=0.06)
