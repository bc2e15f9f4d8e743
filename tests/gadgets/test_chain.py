"""Raw data to image and σ series: the chain, its gadgets alone, and what must hold for σ."""

import dataclasses
import io
import logging
from typing import Any

import numpy as np
import pytest
from ismrmrd import Image, constants
from numpy.typing import NDArray

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.gadgets import wire
from voxelsigma.gadgets.chaining import GadgetSpec, chain
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.external import items_of
from voxelsigma.gadgets.items import KSpace, NoiseCovariance, Sensitivities
from voxelsigma.gadgets.registry import create
from voxelsigma.gadgets.wire_items import to_wire

FRONT: tuple[tuple[str, dict[str, str]], ...] = (("prewhiten", {}), ("accumulate", {}), ("coil_maps", {"kernel": "4"}))


def series(items: list[Any], index: int) -> NDArray[Any]:
    """All images of a series, shape `(images, z, y, x)`."""
    return np.stack([item.data[0] for item in items if item.image_series_index == index])


def sense_chain(run: Any, scan: SimulatedScan, **sketch: str) -> list[Any]:
    found: list[Any] = run(
        scan.header_xml,
        scan.blocks,
        *FRONT,
        ("reconstruct", {"model": "sense"}),
        ("sketch", {"maps": "magnitude complex error snr gfactor", **sketch}),
    )
    return found


def full_scan(**changes: Any) -> SimulatedScan:
    values = {"matrix": (1, 32, 32), "coils": 4, "acceleration": 1, "mask": "uniform_1d", "reference_lines": 16}
    return simulate(Simulation(**{**values, "snr": 200, "noise_samples": 400_000, **changes}))


def test_image_comes_first_and_every_map_has_its_header(scan: SimulatedScan, run: Any) -> None:
    found = sense_chain(run, scan)
    assert [item.image_series_index for item in found] == [1, 2000, 2010, 2020, 2100, 2200]
    image = found[0]
    assert image.image_type == constants.IMTYPE_MAGNITUDE
    for item in found[1:]:
        for field in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view"):
            assert list(getattr(item, field)) == list(getattr(image, field))
        assert list(item.getHead().matrix_size) == list(image.getHead().matrix_size)
        for field in ("slice", "repetition", "image_index", "acquisition_time_stamp"):
            assert getattr(item, field) == getattr(image, field)
        assert item.meta["DataRole"][0] == "Quantitative"
        assert item.data.dtype == np.float32
    roles = [item.meta["DataRole"][1] for item in found[1:]]
    assert roles == ["STD_MAP", "STD_MAP", "STD_MAP", "SNR_MAP", "GFACTOR"]
    assert image.meta["DataRole"] == "Image"
    assert found[1].meta["voxelsigma_kind"] == "magnitude"
    assert found[2].meta["voxelsigma_kind"] == "complex"


def test_a_fully_sampled_scan_has_sigma_one(run: Any) -> None:
    found = sense_chain(run, full_scan())
    np.testing.assert_allclose(series(found, 2000), 1, rtol=1e-3)
    np.testing.assert_allclose(series(found, 2010), np.sqrt(2), rtol=1e-3)
    np.testing.assert_allclose(series(found, 2200), 1, rtol=1e-3)
    np.testing.assert_allclose(series(found, 2100), series(found, 1), rtol=1e-3)


def test_the_image_is_in_snr_units(run: Any) -> None:
    scan = full_scan(snr=40)
    image = series(sense_chain(run, scan), 1)[0, 0]
    truth = np.abs(scan.objects[0, 0])
    inside = truth > 0.1 * truth.max()
    # the simulation's own definition: mean object magnitude 40, within what ringing and edges leave
    assert image[inside].mean() == pytest.approx(40, rel=0.05)


def test_averages_lower_sigma(run: Any) -> None:
    found = sense_chain(run, full_scan(averages=4))
    np.testing.assert_allclose(series(found, 2000), 0.5, rtol=1e-3)


