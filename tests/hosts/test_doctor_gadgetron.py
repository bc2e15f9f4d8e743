"""`voxelsigma doctor --gadgetron`, with interpreters and servers that are shell scripts on a PATH of their own."""

import http.server
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import voxelsigma
from voxelsigma.hosts import doctor_gadgetron
from voxelsigma.hosts.check import Check, failed, lines
from voxelsigma.hosts.doctor import requirements
from voxelsigma.hosts.doctor_gadgetron import PIPELINE_FOLDER, Server, check_server, environment_of
from voxelsigma.hosts.doctor_handshake import handshake

Script = Callable[..., Path]
REAL = shlex.quote(sys.executable)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes a shell script into the folder that is the server's whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name: str, text: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return write


def answering(answer: str) -> str:
    """A script that is this Python, save that what it is to run comes behind some code of ours."""
    stub = f"import sys\n{answer}"
    return f'if [ "$1" = -c ]; then exec {REAL} -c {shlex.quote(stub)}"\n$2"; fi\nexec {REAL} "$@"'


def without(name: str) -> str:
    """A Python in which a package is missing; and torch, which takes long to import."""
    return answering(f"sys.modules[{name!r}] = sys.modules['torch'] = None")


def with_version(name: str, found: str) -> str:
    """A Python in which a package has another version."""
    return answering(
        "sys.modules['torch'] = None; import importlib.metadata as m; real = m.version\n"
        f"m.version = lambda name: {found!r} if name == {name!r} else real(name)",
    )


def examined(tmp_path: Path, python: str | None = None, **environment: str) -> dict[str, Check]:
    server = Server(environment={"PATH": str(tmp_path / "bin"), "OMP_NUM_THREADS": "1", **environment}, python=python)
    return {check.name: check for check in check_server(server, requirements())}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A Gadgetron's folder, with our pipelines in it."""
    config = tmp_path / "home" / "share" / "gadgetron" / "config"
    config.mkdir(parents=True)
    for path in PIPELINE_FOLDER.glob("*.xml"):
        (config / path.name).write_bytes(path.read_bytes())
    return tmp_path / "home"


def test_sound_server(script: Script, home: Path, tmp_path: Path) -> None:
    script("python", f'exec {REAL} "$@"')
    script("gadgetron", "echo 'Gadgetron Version Info'; echo '  -- Version            : 4.7.2' >&2")
    checks = examined(tmp_path, GADGETRON_HOME=str(home))
    assert not failed(checks.values()), lines(checks.values())
    assert checks["gadgetron"].found.startswith("4.7.2 (")
    assert checks["server's voxelsigma"].found.startswith(voxelsigma.__version__)
    assert "as shipped" in checks["pipelines in Gadgetron"].found
    assert checks["gadget started as the server does"].ok is True


def test_python_of_server_without_gadgetron_package(script: Script, tmp_path: Path) -> None:
    path = script("python", without("gadgetron"))
    checks = examined(tmp_path)
    check = checks["server's gadgetron"]
    assert check.ok is False
    assert "gadgetron" in check.found
    assert check.remedy == f"{path} -m pip install 'gadgetron>=1.4.1'"
    assert "gadget started as the server does" not in checks


def test_python_of_server_without_voxelsigma(script: Script, tmp_path: Path) -> None:
    script("python", without("voxelsigma"))
    check = examined(tmp_path)["server's voxelsigma"]
    assert check.ok is False
    assert f"pip install voxelsigma=={voxelsigma.__version__}" in check.remedy


def test_python_of_server_with_old_ismrmrd(script: Script, tmp_path: Path) -> None:
    script("python", with_version("ismrmrd", "1.13.2"))
    check = examined(tmp_path)["server's ismrmrd"]
    assert check.ok is False
    assert check.found == "1.13.2"
    assert "'ismrmrd>=1.14'" in check.remedy


def test_python_of_server_with_other_voxelsigma(script: Script, tmp_path: Path) -> None:
    script("python", answering("import voxelsigma; voxelsigma.__version__ = '0.0.1'; sys.modules['torch'] = None"))
    check = examined(tmp_path)["server's voxelsigma"]
    assert check.ok is False
    assert check.found.startswith("0.0.1 (")
    assert check.found.endswith(f"this one is {voxelsigma.__version__}")


