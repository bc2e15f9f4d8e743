"""Image items: headers from the raw data, metadata, and series numbers that never mix types or sizes."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from ismrmrd import Acquisition, AcquisitionHeader, Image, Meta, constants

from voxelsigma.gadgets.items import KSpace

logger = logging.getLogger("voxelsigma.images")

SERIES_IMAGE: Final = 1
SERIES_SIGMA: Final = 2000
SERIES_SIGMA_COMPLEX: Final = 2010
SERIES_SIGMA_ERROR: Final = 2020
SERIES_SIGMA_LOWER: Final = 2030
SERIES_SIGMA_UPPER: Final = 2040
SERIES_SIGMA_FREEDOM: Final = 2050
SERIES_SNR: Final = 2100
SERIES_GFACTOR: Final = 2200

IMAGE_FACTOR: Final = 10
"""Of images in SNR units that are stored as integers, like Gadgetron's own constant scaling."""

LARGEST: Final = 65535
"""Of unsigned 16-bit integers."""

MetaValue = str | float | int | list[str]


@dataclass(slots=True)
class SeriesNumbers:
    """Gives every combination of series, type and size a number of its own, and counts the images of each."""

    _layouts: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)

    def take(self, base: int, array: npt.NDArray[np.generic]) -> tuple[int, int]:
        """Series and image index for an array: the base, or the next number that fits its type and size.

        Raises
        ------
        ValueError
            If ten numbers from the base are taken by others.
        """
        layout = (array.dtype.str, array.shape)
        for series in range(base, base + 10):
            if self._layouts.setdefault(series, layout) == layout:
                self._counts[series] = self._counts.get(series, 0) + 1
                return series, self._counts[series]
        raise ValueError(
            f"image series {base} to {base + 9} hold other types or sizes than {layout[0]} {layout[1]}; "
            "a scan with more than ten sizes cannot be numbered"
        )


def make_image(
    array: npt.NDArray[np.generic],
    kspace: KSpace,
    numbers: SeriesNumbers,
    base: int,
    meta: Mapping[str, MetaValue],
) -> Image:
    """An image item with the geometry, position and counters of its raw data.

    Parameters
    ----------
    array
        Shape `(z, y, x)`, float32, uint16 or complex64, as it is to be stored.
    kspace
        What it was made from.
    numbers
        Series numbers given so far.
    base
        Series it belongs to.
    meta
        Metadata; empty values are left out, since they come back from readers as the word `None`.
    """
    series, index = numbers.take(base, array)
    header = AcquisitionHeader.from_buffer_copy(kspace.central_header.tobytes())
    complex_valued = np.iscomplexobj(array)
    image = Image.from_array(
        np.ascontiguousarray(array),
        acquisition=Acquisition(header),
        transpose=False,
        image_type=constants.IMTYPE_COMPLEX if complex_valued else constants.IMTYPE_MAGNITUDE,
        image_index=index,
        image_series_index=series,
        field_of_view=tuple(reversed(image_fov_mm(kspace))),
        average=0,
    )
    image.meta = _texts({**meta, **_directions(header)})
    return image


def image_fov_mm(kspace: KSpace) -> tuple[float, float, float]:
    """Field of view `(z, y, x)` that an image really has: of what was encoded, where more is wanted than that."""
    z, y, x = (min(wanted, encoded) for wanted, encoded in zip(kspace.recon_fov_mm, kspace.encoded_fov_mm, strict=True))
    return (z if kspace.volumetric else kspace.recon_fov_mm[0]), y, x


def provenance(kspace: KSpace) -> dict[str, MetaValue]:
    """What is known about the data of an image or map, as metadata."""
    found: dict[str, MetaValue] = {
        "Keep_image_geometry": 1,
        "voxelsigma_incomplete": kspace.incomplete,
        "voxelsigma_partial_fourier": f"{kspace.partial_fourier} (zero-filled)" if kspace.partial_fourier else "",
    }
    whitening = kspace.whitening
    if whitening is None:
        return {**found, "voxelsigma_noise_source": "none: data not whitened"}
    found["voxelsigma_noise_source"] = whitening.source
    found["voxelsigma_noise_calibrated"] = "yes" if whitening.calibrated else "no: uncalibrated"
    if whitening.measured_variance is not None:
        found["voxelsigma_noise_check"] = f"{whitening.measured_variance:.4g}"
    if whitening.samples:
        found |= {
            "voxelsigma_noise_samples": whitening.samples,
            "voxelsigma_noise_effective_samples": f"{whitening.effective_samples:.1f}",
        }
    if whitening.scale:
        found |= {
            "voxelsigma_noise_dwell_us": f"{whitening.dwell_time_us:g}",
            "voxelsigma_noise_bandwidth": f"{whitening.bandwidth:g}",
            "voxelsigma_noise_scale": f"{whitening.scale:.6g}",
        }
    return found


