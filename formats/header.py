"""The ISMRMRD header: parsed with entities off, checked, and reduced to what placing readouts needs."""

import re
import warnings
from dataclasses import dataclass
from typing import Any

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

NAMESPACE = "http://www.ismrm.org/ISMRMRD"
LINE_AXES = ("kspace_encode_step_1", "kspace_encode_step_2")
COUNTERS = ("slice", "contrast", "phase", "repetition", "set")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Encoding limits of one counter."""

    minimum: int
    maximum: int
    center: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """One encoding space of a scan, axes in the order (k2, k1, k0) or (z, y, x).

    Parameters
    ----------
    encoded_matrix, recon_matrix
        Matrix sizes.
    encoded_fov_mm, recon_fov_mm
        Fields of view in millimetres.
    limits
        Encoding limits by counter name; a counter without limits has none here.
    acceleration
        Stated acceleration factors of (k2, k1).
    calibration
        parallelImaging.calibrationMode, or an empty string.
    trajectory
        `cartesian` or whatever the header says.
    """

    encoded_matrix: tuple[int, int, int]
    recon_matrix: tuple[int, int, int]
    encoded_fov_mm: tuple[float, float, float]
    recon_fov_mm: tuple[float, float, float]
    limits: dict[str, Limit]
    acceleration: tuple[int, int]
    calibration: str
    trajectory: str

    def line_limit(self, axis: int) -> Limit:
        """Limits of the k1 (axis 1) or k2 (axis 2) lines; the whole matrix where the header has none."""
        size = self.encoded_matrix[2 - axis]
        whole = Limit(minimum=0, maximum=size - 1, center=size // 2)
        return self.limits.get(LINE_AXES[axis - 1], whole)

    def last(self, counter: str) -> int:
        """Largest value of a counter; 0 where the header has no limits for it."""
        limit = self.limits.get(counter)
        return 0 if limit is None else limit.maximum


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanHeader:
    """An ISMRMRD header.

    Parameters
    ----------
    xml
        Its text, as it came.
    document
        ismrmrd-python's object for it.
    encodings
        Its encoding spaces.
    """

    xml: bytes
    document: Any
    encodings: tuple[Encoding, ...]

    @property
    def noise_bandwidth(self) -> float | None:
        """acquisitionSystemInformation.relativeReceiverNoiseBandwidth, None where absent."""
        system = self.document.acquisitionSystemInformation
        value = None if system is None else system.relativeReceiverNoiseBandwidth
        return None if value is None else float(value)

    @property
    def coil_labels(self) -> tuple[str, ...]:
        """Coil names in channel order; empty where the header has none."""
        system = self.document.acquisitionSystemInformation
        return () if system is None else tuple(str(label.coilName) for label in system.coilLabel)


def parse_header(xml: bytes) -> ScanHeader:
    """Parse and check an ISMRMRD header.

    Raises
    ------
    ValueError
        If it is not well-formed XML, brings a document type or entities, is not an ISMRMRD header, or lacks what a
        reconstruction needs; the text names the field.
    """
    try:
        root = defusedxml.ElementTree.fromstring(xml, forbid_dtd=True)
    except DefusedXmlException as error:
        raise ValueError(f"header: document types and entities are refused ({error})") from None
    except SyntaxError as error:
        raise ValueError(f"header: not well-formed XML ({error})") from None
    if root.tag != f"{{{NAMESPACE}}}ismrmrdHeader":
        raise ValueError(f"header: root element is {root.tag!r}; expected 'ismrmrdHeader' of the namespace {NAMESPACE}")
    import ismrmrd.xsd

    complaints: list[warnings.WarningMessage] = []
    try:
        # values of fields that nobody needs may be odd: they are warned of there, and not our business
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            document = ismrmrd.xsd.CreateFromDocument(xml)
        encodings = tuple(_encoding(number, entry) for number, entry in enumerate(document.encoding))
    except Exception as error:  # xsdata raises a family of its own for a missing field, a wrong type or value
        if str(error).startswith("header: "):
            raise
        reason = "; ".join(str(complaint.message) for complaint in complaints) or _in_words(str(error))
        raise ValueError(f"header: not an ISMRMRD header ({reason})") from None
    if not encodings:
        raise ValueError("header: has no encoding; at least one is needed")
    header = ScanHeader(xml=xml, document=document, encodings=encodings)
    _check_bandwidth(header)
    return header


def _in_words(reason: str) -> str:
    """A reason of xsdata's, without Python's words for a field that is missing."""
    found = re.match(r"(\w+?)(?:Type)?\.__init__\(\) missing .* arguments?: (.*)", reason)
    return f"{found[1]} lacks {found[2]}" if found else reason


def _check_bandwidth(header: ScanHeader) -> None:
    """Refuse a noise bandwidth that would scale the noise to nothing."""
    system = header.document.acquisitionSystemInformation
    value = None if system is None else system.relativeReceiverNoiseBandwidth
    if value is not None and not (isinstance(value, float | int) and 0 < value < float("inf")):
        raise ValueError(
            "header: acquisitionSystemInformation.relativeReceiverNoiseBandwidth is "
            f"{value!r}; expected a number above 0"
        )


def _encoding(number: int, entry: Any) -> Encoding:
    """Reduce one `encoding` element."""
    where = f"header: encoding {number}"
    spaces = {"encodedSpace": entry.encodedSpace, "reconSpace": entry.reconSpace}
    for name, space in spaces.items():
        if space is None or space.matrixSize is None or space.fieldOfView_mm is None:
            raise ValueError(f"{where}: {name} lacks matrixSize or fieldOfView_mm")
    if entry.trajectory is None:
        raise ValueError(f"{where}: lacks trajectory; expected cartesian")
    parallel = entry.parallelImaging
    factor = None if parallel is None else parallel.accelerationFactor
    mode = None if parallel is None else parallel.calibrationMode
    return Encoding(
        encoded_matrix=_matrix(spaces["encodedSpace"], f"{where}: encodedSpace"),
        recon_matrix=_matrix(spaces["reconSpace"], f"{where}: reconSpace"),
        encoded_fov_mm=_field_of_view(spaces["encodedSpace"], f"{where}: encodedSpace"),
        recon_fov_mm=_field_of_view(spaces["reconSpace"], f"{where}: reconSpace"),
        limits=_limits(entry.encodingLimits, where),
        acceleration=(1, 1)
        if factor is None
        else (max(1, int(factor.kspace_encoding_step_2)), max(1, int(factor.kspace_encoding_step_1))),
        calibration="" if mode is None else str(mode.value),
        trajectory=str(entry.trajectory.value),
    )


def _matrix(space: Any, where: str) -> tuple[int, int, int]:
    size = (int(space.matrixSize.z), int(space.matrixSize.y), int(space.matrixSize.x))
    if min(size) < 1 or max(size) > 65535:
        raise ValueError(f"{where}.matrixSize is {size[::-1]}; each of x, y, z must be from 1 to 65535")
    return size


def _field_of_view(space: Any, where: str) -> tuple[float, float, float]:
    field = (float(space.fieldOfView_mm.z), float(space.fieldOfView_mm.y), float(space.fieldOfView_mm.x))
    if not all(0 < length < float("inf") for length in field):
        raise ValueError(f"{where}.fieldOfView_mm is {field[::-1]}; each of x, y, z must be above 0")
    return field


def _limits(limits: Any, where: str) -> dict[str, Limit]:
    """Encoding limits by the counter's name in a readout's header."""
    found = {}
    names = {"kspace_encode_step_1": "kspace_encoding_step_1", "kspace_encode_step_2": "kspace_encoding_step_2"}
    for counter in (*LINE_AXES, "average", *COUNTERS):
        entry = None if limits is None else getattr(limits, names.get(counter, counter))
        if entry is None:
            continue
        limit = Limit(minimum=int(entry.minimum), maximum=int(entry.maximum), center=int(entry.center))
        if not 0 <= limit.minimum <= limit.maximum:
            raise ValueError(
                f"{where}: encodingLimits.{names.get(counter, counter)} is {limit.minimum} to {limit.maximum}; "
                "expected 0 <= minimum <= maximum"
            )
        found[counter] = limit
    return found