def test_gadget_module_that_cannot_be_imported(script: Script, tmp_path: Path) -> None:
    script("python", without("scipy"))
    check = examined(tmp_path)["server's gadgets"]
    assert check.ok is False
    assert "scipy" in check.found


def test_python_that_dies(script: Script, tmp_path: Path) -> None:
    script("python", 'if [ "$1" = --version ]; then echo Python 3.11.2; else echo no libffi >&2; exit 3; fi')
    checks = examined(tmp_path)
    assert checks["server's packages"].ok is False
    assert "does not run (no libffi)" in checks["server's packages"].found
    assert checks["python -m gadgetron"].ok is False


def test_no_python_at_all(script: Script, tmp_path: Path) -> None:
    checks = examined(tmp_path)
    check = checks["server's python"]
    assert check == Check(
        "server's python",
        False,
        "no python on PATH; no python3 on PATH",
        "start the server with voxelsigma's environment first on its PATH",
    )


def test_old_python_is_passed_over_as_the_server_does(script: Script, tmp_path: Path) -> None:
    old = script("python", "echo Python 2.7.18 >&2")
    new = script("python3", "echo Python 3.11.2")
    check = examined(tmp_path)["server's python"]
    assert check.ok is True
    assert check.found.startswith(f"{new}, 3.11.2; ")
    assert f"passed over: {old} (Python 2.7.18)" in check.found


def test_python_that_the_server_takes_but_we_cannot(script: Script, tmp_path: Path) -> None:
    script("python", "echo Python 3.8.10")
    script("python3", f'exec {REAL} "$@"')
    check = examined(tmp_path)["server's python"]
    assert check.ok is False
    assert "3.8.10" in check.found


def test_python_that_hangs_is_ended(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_gadgetron, "VERSION_SECONDS", 0.5)
    script("python", f"/bin/sleep 600 & echo $! > {tmp_path}/pid; wait")
    check = examined(tmp_path)["server's python"]
    assert check.ok is False
    assert "gives no answer within 0.5 s" in check.found
    assert _ended(int((tmp_path / "pid").read_text()))


def test_import_that_hangs_is_ended(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_gadgetron, "IMPORT_SECONDS", 0.5)
    script("python", 'if [ "$1" = --version ]; then echo Python 3.11.2; else exec /bin/sleep 600; fi')
    checks = examined(tmp_path)
    assert "no answer within 0.5 s" in checks["server's packages"].found
    assert "no end within 0.5 s" in checks["python -m gadgetron"].found


def test_given_python_is_taken(script: Script, tmp_path: Path) -> None:
    script("python", "echo Python 2.7.18")
    other = script("other", "echo Python 3.12.1")
    assert examined(tmp_path, python=str(other))["server's python"].found == f"{other}, 3.12.1"
    check = examined(tmp_path, python="/nowhere/python")["server's python"]
    assert check.ok is False
    assert check.found == "no /nowhere/python"


def test_python_path_is_what_the_server_sets(script: Script, home: Path, tmp_path: Path) -> None:
    folder = home / "share" / "gadgetron" / "python"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('an old copy')")
    script("python", f'exec {REAL} "$@"')
    environment = {"PYTHONPATH": str(tmp_path), "GADGETRON_HOME": str(home), "PATH": ""}
    server = Server(environment=environment)
    assert server.child_environment["PYTHONPATH"] == f"{tmp_path}{os.pathsep}{folder}"
    check = examined(tmp_path, GADGETRON_HOME=str(home))["server's torch"]
    assert check.found == "ImportError: an old copy"


def test_home_derived_from_the_program(script: Script, tmp_path: Path) -> None:
    script("gadgetron", "echo '-- Version : 3.17.0'")
    (tmp_path / "share" / "gadgetron" / "config").mkdir(parents=True)
    checks = examined(tmp_path)
    assert checks["GADGETRON_HOME"].found == f"{tmp_path} (not set; the server takes this one)"
    assert checks["gadgetron"].ok is False
    assert checks["gadgetron"].remedy == "version 4 is needed"


