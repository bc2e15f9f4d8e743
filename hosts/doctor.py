"""`voxelsigma doctor`: is everything there that a reconstruction needs, and what to do where it is not."""

import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import voxelsigma
from voxelsigma.hosts.check import Check, failed, older

FREE_BYTES = 2**30
ANSWER_SECONDS = 5.0

# distributions that are imported under another name
_IMPORTED_AS = {"pyyaml": "yaml"}
_REINSTALL = "install voxelsigma again: python -m pip install --force-reinstall voxelsigma"


def doctor(
    *,
    gadgetron: bool = False,
    python: str | None = None,
    path: str | None = None,
    pid: int | None = None,
    worker: int | None = None,
) -> list[Check]:
    """Examine this environment and, where asked for, what a Gadgetron server would start.

    Parameters
    ----------
    gadgetron
        Also examine the server's side.
    python
        The interpreter that the server starts; found on its PATH where it is not given.
    path
        The server's PATH; by default that of `pid`, else this process's.
    pid
        A running server, whose environment is taken.
    worker
        Port at which a resident worker should be listening.

    Raises
    ------
    ValueError
        If the environment of `pid` cannot be read.
    """
    checks = [*_interpreter(), *_packages()]
    if failed(checks):
        checks.append(Check("models, pipelines, device", None, "not looked at: they need what is missing above"))
    else:
        checks += [*_cards(), *_pipelines(), _device(), _threads()]
    checks.append(_temporary_folder())
    if gadgetron:
        from voxelsigma.hosts.doctor_gadgetron import Server, check_server, environment_of

        environment = dict(os.environ) if pid is None else environment_of(pid)
        if path is not None:
            environment["PATH"] = path
        checks += check_server(Server(environment=environment, python=python), requirements())
    if worker is not None:
        checks.append(check_worker(worker))
    return checks


def check_worker(port: int) -> Check:
    """Whether a worker answers where `<connect port="..."/>` will look for it."""
    from voxelsigma.hosts.health import ask

    name = f"worker at port {port}"
    try:
        report = ask("localhost", port, timeout=ANSWER_SECONDS)
    except OSError as error:
        return Check(name, False, str(error), f"start voxelsigma worker --port {port}")
    models = ", ".join(report.get("models", ())) or "none"
    found = f"{report.get('server')} of voxelsigma {report.get('version')}, models loaded: {models}"
    if report.get("server") != "worker":
        return Check(
            name, False, found, f"start voxelsigma worker there, or name its port: --worker {port} is another's"
        )
    same = report.get("version") == voxelsigma.__version__
    return Check(name, same, found, "" if same else f"this one is {voxelsigma.__version__}: install and start it anew")


def requirements() -> Mapping[str, str]:
    """Smallest version of every package that voxelsigma needs, by its distribution's name; empty if not installed."""
    try:
        listed = requires("voxelsigma") or []
    except PackageNotFoundError:
        listed = []
    found: dict[str, str] = {}
    for text in listed:
        matched = re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)", text)
        if matched:
            found[matched.group(1).lower()] = matched.group(2)
    return found


def _interpreter() -> Iterator[Check]:
    name = "python"
    found = f"{sys.version.split()[0]} ({sys.executable})"
    ok = sys.version_info >= (3, 10)
    yield Check(name, ok, found, "" if ok else "use Python 3.10 or newer")
    yield Check("voxelsigma", True, f"{voxelsigma.__version__} ({Path(voxelsigma.__file__).parent})")


def _packages() -> Iterator[Check]:
    """Versions, and whether they can be imported at all."""
    needed = requirements()
    if not needed:
        yield Check("packages", False, "voxelsigma itself is not installed here", _REINSTALL)
    for name, minimum in needed.items():
        yield _package(name, minimum)