def test_zero_filled_interpolation_keeps_sigma(run: Any) -> None:
    scan = full_scan()
    xml = scan.header_xml.replace(
        b"<reconSpace><matrixSize><x>32</x><y>32</y>", b"<reconSpace><matrixSize><x>48</x><y>64</y>"
    )
    found = sense_chain(run, dataclasses.replace(scan, header_xml=xml))
    assert series(found, 1).shape == (1, 1, 64, 48)
    np.testing.assert_allclose(series(found, 2000), 1, rtol=1e-3)
    plain = series(sense_chain(run, scan), 1)[0, 0]
    np.testing.assert_allclose(series(found, 1)[0, 0, ::2, ::3][:, :10], plain[:, ::2][:, :10], atol=0.02 * plain.max())


def test_phase_oversampling_is_cropped(run: Any) -> None:
    scan = full_scan()
    whole = series(sense_chain(run, scan), 1)[0, 0]
    start = scan.header_xml.index(b"<reconSpace>")
    recon = scan.header_xml[start:].replace(b"<y>32</y>", b"<y>24</y>", 1).replace(b"<y>240.0</y>", b"<y>180.0</y>", 1)
    found = sense_chain(run, dataclasses.replace(scan, header_xml=scan.header_xml[:start] + recon))
    cropped = series(found, 1)[0, 0]
    assert cropped.shape == (24, 32)
    np.testing.assert_allclose(cropped, whole[4:28], atol=1e-3 * whole.max())
    np.testing.assert_allclose(series(found, 2000), 1, rtol=1e-3)


def test_partial_fourier_is_zero_filled_and_said_so(run: Any) -> None:
    scan = full_scan()
    xml = scan.header_xml.replace(
        b"<minimum>0</minimum><maximum>31</maximum><center>16</center>",
        b"<minimum>8</minimum><maximum>31</maximum><center>16</center>",
        1,
    )
    block = scan.blocks[1]
    kept = block.select(block.headers["idx"]["kspace_encode_step_1"] >= 8)
    partial = dataclasses.replace(scan, header_xml=xml, blocks=[scan.blocks[0], kept])
    found = sense_chain(run, partial)
    np.testing.assert_allclose(series(found, 2000), 1, rtol=1e-3)
    assert found[0].meta["voxelsigma_partial_fourier"] == "k1 0.75 (zero-filled)"
    whole = series(sense_chain(run, scan), 1)
    # the missing quarter blurs edges but moves nothing: the images stay alike
    assert np.corrcoef(series(found, 1).ravel(), whole.ravel())[0, 1] > 0.95


def test_sketch_and_exact_map_agree_within_the_stated_error(scan: SimulatedScan, run: Any) -> None:
    exact = sense_chain(run, scan)
    sketched = sense_chain(run, scan, estimator="sketch", probes="256", seed="5")
    assert exact[1].meta["voxelsigma_estimator"] == "exact"
    assert sketched[1].meta["voxelsigma_estimator"] == "sketch with control variate"
    assert sketched[1].meta["voxelsigma_probes"] == "256"
    ratio = series(sketched, 2000) / series(exact, 2000)
    stated = float(sketched[1].meta["voxelsigma_sketch_error"])
    # R = 2: voxels share errors in pairs, 512 independent values of deviation `stated`; five deviations of the mean
    assert ratio.mean() == pytest.approx(1, abs=5 * stated / np.sqrt(512))
    assert ratio.std() == pytest.approx(stated, rel=0.2)
    np.testing.assert_allclose(series(sketched, 2020), series(sketched, 2000) * stated, rtol=0.6)


def test_the_same_seed_gives_the_same_map_for_every_chunk_size(scan: SimulatedScan, run: Any) -> None:
    maps = [
        series(sense_chain(run, scan, estimator="sketch", probes="64", seed="7", chunk=chunk), 2000)
        for chunk in ("1", "7", "64")
    ]
    for other in maps[1:]:
        np.testing.assert_allclose(other, maps[0], rtol=1e-5)
    another = series(sense_chain(run, scan, estimator="sketch", probes="64", seed="8"), 2000)
    assert np.abs(another / maps[0] - 1).max() > 0.01


