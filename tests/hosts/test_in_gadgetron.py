"""The shipped pipelines as a Gadgetron server runs them: three ways, one result, and no image of half a scan."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from ismrmrd import Image
from numpy.typing import NDArray
from tests.gadgetron_double import Double, Received, acquisitions, client
from tests.gadgets.front_end import changed
from tests.gadgets.streams import recording
from tests.hosts.servers import listening, nothing_left

import voxelsigma.pipelines
from voxelsigma.formats.raw_file import open_raw
from voxelsigma.gadgets.wire import HEADER, close_message, message, text_message
from voxelsigma.hosts.worker import Worker
from voxelsigma.noise.voxels import object_mask

FOLDER: Final = Path(voxelsigma.pipelines.__path__[0])
TOLD: Final = "[Stream] ERROR: Errors received: \n"
WAYS: Final = ("externals", "worker")

Properties = dict[str, dict[str, str]]
Run = Callable[..., Received]

LINEAR: Properties = {"sketch": {"maps": "magnitude complex snr gfactor"}}
NETWORK: Properties = {"sketch": {"maps": "magnitude", "probes": "4", "seed": "3"}}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening(Worker().handle) as listener:
        yield listener.port


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A scan through a double of its own; whatever comes of it, nothing is left and a failed child says so."""

    def runner(xml: str, header: bytes, messages: Any, front_end: bytes | Path | None = None) -> Received:
        log = tmp_path / "log.txt"
        double = Double(xml, {"OMP_NUM_THREADS": "1"}, log=log, front_end=front_end, child_seconds=120)
        with nothing_left(), double:
            found = client(double.port, "any_name.xml", header, messages, seconds=240)
            assert found.closed, double.log_text
            assert double.leftovers() == []
            if not found.texts:
                assert {code for _, code in double.exit_codes} <= {0}
        return found

    return runner


@pytest.fixture
def real(shared_data: Path, run: Run, port: int) -> Callable[..., list[Image]]:
    """Images that a shipped pipeline makes of the real scan."""

    def runner(name: str, properties: Properties, front_end: str = "") -> list[Image]:
        xml = with_properties(shipped(name, port), properties)
        recorded = shared_data / "wire" / f"{front_end}.bin" if front_end else None
        found = run(xml, *scan_of(shared_data), recorded)
        assert found.texts == []
        return found.images

    return runner


def shipped(name: str, port: int) -> str:
    """A shipped pipeline, whose worker is at a port."""
    return (FOLDER / f"{name}.xml").read_text().replace('port="18000"', f'port="{port}"')


def scan_of(folder: Path) -> tuple[bytes, list[bytes]]:
    """Header and messages of the real scan: a noise readout, then 68 of 36 lines and references."""
    with open_raw(folder / "snr_r3.h5") as raw:
        return raw.header.xml, acquisitions(list(raw.blocks()))


def with_properties(xml: str, properties: Properties) -> str:
    """A pipeline in which gadgets, in chains or alone, have other properties."""
    root = ElementTree.fromstring(xml)
    for external in root.iter("external"):
        action, configuration = external.find("execute"), external.find("configuration")
        assert configuration is not None
        alone = "" if action is None else action.get("name", "").rpartition(".")[2]
        for element in [configuration, *configuration.iter("gadget")]:
            for name, value in properties.get(element.get("name", alone), {}).items():
                for old in element.findall(f"property[@name='{name}']"):
                    element.remove(old)
                ElementTree.SubElement(element, "property", name=name, value=value)
    return ElementTree.tostring(root, encoding="unicode")


def unbiased(image: Image) -> NDArray[np.float64]:
    """A map without the factor for the number of noise samples, which the hybrid way does not know."""
    stated = image.meta.get("voxelsigma_covariance_bias", "1")
    power = {2000: 1, 2010: 1, 2100: -1}.get(image.image_series_index, 0)
    bias = 1.0 if stated.startswith("unknown") else float(stated)
    return np.asarray(image.data[0].astype(np.float64) / bias**power)


def deviations(found: list[Image], expected: list[Image]) -> list[float]:
    """Largest deviation of each series from another of its kind, in units of its maximum."""
    assert [one.image_series_index for one in found] == [one.image_series_index for one in expected]
    pairs = [(unbiased(one), unbiased(other)) for one, other in zip(found, expected, strict=True)]
    return [float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs]


@pytest.mark.slow
def test_all_ways_give_the_same_linear_series(real: Callable[..., list[Image]]) -> None:
    expected = real("sense_sigma", LINEAR)
    assert [image.image_series_index for image in expected] == [1, 2000, 2010, 2100, 2200]
    for way in WAYS:
        assert max(deviations(real(f"sense_sigma_{way}", LINEAR), expected)) <= 1e-5
    for recorded in ("snr_recondata", "snr_bucket"):
        assert max(deviations(real("sense_sigma_hybrid", LINEAR, recorded), expected)) <= 1e-5


@pytest.mark.slow
def test_all_ways_give_the_same_series_of_a_network(real: Callable[..., list[Image]]) -> None:
    expected = real("unrolled_sigma", NETWORK)
    inside = object_mask(torch.from_numpy(expected[0].data[0, 0].astype(np.complex64))).numpy()
    others = [real(f"unrolled_sigma_{way}", NETWORK) for way in WAYS]
    for found in [*others, real("unrolled_sigma_hybrid", NETWORK, "snr_recondata")]:
        assert deviations(found[:1], expected[:1])[0] <= 1e-4
        ratio = unbiased(found[1])[0, inside] / unbiased(expected[1])[0, inside]
        # rounding flips a rectifier here and there
        assert np.percentile(np.abs(ratio - 1), 99) <= 1e-3


@pytest.mark.parametrize("way", ["", "_externals", "_worker", "_hybrid"])
def test_a_truncated_scan_is_an_error_with_the_counts(shared_data: Path, run: Run, port: int, way: str) -> None:
    header, messages = scan_of(shared_data)
    recorded = None
    if way == "_hybrid":
        context, (item,) = recording(shared_data / "wire" / "snr_recondata.bin")
        headers = item.bits[0].data.headers.copy()
        lines = np.flatnonzero(headers["number_of_samples"][0, 0, 0, 0])
        headers["number_of_samples"][..., lines[18:]] = 0
        half = changed(item, headers=headers)
        recorded = text_message(HEADER, context.header.xml) + message(half) + close_message()
    found = run(shipped(f"sense_sigma{way}", port), header, messages[:35], recorded)
    assert found.images == []
    (text,) = found.texts
    who = {"_externals": "accumulate", "_worker": "worker"}.get(way, "chain")
    assert text.startswith(f"{TOLD}voxelsigma {who}: accumulate: the volume "), text
    assert "is incomplete: 18 of 36 lines" in text
