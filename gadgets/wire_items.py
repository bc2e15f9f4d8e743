"""Items in both forms: as they travel inside a process, and as messages between processes."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gadgetron.types.recon_data import SamplingDescription
from ismrmrd import Acquisition, Image, Meta, constants

from voxelsigma.gadgets.items import (
    Item,
    KSpace,
    OversampledReadout,
    Sensitivities,
    VolumeKey,
    Whitening,
)
from voxelsigma.gadgets.wire import ReconBit, ReconBuffer, ReconData
from voxelsigma.noise.covariance import NoiseCovariance

SERIES_COVARIANCE: Final = 9000
SERIES_SENSITIVITIES: Final = 9001
SERIES_VARIANCE: Final = 9002


def to_wire(item: Item) -> Iterator[Any]:
    """What goes onto the wire for an item: one object, several, or itself."""
    if isinstance(item, NoiseCovariance):
        yield _covariance_image(item)
    elif isinstance(item, Sensitivities):
        yield _sensitivities_image(item)
    elif isinstance(item, KSpace):
        yield _variance_image(item)
        yield _recon_data(item)
    else:
        yield item


class FromWire:
    """Items from what comes off the wire.

    A k-space is the pair of a variance image and the RECON_DATA behind it. A RECON_DATA alone comes from Gadgetron's
    own gadgets and stays what it is, like a bucket.
    """

    def __init__(self) -> None:
        self._variance: Image | None = None

    def __call__(self, found: Any) -> Iterator[Item]:
        """Items for one object of the wire."""
        try:
            yield from self._items(found)
        except KeyError as error:
            raise ValueError(
                f"wire: the sidecar of series {SERIES_COVARIANCE} to {SERIES_VARIANCE} lacks the metadata {error}"
            ) from None

    def end(self) -> None:
        """Judge what is left at the end of a stream.

        Raises
        ------
        ValueError
            If a sample variance came without its RECON_DATA.
        """
        if self._variance is not None:
            raise ValueError(
                f"wire: the stream ended between a sample variance (series {SERIES_VARIANCE}) and its RECON_DATA"
            )

    def _items(self, found: Any) -> Iterator[Item]:
        if isinstance(found, Image) and found.image_series_index == SERIES_COVARIANCE:
            yield _covariance(found)
        elif isinstance(found, Image) and found.image_series_index == SERIES_SENSITIVITIES:
            yield _sensitivities(found)
        elif isinstance(found, Image) and found.image_series_index == SERIES_VARIANCE:
            if self._variance is not None:
                raise ValueError(
                    f"wire: two sample variances (series {SERIES_VARIANCE}) without the RECON_DATA that belongs between"
                )
            self._variance = found
        elif isinstance(found, ReconData) and self._variance is not None:
            yield from _kspaces(found, self._variance)
            self._variance = None
        else:
            yield found


def _sidecar(array: npt.NDArray[Any], series: int, role: str, meta: dict[str, Any]) -> Image:
    """An image that carries an item; empty texts are left out, since they come back as the word `None`."""
    image = Image.from_array(
        np.ascontiguousarray(array),
        acquisition=Acquisition(),
        transpose=False,
        image_series_index=series,
        image_type=constants.IMTYPE_COMPLEX if np.iscomplexobj(array) else constants.IMTYPE_REAL,
    )
    values = {"DataRole": role, **meta}
    image.meta = Meta({key: value for key, value in values.items() if value not in ("", None, ())})
    return image


def _covariance_image(item: NoiseCovariance) -> Image:
    meta = {
        "samples": item.samples,
        "effective_samples": repr(item.effective_samples),
        "dwell_time_us": repr(item.dwell_time_us),
        "bandwidth": repr(item.bandwidth),
        "labels": list(item.labels) or None,
        "source": item.source,
        "calibrated": int(item.calibrated),
        "applied_scale": None if item.applied_scale is None else repr(item.applied_scale),
        "measured_variance": None if item.measured_variance is None else repr(item.measured_variance),
    }
    return _sidecar(item.matrix.astype(np.complex64), SERIES_COVARIANCE, "NOISE_COVARIANCE", meta)


def _covariance(image: Image) -> NoiseCovariance:
    meta = image.meta
    labels = meta.get("labels", [])
    scale, measured = meta.get("applied_scale"), meta.get("measured_variance")
    return NoiseCovariance(
        matrix=image.data[0, 0].astype(np.complex128),
        samples=int(meta["samples"]),
        effective_samples=float(meta["effective_samples"]),
        dwell_time_us=float(meta["dwell_time_us"]),
        bandwidth=float(meta["bandwidth"]),
        labels=(labels,) if isinstance(labels, str) else tuple(labels),
        source=str(meta["source"]),
        calibrated=meta["calibrated"] == "1",
        applied_scale=None if scale is None else float(scale),
        measured_variance=None if measured is None else float(measured),
    )


def _sensitivities_image(item: Sensitivities) -> Image:
    image = _sidecar(item.maps, SERIES_SENSITIVITIES, "COIL_SENSITIVITIES", {"method": item.method})
    for name in VolumeKey.__dataclass_fields__:
        setattr(image, name, getattr(item.key, name))
    return image


def _sensitivities(image: Image) -> Sensitivities:
    key = VolumeKey(**{name: int(getattr(image, name)) for name in VolumeKey.__dataclass_fields__})
    return Sensitivities(maps=image.data.copy(), key=key, method=str(image.meta.get("method", "unknown")))


def _variance_image(item: KSpace) -> Image:
    whitening = {} if item.whitening is None else {f"whitening_{k}": v for k, v in asdict(item.whitening).items()}
    meta = {key: int(value) if isinstance(value, bool) else value for key, value in whitening.items()}
    if item.readout is not None:
        meta["readout"] = f"{item.readout.size} {item.readout.start} {item.readout.stop}"
    meta |= {"incomplete": item.incomplete, "partial_fourier": item.partial_fourier}
    return _sidecar(item.variance, SERIES_VARIANCE, "SAMPLE_VARIANCE", meta)


def _recon_data(item: KSpace) -> ReconData:
    reference = None
    if item.reference is not None:
        headers = item.headers.copy()
        headers["number_of_samples"] = np.where(item.reference_lines, item.reference.shape[-1], 0)
        reference = _buffer(item, item.reference, headers)
    return ReconData((ReconBit(_buffer(item, item.data, item.headers), reference),))


def _buffer(item: KSpace, data: npt.NDArray[np.complex64], headers: npt.NDArray[np.void]) -> ReconBuffer:
    sampling = SamplingDescription()
    sampling.encoded_FOV[:] = item.encoded_fov_mm[::-1]
    sampling.recon_FOV[:] = item.recon_fov_mm[::-1]
    sampling.encoded_matrix[:] = item.data.shape[:0:-1]
    sampling.recon_matrix[:] = item.recon_matrix[::-1]
    for entry, (first, last), size in zip(
        sampling.sampling_limits, item.limits[::-1], item.data.shape[:0:-1], strict=True
    ):
        entry.min, entry.center, entry.max = first, size // 2, last
    return ReconBuffer(data[None, None, None], headers[None, None, None], sampling)


def _kspaces(found: ReconData, variance: Image) -> Iterator[KSpace]:
    """One k-space for each slice, set and repetition of RECON_DATA."""
    for bit in found.bits:
        for index in np.ndindex(bit.data.data.shape[:3]):
            yield _kspace(bit, index, variance)


def _kspace(bit: ReconBit, index: tuple[int, ...], sidecar: Image) -> KSpace:
    data, headers = bit.data.data[index], bit.data.headers[index]
    if sidecar.data.shape != (1, *data.shape[1:]):
        raise ValueError(
            f"wire: a sample variance has shape {sidecar.data.shape[1:]}, the RECON_DATA behind it {data.shape[1:]}; "
            "expected equal shapes"
        )
    reference, reference_lines = None, np.zeros(headers.shape, dtype=bool)
    if bit.reference is not None:
        reference = bit.reference.data[index]
        reference_lines = np.abs(reference).max(axis=(0, 3)) > 0
    sampling = bit.data.sampling
    limits = tuple((int(entry.min), int(entry.max)) for entry in sampling.sampling_limits)[::-1]
    meta = sidecar.meta
    readout = meta.get("readout")
    return KSpace(
        data=data,
        variance=sidecar.data[0].copy(),
        reference=reference,
        reference_lines=reference_lines,
        headers=headers,
        limits=(limits[0], limits[1], limits[2]),
        encoded_fov_mm=_zyx(sampling.encoded_FOV),
        recon_fov_mm=_zyx(sampling.recon_FOV),
        recon_matrix=_zyx_int(sampling.recon_matrix),
        whitening=_whitening(meta),
        incomplete=str(meta.get("incomplete", "")),
        partial_fourier=str(meta.get("partial_fourier", "")),
        readout=None if readout is None else OversampledReadout(*map(int, str(readout).split())),
    )


def _zyx(values: Any) -> tuple[float, float, float]:
    x, y, z = values
    return float(z), float(y), float(x)


def _zyx_int(values: Any) -> tuple[int, int, int]:
    x, y, z = values
    return int(z), int(y), int(x)


def _whitening(meta: Meta) -> Whitening | None:
    if "whitening_source" not in meta:
        return None
    measured = meta.get("whitening_measured_variance")
    return Whitening(
        source=str(meta["whitening_source"]),
        samples=int(meta["whitening_samples"]),
        effective_samples=float(meta["whitening_effective_samples"]),
        coils=int(meta["whitening_coils"]),
        dwell_time_us=float(meta["whitening_dwell_time_us"]),
        bandwidth=float(meta["whitening_bandwidth"]),
        scale=float(meta["whitening_scale"]),
        calibrated=meta["whitening_calibrated"] == "1",
        measured_variance=None if measured is None else float(measured),
    )