def test_a_few_noise_samples_widen_sigma(run: Any) -> None:
    found = sense_chain(run, full_scan(noise_samples=128))
    bias = float(found[1].meta["voxelsigma_covariance_bias"])
    effective = float(found[1].meta["voxelsigma_noise_effective_samples"])
    assert bias == pytest.approx(1 + 4 / effective, rel=1e-4)
    np.testing.assert_allclose(series(found, 2000), bias, rtol=1e-3)
    assert float(found[1].meta["voxelsigma_covariance_error"]) == pytest.approx(0.5 / np.sqrt(effective), rel=1e-3)
    np.testing.assert_allclose(series(found, 2200), 1, rtol=1e-3)


def test_each_gadget_alone_gives_the_series_of_the_chain(scan: SimulatedScan, run: Any) -> None:
    """One gadget after the other, every item through the wire between them, as in separate processes."""
    forwards = ["covariance", "", "kspace", "kspace sensitivities", ""]
    gadgets = [*FRONT, ("reconstruct", {"model": "sense"}), ("sketch", {"seed": "5", "estimator": "sketch"})]
    context = Context(header=parse_header(scan.header_xml))
    items: list[Any] = list(scan.blocks)
    for (name, properties), forward in zip(gadgets, forwards, strict=True):
        gadget = create(name, {**properties, "forward": forward} if forward else properties, context)
        content = b"".join(wire.message(part) for item in items for part in to_wire(item)) + wire.close_message()
        items = list(gadget(items_of(messages_of(content))))
    expected = run(scan.header_xml, scan.blocks, *gadgets)
    assert [item.image_series_index for item in items] == [1, 2000]
    for one, other in zip(items, expected, strict=True):
        assert np.abs(one.data - other.data).max() <= 1e-5 * np.abs(other.data).max()
        ours, theirs = ({k: v for k, v in item.meta.items() if "noise" not in k} for item in (one, other))
        assert ours == theirs


def messages_of(content: bytes) -> Any:
    reader = wire.Reader(io.BytesIO(content).read)
    while not isinstance(found := wire.read_message(reader), wire.Close):
        yield found


def test_sidecars_reach_the_client_only_where_asked(scan: SimulatedScan, run: Any) -> None:
    asked = run(
        scan.header_xml,
        scan.blocks,
        ("prewhiten", {}),
        ("accumulate", {"forward": "covariance"}),
        ("coil_maps", {"kernel": "4"}),
    )
    assert [type(item) for item in asked] == [NoiseCovariance, Sensitivities]


def volume_scan(**changes: Any) -> SimulatedScan:
    values = {"matrix": (24, 32, 16), "coils": 6, "reference_lines": 12, "snr": 100, "noise_samples": 100_000}
    return simulate(Simulation(**{**values, **changes}))


def test_three_dimensional_scans(run: Any) -> None:
    full = volume_scan(acceleration=1, mask="uniform_1d")
    (whole,) = run(full.header_xml, full.blocks, *FRONT, ("reconstruct", {}))
    scan = volume_scan(acceleration=2, mask="random_2d", seed=1)
    found = run(
        scan.header_xml,
        scan.blocks,
        *FRONT,
        ("reconstruct", {"regularization": "0.01"}),
        ("sketch", {"seed": "1", "probes": "32", "maps": "magnitude gfactor"}),
    )
    image, sigma = series(found, 1)[0], series(found, 2000)[0]
    assert image.shape == sigma.shape == (24, 32, 16)
    assert list(found[0].getHead().matrix_size) == [16, 32, 24]
    assert np.corrcoef(image.ravel(), whole.data.ravel())[0, 1] > 0.96
    inside = whole.data[0] > 0.1 * whole.data.max()
    # R = 2 alone makes √2; few coils and random holes do the rest
    assert 1.2 < np.median(sigma[inside]) < 3
    np.testing.assert_allclose(series(found, 2200)[0], sigma / np.sqrt(2), rtol=0.02)


