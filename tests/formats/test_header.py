"""ISMRMRD headers: what is read from them, and what is refused."""

import re
import warnings
from pathlib import Path

import pytest

from voxelsigma.formats.header import Limit, parse_header
from voxelsigma.formats.raw_file import open_raw
from voxelsigma.formats.simulate import SimulatedScan


def changed(scan: SimulatedScan, pattern: str, replacement: str) -> bytes:
    """The scan's header with the first match of a pattern replaced."""
    text, count = re.subn(pattern, lambda found: replacement, scan.header_xml.decode(), count=1, flags=re.DOTALL)
    assert count == 1
    return text.encode()


def test_what_a_header_says(scan: SimulatedScan) -> None:
    header = parse_header(scan.header_xml)
    assert header.xml == scan.header_xml
    assert header.noise_bandwidth == 0.793
    assert header.coil_labels == ("SIM000", "SIM001", "SIM002", "SIM003")
    (encoding,) = header.encodings
    assert (encoding.encoded_matrix, encoding.recon_matrix) == ((1, 32, 64), (1, 32, 32))
    assert (encoding.encoded_fov_mm, encoding.recon_fov_mm) == ((5.0, 240.0, 480.0), (5.0, 240.0, 240.0))
    assert encoding.line_limit(1) == Limit(minimum=0, maximum=31, center=16)
    assert encoding.line_limit(2) == Limit(minimum=0, maximum=0, center=0)
    assert (encoding.acceleration, encoding.calibration, encoding.trajectory) == ((1, 2), "embedded", "cartesian")
    assert encoding.last("repetition") == 0
    assert encoding.last("a counter without limits") == 0


def test_a_header_without_system_information(scan: SimulatedScan) -> None:
    header = parse_header(changed(scan, "<acquisitionSystemInformation>.*</acquisitionSystemInformation>", ""))
    assert header.noise_bandwidth is None
    assert header.coil_labels == ()


def test_a_header_without_bandwidth_or_measurement(scan: SimulatedScan) -> None:
    without = changed(scan, "<relativeReceiverNoiseBandwidth>.*</relativeReceiverNoiseBandwidth>", "")
    assert parse_header(without).noise_bandwidth is None
    assert parse_header(changed(scan, "<measurementInformation>.*</measurementInformation>", "")).encodings


def test_without_limits_the_whole_matrix_is_encoded(scan: SimulatedScan) -> None:
    (encoding,) = parse_header(changed(scan, "<encodingLimits>.*</encodingLimits>", "<encodingLimits/>")).encodings
    assert encoding.limits == {}
    assert encoding.line_limit(1) == Limit(minimum=0, maximum=31, center=16)
    assert encoding.last("slice") == 0


def test_without_parallel_imaging_nothing_is_accelerated(scan: SimulatedScan) -> None:
    (encoding,) = parse_header(changed(scan, "<parallelImaging>.*</parallelImaging>", "")).encodings
    assert (encoding.acceleration, encoding.calibration) == ((1, 1), "")


def test_several_encodings_keep_their_order(scan: SimulatedScan) -> None:
    found = re.search(rb"<encoding>.*</encoding>", scan.header_xml, re.DOTALL)
    assert found
    second = found[0].replace(b"<x>64</x>", b"<x>48</x>")
    header = parse_header(scan.header_xml.replace(found[0], found[0] + second))
    assert [encoding.encoded_matrix[2] for encoding in header.encodings] == [64, 48]


@pytest.mark.parametrize("trajectory", ["spiral", "radial", "epi"])
def test_the_trajectory_is_told_not_judged(scan: SimulatedScan, trajectory: str) -> None:
    xml = changed(scan, "<trajectory>cartesian", f"<trajectory>{trajectory}")
    assert parse_header(xml).encodings[0].trajectory == trajectory


def test_an_odd_value_that_nobody_needs_is_let_pass(scan: SimulatedScan) -> None:
    xml = changed(scan, "<H1resonanceFrequency_Hz>123200000", "<H1resonanceFrequency_Hz>unknown")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_header(xml).encodings[0].encoded_matrix == (1, 32, 64)


