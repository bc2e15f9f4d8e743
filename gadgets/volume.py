"""A volume that is being filled with lines."""

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from voxelsigma.formats.header import Encoding
from voxelsigma.formats.readouts import HEADER_DTYPE, Headers, Samples
from voxelsigma.gadgets.items import KSpace, OversampledReadout, VolumeKey, Whitening
from voxelsigma.gadgets.placement import ReadoutGeometry

MAX_VOLUME_BYTES: Final = 64 * 2**30


@dataclass(slots=True)
class LineBuffer:
    """Sums of lines on the encoded matrix, `(k2, k1, coils, k0)`: a line lies together, which makes adding it cheap."""

    total: Samples
    count: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, coils: int, matrix: tuple[int, int, int]) -> "LineBuffer":
        """For a matrix `(k2, k1, k0)`."""
        shape = (*matrix[:2], coils, matrix[2])
        return cls(np.zeros(shape, dtype=np.complex64), np.zeros(matrix[:2], dtype=np.int64))

    def add(self, samples: Samples, line: tuple[int, int]) -> None:
        """Add one readout, shape `(coils, k0)`."""
        self.total[line] += samples
        self.count[line] += 1

    def mean(self) -> Samples:
        """Mean over the readouts of each line, shape `(coils, k2, k1, k0)`."""
        found = np.ascontiguousarray(np.moveaxis(self.total, 2, 0))
        if self.count.max(initial=0) > 1:
            found /= np.maximum(self.count, 1).astype(np.float32)[None, :, :, None]
        return found