def test_a_fully_sampled_volume_has_sigma_one(run: Any) -> None:
    scan = full_scan(matrix=(16, 16, 16), reference_lines=8)
    found = sense_chain(run, scan)
    np.testing.assert_allclose(series(found, 2000), 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("estimator", "name"), [("sketch", "sketch with control variate"), ("auto", "image-space probing")]
)
def test_an_asymmetric_echo_is_sketched_with_its_own_noise(run: Any, estimator: str, name: str) -> None:
    scan = full_scan()
    block = scan.blocks[1]
    headers = block.headers.copy()
    headers["discard_pre"] = 16
    cut = dataclasses.replace(scan, blocks=[scan.blocks[0], dataclasses.replace(block, headers=headers)])
    found = sense_chain(run, cut, seed="2", probes="512", estimator=estimator)
    assert found[1].meta["voxelsigma_estimator"] == name
    sigma = series(found, 2000)[0, 0]
    # 24 of 32 samples, all of them acquired: white noise of deviation 1 on a grid of 24, up to the crop's edges
    assert np.median(sigma) == pytest.approx(1, abs=0.05)


def test_uncalibrated_maps_say_so(run: Any) -> None:
    scan = full_scan(noise_samples=0, matrix=(1, 64, 64))
    found = sense_chain(run, scan)
    for item in found:
        assert "uncalibrated" in item.meta["ImageComments"]
        assert item.meta["voxelsigma_noise_calibrated"] == "no: uncalibrated"
    assert found[1].meta["voxelsigma_noise_source"] == "edge of k-space"


def test_incomplete_series_say_so(scan: SimulatedScan, run: Any) -> None:
    half = [scan.blocks[0], scan.blocks[1].select(slice(0, 20))]
    found = run(
        scan.header_xml,
        half,
        ("prewhiten", {}),
        ("accumulate", {"incomplete": "emit"}),
        ("coil_maps", {"kernel": "4"}),
        ("reconstruct", {"regularization": "0.01"}),
        ("sketch", {}),
    )
    for item in found:
        assert "incomplete" in item.meta["ImageComments"]
        assert "of 16 lines" in item.meta["voxelsigma_incomplete"]


