"""What a real server's front end sent gives the series that the raw data give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ismrmrd import Image
from numpy.typing import NDArray
from tests.gadgets.front_end import changed
from tests.gadgets.streams import Gadgets, recording, through

from voxelsigma.formats.raw_file import open_raw
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.wire import Bucket, ReconData
from voxelsigma.noise.voxels import object_mask

WHITENED = ("accumulate", {"prewhitened": "true"})
SENSE: Gadgets = (("coil_maps", {}), ("reconstruct", {}), ("sketch", {"maps": "magnitude complex snr gfactor"}))
CROPPED: Gadgets = (("coil_maps", {"crop": "0.9"}), *SENSE[1:-1], ("sketch", {"maps": "magnitude complex"}))
NETWORK: Gadgets = (
    ("coil_maps", {"crop": "0.9"}),
    ("reconstruct", {"model": "unrolled_small"}),
    # of a prediction and a sketch the better one is taken, voxel by voxel: rounding may change which
    ("sketch", {"seed": "3", "probes": "16", "prior": "off"}),
)
RECORDINGS = ("snr_recondata", "snr_recondata_ref", "snr_bucket")


@pytest.fixture(scope="module")
def linear_of_the_file(shared_data: Path) -> list[list[Any]]:
    return [of_the_file(shared_data, gadgets) for gadgets in (SENSE, CROPPED)]


def of_the_file(shared_data: Path, gadgets: Gadgets) -> list[Any]:
    with open_raw(shared_data / "snr_r3.h5") as raw:
        return through(Context(header=raw.header), raw.blocks(), (("prewhiten", {}), ("accumulate", {}), *gadgets))


def unbiased(image: Image) -> NDArray[np.float64]:
    """A map without the factor for the number of noise samples, which the hybrid way does not know."""
    stated = image.meta.get("voxelsigma_covariance_bias", "1")
    factor = {2000: 1, 2010: 1, 2100: -1}.get(image.image_series_index, 0)
    bias = 1.0 if stated.startswith("unknown") else float(stated)
    return image.data[0].astype(np.float64) / bias**factor


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_give_the_linear_series_of_the_chain(
    shared_data: Path, linear_of_the_file: list[list[Any]], name: str
) -> None:
    context, items = recording(shared_data / "wire" / f"{name}.bin")
    assert [type(item) for item in items] == [Bucket if "bucket" in name else ReconData]
    # far from the object, where g is 15, the last bit of the reference lines is worth 2e-4 in the coil maps
    for gadgets, expected, limit in zip((SENSE, CROPPED), linear_of_the_file, (1e-5, 1e-5), strict=True):
        found = through(context, items, (WHITENED, *gadgets))
        for one, other in zip(found, expected, strict=True):
            assert one.image_series_index == other.image_series_index
            largest = np.abs(unbiased(other)).max()
            np.testing.assert_allclose(unbiased(one), unbiased(other), atol=limit * largest, rtol=0)


@pytest.mark.slow
def test_recordings_give_the_networks_series_of_the_chain(shared_data: Path) -> None:
    image, sigma = of_the_file(shared_data, NETWORK)
    inside = object_mask(torch.from_numpy(image.data[0, 0].astype(np.complex64))).numpy()
    for name in RECORDINGS:
        context, items = recording(shared_data / "wire" / f"{name}.bin")
        other, other_sigma = through(context, items, (WHITENED, *NETWORK))
        assert np.abs(other.data - image.data).max() <= 1e-4 * image.data.max()
        ratio = unbiased(other_sigma)[0, inside] / unbiased(sigma)[0, inside]
        # rounding flips a rectifier here and there
        assert np.percentile(np.abs(ratio - 1), 99) <= 1e-3


def test_a_recorded_scan_that_was_truncated_is_an_error_with_the_counts(shared_data: Path) -> None:
    context, (found,) = recording(shared_data / "wire" / "snr_recondata.bin")
    headers = found.bits[0].data.headers.copy()
    lines = np.flatnonzero(headers["number_of_samples"][0, 0, 0, 0])
    headers["number_of_samples"][..., lines[18:]] = 0
    half = changed(found, headers=headers)
    with pytest.raises(ValueError, match="slice 0 is incomplete: 18 of 36 lines"):
        through(context, [half], (WHITENED,))
    emitting = ("accumulate", {"prewhitened": "true", "incomplete": "emit"})
    for image in through(context, [half], (emitting, *SENSE)):
        assert "incomplete" in image.meta["ImageComments"]
        assert image.meta["voxelsigma_incomplete"] == "18 of 36 lines"