def _package(name: str, minimum: str) -> Check:
    advice = f"python -m pip install '{name}>={minimum}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, False, "is not installed", advice)
    try:
        import_module(_IMPORTED_AS.get(name, name))
    except Exception as error:  # a broken library can raise anything
        return Check(name, False, f"{found} cannot be imported ({error})", f"reinstall it: {advice}")
    old = older(found, minimum)
    return Check(name, not old, found, advice if old else "")


def _cards() -> Iterator[Check]:
    """Every card that is shipped, with its weights."""
    from voxelsigma.models.cards import available_cards

    names = available_cards()
    if not names:
        yield Check("models", False, "none is shipped", _REINSTALL)
    for name in names:
        yield _card(name)


def _card(name: str) -> Check:
    import torch

    from voxelsigma.models.cards import load_card, load_model

    try:
        card = load_card(name)
        load_model(card, torch.device("cpu"))
    except (ValueError, OSError) as error:
        return Check(f"model {name}", False, str(error), _REINSTALL)
    return Check(f"model {name}", True, f"sha256 {card.sha256[:12]}… holds" if card.sha256 else "has no weights")


def _pipelines() -> Iterator[Check]:
    """Every pipeline that is shipped: one line where all is well, else one for each that is not."""
    from voxelsigma.hosts.pipeline import shipped_pipelines

    names = shipped_pipelines()
    wrong = {name: problem for name in names if (problem := _pipeline_problem(name))}
    for name, problem in wrong.items():
        yield Check(f"pipeline {name}", False, problem, _REINSTALL)
    if not wrong:
        yield Check("pipelines", bool(names), f"{len(names)} shipped, all valid", "" if names else _REINSTALL)


def _pipeline_problem(name: str) -> str:
    from voxelsigma.hosts.pipeline import load_pipeline

    try:
        nodes = load_pipeline(name).nodes
        modules = [module for node in nodes if (module := getattr(node, "module", ""))]
        absent = [module for module in modules if find_spec(module) is None]
    except (ValueError, OSError, ImportError) as error:
        return str(error)
    return f"names {', '.join(absent)}, which is not installed" if absent else ""


def _device() -> Check:
    """The device that `device="auto"` takes, tried out."""
    import torch

    built = torch.version.cuda
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        try:
            torch.fft.fft(torch.ones(8, device="cuda", dtype=torch.complex64)).abs().sum().item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            return Check("device", False, f"cuda does not work ({reason})", "install the torch build of your driver")
        free, total = torch.cuda.mem_get_info()
        return Check(
            "device",
            True,
            f"cuda: {torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {built}",
        )
    present = Path("/proc/driver/nvidia/version").exists()
    if built is None:
        remedy = "a GPU driver is there: install a CUDA build of torch to use it" if present else ""
        return Check("device", None if present else True, "cpu (torch is a CPU build)", remedy)
    reason = f": {str(caught[0].message).splitlines()[0]}" if caught else ""
    return Check(
        "device",
        False if present else None,
        f"cpu, though torch is built for CUDA {built}{reason}",
        "update the driver, or install the torch build that fits it" if present else "no GPU is visible here",
    )


def _temporary_folder() -> Check:
    """Where readouts are spilled that wait for a slow gadget."""
    name = "temporary folder"
    wanted = os.environ.get("TMPDIR")
    if wanted and not (Path(wanted).is_dir() and os.access(wanted, os.W_OK)):
        return Check(name, False, f"TMPDIR is {wanted}, which cannot be written", "create it, or set TMPDIR to another")
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check(name, False, f"cannot be written ({error})", "set TMPDIR to a folder that can be written")
    found = f"{folder}, {free / 2**30:.1f} GiB free"
    if free < FREE_BYTES:
        return Check(name, False, found, "free at least 1 GiB there, or set TMPDIR to another folder")
    return Check(name, True, found)


def _threads() -> Check:
    import torch

    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    found = f"{threads} of torch on {cores} cores ({blas})"
    if threads > cores:
        return Check("threads", None, found, f"more threads than cores slow each other down: OMP_NUM_THREADS={cores}")
    return Check("threads", True, found)