def test_integers_for_consoles_keep_their_scale(
    scan: SimulatedScan, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    floats, integers = sense_chain(run, scan), sense_chain(run, scan, dtype="uint16")
    for index, factor in ((2000, 1000), (2100, 10), (2200, 1000)):
        np.testing.assert_allclose(series(integers, index) / factor, series(floats, index), atol=0.51 / factor)
        item = next(item for item in integers if item.image_series_index == index)
        assert item.data.dtype == np.uint16
        assert float(item.meta["GADGETRON_ScaleRatio"]) == factor
    assert caplog.text == ""
    loud = simulate(Simulation(matrix=(1, 32, 32), coils=4, acceleration=1, mask="uniform_1d", snr=20000))
    sense_chain(run, loud, dtype="uint16")
    assert "voxels are above 6553.5 and saturate" in caplog.text


def test_another_matrix_takes_the_next_series(scan: SimulatedScan, run: Any) -> None:
    from voxelsigma.gadgets.images import SeriesNumbers

    numbers = SeriesNumbers()
    assert numbers.take(1, np.zeros((1, 4, 4), np.float32)) == (1, 1)
    assert numbers.take(1, np.zeros((1, 4, 4), np.float32)) == (1, 2)
    assert numbers.take(1, np.zeros((1, 4, 5), np.float32)) == (2, 1)
    assert numbers.take(1, np.zeros((1, 4, 4), np.uint16)) == (3, 1)
    for size in range(6, 13):
        numbers.take(1, np.zeros((1, 4, size), np.float32))
    with pytest.raises(ValueError, match="image series 1 to 10 hold other types or sizes"):
        numbers.take(1, np.zeros((1, 9, 9), np.float32))


def test_complex_images_on_request(scan: SimulatedScan, run: Any) -> None:
    (image,) = run(scan.header_xml, scan.blocks, *FRONT, ("reconstruct", {"output": "complex"}))
    assert isinstance(image, Image)
    assert image.data.dtype == np.complex64
    assert image.image_type == constants.IMTYPE_COMPLEX


def test_walsh_maps_reconstruct_too(scan: SimulatedScan, run: Any) -> None:
    front = (*FRONT[:2], ("coil_maps", {"method": "walsh"}))
    (walsh,) = run(scan.header_xml, scan.blocks, *front, ("reconstruct", {}))
    (espirit,) = run(scan.header_xml, scan.blocks, *FRONT, ("reconstruct", {}))
    assert np.corrcoef(walsh.data.ravel(), espirit.data.ravel())[0, 1] > 0.95


def test_a_network_is_sketched(scan: SimulatedScan, run: Any) -> None:
    found = run(
        scan.header_xml,
        scan.blocks,
        *FRONT,
        ("reconstruct", {"model": "unrolled_small"}),
        ("sketch", {"probes": "12", "seed": "1", "maps": "magnitude gfactor", "prior": "off"}),
    )
    assert [item.image_series_index for item in found] == [1, 2000, 2200]
    assert found[1].meta["voxelsigma_model"] == "unrolled_small"
    assert found[1].meta["voxelsigma_probes"] == "12"
    assert len(found[1].meta["voxelsigma_model_sha256"]) == 64
    assert "held fixed" in found[1].meta["voxelsigma_sensitivities"]
    assert "noise ratio" in found[2].meta["ImageComments"]
    assert (series(found, 2000) >= 0).all()


def test_an_unfit_model_is_warned_of(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    scan = full_scan(coils=2)
    found = run(scan.header_xml, scan.blocks, *FRONT, ("reconstruct", {"model": "unrolled_small"}))
    assert (
        "model 'unrolled_small' was not made for this data: acceleration 1.0 (fit for 2 to 8), 2 coils" in caplog.text
    )
    assert "2 coils" in found[0].meta["voxelsigma_unfit"]


def test_a_fully_sampled_centre_needs_no_reference_lines(run: Any) -> None:
    found = run((scan := full_scan(reference_lines=0)).header_xml, scan.blocks, *FRONT, ("reconstruct", {}))
    assert len(found) == 1


def test_an_image_without_its_kspace_is_refused(scan: SimulatedScan, run: Any) -> None:
    image = run(scan.header_xml, scan.blocks, *FRONT, ("reconstruct", {}))
    with pytest.raises(ValueError, match="no k-space came for the image of slice 0"):
        run(scan.header_xml, image, ("sketch", {}))


def test_progress_is_reported(scan: SimulatedScan) -> None:
    told: list[tuple[str, int, int]] = []
    context = Context(
        header=parse_header(scan.header_xml), progress=lambda stage, done, total: told.append((stage, done, total))
    )
    specs = [
        GadgetSpec(name, properties)
        for name, properties in (*FRONT, ("reconstruct", {}), ("sketch", {"estimator": "sketch", "probes": "20"}))
    ]
    list(chain(specs, context)(iter(scan.blocks)))
    assert ("slices", 1, 0) in told
    assert told[-1] == ("probes", 20, 20)


def test_a_target_error_stops_early(scan: SimulatedScan, run: Any) -> None:
    found = sense_chain(run, scan, estimator="sketch", probes="4096", target_error="0.08")
    assert int(found[1].meta["voxelsigma_probes"]) < 200
    assert float(found[1].meta["voxelsigma_sketch_error"]) <= 0.08


def test_kspace_of_another_process_is_not_kept(scan: SimulatedScan) -> None:
    context = Context(header=parse_header(scan.header_xml))
    front = chain([GadgetSpec("prewhiten", {}), GadgetSpec("accumulate", {})], context)
    (kspace,) = front(iter(scan.blocks))
    assert isinstance(kspace, KSpace)
    maps = create("coil_maps", {"kernel": "4", "forward": "kspace"}, context)(iter([kspace]))
    with pytest.raises(ValueError, match="no coil sensitivities came"):
        # the second k-space of the same volume must bring sensitivities of its own
        list(create("reconstruct", {}, context)(iter([*maps, kspace])))


@pytest.fixture(autouse=True)
def _warnings_reach_caplog(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="voxelsigma")
    logging.getLogger("voxelsigma").propagate = True
