"""Which noise covariance a scan is whitened with, and whether the sources agree."""

import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.gadgets.storage_server import Storage, garbage, refusing_address, storage_service

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.noise_blob import decode_noise_blob, encode_noise_blob
from voxelsigma.formats.noise_file import covariance_of_noise
from voxelsigma.formats.raw_file import open_raw
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import NoiseCovariance
from voxelsigma.gadgets.noise_sources import compare, matched, noise_dependencies
from voxelsigma.gadgets.registry import create

ADDRESS = "GADGETRON_STORAGE_ADDRESS"
EYE = np.eye(2, dtype=np.complex128)
LABELS = ("SIM000", "SIM001", "SIM002", "SIM003")


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    with storage_service() as service:
        monkeypatch.setenv(ADDRESS, service.address)
        yield service


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="voxelsigma")
    return caplog


def header_of(scan: SimulatedScan, own: str = "dev_sub_ses_2", depends: str = "dev_sub_ses_1") -> bytes:
    """The scan's header as that of a measurement that depends on another one's noise."""
    dependency = (
        "<measurementDependency><dependencyType>SenMap</dependencyType><measurementID>dev_sub_ses_0</measurementID>"
        "</measurementDependency><measurementDependency><dependencyType>NOISE</dependencyType>"
        f"<measurementID>{depends}</measurementID></measurementDependency>"
    )
    xml = scan.header_xml.replace(b"<measurementID>simulation<", f"<measurementID>{own}<".encode())
    return xml.replace(b"</protocolName>", b"</protocolName>" + (dependency if depends else "").encode())


def covariance_of(scan: SimulatedScan, factor: float = 1.0) -> NoiseCovariance:
    found = covariance_of_noise([scan.blocks[0]], bandwidth=None, labels=LABELS)
    return dataclasses.replace(found, matrix=factor * found.matrix)


def stored(storage: Storage, covariance: NoiseCovariance, measurement: str = "dev_sub_ses_1") -> None:
    tags = {
        "subject": "sub",
        "device": "dev",
        "session": "ses",
        "name": "noise_covariance",
        "measurement": measurement,
    }
    storage.blobs[tuple(sorted(tags.items()))] = encode_noise_blob(covariance)


def noise_file(scan: SimulatedScan, folder: Path, factor: float = 1.0) -> dict[str, str]:
    """The property that names a file with the scan's noise."""
    path = folder / "noise.h5"
    noise = scan.blocks[0]
    write_raw(path, scan.header_xml, [noise.with_samples((noise.samples * factor).astype(np.complex64))])
    return {"noise_file": str(path)}


def whitened(run: Any, xml: bytes, blocks: list[Any], **properties: str) -> tuple[NoiseCovariance, list[ReadoutBlock]]:
    covariance, *rest = run(xml, blocks, ("prewhiten", {"forward": "covariance", **properties}))
    return covariance, [item for item in rest if isinstance(item, ReadoutBlock)]


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


