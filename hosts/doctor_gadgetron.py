"""What a Gadgetron server would start, seen from outside: the part that no gadget can report itself."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import voxelsigma
import voxelsigma.pipelines
from voxelsigma.hosts.check import Check, older
from voxelsigma.hosts.doctor_handshake import handshake

PIPELINE_FOLDER = Path(voxelsigma.pipelines.__path__[0])
VERSION_SECONDS = 10.0
IMPORT_SECONDS = 120.0

_FIRST = "start the server with voxelsigma's environment first on its PATH"
_MARK = "voxelsigma-probe "
# runs in a foreign interpreter, perhaps an old one: standard library and plain syntax only
_PROBE = """
import json
try:
    from importlib.metadata import version
except ImportError:
    version = None
found = {}
def look(name, imported):
    try:
        module = __import__(imported)
        known = version(name) if version else getattr(module, "__version__", "unknown")
        found[name] = {"version": known, "file": getattr(module, "__file__", None) or ""}
    except BaseException as error:
        found[name] = {"error": type(error).__name__ + ": " + str(error)}
for name in ("gadgetron", "ismrmrd", "numpy", "torch", "voxelsigma"):
    look(name, name)
try:
    from importlib import import_module
    import voxelsigma
    found["voxelsigma"]["version"] = voxelsigma.__version__
    import_module("voxelsigma.gadgets.chain")
    import_module("voxelsigma.gadgets.external")
    for entry in import_module("voxelsigma.gadgets.registry").GADGETS.values():
        import_module(entry.module)
    found["gadgets"] = {}
except BaseException as error:
    found["gadgets"] = {"error": type(error).__name__ + ": " + str(error)}
try:
    import torch
    found["torch"]["device"] = "cuda" if torch.cuda.is_available() else "cpu"
except BaseException:
    pass
