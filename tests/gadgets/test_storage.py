"""The client of Gadgetron's storage service, against a real HTTP server."""

import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from tests.gadgets.storage_server import garbage, refusing_address, reply, storage_service

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.storage import (
    StorageError,
    fetch_covariance,
    storage_address,
    storage_tags,
    store_covariance,
)
from voxelsigma.noise.covariance import NoiseCovariance

TAGS = {"subject": "s", "device": "d", "session": "e", "name": "noise_covariance", "measurement": "d_s_e_1"}
COVARIANCE = NoiseCovariance(
    matrix=np.array([[2, 1 + 1j], [1 - 1j, 3]]),
    samples=1000,
    effective_samples=900.0,
    dwell_time_us=20.0,
    labels=("A:1", "B&2"),
)


def test_round_trip() -> None:
    with storage_service() as storage:
        assert fetch_covariance(storage.address, TAGS) is None
        store_covariance(storage.address, TAGS, COVARIANCE)
        found = fetch_covariance(storage.address, TAGS, bandwidth=0.6)
        assert fetch_covariance(storage.address, {**TAGS, "measurement": "d_s_e_2"}) is None
    assert found is not None
    np.testing.assert_array_equal(found.matrix, COVARIANCE.matrix)
    assert (found.labels, found.samples, found.bandwidth) == (("A:1", "B&2"), 1000, 0.6)
    assert found.source == "covariance stored for measurement d_s_e_1"
    assert storage.requests[:3] == [
        ("GET", "/v1/blobs/data/latest", TAGS),
        ("POST", "/v1/blobs/data", {**TAGS, "_ttl": "172800s"}),
        ("GET", "/v1/blobs/data/latest", TAGS),
    ]


def test_an_address_may_have_a_path_and_values_any_character() -> None:
    tags = {**TAGS, "subject": "Å & b=c\r\nX: y#?"}
    with storage_service("/kept") as storage:
        store_covariance(storage.address + "/", tags, COVARIANCE)
        assert fetch_covariance(storage.address, tags) is not None
    assert storage.requests[0] == ("POST", "/kept/v1/blobs/data", {**tags, "_ttl": "172800s"})


def header_with(scan: SimulatedScan, measurement: str, extra: str = "") -> bytes:
    start = b'<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
    xml = scan.header_xml.replace(b"<measurementID>simulation<", f"<measurementID>{measurement}<".encode())
    return xml.replace(start, start + extra.encode())


def test_tags_come_from_the_header_and_else_from_measurement_ids(scan: SimulatedScan) -> None:
    structured = parse_header(header_with(scan, "dev_sub_ses_7"))
    assert storage_tags(structured, "x_y_z_6") == {
        "subject": "sub",
        "device": "dev",
        "session": "ses",
        "name": "noise_covariance",
        "measurement": "x_y_z_6",
    }
    plain = parse_header(scan.header_xml)
    assert storage_tags(plain, "x_y_z_6")["subject"] == "y"
    assert storage_tags(plain, "six") == {"subject": "$null", "name": "noise_covariance", "measurement": "six"}
    people = (
        "<subjectInformation><patientID>pat</patientID></subjectInformation>"
        "<studyInformation><studyID>study</studyID></studyInformation>"
    )
    stated = parse_header(header_with(scan, "dev_sub_ses_7", people))
    found = storage_tags(stated, "dev_sub_ses_6")
    assert (found["device"], found["subject"], found["session"]) == ("dev", "pat", "study")


def refused(handler: BaseHTTPRequestHandler) -> None:
    reply(handler, 500, b"out of order")


def elsewhere(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "http://192.0.2.1/secret")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def huge(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(2**50))
    handler.end_headers()
    handler.wfile.write(b"SFNDAM")


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(1000):
            handler.wfile.write(bytes(2**16))
    except OSError:
        pass


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"SFNDAM")


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\x01\x02 hello\r\n\r\n")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (garbage, "noise blob: starts with b'<html>'"),
        (refused, "answers with status 500"),
        (elsewhere, "answers with status 302"),
        (huge, "answers with 1125899906842624 bytes; a noise covariance has at most"),
        (endless, "answers with more than"),
        (cut_off, "its answer ends after 6 of 100 bytes"),
        (no_http, "cannot be asked"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nonsense_is_an_error_that_names_address_and_reason(answer: object, complaint: str) -> None:
    with storage_service() as storage:
        storage.answer = answer  # type: ignore[assignment]
        with pytest.raises(StorageError, match=f"storage at {re.escape(storage.address)}: .*{complaint}"):
            fetch_covariance(storage.address, TAGS)


def test_a_refused_blob_is_an_error() -> None:
    with storage_service() as storage:
        storage.answer = refused
        with pytest.raises(StorageError, match=r"answers with status 500; expected 201 \(stored\)"):
            store_covariance(storage.address, TAGS, COVARIANCE)


def test_nothing_listens() -> None:
    address = refusing_address()
    with pytest.raises(StorageError, match=rf"storage at {re.escape(address)}: cannot be asked \(.*refused"):
        fetch_covariance(address, TAGS)


@pytest.mark.parametrize("dribbling", [False, True])
def test_a_slow_service_is_left_in_time_and_leaves_no_thread(dribbling: bool) -> None:
    ended = threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        try:
            for _ in range(200):
                if dribbling:
                    handler.wfile.write(b"H")
                if ended.wait(0.05):
                    break
        except OSError:
            pass

    with storage_service() as storage:
        storage.answer = slow
        start = time.monotonic()
        try:
            with pytest.raises(StorageError, match=r"no whole answer within 0\.3 seconds"):
                fetch_covariance(storage.address, TAGS, timeout_seconds=0.3)
            assert time.monotonic() - start < 3
            for thread in threading.enumerate():
                if thread.name == "storage":
                    thread.join(5)
                    assert not thread.is_alive()
        finally:
            ended.set()


def test_a_service_that_never_answers_is_left_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StorageError, match="no whole answer within"):
            fetch_covariance(address, TAGS, timeout_seconds=0.2)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost:3333",
        "file:///etc/passwd",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://u:p@host",
        "//host",
    ],
)
def test_only_http_addresses_are_asked(address: str) -> None:
    with pytest.raises(StorageError, match="expected http://host:port"):
        fetch_covariance(address, TAGS)


def test_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", refusing_address())
    with storage_service() as storage:
        assert fetch_covariance(storage.address, TAGS) is None


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GADGETRON_STORAGE_ADDRESS", raising=False)
    assert storage_address() is None
    monkeypatch.setenv("GADGETRON_STORAGE_ADDRESS", " http://host:3333 ")
    assert storage_address() == "http://host:3333"