class TestFile:
    def test_it_whitens_as_the_streams_own_noise_does(
        self, scan: SimulatedScan, run: Any, tmp_path: Path, log: pytest.LogCaptureFixture
    ) -> None:
        covariance, blocks = whitened(run, scan.header_xml, scan.blocks[1:], **noise_file(scan, tmp_path))
        _, usual = whitened(run, scan.header_xml, scan.blocks)
        np.testing.assert_array_equal(blocks[0].samples, usual[0].samples)
        assert covariance.source == "noise file noise.h5"
        assert covariance.applied_scale == pytest.approx(np.sqrt(2 * 5 / 10 * 0.793))
        assert "from noise file noise.h5: 4096 samples" in log.text
        assert not warnings(log)

    def test_the_hosts_file_is_used_and_the_propertys_goes_before_it(self, scan: SimulatedScan, tmp_path: Path) -> None:
        blob = tmp_path / "host.bin"
        blob.write_bytes(encode_noise_blob(covariance_of(scan)))
        context = Context(header=parse_header(scan.header_xml), noise=blob)
        forward = {"forward": "covariance"}
        found = next(iter(create("prewhiten", forward, context)(iter(scan.blocks[1:]))))
        assert found.source == "noise file host.bin"
        properties = {**forward, **noise_file(scan, tmp_path)}
        found = next(iter(create("prewhiten", properties, context)(iter(scan.blocks[1:]))))
        assert found.source == "noise file noise.h5"

    def test_data_do_not_wait(self, scan: SimulatedScan, tmp_path: Path) -> None:
        context = Context(header=parse_header(scan.header_xml))

        def early() -> Iterator[ReadoutBlock]:
            yield scan.blocks[1].select(slice(0, 1))
            raise AssertionError("more was read before the first readout came out")

        stream = create("prewhiten", noise_file(scan, tmp_path), context)(early())
        assert len(next(iter(stream))) == 1

    def test_channels_are_matched_by_label(self, scan: SimulatedScan, run: Any, tmp_path: Path) -> None:
        order = [2, 0, 3, 1]
        mixed = covariance_of(scan)
        mixed = dataclasses.replace(
            mixed, matrix=mixed.matrix[np.ix_(order, order)], labels=tuple(LABELS[number] for number in order)
        )
        path = tmp_path / "mixed.bin"
        path.write_bytes(encode_noise_blob(mixed))
        covariance, blocks = whitened(run, scan.header_xml, scan.blocks[1:], noise_file=str(path))
        _, usual = whitened(run, scan.header_xml, scan.blocks)
        assert covariance.labels == LABELS
        # the blob holds single precision
        np.testing.assert_allclose(
            blocks[0].samples, usual[0].samples, atol=2e-6 * float(np.abs(usual[0].samples).max())
        )

    def test_another_number_of_channels_is_refused(self, scan: SimulatedScan, run: Any, tmp_path: Path) -> None:
        path = tmp_path / "three.bin"
        full = covariance_of(scan)
        path.write_bytes(encode_noise_blob(dataclasses.replace(full, matrix=full.matrix[:3, :3], labels=())))
        complaint = r"prewhiten: noise file three\.bin has 3 channels, the imaging readouts 4"
        with pytest.raises(ValueError, match=complaint):
            run(scan.header_xml, scan.blocks, ("prewhiten", {"noise_file": str(path)}))

    def test_a_file_that_is_not_there_is_refused(self, scan: SimulatedScan, run: Any, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=r"prewhiten: noise file .*none\.h5: no such file"):
            run(scan.header_xml, scan.blocks, ("prewhiten", {"noise_file": str(tmp_path / "none.h5")}))

    def test_few_samples_are_refused_or_warned_of(
        self, scan: SimulatedScan, run: Any, tmp_path: Path, log: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "few.bin"
        path.write_bytes(encode_noise_blob(dataclasses.replace(covariance_of(scan), samples=4)))
        with pytest.raises(ValueError, match=r"noise file few\.bin: 4 noise samples for 4 coils"):
            run(scan.header_xml, scan.blocks[1:], ("prewhiten", {"noise_file": str(path)}))
        path.write_bytes(encode_noise_blob(dataclasses.replace(covariance_of(scan), samples=39)))
        run(scan.header_xml, scan.blocks[1:], ("prewhiten", {"noise_file": str(path)}))
        assert "noise file few.bin: only 39 noise samples for 4 coils: at least 40" in log.text

    def test_unusable_noise_in_the_stream_is_no_matter_then(
        self, scan: SimulatedScan, run: Any, tmp_path: Path, log: pytest.LogCaptureFixture
    ) -> None:
        short = scan.blocks[0].select(slice(0, 1))
        short = dataclasses.replace(short, samples=short.samples[..., :3])
        covariance, _ = whitened(run, scan.header_xml, [short, scan.blocks[1]], **noise_file(scan, tmp_path))
        assert covariance.source == "noise file noise.h5"
        assert any("noise readouts of the stream are not used: " in text for text in warnings(log))


class TestStorage:
    def test_precedence(self, scan: SimulatedScan, run: Any, tmp_path: Path, storage: Storage) -> None:
        stored(storage, covariance_of(scan))
        noise, block = scan.blocks
        xml = header_of(scan)
        file = noise_file(scan, tmp_path)
        assert whitened(run, xml, [noise, block], **file)[0].source == "noise file noise.h5"
        assert whitened(run, xml, [noise, block])[0].source == "noise readouts"
        assert whitened(run, xml, [block])[0].source == "covariance stored for measurement dev_sub_ses_1"

    def test_a_stored_covariance_whitens_without_waiting(
        self, scan: SimulatedScan, run: Any, storage: Storage, log: pytest.LogCaptureFixture
    ) -> None:
        stored(storage, covariance_of(scan))
        context = Context(header=parse_header(header_of(scan)))
        stream = create("prewhiten", {}, context)(iter([scan.blocks[1].select(slice(0, 1)), None]))
        first = next(iter(stream))
        _, usual = whitened(run, scan.header_xml, scan.blocks, store="false")
        np.testing.assert_allclose(first.samples, usual[0].samples[:1], rtol=1e-4, atol=1e-4)
        assert storage.requests == [
            (
                "GET",
                "/v1/blobs/data/latest",
                {
                    "subject": "sub",
                    "device": "dev",
                    "session": "ses",
                    "name": "noise_covariance",
                    "measurement": "dev_sub_ses_1",
                },
            )
        ]
        assert not warnings(log)

    def test_the_stored_bandwidth_is_not_used(self, scan: SimulatedScan, run: Any, storage: Storage) -> None:
        stored(storage, dataclasses.replace(covariance_of(scan), bandwidth=0.1))
        assert whitened(run, header_of(scan), scan.blocks[1:])[0].bandwidth == 0.793

    def test_the_streams_noise_is_stored_for_others(self, scan: SimulatedScan, run: Any, storage: Storage) -> None:
        run(header_of(scan, depends=""), scan.blocks, ("prewhiten", {}))
        ((method, path, tags),) = storage.requests
        assert (method, path) == ("POST", "/v1/blobs/data")
        assert tags == {
            "subject": "sub",
            "device": "dev",
            "session": "ses",
            "name": "noise_covariance",
            "measurement": "dev_sub_ses_2",
            "_ttl": "172800s",
        }
        (blob,) = storage.blobs.values()
        np.testing.assert_allclose(decode_noise_blob(blob).matrix, covariance_of(scan).matrix, rtol=1e-6, atol=1e-7)

    def test_it_is_not_stored_where_that_is_unwanted(self, scan: SimulatedScan, run: Any, storage: Storage) -> None:
        run(header_of(scan, depends=""), scan.blocks, ("prewhiten", {"store": "false"}))
        assert not storage.requests

    def test_a_noise_scan_serves_the_next_one(self, scan: SimulatedScan, run: Any, storage: Storage) -> None:
        (covariance,) = run(header_of(scan, own="dev_sub_ses_1", depends=""), scan.blocks[:1], *CHAIN)
        assert isinstance(covariance, NoiseCovariance)
        assert covariance.applied_scale is None
        (kspace,) = run(header_of(scan), scan.blocks[1:], ("prewhiten", {}), ("accumulate", {}))
        assert kspace.whitening.source == "covariance stored for measurement dev_sub_ses_1"
        assert kspace.whitening.samples == 4096

    @pytest.mark.parametrize(
        ("store", "address", "reason"),
        [
            ("false", "", "property 'store' is false"),
            ("true", "", "GADGETRON_STORAGE_ADDRESS is not set"),
            ("true", "nowhere", r"storage at http://.*: cannot be asked"),
        ],
    )
    def test_a_noise_scan_that_is_kept_nowhere_is_refused(
        self, scan: SimulatedScan, run: Any, monkeypatch: pytest.MonkeyPatch, store: str, address: str, reason: str
    ) -> None:
        if address:
            monkeypatch.setenv(ADDRESS, refusing_address())
        with pytest.raises(ValueError, match=rf"noise readouts only \(64\) .* could not be stored .*: {reason}"):
            run(header_of(scan, depends=""), scan.blocks[:1], ("prewhiten", {"store": store}))

    def test_an_absent_dependency_is_no_matter_where_the_stream_brings_noise(
        self, scan: SimulatedScan, run: Any, storage: Storage, log: pytest.LogCaptureFixture
    ) -> None:
        assert whitened(run, header_of(scan), scan.blocks)[0].source == "noise readouts"
        assert not warnings(log)
        assert f"storage at {storage.address} has no noise covariance of measurement dev_sub_ses_1" in log.text

    def test_nor_is_a_missing_service(self, scan: SimulatedScan, run: Any, log: pytest.LogCaptureFixture) -> None:
        assert whitened(run, header_of(scan), scan.blocks)[0].source == "noise readouts"
        assert not warnings(log)

    @pytest.mark.parametrize("kind", ["garbage", "refusing"])
    def test_a_service_that_fails_is_warned_of(
        self, scan: SimulatedScan, run: Any, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, kind: str
    ) -> None:
        with storage_service() as service:
            service.answer = garbage
            address = service.address if kind == "garbage" else refusing_address()
            monkeypatch.setenv(ADDRESS, address)
            covariance, _ = whitened(run, header_of(scan), scan.blocks, store="false")
        assert covariance.source == "noise readouts"
        (text,) = warnings(log)
        assert f"noise dependency dev_sub_ses_1: storage at {address}: " in text
        assert text.endswith("going on without it")

    def test_a_covariance_of_too_few_samples_is_warned_of(
        self, scan: SimulatedScan, run: Any, storage: Storage, log: pytest.LogCaptureFixture
    ) -> None:
        stored(storage, dataclasses.replace(covariance_of(scan), samples=3))
        assert whitened(run, header_of(scan), scan.blocks)[0].source == "noise readouts"
        assert "3 noise samples for 4 coils" in warnings(log)[0]


CHAIN = (("prewhiten", {"forward": "covariance"}), ("accumulate", {"forward": "covariance"}))


@pytest.fixture(scope="module")
def silent_scan() -> SimulatedScan:
    """A scan without noise readouts, large enough for the edge of k-space."""
    return simulate(Simulation(matrix=(1, 96, 96), coils=4, acceleration=1, mask="uniform_1d", noise_samples=0, snr=30))


def test_without_any_noise_the_warning_says_where_it_was_looked_for(
    silent_scan: SimulatedScan, run: Any, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not whitened(run, header_of(silent_scan), silent_scan.blocks)[0].calibrated
    (text,) = warnings(log)
    assert (
        "no noise readouts, and the header's noise dependency dev_sub_ses_1 was not found: no storage service" in text
    )
    log.clear()
    with storage_service() as service:
        monkeypatch.setenv(ADDRESS, service.address)
        assert not whitened(run, header_of(silent_scan), silent_scan.blocks)[0].calibrated
    (text,) = warnings(log)
    assert f"the storage service at {service.address} has no covariance of it: the covariance is estimated" in text


class TestComparison:
    @pytest.mark.parametrize(("factor", "warned"), [(1.02, False), (1.2, True), (0.8, True)])
    def test_file_and_stream(
        self,
        scan: SimulatedScan,
        run: Any,
        tmp_path: Path,
        log: pytest.LogCaptureFixture,
        factor: float,
        warned: bool,
    ) -> None:
        whitened(run, scan.header_xml, scan.blocks, **noise_file(scan, tmp_path, factor**-0.5))
        assert bool(warnings(log)) == warned
        (found,) = re.findall(r"noise power of noise readouts is (\S+) times that of noise file noise.h5", log.text)
        assert float(found) == pytest.approx(factor, rel=2e-3)

    def test_stream_and_storage(
        self, scan: SimulatedScan, run: Any, storage: Storage, log: pytest.LogCaptureFixture
    ) -> None:
        stored(storage, covariance_of(scan, 2.0))
        whitened(run, header_of(scan), scan.blocks)
        (text,) = warnings(log)
        assert "covariance stored for measurement dev_sub_ses_1 is 2 times that of noise readouts" in text
        assert text.endswith("noise readouts is used")

    def test_file_and_storage(
        self, scan: SimulatedScan, run: Any, storage: Storage, tmp_path: Path, log: pytest.LogCaptureFixture
    ) -> None:
        stored(storage, covariance_of(scan, 0.5))
        whitened(run, header_of(scan), scan.blocks[1:], **noise_file(scan, tmp_path))
        (text,) = warnings(log)
        assert "covariance stored for measurement dev_sub_ses_1 is 0.5 times that of noise file noise.h5" in text

    def test_noise_that_comes_late_is_compared_once(
        self, scan: SimulatedScan, run: Any, tmp_path: Path, log: pytest.LogCaptureFixture
    ) -> None:
        noise, block = scan.blocks
        items = [block.select(slice(0, 5)), noise, block.select(slice(5, None)), noise]
        whitened(run, scan.header_xml, items, **noise_file(scan, tmp_path, 2.0))
        (text,) = warnings(log)
        assert "noise power of noise readouts is 0.25 times that of noise file noise.h5" in text
        assert "noise readouts after the first whitened data are ignored: 64" in log.text

    def test_few_samples_differ_by_chance(self, log: pytest.LogCaptureFixture) -> None:
        one = NoiseCovariance(matrix=EYE, samples=50, effective_samples=50, dwell_time_us=1)
        compare(one, dataclasses.replace(one, matrix=1.3 * EYE))
        assert not warnings(log)
        many = dataclasses.replace(one, effective_samples=10_000)
        compare(many, dataclasses.replace(many, matrix=1.3 * EYE))
        assert len(warnings(log)) == 1

    def test_what_cannot_be_compared_is_said(self, log: pytest.LogCaptureFixture) -> None:
        one = NoiseCovariance(matrix=EYE, samples=50, effective_samples=50, dwell_time_us=1)
        compare(one, dataclasses.replace(one, dwell_time_us=0))
        assert "cannot be compared: dwell times of 1 and 0 us" in warnings(log)[0]


class TestMatching:
    COVARIANCE = NoiseCovariance(
        matrix=np.diag([1.0, 2.0]).astype(np.complex128),
        samples=50,
        effective_samples=50,
        dwell_time_us=1,
        labels=("A", "B"),
    )

    def test_by_label(self) -> None:
        found = matched(self.COVARIANCE, ("B", "A"), 2)
        assert np.diag(found.matrix).tolist() == [2, 1]
        assert found.labels == ("B", "A")

    @pytest.mark.parametrize("labels", [(), ("A",)])
    def test_without_labels_the_order_stays(self, labels: tuple[str, ...], log: pytest.LogCaptureFixture) -> None:
        assert np.diag(matched(self.COVARIANCE, labels, 2).matrix).tolist() == [1, 2]
        assert not warnings(log)

    @pytest.mark.parametrize("labels", [("A", "C"), ("A", "A")])
    def test_other_labels_are_warned_of(self, labels: tuple[str, ...], log: pytest.LogCaptureFixture) -> None:
        assert np.diag(matched(self.COVARIANCE, labels, 2).matrix).tolist() == [1, 2]
        assert "has the coils A B, the header A " in warnings(log)[0]


def test_dependencies_of_a_real_header(shared_data: Path) -> None:
    with open_raw(shared_data / "snr_r3.h5") as raw:
        assert noise_dependencies(raw.header) == ["45387_1079885_1079904_343"]
