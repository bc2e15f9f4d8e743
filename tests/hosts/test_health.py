"""Health, asked for and counted."""

import json
import socket
from collections.abc import Callable

import pytest
from tests.hosts.conftest import Outcome
from tests.hosts.mrd_peer import Peer, Talk
from tests.hosts.servers import Client, eventually, listening, nothing_left

import voxelsigma
from voxelsigma.gadgets.wire import Close, Query, Response, message
from voxelsigma.hosts.health import HEALTH_QUESTION, Tally, ask
from voxelsigma.hosts.listener import LOOPBACK
from voxelsigma.hosts.server import Policy, Server
from voxelsigma.hosts.worker import Worker


def test_scans_are_counted() -> None:
    tally = Tally("worker", models=("sense",))
    with tally.scan(), tally.scan():
        assert tally.report()["running"] == 2
    with pytest.raises(LookupError, match="oh"), tally.scan():
        raise LookupError("oh")
    report = tally.report()
    assert (report["running"], report["done"], report["failed"]) == (0, 2, 1)
    assert (report["status"], report["server"], report["models"]) == ("ok", "worker", ["sense"])
    assert report["version"] == voxelsigma.__version__
    assert report["uptime_seconds"] >= 0


def test_answers() -> None:
    tally = Tally("server")
    assert json.loads(tally.answer(Query(7, HEALTH_QUESTION)).answer)["server"] == "server"
    assert tally.answer(Query(7, "gadgetron::info")) == Response(
        7, f"voxelsigma {voxelsigma.__version__} server, no Gadgetron"
    )
    assert tally.answer(Query(8, "x")) == Response(8, "Unable to respond to query: x")


@pytest.mark.parametrize(("host", "kind"), [("127.0.0.1", "worker"), ("::1", "worker"), ("127.0.0.1", "server")])
def test_a_server_is_asked(host: str, kind: str) -> None:
    served = Worker() if kind == "worker" else Server(Policy())
    with nothing_left(), listening(served.handle, LOOPBACK) as listener:
        for _ in range(3):
            report = ask(host, listener.port)
    # to ask is no scan
    assert (report["server"], report["running"], report["done"], report["failed"]) == (kind, 0, 0, 0)


@pytest.mark.parametrize("served", [Worker(), Server(Policy())])
def test_several_questions_on_one_connection(served: Worker | Server) -> None:
    with listening(served.handle) as listener:
        with Client(listener.port) as client:
            client.say(Query(1, "x"), Query(2, "gadgetron::info"), Close())
            assert [answer.number for answer in client.hear_all()] == [1, 2]
        with Client(listener.port) as client:
            client.say(Close())
            assert client.hear_all() == []
        # it does not wait
        with Client(listener.port) as client:
            client.say(Query(1, "x"))


@pytest.mark.parametrize("served", [Worker(), Server(Policy())])
def test_probes_of_a_port_leave_no_trace(served: Worker | Server, caplog: pytest.LogCaptureFixture) -> None:
    with nothing_left(), listening(served.handle) as listener:
        for _ in range(3):
            Client(listener.port).socket.close()
        with Client(listener.port) as client:
            client.socket.shutdown(socket.SHUT_WR)
            assert client.is_over()
        assert eventually(lambda: listener.connections == 0)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert served.tally.report()["failed"] == 0


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def test_nothing_listens() -> None:
    port = closed_port()
    with pytest.raises(ConnectionError, match=rf"127\.0\.0\.1:{port}: no answer \(.*refused"):
        ask("127.0.0.1", port)
    with pytest.raises(ConnectionError, match=rf"\[::1\]:{port}: no answer"):
        ask("::1", port)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (message("HTTP"), "something listens there, but it is no voxelsigma server"),
        (message(Response(1, "Gadgetron 4.7")), "something listens there, but it is no voxelsigma server"),
        (message(Response(1, "[1]")), "something listens there, but it is no voxelsigma server"),
        (b"HTTP/1.1 400", r"no answer \(wire: message id 21576"),
        (b"", r"no answer \("),
    ],
)
def test_something_else_listens(said: bytes, text: str) -> None:
    def script(talk: Talk) -> None:
        talk.read(4)
        talk.say(said)

    with Peer(script) as peer:
        host, port = peer.address.split(":")
        with pytest.raises(ConnectionError, match=rf"{peer.address}: {text}"):
            ask(host, int(port))


def test_something_silent_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(
            ConnectionError, match=rf"127\.0\.0\.1:{port}: no answer \(timed out, after 0 of 2 bytes of a message id\)"
        ):
            ask("127.0.0.1", port, timeout=0.1)


def test_the_command(cli: Callable[..., Outcome]) -> None:
    worker = Worker(Tally("worker", models=("sense",)))
    with listening(worker.handle) as listener:
        found = cli("health", "--port", listener.port)
    assert (found.returncode, found.stderr) == (0, "")
    assert {"status: ok", "server: worker", "models: sense", "running: 0"} <= set(found.stdout.splitlines())
    missing = cli("health", "--port", closed_port())
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.count("\n") == 1
    assert "no answer" in missing.stderr