@pytest.mark.parametrize(
    ("pattern", "replacement", "text"),
    [
        (
            r"\?>\n",
            '?>\n<!DOCTYPE a [<!ENTITY b "c">]>\n',
            "document types and entities are refused .*DTDForbidden",
        ),
        (r"\?>\n", '?>\n<!DOCTYPE a SYSTEM "file:///etc/passwd">\n', "document types and entities are refused"),
        ("</encoding>.*", "", "header: not well-formed XML"),
        ("^.*$", "", "header: not well-formed XML"),
        (
            "^.*$",
            "<other/>",
            "root element is 'other'; expected 'ismrmrdHeader' of the namespace http://www.ismrm",
        ),
        (' xmlns="[^"]*"', "", "root element is 'ismrmrdHeader'; expected 'ismrmrdHeader' of the namespace"),
        ("<encoding>.*</encoding>", "", "header: has no encoding; at least one is needed"),
        ("<encodedSpace>.*</encodedSpace>", "", "encodedSpace"),
        ("<reconSpace>.*</reconSpace>", "", "reconSpace"),
        ("<matrixSize>.*?</matrixSize>", "", "lacks .*matrixSize"),
        ("<fieldOfView_mm>.*?</fieldOfView_mm>", "", "lacks .*fieldOfView_mm"),
        ("<trajectory>cartesian</trajectory>", "", "lacks .*trajectory"),
        ("<trajectory>cartesian", "<trajectory>zigzag", "`zigzag` is not a valid `trajectoryType`"),
        ("<x>64</x>", "<x>many</x>", "not an ISMRMRD header .*`many` is not a valid `int`"),
        (
            "<x>64</x>",
            "<x>0</x>",
            r"encodedSpace.matrixSize is \(0, 32, 1\); each of x, y, z must be from 1 to 65535",
        ),
        ("<x>64</x>", "<x>70000</x>", r"encodedSpace.matrixSize is \(70000, 32, 1\)"),
        (
            "<x>240.0</x>",
            "<x>0</x>",
            r"reconSpace.fieldOfView_mm is \(0.0, 240.0, 5.0\); each of x, y, z must be above",
        ),
        ("<x>240.0</x>", "<x>NaN</x>", r"reconSpace.fieldOfView_mm is \(nan, 240.0, 5.0\)"),
        ("<x>240.0</x>", "<x>INF</x>", r"reconSpace.fieldOfView_mm is \(inf, 240.0, 5.0\)"),
        (
            "<minimum>0</minimum><maximum>31</maximum>",
            "<minimum>31</minimum><maximum>0</maximum>",
            "encoding 0: encodingLimits.kspace_encoding_step_1 is 31 to 0; expected 0 <= minimum <= maximum",
        ),
        ("<slice><minimum>0", "<slice><minimum>-1", "encodingLimits.slice is -1 to 0; expected 0 <= minimum"),
        ("<kspace_encoding_step_1>2<", "<kspace_encoding_step_1>two<", "`two` is not a valid `int`"),
        (
            "Bandwidth>0.793",
            "Bandwidth>wide",
            "relativeReceiverNoiseBandwidth is 'wide'; expected a number above 0",
        ),
        ("Bandwidth>0.793", "Bandwidth>-1", "relativeReceiverNoiseBandwidth is -1.0; expected a number above 0"),
        ("Bandwidth>0.793", "Bandwidth>0", "relativeReceiverNoiseBandwidth is 0.0; expected a number above 0"),
        ("<trajectory>", "<strange>1</strange><trajectory>", "not an ISMRMRD header .Unknown property .*strange"),
    ],
)
def test_bad_headers_are_refused(scan: SimulatedScan, pattern: str, replacement: str, text: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + text) as caught:
        parse_header(changed(scan, pattern, replacement))
    assert str(caught.value).startswith("header: ")


def test_a_header_that_is_not_utf8_is_refused(scan: SimulatedScan) -> None:
    with pytest.raises(ValueError, match="header: not well-formed XML"):
        parse_header(scan.header_xml.replace(b"voxelsigma simulation", b"gr\xfc\xdfe"))


def test_the_header_of_a_real_scan(shared_data: Path) -> None:
    with open_raw(shared_data / "snr_r3.h5") as raw:
        header = raw.header
    (encoding,) = header.encodings
    assert (encoding.encoded_matrix, encoding.recon_matrix) == ((1, 144, 384), (1, 144, 192))
    assert encoding.line_limit(1) == Limit(minimum=0, maximum=105, center=54)
    assert (encoding.acceleration, encoding.trajectory) == ((1, 3), "cartesian")
    assert header.noise_bandwidth == pytest.approx(0.793)
    assert len(header.coil_labels) in {0, 14}