def labels(kspace: KSpace) -> str:
    """The warnings that every series of this data carries in its comment: ` uncalibrated`, ` incomplete`."""
    words = []
    if kspace.whitening is not None and not kspace.whitening.calibrated:
        words.append("uncalibrated")
    if kspace.incomplete:
        words.append("incomplete")
    return " ".join(words)


def described(role: str | list[str], comment: str, history: list[str], kspace: KSpace) -> dict[str, MetaValue]:
    """The metadata keys by which Gadgetron and MRD consoles know what an image is."""
    warning = labels(kspace)
    text = f"{comment} {warning}" if warning else comment
    roles = [role] if isinstance(role, str) else role
    return {
        "DataRole": roles if len(roles) > 1 else roles[0],
        "GADGETRON_DataRole": roles[-1],
        "ImageComments": text,
        "GADGETRON_ImageComment": text,
        "SeriesDescriptionAdditional": text.replace(" ", "_"),
        "SequenceDescriptionAdditional": text.replace(" ", "_"),
        "GADGETRON_SeqDescription": text.replace(" ", "_"),
        "ImageProcessingHistory": history,
        "GADGETRON_ImageProcessingHistory": history,
        "Skip_processing_after_recon": 1,
    }


def stored_as(
    array: npt.NDArray[np.float32], dtype: str, factor: float, what: str
) -> tuple[npt.NDArray[np.generic], dict[str, MetaValue]]:
    """An array as its series stores it, and the metadata that say so.

    Parameters
    ----------
    array
        Values in their own units.
    dtype
        `float32` keeps them; `uint16` stores them times `factor`, rounded, for consoles. Voxels beyond its range are
        counted and warned of.
    factor
        Of the integers, the same for all images of a series.
    what
        The series, for the warning.
    """
    if dtype == "float32":
        return array, {**window(array, 1), **scaled_by(1)}
    scaled = np.rint(array * factor)
    beyond = int((scaled > LARGEST).sum())
    if beyond:
        logger.warning("%s: %d voxels are above %g and saturate as uint16", what, beyond, LARGEST / factor)
    return np.clip(scaled, 0, LARGEST).astype(np.uint16), {**window(array, factor), **scaled_by(factor)}


def window(array: npt.NDArray[np.float32], factor: float = 1) -> dict[str, MetaValue]:
    """Display window from 0 to the 99th percentile.

    DICOM and MRD consoles apply it to rescaled values, Gadgetron to those that are stored, `factor` times as large.
    """
    top = float(np.percentile(np.abs(array), 99)) or 1.0
    found: dict[str, MetaValue] = {}
    for prefix, scale in (("", 1.0), ("GADGETRON_", factor)):
        found[f"{prefix}WindowCenter"] = f"{top * scale / 2:.4g}"
        found[f"{prefix}WindowWidth"] = f"{top * scale:.4g}"
    return found


def scaled_by(factor: float) -> dict[str, MetaValue]:
    """What stored numbers were multiplied with, and how a reader undoes it."""
    return {
        "GADGETRON_ScaleRatio": f"{factor:g}",
        "RescaleSlope": f"{1 / factor:g}",
        "RescaleIntercept": 0,
    }


def scale_of(image: Image) -> float | None:
    """What an image's stored numbers were multiplied with; None where it does not say."""
    if ratio := image.meta.get("GADGETRON_ScaleRatio"):
        return float(ratio)
    slope = image.meta.get("RescaleSlope")
    return 1 / float(slope) if slope and float(slope) else None


def history_of(image: Image) -> list[str]:
    """The processing history of an image."""
    found = image.meta.get("ImageProcessingHistory") or image.meta.get("GADGETRON_ImageProcessingHistory") or []
    return [found] if isinstance(found, str) else list(found)


def ascii_text(text: str) -> str:
    """For metadata, which consoles read as ASCII: other characters become escapes of Python's."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def _directions(header: AcquisitionHeader) -> dict[str, MetaValue]:
    """Directions of rows and columns, where the raw data have any."""
    found: dict[str, MetaValue] = {}
    for name, direction in (("ImageRowDir", header.read_dir), ("ImageColumnDir", header.phase_dir)):
        if any(direction):
            found[name] = [f"{value:.9g}" for value in direction]
    return found


def _texts(meta: Mapping[str, MetaValue]) -> Meta:
    """Metadata as they are behind the wire: ASCII texts, none of them empty, lists of two or more."""
    found = {}
    for key, value in meta.items():
        entries = [ascii_text(str(entry)) for entry in (value if isinstance(value, list) else [value])]
        entries = [entry for entry in entries if entry]
        if entries:
            found[key] = entries if len(entries) > 1 else entries[0]
    return Meta(found)
