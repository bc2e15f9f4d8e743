"""Listening: several addresses, several connections, and how it stops; then the same of a real process."""

import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.hosts.conftest import Outcome
from tests.hosts.servers import Client, Served, eventually, listening, nothing_left, serving, whole

from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.wire import Close, FileName, ScanHeaderText
from voxelsigma.hosts import listener as module
from voxelsigma.hosts.health import ask
from voxelsigma.hosts.listener import LOOPBACK, Listener


def echo(connection: socket.socket, peer: str) -> None:
    del peer
    while part := connection.recv(100):
        connection.sendall(part)


def says(port: int, text: bytes, host: str = "127.0.0.1") -> bytes:
    with Client(port, host) as client:
        client.say(text)
        client.socket.shutdown(socket.SHUT_WR)
        found = b""
        while part := client.socket.recv(100):
            found += part
        return found


def test_both_loopbacks_by_default() -> None:
    with nothing_left(), listening(echo, LOOPBACK) as listener:
        assert listener.addresses == (f"127.0.0.1:{listener.port}", f"[::1]:{listener.port}")
        assert says(listener.port, b"four") == b"four"
        assert says(listener.port, b"six", "::1") == b"six"


@pytest.mark.parametrize("hosts", [["::"], ["0.0.0.0", "::"], ["::", "0.0.0.0"]])
def test_any_mixture_of_addresses(hosts: list[str]) -> None:
    with listening(echo, hosts) as listener:
        assert says(listener.port, b"four") == b"four"
        assert says(listener.port, b"six", "::1") == b"six"


def test_an_address_named_twice() -> None:
    with listening(echo, ["localhost", "127.0.0.1", "127.0.0.1"]) as listener:
        assert len(set(listener.addresses)) == len(listener.addresses)
        assert says(listener.port, b"four") == b"four"


