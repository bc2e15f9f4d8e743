"""Metadata of every series: the keys that Gadgetron and MRD consoles read, and what integers stand for."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ismrmrd import Image, Meta
from tests.gadgets.streams import Gadgets, over_the_wire, through

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.image_file import image_writer, read_series
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.images import ascii_text, history_of, scale_of
from voxelsigma.gadgets.registry import create
from voxelsigma.models.cards import load_card

FRONT: Gadgets = (("prewhiten", {}), ("accumulate", {}), ("coil_maps", {"kernel": "4"}))
MAPS = "magnitude complex error snr gfactor"
FACTORS = {1: 10, 2000: 1000, 2010: 1000, 2020: 1000, 2100: 10, 2200: 1000}
ROLES = {2000: "STD_MAP", 2010: "STD_MAP", 2020: "STD_MAP", 2100: "SNR_MAP", 2200: "GFACTOR"}
WINDOWS = ("WindowCenter", "WindowWidth")


def series_of(scan: SimulatedScan, image: str = "float32", maps: str = "float32") -> list[Image]:
    context = Context(header=parse_header(scan.header_xml))
    back = (("reconstruct", {"dtype": image}), ("sketch", {"maps": MAPS, "dtype": maps}))
    return through(context, scan.blocks, (*FRONT, *back))


@pytest.fixture(scope="module")
def floats(scan: SimulatedScan) -> list[Image]:
    return series_of(scan)


@pytest.fixture(scope="module")
def integers(scan: SimulatedScan) -> list[Image]:
    return series_of(scan, "uint16", "uint16")


@pytest.fixture(scope="module", params=["floats", "integers"])
def series(request: pytest.FixtureRequest) -> list[Image]:
    found: list[Image] = request.getfixturevalue(request.param)
    return found


def test_every_series_has_the_keys_that_are_read(series: list[Image]) -> None:
    assert [image.image_series_index for image in series] == list(FACTORS)
    for image in series:
        meta = image.meta
        for key in ("ImageComments", "SeriesDescriptionAdditional", "WindowCenter", "WindowWidth", "RescaleSlope"):
            assert meta[key]
        for one, other in (
            ("ImageComments", "GADGETRON_ImageComment"),
            ("SeriesDescriptionAdditional", "SequenceDescriptionAdditional"),
            ("SeriesDescriptionAdditional", "GADGETRON_SeqDescription"),
            ("ImageProcessingHistory", "GADGETRON_ImageProcessingHistory"),
        ):
            assert meta[one] == meta[other]
        assert " " not in meta["SeriesDescriptionAdditional"]
        assert meta["RescaleIntercept"] == "0"
        assert meta["Keep_image_geometry"] == meta["Skip_processing_after_recon"] == "1"
        # each number of the header's directions, as a text
        assert [float(text) for text in meta["ImageRowDir"]] == pytest.approx(list(image.read_dir))
        assert [float(text) for text in meta["ImageColumnDir"]] == pytest.approx(list(image.phase_dir))
        assert "IceMiniHead" not in meta


def test_roles(series: list[Image]) -> None:
    image, *maps = series
    assert image.meta["DataRole"] == image.meta["GADGETRON_DataRole"] == "Image"
    assert "Use_dedicated_scaling_factor" not in image.meta
    for item in maps:
        role = ROLES[item.image_series_index]
        assert item.meta["DataRole"] == ["Quantitative", role]
        assert item.meta["GADGETRON_DataRole"] == role
        assert item.meta["Use_dedicated_scaling_factor"] == "1"


def test_no_value_is_empty_or_beyond_ascii(series: list[Image]) -> None:
    for image in series:
        assert image.attribute_string.isascii()
        for key, value in image.meta.items():
            entries = value if isinstance(value, list) else [value]
            assert entries, key
            assert all(isinstance(entry, str) and entry and entry != "None" for entry in entries), key


def test_metadata_are_the_same_behind_the_wire_and_the_file(series: list[Image], tmp_path: Path) -> None:
    path = tmp_path / "images.h5"
    with image_writer(path) as writer:
        for image in series:
            writer.write(image)
    read = {found.index: found for found in read_series(path)}
    for image, behind in zip(series, over_the_wire(*series), strict=True):
        assert dict(behind.meta) == dict(image.meta)
        assert dict(Meta.deserialize(image.meta.serialize())) == dict(image.meta)
        stored = read[image.image_series_index]
        assert dict(stored.attributes[0]) == dict(image.meta)
        np.testing.assert_array_equal(stored.data[0], image.data)
        assert stored.data.dtype == behind.data.dtype == image.data.dtype


def test_integers_are_the_floats_rescaled(floats: list[Image], integers: list[Image]) -> None:
    for one, other in zip(floats, integers, strict=True):
        factor = FACTORS[one.image_series_index]
        assert (one.data.dtype, other.data.dtype) == (np.float32, np.uint16)
        slope, intercept = float(other.meta["RescaleSlope"]), float(other.meta["RescaleIntercept"])
        np.testing.assert_allclose(other.data * slope + intercept, one.data, atol=0.501 / factor)
        assert float(other.meta["GADGETRON_ScaleRatio"]) == factor
        assert one.meta["RescaleSlope"] == one.meta["GADGETRON_ScaleRatio"] == "1"
        for name in WINDOWS:
            # consoles apply the window to rescaled values, Gadgetron to stored ones
            assert other.meta[name] == one.meta[name]
            assert float(other.meta[f"GADGETRON_{name}"]) == pytest.approx(factor * float(one.meta[name]), rel=1e-3)
        centre, width = (float(one.meta[name]) for name in WINDOWS)
        assert centre + width / 2 == pytest.approx(np.percentile(one.data, 99) or 1.0, rel=1e-3)


def test_maps_repeat_what_was_done_to_their_image(floats: list[Image], integers: list[Image]) -> None:
    for series, scale in ((floats, "1"), (integers, "10")):
        image, *maps = series
        assert history_of(image) == ["voxelsigma", "sense"]
        assert scale_of(image) == float(scale)
        for item in maps:
            assert history_of(item) == ["voxelsigma", "sense", "exact"]
            assert item.meta["voxelsigma_image_scale"] == scale


def test_the_image_may_be_scaled_by_somebody_on_the_way(scan: SimulatedScan) -> None:
    context = Context(header=parse_header(scan.header_xml))
    *sidecars, image = through(
        context,
        scan.blocks,
        (
            *FRONT[:2],
            ("coil_maps", {"kernel": "4", "forward": "kspace"}),
            ("reconstruct", {"forward": "kspace sensitivities"}),
        ),
    )
    expected = list(create("sketch", {"maps": "magnitude snr"}, context)(iter([*sidecars, image])))
    foreign = Image(image.getHead(), image.attribute_string)
    foreign.data[:] = 7 * image.data
    meta = image.meta
    meta |= {"RescaleSlope": "0.25", "ImageProcessingHistory": [*history_of(image), "AutoScale"]}
    del meta["GADGETRON_ScaleRatio"]
    foreign.meta = meta
    found = list(create("sketch", {"maps": "magnitude snr"}, context)(iter([*sidecars, foreign])))
    assert found[0] is foreign
    for one, other in zip(found[1:], expected[1:], strict=True):
        # sigma and SNR are of what was reconstructed, whatever its numbers were multiplied with
        np.testing.assert_array_equal(one.data, other.data)
        assert one.meta["voxelsigma_image_scale"] == "4"
        assert history_of(one) == ["voxelsigma", "sense", "AutoScale", "exact"]
    del meta["RescaleSlope"]
    foreign.meta = meta
    _, sigma, _ = create("sketch", {"maps": "magnitude snr"}, context)(iter([*sidecars, foreign]))
    assert "voxelsigma_image_scale" not in sigma.meta


def test_all_slices_of_an_integer_series_share_their_scale() -> None:
    scan = simulate(
        Simulation(matrix=(1, 32, 32), coils=4, acceleration=2, mask="uniform_1d", reference_lines=12, slices=3)
    )
    found = [image for image in series_of(scan, "uint16", "uint16") if image.image_series_index == 1]
    assert [image.slice for image in found] == [0, 1, 2]
    assert {image.meta["RescaleSlope"] for image in found} == {"0.1"}


def test_saturation_is_counted_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="voxelsigma")
    logging.getLogger("voxelsigma").propagate = True
    loud = simulate(Simulation(matrix=(1, 32, 32), coils=4, acceleration=1, mask="uniform_1d", snr=20000))
    plain, found = (series_of(loud, dtype, "float32")[0] for dtype in ("float32", "uint16"))
    beyond = int((plain.data > 6553.5).sum())
    assert beyond > 0
    assert f"sense image, SNR units: {beyond} voxels are above 6553.5 and saturate as uint16" in caplog.text
    assert (found.data == 65535).sum() >= beyond


def test_complex_integers_are_refused(scan: SimulatedScan) -> None:
    context = Context(header=parse_header(scan.header_xml))
    with pytest.raises(ValueError, match="property 'dtype' is 'uint16' and 'output' is 'complex'; integers are for"):
        create("reconstruct", {"dtype": "uint16", "output": "complex"}, context)
    with pytest.raises(ValueError, match="property 'dtype' must be one of float32, uint16, got 'int16'"):
        create("sketch", {"dtype": "int16"}, context)


def test_a_card_beyond_ascii_is_found_again(scan: SimulatedScan, tmp_path: Path) -> None:
    source = load_card("sense").path
    card = tmp_path / "Zürich σ.yaml"
    card.write_text(source.read_text())
    context = Context(header=parse_header(scan.header_xml))
    items = through(
        context,
        scan.blocks,
        (
            *FRONT[:2],
            ("coil_maps", {"kernel": "4", "forward": "kspace"}),
            ("reconstruct", {"model": str(card), "forward": "kspace sensitivities"}),
        ),
    )
    assert items[-1].attribute_string.isascii()
    image, sigma = create("sketch", {"model": str(card)}, context)(iter(over_the_wire(*items)))
    assert sigma.meta["voxelsigma_model_card"] == image.meta["voxelsigma_model_card"]


def test_a_card_that_only_a_message_names_is_not_opened(scan: SimulatedScan, tmp_path: Path) -> None:
    """A card may name code, and messages come from outside."""
    card = tmp_path / "own.yaml"
    card.write_text(load_card("sense").path.read_text())
    context = Context(header=parse_header(scan.header_xml))
    last = ("reconstruct", {"model": str(card), "forward": "kspace sensitivities"})
    items = through(context, scan.blocks, (*FRONT[:2], ("coil_maps", {"kernel": "4", "forward": "kspace"}), last))
    card.unlink()
    with pytest.raises(ValueError, match=r"own.yaml', which is not shipped; property 'model' .* got 'sense'"):
        list(create("sketch", {}, context)(iter(over_the_wire(*items))))


def test_a_path_in_the_place_of_a_name_is_not_opened(scan: SimulatedScan, tmp_path: Path) -> None:
    changes = {"voxelsigma_model": str(tmp_path / "own.yaml"), "voxelsigma_model_card": ""}
    image, context = image_by(scan, tmp_path, changes)
    with pytest.raises(ValueError, match=r"own.yaml', which is not shipped; property 'model' .* got 'sense'"):
        list(create("sketch", {}, context)(iter(image)))


def test_an_image_of_other_weights_is_refused(scan: SimulatedScan, tmp_path: Path) -> None:
    image, context = image_by(scan, tmp_path, {"voxelsigma_model_sha256": "abc", "voxelsigma_model_card": ""})
    with pytest.raises(ValueError, match=r"made by 'sense' with weights of sha256 abc, the card .*sense.yaml has none"):
        list(create("sketch", {}, context)(iter(image)))


def test_a_card_of_a_shipped_name_elsewhere_is_not_taken_for_the_shipped_one(
    scan: SimulatedScan, tmp_path: Path
) -> None:
    card = tmp_path / "sense.yaml"
    card.write_text(load_card("sense").path.read_text())
    items, context = image_by(scan, tmp_path, {}, card)
    assert items[-1].meta["voxelsigma_model_card"] == str(card)
    with pytest.raises(ValueError, match="which is not shipped"):
        list(create("sketch", {}, context)(iter(items)))


def image_by(
    scan: SimulatedScan, folder: Path, changes: dict[str, str], card: Path | None = None
) -> tuple[list[Any], Context]:
    """What an image of another process comes with, its metadata changed."""
    context = Context(header=parse_header(scan.header_xml))
    last = ("reconstruct", {"model": str(card or "sense"), "forward": "kspace sensitivities"})
    items = through(context, scan.blocks, (*FRONT[:2], ("coil_maps", {"kernel": "4", "forward": "kspace"}), last))
    found = over_the_wire(*items)
    meta = found[-1].meta
    meta.update(changes)
    found[-1].meta = meta
    return found, context


def test_texts_of_others_become_ascii(scan: SimulatedScan) -> None:
    context = Context(header=parse_header(scan.header_xml))
    (kspace,) = through(context, scan.blocks, FRONT[:2])
    named = dataclasses.replace(kspace, whitening=dataclasses.replace(kspace.whitening, source="C:\\Rösti µ\n"))
    image, *_ = through(context, [named], (FRONT[2], ("reconstruct", {}), ("sketch", {})))
    assert image.attribute_string.isascii()
    assert ascii_text("5 µs") == "5 \\xb5s"


def test_directions_that_nobody_knows_are_left_out(scan: SimulatedScan) -> None:
    blocks: list[Any] = []
    for block in scan.blocks:
        headers = block.headers.copy()
        headers["read_dir"] = headers["phase_dir"] = 0
        blocks.append(dataclasses.replace(block, headers=headers))
    image, *_ = series_of(dataclasses.replace(scan, blocks=blocks))
    assert "ImageRowDir" not in image.meta
    assert "ImageColumnDir" not in image.meta
