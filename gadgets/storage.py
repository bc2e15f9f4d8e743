"""Gadgetron's storage service: where noise covariances wait for the scans that depend on them.

`GET /v1/blobs/data/latest?…` gives the latest blob with these tags (404 = none), `POST /v1/blobs/data?…&_ttl=172800s`
keeps one for two days. The address stands in the environment variable `GADGETRON_STORAGE_ADDRESS`.
"""

import contextlib
import http.client
import os
import queue
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult, urlencode, urlsplit

from voxelsigma.formats.header import ScanHeader
from voxelsigma.formats.noise_blob import MOST_BYTES, decode_noise_blob, encode_noise_blob
from voxelsigma.noise.covariance import GADGETRON_BANDWIDTH, NoiseCovariance

ADDRESS_VARIABLE: Final = "GADGETRON_STORAGE_ADDRESS"
TIMEOUT_SECONDS: Final = 2.0
TIME_TO_LIVE: Final = "172800s"

Tags = dict[str, str]


class StorageError(OSError):
    """The storage service is absent, refuses, is slow, or answers nonsense; the text names its address and why."""


def storage_address() -> str | None:
    """Address of the storage service; None where the environment names none."""
    return os.environ.get(ADDRESS_VARIABLE, "").strip() or None


def storage_tags(header: ScanHeader, measurement: str) -> Tags:
    """The tags of a measurement's noise covariance, as Gadgetron forms them.

    Subject, device and session are those of the scan that asks; what its header lacks comes from a measurement ID
    of the form `device_subject_session_measurement`, its own or else the one asked for.

    Parameters
    ----------
    header
        Header of the scan that asks or stores.
    measurement
        ID of the measurement whose noise it is.
    """
    document = header.document
    own = getattr(document.measurementInformation, "measurementID", None)
    parts = _parts(own) or _parts(measurement) or ("", "", "")
    stated = (
        getattr(document.acquisitionSystemInformation, "deviceID", None),
        getattr(document.subjectInformation, "patientID", None),
        getattr(document.studyInformation, "studyID", None),
    )
    device, subject, session = (str(given) if given else part for given, part in zip(stated, parts, strict=True))
    # the service insists on a subject; this is Gadgetron's word for none
    tags = {"subject": subject or "$null"}
    if device:
        tags["device"] = device
    if session:
        tags["session"] = session
    return tags | {"name": "noise_covariance", "measurement": measurement}


def fetch_covariance(
    address: str, tags: Tags, *, bandwidth: float = GADGETRON_BANDWIDTH, timeout_seconds: float = TIMEOUT_SECONDS
) -> NoiseCovariance | None:
    """The latest covariance with these tags; None if the service knows none.

    Parameters
    ----------
    address
        `http://host:port` of the storage service.
    tags
        From `storage_tags`.
    bandwidth
        Relative receiver noise bandwidth of the imaging header.
    timeout_seconds
        For all of it.

    Raises
    ------
    StorageError
        If it cannot be had, or is no covariance.
    """
    target = f"/v1/blobs/data/latest?{urlencode(tags)}"
    status, body = _request(address, "GET", target, None, timeout_seconds)
    if status == http.client.NOT_FOUND:
        return None
    if status != http.client.OK:
        raise StorageError(f"storage at {address}: answers with status {status}; expected 200, or 404 for none")
    try:
        return decode_noise_blob(
            body, bandwidth=bandwidth, source=f"covariance stored for measurement {tags['measurement']}"
        )
    except ValueError as error:
        raise StorageError(f"storage at {address}: {error}") from None


def store_covariance(
    address: str, tags: Tags, covariance: NoiseCovariance, *, timeout_seconds: float = TIMEOUT_SECONDS
) -> None:
    """Keep a covariance for two days.

    Raises
    ------
    StorageError
        If the service does not take it.
    """
    target = f"/v1/blobs/data?{urlencode({**tags, '_ttl': TIME_TO_LIVE})}"
    status, _ = _request(address, "POST", target, encode_noise_blob(covariance), timeout_seconds)
    if status not in (http.client.OK, http.client.CREATED, http.client.NO_CONTENT):
        raise StorageError(f"storage at {address}: answers with status {status}; expected 201 (stored)")


def _parts(measurement: str | None) -> tuple[str, str, str] | None:
    """Device, subject and session of a measurement ID that has them."""
    parts = (measurement or "").split("_")
    return (parts[0], parts[1], parts[2]) if len(parts) == 4 else None


@dataclass(slots=True)
class _Exchange:
    """One request and its answer, in a thread of its own: also a slow name server must not hold up a scan."""

    address: str
    url: SplitResult
    deadline: float
    connection: http.client.HTTPConnection
    outcome: "queue.SimpleQueue[tuple[int, bytes] | Exception]" = field(default_factory=queue.SimpleQueue)

    def run(self, method: str, target: str, body: bytes | None) -> None:
        """Exchange, and leave the outcome."""
        headers = {"Accept": "application/octet-stream", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/octet-stream"
        try:
            self.connection.request(method, self.url.path.rstrip("/") + target, body, headers)
            with self.connection.getresponse() as response:
                self.outcome.put(self._answer(response))
        except Exception as error:  # the caller raises it
            self.outcome.put(error)
        finally:
            self.connection.close()

    def stop(self) -> None:
        """Unblock a thread that waits for its peer."""
        channel: Any = self.connection.sock
        if channel is not None:
            # it may be closed already
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)

    def _answer(self, response: http.client.HTTPResponse) -> tuple[int, bytes]:
        if response.status != http.client.OK:
            return response.status, b""
        stated = response.length
        if stated is not None and stated > MOST_BYTES:
            raise StorageError(
                f"storage at {self.address}: answers with {stated} bytes; a noise covariance has at most {MOST_BYTES}"
            )
        parts, size = [], 0
        while part := response.read1(2**16):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise StorageError(f"storage at {self.address}: answers with more than {MOST_BYTES} bytes")
            if time.monotonic() > self.deadline:
                raise TimeoutError
        if stated is not None and size != stated:
            raise StorageError(f"storage at {self.address}: its answer ends after {size} of {stated} bytes")
        return response.status, b"".join(parts)


def _request(address: str, method: str, target: str, body: bytes | None, timeout_seconds: float) -> tuple[int, bytes]:
    """Status and body of an answer; redirections are not followed, proxies not used."""
    url = _checked(address)
    assert url.hostname is not None
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname, url.port, timeout=timeout_seconds)
    exchange = _Exchange(address, url, time.monotonic() + timeout_seconds, connection)
    threading.Thread(target=exchange.run, args=(method, target, body), name="storage", daemon=True).start()
    slow = f"storage at {address}: no whole answer within {timeout_seconds:g} seconds"
    try:
        found = exchange.outcome.get(timeout=timeout_seconds)
    except queue.Empty:
        exchange.stop()
        raise StorageError(slow) from None
    if isinstance(found, StorageError):
        raise found
    if isinstance(found, TimeoutError):
        raise StorageError(slow) from None
    if isinstance(found, Exception):
        reason = getattr(found, "strerror", None) or str(found) or type(found).__name__
        raise StorageError(f"storage at {address}: cannot be asked ({reason})") from found
    return found


def _checked(address: str) -> SplitResult:
    """The parts of an address, if it is one of http or https."""
    try:
        url = urlsplit(address)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        valid = False
    if not valid or url.username is not None or url.query or url.fragment:
        raise StorageError(f"{ADDRESS_VARIABLE} is {address!r}; expected http://host:port")
    return url
