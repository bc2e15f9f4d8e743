"""`voxelsigma doctor` on the environment that the tests run in, made worse in one place at a time."""

import importlib.metadata
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import voxelsigma
from voxelsigma.gadgets.wire import Reader, Response, close_message, message, read_message
from voxelsigma.hosts.check import Check, failed, lines, older
from voxelsigma.hosts.doctor import check_worker, doctor, requirements


def test_own_environment_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    checks = doctor()
    assert not failed(checks), lines(checks)
    names = {check.name for check in checks}
    assert {
        "python",
        "torch",
        "gadgetron",
        "ismrmrd",
        "model unrolled_small",
        "pipelines",
        "device",
        "threads",
    } <= names


def test_every_package_of_the_distribution_is_looked_at() -> None:
    found = requirements()
    assert found["gadgetron"] == "1.4.1"
    assert {"torch", "numpy", "ismrmrd", "pyyaml", "defusedxml"} <= set(found)
    assert "matplotlib" not in found


def test_temporary_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    (check,) = [check for check in doctor() if check.name == "temporary folder"]
    assert check.ok is False
    assert "nowhere, which cannot be written" in check.found
    assert check.remedy


def test_weights_that_were_altered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from voxelsigma.models import cards

    for path in cards.CARD_FOLDER.iterdir():
        if path.suffix in (".yaml", ".safetensors"):
            content = path.read_bytes()
            (tmp_path / path.name).write_bytes(content[:-1] + b"\0" if path.suffix == ".safetensors" else content)
    monkeypatch.setattr(cards, "CARD_FOLDER", tmp_path)
    (check,) = [check for check in doctor() if check.name == "model unrolled_small"]
    assert check.ok is False
    assert "sha256 is" in check.found


def test_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "voxelsigma.hosts.doctor.version",
        lambda name: "1.13.0" if name == "ismrmrd" else importlib.metadata.version(name),
    )
    checks = {check.name: check for check in doctor()}
    assert checks["ismrmrd"] == Check("ismrmrd", False, "1.13.0", "python -m pip install 'ismrmrd>=1.14'")
    assert checks["models, pipelines, device"].ok is None


@pytest.fixture
def answering_port() -> Iterator[Callable[[dict[str, object]], int]]:
    """A port at which the next connection's query is answered with a report."""
    listeners = []

    def start(report: dict[str, object]) -> int:
        server = socket.create_server(("localhost", 0))
        server.settimeout(30)

        def serve() -> None:
            connection, _address = server.accept()
            with connection:
                connection.settimeout(30)
                query = read_message(Reader(connection.recv))
                connection.sendall(message(Response(query.number, json.dumps(report))) + close_message())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        listeners.append((server, thread))
        return int(server.getsockname()[1])

    yield start
    for server, thread in listeners:
        thread.join(timeout=40)
        server.close()


@pytest.mark.parametrize(
    ("report", "ok", "remedy"),
    [
        ({"server": "worker", "version": voxelsigma.__version__, "models": ["unrolled_small"]}, True, ""),
        ({"server": "worker", "version": "0.0.1"}, False, "install and start it anew"),
        ({"server": "server", "version": voxelsigma.__version__}, False, "start voxelsigma worker there"),
    ],
)
def test_worker_that_answers(
    answering_port: Callable[[dict[str, object]], int], report: dict[str, object], ok: bool, remedy: str
) -> None:
    check = check_worker(answering_port(report))
    assert check.ok is ok
    assert str(report["version"]) in check.found
    assert remedy in check.remedy


def test_worker_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voxelsigma.hosts.doctor.ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "no answer" in check_worker(port).found
    check = doctor(worker=port)[-1]
    assert check.ok is False
    assert check.remedy == f"start voxelsigma worker --port {port}"


def test_lines() -> None:
    checks = [Check("a", True, "x"), Check("b", False, "two\nlines", "mend it"), Check("c", None, "unknown")]
    assert lines(checks) == ["ok    a: x", "FAIL  b: two lines -> mend it", "note  c: unknown"]
    assert failed(checks)
    assert not failed([checks[0], checks[2]])


@pytest.mark.parametrize(
    ("found", "minimum", "expected"),
    [
        ("2.13.0+cpu", "2.4", False),
        ("2.4", "2.4.0", False),
        ("1.9", "1.14", True),
        ("1.14.0rc1", "1.14", False),
        ("unknown", "1", True),
    ],
)
def test_older(found: str, minimum: str, expected: bool) -> None:
    assert older(found, minimum) is expected