print("\\n" + MARK + json.dumps(found), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The server that is examined.

    Parameters
    ----------
    environment
        Its environment.
    python
        The interpreter that it starts; None for the first on its PATH.
    """

    environment: Mapping[str, str]
    python: str | None = None

    @property
    def executable(self) -> str | None:
        """The server's program."""
        return shutil.which("gadgetron", path=self.environment.get("PATH", ""))

    @property
    def home(self) -> Path | None:
        """GADGETRON_HOME, or the folder that the server takes for it: the one above its program's."""
        given = self.environment.get("GADGETRON_HOME")
        if given:
            return Path(given)
        return Path(self.executable).resolve().parent.parent if self.executable else None

    @property
    def child_environment(self) -> dict[str, str]:
        """What the server gives the processes that it starts."""
        environment = dict(self.environment)
        if self.home is not None:
            before = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
            environment["PYTHONPATH"] = os.pathsep.join([*before, str(self.home / "share" / "gadgetron" / "python")])
        return environment


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a running process was started with.

    Raises
    ------
    ValueError
        If there is no such process, or it belongs to someone else.
    """
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError as error:
        raise ValueError(f"doctor: the environment of process {pid} cannot be read ({error.strerror})") from None
    pairs = (os.fsdecode(entry).partition("=") for entry in content.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def check_server(server: Server, requirements: Mapping[str, str]) -> list[Check]:
    """Examine a server: its program, its Python, its pipelines and its storage.

    Parameters
    ----------
    server
        The server.
    requirements
        Smallest version of every package that voxelsigma needs.
    """
    checks = [_program(server), _home(server), _installed_pipelines(server), _storage(server)]
    python, found = _python(server)
    checks.append(found)
    if python is None:
        return checks
    imports = list(_imports(server, python, requirements))
    checks += [*imports, _package_starts(server, python)]
    if all(check.ok is not False for check in checks[-len(imports) - 1 :]):
        checks.append(handshake(python, server.child_environment))
    return checks


def _run(command: list[str], environment: Mapping[str, str], seconds: float) -> tuple[int | None, str, str]:
    """Exit code (None when it ran out of time), standard output and error; the whole family is ended."""
    try:
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return 127, "", str(error)
    code: int | None
    try:
        out, err = child.communicate(timeout=seconds)
        code = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        code = None
    return code, out.decode(errors="replace"), err.decode(errors="replace")


def _last(text: str, otherwise: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), otherwise)


def _python(server: Server) -> tuple[str | None, Check]:
    """The interpreter that the server takes: the first of `python`, `python3` that says to be 3.6 or newer."""
    name = "server's python"
    path = server.environment.get("PATH", "")
    passed_over = []
    for candidate in (server.python,) if server.python else ("python", "python3"):
        program = shutil.which(candidate, path=path)
        if program is None:
            passed_over.append(f"no {candidate}" if server.python else f"no {candidate} on PATH")
            continue
        code, out, err = _run([program, "--version"], server.child_environment, VERSION_SECONDS)
        if code is None:
            found = f"{program} --version gives no answer within {VERSION_SECONDS:g} s"
            return None, Check(name, False, found, f"the server would hang on it: {_FIRST}")
        numbers = re.search(r"(\d+)\.(\d+)\.(\d+)", out)
        if numbers and numbers.group(1) == "3" and int(numbers.group(2)) > 5:
            note = f"; passed over: {', '.join(passed_over)}" if passed_over else ""
            ok = not older(numbers.group(), "3.10")
            remedy = "" if ok else f"voxelsigma needs 3.10 or newer: {_FIRST}"
            return program if ok else None, Check(name, ok, f"{program}, {numbers.group()}{note}", remedy)
        said = _last(out, _last(err, f"exit code {code}"))
        passed_over.append(f"{program} ({said})")
    return None, Check(name, False, "; ".join(passed_over), _FIRST)


def _imports(server: Server, python: str, requirements: Mapping[str, str]) -> Iterator[Check]:
    """What the interpreter can import, as the server would start it."""
    probe = _PROBE.replace("MARK", repr(_MARK))
    code, out, err = _run([python, "-c", probe], server.child_environment, IMPORT_SECONDS)
    answers = [line.removeprefix(_MARK) for line in out.splitlines() if line.startswith(_MARK)]
    if not answers:
        said = f"no answer within {IMPORT_SECONDS:g} s" if code is None else _last(err, f"exit code {code}")
        yield Check("server's packages", False, f"{python} does not run ({said})", f"repair it, or {_FIRST}")
        return
    found: dict[str, dict[str, Any]] = json.loads(answers[-1])
    for name in ("gadgetron", "ismrmrd", "numpy", "torch"):
        yield _package(name, found[name], requirements.get(name, "0"), python)
    ours = found["voxelsigma"]
    install = f"{python} -m pip install voxelsigma=={voxelsigma.__version__}"
    if "error" in ours:
        yield Check("server's voxelsigma", False, ours["error"], install)
        return
    same = ours["version"] == voxelsigma.__version__
    text = f"{ours['version']} ({Path(ours['file']).parent})"
    yield Check(
        "server's voxelsigma",
        same,
        text if same else f"{text}, this one is {voxelsigma.__version__}",
        "" if same else install,
    )
    error = found["gadgets"].get("error")
    yield Check("server's gadgets", not error, error or "can be imported", install if error else "")


def _package(name: str, found: Mapping[str, Any], minimum: str, python: str) -> Check:
    install = f"{python} -m pip install '{name}>={minimum}'"
    if "error" in found:
        # as it is, the client of a scan would see no image and no error
        return Check(f"server's {name}", False, found["error"], install)
    device = f", {found['device']}" if "device" in found else ""
    old = older(found["version"], minimum)
    return Check(f"server's {name}", not old, f"{found['version']}{device}", install if old else "")


def _package_starts(server: Server, python: str) -> Check:
    code, out, err = _run([python, "-m", "gadgetron"], server.child_environment, IMPORT_SECONDS)
    name, remedy = "python -m gadgetron", f"{python} -m pip install --force-reinstall gadgetron"
    if code == 0:
        return Check(name, True, _last(out, "starts"))
    said = f"no end within {IMPORT_SECONDS:g} s" if code is None else _last(err, f"exit code {code}")
    return Check(name, False, said, remedy)


def _program(server: Server) -> Check:
    if server.executable is None:
        return Check(
            "gadgetron", False, "not on PATH", "run doctor where and as the server runs, or give --pid or --path"
        )
    code, out, err = _run([server.executable, "--info"], server.environment, VERSION_SECONDS * 3)
    matched = re.search(r"Version\s*:\s*(\d[\w.]*)", out + err)
    if matched is None:
        said = "no answer" if code is None else _last(err or out, f"exit code {code}")
        return Check("gadgetron", False, f"{server.executable} does not tell its version ({said})", "reinstall it")
    old = older(matched.group(1), "4")
    return Check(
        "gadgetron", not old, f"{matched.group(1)} ({server.executable})", "version 4 is needed" if old else ""
    )


def _home(server: Server) -> Check:
    name, home = "GADGETRON_HOME", server.home
    if home is None:
        return Check(name, None, "not set, and no server to derive it from", "set it to the folder Gadgetron is in")
    source = "" if server.environment.get("GADGETRON_HOME") else " (not set; the server takes this one)"
    if not (home / "share" / "gadgetron" / "config").is_dir():
        return Check(
            name, False, f"{home}{source} has no share/gadgetron/config", "set it to the folder Gadgetron is in"
        )
    return Check(name, True, f"{home}{source}")


def _installed_pipelines(server: Server) -> Check:
    """Whether the pipelines are where a client's `-c NAME` is looked for, and are this version's."""
    name = "pipelines in Gadgetron"
    if server.home is None:
        return Check(name, None, "GADGETRON_HOME is not known")
    folder = server.home / "share" / "gadgetron" / "config"
    names = sorted(path.name for path in PIPELINE_FOLDER.glob("*.xml"))
    missing = [file for file in names if not (folder / file).is_file()]
    differing = [
        file
        for file in names
        if file not in missing and (folder / file).read_bytes() != (PIPELINE_FOLDER / file).read_bytes()
    ]
    if not missing and not differing:
        return Check(name, True, f"{len(names)} of {len(names)}, as shipped ({folder})")
    parts = [f"{what} {', '.join(files)}" for what, files in (("missing", missing), ("other", differing)) if files]
    remedy = f"ln -sf {PIPELINE_FOLDER}/*.xml {folder}/"
    if differing:
        remedy += " (after renaming what you changed yourself)"
    return Check(name, False, "; ".join(parts), remedy)


def _storage(server: Server) -> Check:
    """Whether the storage service answers; its 404 says that nothing is stored under a name."""
    name = "GADGETRON_STORAGE_ADDRESS"
    address = server.environment.get(name, "")
    if not address:
        remedy = "Gadgetron sets it for what it starts; a resident worker needs it set"
        return Check(name, None, "not set", remedy)
    remedy = "start the storage service, or correct the address (http://host:port)"
    if urlsplit(address).scheme not in ("http", "https"):
        return Check(name, False, f"{address} is no address", remedy)
    query = "/v1/blobs/data/latest?subject=voxelsigma-doctor&name=noise_covariance"
    try:
        with build_opener(ProxyHandler({})).open(address.rstrip("/") + query, timeout=5) as answer:
            status = answer.status
    except HTTPError as error:
        error.close()
        status = error.code
    except (URLError, OSError, ValueError) as error:
        return Check(name, False, f"{address} does not answer ({getattr(error, 'reason', error)})", remedy)
    if status not in (200, 404):
        return Check(name, False, f"{address} answers with status {status}", remedy)
    return Check(name, True, f"{address} answers")