@pytest.mark.parametrize("hosts", [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
def test_ipv6_may_be_missing(monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, ...]) -> None:
    original: Callable[..., socket.socket] = module._listening

    def without(family: Any, address: str, port: int, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return original(family, address, port, **options)

    monkeypatch.setattr(module, "_listening", without)
    with listening(echo, hosts) as listener:
        assert listener.addresses == (f"127.0.0.1:{listener.port}",)
    with pytest.raises(OSError, match=r"\[::1\]:0: cannot listen \(Cannot assign"):
        Listener(["::1"], 0, echo)


def test_what_cannot_be_listened_on() -> None:
    with listening(echo) as listener:
        text = (
            rf"127\.0\.0\.1:{listener.port}: cannot listen \(.*, something else listens there\); choose another --port"
        )
        with pytest.raises(OSError, match=text):
            Listener(["127.0.0.1"], listener.port, echo)
    with pytest.raises(OSError, match=r"no\.such\.host\.invalid: no address to listen on"):
        Listener(["no.such.host.invalid"], 0, echo)


def test_all_are_accepted_at_once() -> None:
    together = threading.Barrier(5)

    def handle(connection: socket.socket, peer: str) -> None:
        together.wait(20)
        echo(connection, peer)

    with nothing_left(), listening(handle) as listener:
        clients = [Client(listener.port) for _ in range(5)]
        assert eventually(lambda: listener.connections == 5)
        for client in clients:
            client.say(b"x")
            assert client.socket.recv(1) == b"x"
            client.socket.close()
        assert eventually(lambda: listener.connections == 0)


def test_a_handler_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def handle(connection: socket.socket, peer: str) -> None:
        if connection.recv(100) == b"bad":
            raise LookupError("oh")
        connection.sendall(b"good")

    with listening(handle) as listener:
        assert says(listener.port, b"bad") == b""
        assert says(listener.port, b"x") == b"good"
    assert "failed" in caplog.text
    assert "LookupError: oh" in caplog.text


def test_no_thread_for_another_connection(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with listening(echo) as listener:
        with monkeypatch.context() as patch:

            def refuse(_: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", refuse)
            with Client(listener.port) as client:
                assert client.is_over()
        assert says(listener.port, b"x") == b"x"
    assert "refused: can't start new thread" in caplog.text


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CONNECTIONS", 1)
    with listening(echo) as listener, Client(listener.port) as client:
        assert eventually(lambda: listener.connections == 1)
        with Client(listener.port) as other:
            assert other.is_over()
        client.say(b"x")
        assert client.socket.recv(1) == b"x"


def test_the_last_words_are_not_lost_by_a_reset() -> None:
    """A client still sends when it is served no more."""
    with listening(lambda connection, _: connection.sendall(b"bye")) as listener, Client(listener.port) as client:
        for _ in range(30):
            client.say(bytes(10_000))
            time.sleep(0.01)
        assert client.socket.recv(10) == b"bye"
        assert client.socket.recv(10) == b""


def test_who_does_not_hang_up_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.1)
    with listening(lambda connection, _: connection.sendall(b"bye")) as listener, Client(listener.port):
        assert eventually(lambda: listener.connections == 0)


def test_running_connections_get_some_time() -> None:
    listener = Listener(["127.0.0.1"], 0, echo)
    thread = threading.Thread(target=listener.run, args=(60.0,), daemon=True)
    thread.start()
    with Client(listener.port) as client:
        client.say(b"x")
        assert client.socket.recv(1) == b"x"
        listener.stop()
        assert eventually(lambda: not _open(listener.port))
        client.say(b"y")
        assert client.socket.recv(1) == b"y"
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()
    listener.stop()


def test_who_takes_too_long_is_cut_off_and_may_still_say_so(caplog: pytest.LogCaptureFixture) -> None:
    def handle(connection: socket.socket, peer: str) -> None:
        echo(connection, peer)
        connection.sendall(b"cut off")

    with nothing_left():
        with listening(handle, grace=0.1) as listener:
            client = Client(listener.port)
            client.say(b"x")
            assert client.socket.recv(1) == b"x"
        with client:
            assert client.socket.recv(100) == b"cut off"
            assert client.is_over()
    assert "is cut off: it was still served after 0.1 s" in caplog.text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A `serve`, which the tests up to the last leave running."""
    with serving(tmp_path_factory.mktemp("serve"), "serve", "--pipeline", "sense_sigma.xml") as found:
        yield found


def test_a_process_serves(served: Served, scan: SimulatedScan) -> None:
    for host in LOOPBACK:
        with Client(served.port, host) as client:
            client.say(FileName("sense_sigma"), *whole(scan))
            assert len(client.hear_all()) == 4
    assert ask("127.0.0.1", served.port)["models"] == ["sense"]


def test_a_port_in_use(served: Served, cli: Callable[..., Outcome]) -> None:
    found = cli("serve", "--port", served.port)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith(f"error: 127.0.0.1:{served.port}: cannot listen (Address already in use")
    assert found.stderr.count("\n") == 1


def test_a_scan_is_finished_after_sigterm(served: Served, scan: SimulatedScan) -> None:
    with Client(served.port) as client:
        client.say(FileName("sense_sigma"), ScanHeaderText(scan.header_xml), scan.blocks[0])
        assert eventually(lambda: ask("127.0.0.1", served.port)["running"] == 1)
        served.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: not _open(served.port))
        client.say(scan.blocks[1], Close())
        assert len(client.hear_all()) == 4
    assert served.process.wait(60) == 0
    assert served.process.stdout is not None
    assert served.process.stdout.read() == "serve: stopped\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_process_stops_at_once(tmp_path: Path, number: int) -> None:
    # a grace that would end the test's patience
    with serving(tmp_path, "serve", "--grace", 3000) as served:
        assert served.end(number) == 0
        assert served.log == ""


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "worker", "--grace", 3000) as served, Client(served.port) as client:
        client.say(b"x")
        # whose connection is accepted after the client's
        ask("127.0.0.1", served.port)
        served.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: not _open(served.port))
        assert served.process.poll() is None
        assert served.end(signal.SIGTERM) == 128 + signal.SIGTERM


def test_a_client_is_told_when_the_grace_is_over(tmp_path: Path, scan: SimulatedScan) -> None:
    with serving(tmp_path, "serve", "--grace", 0.2) as served, Client(served.port) as client:
        client.say(FileName("sense_sigma"), ScanHeaderText(scan.header_xml), scan.blocks[0])
        assert eventually(lambda: ask("127.0.0.1", served.port)["running"] == 1)
        served.process.send_signal(signal.SIGTERM)
        assert "stream ends after 0 of 2 bytes of a message id" in client.complaint()
        assert served.process.wait(60) == 0
        assert "is cut off: it was still served after 0.2 s" in served.log


def _open(port: int) -> bool:
    try:
        Client(port).socket.close()
    except OSError:
        return False
    return True