def test_no_server(script: Script, tmp_path: Path) -> None:
    checks = examined(tmp_path)
    assert checks["gadgetron"].ok is False
    assert checks["GADGETRON_HOME"].ok is None
    assert checks["pipelines in Gadgetron"].ok is None


def test_home_that_is_not_gadgetrons(script: Script, tmp_path: Path) -> None:
    check = examined(tmp_path, GADGETRON_HOME=str(tmp_path))["GADGETRON_HOME"]
    assert check.ok is False
    assert "has no share/gadgetron/config" in check.found


def test_pipelines_missing_and_altered(script: Script, home: Path, tmp_path: Path) -> None:
    config = home / "share" / "gadgetron" / "config"
    (config / "sense_sigma.xml").write_text("<configuration/>")
    (config / "unrolled_sigma.xml").unlink()
    check = examined(tmp_path, GADGETRON_HOME=str(home))["pipelines in Gadgetron"]
    assert check.ok is False
    assert check.found == "missing unrolled_sigma.xml; other sense_sigma.xml"
    assert check.remedy.startswith("ln -sf ")


@pytest.fixture
def storage() -> Iterator[Callable[[int], str]]:
    """A storage service that answers every request with the status asked for."""
    servers = []

    def start(status: int) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *values: object) -> None:
                del values

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


@pytest.mark.parametrize(("status", "ok"), [(200, True), (404, True), (500, False), (403, False)])
def test_storage(script: Script, tmp_path: Path, storage: Callable[[int], str], status: int, ok: bool) -> None:
    address = storage(status)
    check = examined(tmp_path, GADGETRON_STORAGE_ADDRESS=address)["GADGETRON_STORAGE_ADDRESS"]
    assert check.ok is ok
    assert address in check.found


def test_storage_that_is_not_there(script: Script, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    check = examined(tmp_path, GADGETRON_STORAGE_ADDRESS=f"http://127.0.0.1:{port}")["GADGETRON_STORAGE_ADDRESS"]
    assert check.ok is False
    assert "does not answer" in check.found
    check = examined(tmp_path, GADGETRON_STORAGE_ADDRESS="file:///etc/passwd")["GADGETRON_STORAGE_ADDRESS"]
    assert check.found == "file:///etc/passwd is no address"
    assert examined(tmp_path)["GADGETRON_STORAGE_ADDRESS"].ok is None


def test_environment_of_a_running_server() -> None:
    child = subprocess.Popen(["/bin/sleep", "60"], env={"PATH": "/somewhere", "A": "b=c"})
    try:
        # until exec, the child still has this process's environment
        for _ in range(500):
            if environment_of(child.pid).get("A"):
                break
            time.sleep(0.01)
        assert environment_of(child.pid) == {"PATH": "/somewhere", "A": "b=c"}
    finally:
        child.kill()
        child.wait(timeout=10)
    with pytest.raises(ValueError, match=r"environment of process .* cannot be read"):
        environment_of(child.pid)


def test_gadget_that_ends_before_it_connects(script: Script) -> None:
    path = script("python", "echo oh dear; exit 4")
    check = handshake(str(path), {})
    assert check.ok is False
    assert "exit code 4 before it connects; its log ends with: oh dear" in check.found


def test_gadget_that_never_connects(script: Script, tmp_path: Path) -> None:
    path = script("python", f"echo $$ > {tmp_path}/pid; exec /bin/sleep 600")
    check = handshake(str(path), {}, seconds=0.5)
    assert "does not connect within 0.5 s" in check.found
    assert _ended(int((tmp_path / "pid").read_text()))


def test_gadget_whose_import_fails(script: Script) -> None:
    stub = (
        "import sys, runpy; sys.modules['scipy'] = None; sys.argv = sys.argv[2:]; "
        "runpy.run_module('gadgetron', run_name='__main__')"
    )
    path = script("python", f'exec {REAL} -c {shlex.quote(stub)} "$@"')
    check = handshake(str(path), {**os.environ, "OMP_NUM_THREADS": "1"})
    assert check.ok is False
    assert "reports: voxelsigma chain:" in check.found
    assert "scipy" in check.found


def _ended(pid: int) -> bool:
    """Whether a process ends; one that nobody has waited for yet has ended, too."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False