@dataclass(slots=True)
class Volume:
    """Lines of one volume as they come in."""

    key: VolumeKey
    encoding: Encoding
    geometry: ReadoutGeometry
    image: LineBuffer
    headers: Headers
    acquired: tuple[int, int] | None = None
    averages: set[tuple[int, int, int]] = field(default_factory=set)
    marked: bool = False

    @classmethod
    def start(cls, key: VolumeKey, encoding: Encoding, geometry: ReadoutGeometry, coils: int) -> "Volume":
        """An empty volume; ValueError if the header's matrix cannot be meant."""
        matrix = (*encoding.encoded_matrix[:2], geometry.size)
        size = 8 * coils * math.prod(matrix)
        if size > MAX_VOLUME_BYTES:
            raise ValueError(
                f"accumulate: the header's encoded matrix (z, y, x) = {matrix} of {coils} coils takes {size} bytes; "
                f"at most {MAX_VOLUME_BYTES} are accepted"
            )
        return cls(
            key=key,
            encoding=encoding,
            geometry=geometry,
            image=LineBuffer.empty(coils, matrix),
            headers=np.zeros(matrix[:2], dtype=HEADER_DTYPE),
        )

    def add_image(
        self,
        samples: Samples,
        line: tuple[int, int],
        header: np.void,
        acquired: tuple[int, int],
        geometry: ReadoutGeometry,
    ) -> None:
        """Add an imaging readout, oversampling removed, shape `(coils, k0)`; it must be like those before it."""
        if self.acquired not in (None, acquired) or geometry != self.geometry:
            raise ValueError(
                f"accumulate: readout {int(header['scan_counter'])} covers samples {acquired[0]} to {acquired[1] - 1} "
                f"of {geometry.oversampled}, those before it {self.acquired} of {self.geometry.oversampled}; "
                f"the readout window must not change within a volume ({self.key})"
            )
        self.acquired = acquired
        self.image.add(samples, line)
        self.averages.add((*line, int(header["idx"]["average"])))
        if self.image.count[line] == 1:
            self.headers[line] = header

    def missing(self, *, irregular: bool) -> str:
        """What is missing of the lines that the header calls for, in words; empty if nothing is, or nobody can tell."""
        if irregular:
            return ""
        expected = self._expected()
        averages = self.encoding.last("average") + 1
        wanted = int(expected.sum()) * averages
        found = sum(bool(expected[line[:2]]) for line in self.averages)
        if found >= wanted:
            return ""
        lines = int((expected & (self.image.count > 0)).sum())
        counts = f"{lines} of {int(expected.sum())} lines"
        return counts if averages == 1 else f"{counts}, {found} of {wanted} readouts with averages"

    def regular(self) -> bool:
        """Whether all imaging lines lie on the regular grid of the header's acceleration."""
        steps = self.encoding.acceleration
        return all(
            len(set((np.flatnonzero(sampled) % step).tolist())) <= 1
            for sampled, step in zip(self._sampled_axes(), steps, strict=True)
        )

    @property
    def flat(self) -> bool:
        """Whether it has one phase encoding axis only."""
        return self.encoding.encoded_matrix[0] == 1

    def line_limits(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """First and last position of k2 and k1 that the protocol encodes, as indices of the matrix."""
        found = []
        for axis in (2, 1):
            limit, size = self.encoding.line_limit(axis), self.encoding.encoded_matrix[2 - axis]
            shift = size // 2 - limit.center
            found.append((max(0, limit.minimum + shift), min(size - 1, limit.maximum + shift)))
        return found[0], found[1]

    def finish(self, whitening: Whitening | None, incomplete: str, reference: LineBuffer | None) -> KSpace:
        """The volume as an item, with its reference lines."""
        assert self.acquired is not None
        start, stop = self.acquired
        size, oversampled = self.geometry.size, self.geometry.oversampled
        whole = (start, stop) == (0, oversampled)
        readout = self.geometry.limits(start, stop)
        limits = (*self.line_limits(), readout)
        # white noise on part of the oversampled readout, seen after the crop: diagonal of its covariance
        part = self.geometry.matrix()[:, start:stop] if not whole else None
        profile = np.ones(size) if part is None else (np.abs(part) ** 2).sum(axis=1)
        line_variance = np.where(self.image.count > 0, 2 / np.maximum(self.image.count, 1), 0)
        encoding = self.encoding
        encoded = ReadoutGeometry.of(encoding)
        return KSpace(
            data=self.image.mean(),
            variance=(line_variance[..., None] * profile).astype(np.float32),
            reference=None if reference is None else reference.mean(),
            reference_lines=np.zeros(self.headers.shape, dtype=bool) if reference is None else reference.count > 0,
            headers=self._sampled_headers(),
            limits=limits,
            encoded_fov_mm=(
                *encoding.encoded_fov_mm[:2],
                encoding.encoded_fov_mm[2] * size / encoded.oversampled,
            ),
            recon_fov_mm=encoding.recon_fov_mm,
            recon_matrix=encoding.recon_matrix,
            whitening=whitening,
            incomplete=incomplete,
            partial_fourier=" ".join(
                filter(None, (_partial_fourier(limits, (*self.headers.shape, size)), self._missing_corners()))
            ),
            readout=None if whole or size == oversampled else OversampledReadout(oversampled, start, stop),
        )

    def _sampled_headers(self) -> Headers:
        """Headers of the lines, as the samples are now: cropped, placed and centred."""
        found = self.headers.copy()
        sampled = self.image.count > 0
        size = self.geometry.size
        for name, value in (("number_of_samples", size), ("center_sample", size // 2), ("discard_pre", 0)):
            found[name][sampled] = value
        found["discard_post"][sampled] = 0
        return found

    def _sampled_axes(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        sampled = self.image.count > 0
        return np.asarray(sampled.any(axis=1)), np.asarray(sampled.any(axis=0))

    def _missing_corners(self) -> str:
        """`k2-k1 corners` where a regular 3D scan left some out, else empty."""
        if self.flat or not self.regular():
            return ""
        return "k2-k1 corners" if (self._expected(corners=True) & (self.image.count == 0)).any() else ""

    def _expected(self, *, corners: bool = False) -> npt.NDArray[np.bool_]:
        """Lines of the regular grid within the limits, shape `(k2, k1)`.

        Of a 3D scan the corners beyond the inscribed ellipse are not called for: many protocols leave them out.
        """
        axes, distances = [], []
        for sampled, step, (first, last) in zip(
            self._sampled_axes(), self.encoding.acceleration, self.line_limits(), strict=True
        ):
            position = np.arange(len(sampled))
            lines = np.flatnonzero(sampled)
            offset = lines[0] % step if len(lines) else 0
            axes.append((position >= first) & (position <= last) & (position % step == offset))
            centre = len(sampled) // 2
            distances.append((position - centre) / max(1, centre - first, last - centre))
        expected: npt.NDArray[np.bool_] = axes[0][:, None] & axes[1][None, :]
        if len(axes[0]) > 1 and not corners:
            expected &= distances[0][:, None] ** 2 + distances[1][None, :] ** 2 <= 1
        return expected


def _partial_fourier(limits: tuple[tuple[int, int], ...], matrix: tuple[int, ...]) -> str:
    """Which axes were sampled on one side only, in words: `k1 0.75` is three quarters of a symmetric extent."""
    found = []
    for name, (first, last), size in zip(("k2", "k1", "k0"), limits, matrix, strict=True):
        origin = size // 2
        if size == 1:
            continue
        extent = last - first + 1
        symmetric = min(size, 2 * max(origin - first, last + 1 - origin))
        # one line, or one step of an accelerated scan, is no asymmetry
        if extent / symmetric < 0.95 and symmetric - extent > 4:
            found.append(f"{name} {extent / symmetric:.2f}")
    return " ".join(found)
