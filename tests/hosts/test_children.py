"""Foreign externals as child processes: what they do wrong is said in one line, and none outlives its pipeline."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from ismrmrd import Image, Meta

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.context import Context
from voxelsigma.hosts import child
from voxelsigma.hosts.child import ChildNode
from voxelsigma.hosts.family import Family
from voxelsigma.hosts.pipeline import External, parse_pipeline

Outcome = subprocess.CompletedProcess[str]

# a goodbye behind which not everything was read may be lost on its way
ENDED = "(ended|broke off)"
EARLY = "(ended before it had read all its input|broke off without an error)"

# each gadget leaves its process number behind
MODULE = """
import os, signal, sys, time

def note(function):
    def noted(connection):
        with open("children.txt", "a") as file:
            file.write(f"{os.getpid()} {function.__name__}\\n")
        function(connection)
    return noted

@note
def passes(connection):
    for item in connection:
        connection.send(item)

@note
def raises(connection):
    for number, item in enumerate(connection):
        if number == 3:
            raise ValueError("no chocolate left")
        connection.send(item)

@note
def raises_at_once(connection):
    raise ValueError("no chocolate at all")

@note
def raises_at_the_end(connection):
    for item in connection:
        connection.send(item)
    raise ValueError("no chocolate for you")

@note
def exits(connection):
    sys.exit(3)

@note
def leaves_silently(connection):
    sys.exit(0)

@note
def returns_early(connection):
    connection.send(next(connection)[1])

@note
def vanishes(connection):
    os._exit(0)

@note
def is_killed(connection):
    os.kill(os.getpid(), signal.SIGKILL)

@note
def talks_nonsense(connection):
    connection.socket.write(b"\\xff" * 64)
    for item in connection:
        pass

@note
def lingers(connection):
    for item in connection:
        connection.send(item)
    connection.socket.close()
    time.sleep(60)

@note
def is_slow(connection):
    for item in connection:
        time.sleep(0.05)
        connection.send(item)

@note
def doubles(connection):
    for image in connection:
        image.data[:] *= 2
        image.meta["Doubled"] = "yes"
        connection.send(image)

class Holder:
    def handle(self, connection):
        passes(connection)
"""


@pytest.fixture
def modules(tmp_path: Path) -> str:
    """A PYTHONPATH with the module `odd`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "odd.py").write_text(MODULE)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def externals(*targets: str) -> str:
    """A pipeline of targets of `odd`, or of our own gadgets."""
    nodes = [target.split(".") if "." in target else ["odd", target] for target in targets]
    stream = "".join(
        f'<external><execute name="{".".join(parts[:-1])}" target="{parts[-1]}" type="python"/></external>'
        for parts in nodes
    )
    return f"<configuration><version>2</version><stream>{stream}</stream></configuration>"


def children(folder: Path) -> list[int]:
    """Process numbers of the children that got as far as to note them."""
    noted = folder / "children.txt"
    return [int(line.split()[0]) for line in noted.read_text().splitlines()] if noted.exists() else []


def alive(number: int) -> bool:
    """Whether a process runs (one that has ended and waits for its parent does not)."""
    try:
        return "Z" not in Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("raises", rf"external odd\.raises: {ENDED} with exit code 1, see its log above"),
        ("exits", rf"external odd\.exits: {ENDED} with exit code 3, see its log above"),
        ("nowhere.missing", rf"external nowhere\.missing: {ENDED} with exit code 1, see its log above"),
    ],
)
def test_a_child_that_fails_is_one_error(
    cli: Callable[..., Outcome], modules: str, scan_file: Path, tmp_path: Path, target: str, text: str
) -> None:
    (tmp_path / "pipeline.xml").write_text(externals(target))
    found = cli("replay", scan_file, "-p", "pipeline.xml", "-o", "out.h5", PYTHONPATH=modules)
    assert (found.returncode, found.stdout) == (1, "")
    # what comes before is the child's own log
    *log, last = found.stderr.splitlines()
    assert re.match(f"error: {text}", last)
    assert not [line for line in log if line.startswith(("error:", "warning:"))]
    if target == "raises":
        assert any("ValueError: no chocolate" in line for line in log)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    assert not any(map(alive, children(tmp_path)))


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (("passes", "passes", "raises"), rf"external odd\.raises: {ENDED} with exit code 1"),
        (("passes", "raises", "passes"), rf"external odd\.raises: {ENDED} with exit code 1"),
        (("is_slow", "passes", "is_killed"), r"external odd\.is_killed: broke off with exit code -9"),
        (("is_slow", "passes", "voxelsigma.gadgets.prewhiten.gadget"), "prewhiten: readout 36 holds NaN or Inf"),
    ],
)
def test_when_one_fails_the_others_end_with_it(
    cli: Callable[..., Outcome],
    modules: str,
    scan: SimulatedScan,
    raw: Callable[..., Path],
    tmp_path: Path,
    targets: tuple[str, ...],
    text: str,
) -> None:
    """And none complains of it after the error: that is the last line."""
    imaging = scan.blocks[1]
    samples = imaging.samples.copy()
    samples[3, 0, 0] = np.nan
    path = raw({"blocks": [scan.blocks[0], imaging.with_samples(samples)]})
    (tmp_path / "pipeline.xml").write_text(externals(*targets))
    found = cli("replay", path, "-p", "pipeline.xml", "-o", "out.h5", PYTHONPATH=modules)
    assert found.returncode == 1
    assert re.match(f"error: {text}", found.stderr.splitlines()[-1])
    assert found.stderr.count("error:") == 1
    assert not any(map(alive, children(tmp_path)))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_replay_that_is_stopped_leaves_nothing_behind(
    modules: str, raw: Callable[..., Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "pipeline.xml").write_text(externals("is_slow", "passes"))
    path = raw()
    before = {entry.name for entry in tmp_path.iterdir()}
    # a suite that runs in the background of a shell ignores SIGINT, and so would its children
    listening = ["env", "--default-signal=INT", sys.executable]
    running = subprocess.Popen(
        [*listening, "-m", "voxelsigma", "replay", str(path), "-p", "pipeline.xml", "-o", "out.h5"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": modules},
        stderr=subprocess.DEVNULL,
    )
    while len(children(tmp_path)) < 2:
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(number)
    assert running.wait(timeout=60) == code
    assert not any(map(alive, children(tmp_path)))
    assert {entry.name for entry in tmp_path.iterdir()} - before == {"children.txt"}


def node(scan: SimulatedScan, target: str, family: Family | None = None) -> ChildNode:
    (found,) = parse_pipeline(externals(target).encode(), "pipeline.xml").nodes
    assert isinstance(found, External)
    return ChildNode(found, Context(header=parse_header(scan.header_xml)), family or Family())


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("raises_at_once", rf"external odd\.raises_at_once: {ENDED} with exit code 1, see its log above"),
        ("raises_at_the_end", r"external odd\.raises_at_the_end: ended with exit code 1, see its log above"),
        ("leaves_silently", rf"external odd\.leaves_silently: {EARLY}"),
        ("returns_early", rf"external odd\.returns_early: {EARLY}"),
        ("vanishes", r"external odd\.vanishes: broke off without an error"),
        ("is_killed", r"external odd\.is_killed: broke off with exit code -9, see its log above"),
        ("talks_nonsense", r"external odd\.talks_nonsense: sent what cannot be read \(wire: message id 65535"),
        ("missing", rf"external odd\.missing: {ENDED} with exit code 1, see its log above"),
    ],
)
def test_whatever_a_child_does_it_is_noticed(
    scan: SimulatedScan, modules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", modules)
    with pytest.raises(RuntimeError, match=f"^{text}"):
        list(node(scan, target)(iter(scan.blocks)))
    assert not any(map(alive, children(tmp_path)))


@pytest.mark.parametrize("target", ["passes", "Holder"])
def test_a_child_gets_the_readouts_and_its_items_come_back(
    scan: SimulatedScan, modules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """A target is a function, or a class with the method `handle`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", modules)
    found = list(node(scan, target)(iter(scan.blocks)))
    assert all(isinstance(block, ReadoutBlock) for block in found)
    np.testing.assert_array_equal(
        np.concatenate([block.headers for block in found]), np.concatenate([block.headers for block in scan.blocks])
    )
    np.testing.assert_array_equal(
        np.concatenate([block.samples for block in found]), np.concatenate([block.samples for block in scan.blocks])
    )


def test_a_child_behind_a_reconstruction_gets_the_images(
    scan: SimulatedScan, modules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", modules)
    images = []
    for series in (1, 2000):
        array = np.full((2, 4, 5), series, dtype=np.float32)
        image = Image.from_array(array, transpose=False, image_series_index=series)
        image.meta = Meta({"ImageComments": "σ"})
        images.append(image)
    found = list(node(scan, "doubles")(iter(images)))
    assert [image.image_series_index for image in found] == [1, 2000]
    for image, before in zip(found, (1, 2000), strict=True):
        np.testing.assert_array_equal(image.data, np.full((1, 2, 4, 5), 2 * before))
        assert dict(image.meta) == {"ImageComments": "σ", "Doubled": "yes"}


def test_a_failure_upstream_is_raised_as_it_is(
    scan: SimulatedScan, modules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> Iterator[ReadoutBlock]:
        yield scan.blocks[0]
        raise LookupError("the scanner is gone")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", modules)
    with pytest.raises(LookupError, match="the scanner is gone"):
        list(node(scan, "passes")(failing()))


def test_a_child_that_lingers_after_its_goodbye_is_not_waited_for_long(
    scan: SimulatedScan, modules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", modules)
    monkeypatch.setattr(child, "LEAVE_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match=r"external odd\.lingers: still runs 0\.2 s after the end of its output"):
        list(node(scan, "lingers")(iter(scan.blocks)))
    assert not any(map(alive, children(tmp_path)))


def test_a_child_that_never_connects(scan: SimulatedScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(child, "CONNECT_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match=r"external odd\.passes: did not connect within 0\.5 s"):
        list(node(scan, "passes")(iter(scan.blocks)))
    (tmp_path / "python").write_text("#!/bin/sh\nexit 7\n")
    monkeypatch.setattr(child, "CONNECT_SECONDS", 30.0)
    with pytest.raises(RuntimeError, match=r"external odd\.passes: ended with exit code 7 before it connected"):
        list(node(scan, "passes")(iter(scan.blocks)))


def void(value: object) -> None:
    del value


def test_nothing_starts_after_the_end() -> None:
    family = Family()
    family.end()
    with pytest.raises(RuntimeError, match="the pipeline has ended"):
        family.start([sys.executable, "-c", ""])


def test_the_end_kills_what_runs() -> None:
    family = Family()
    sleeping = family.start([sys.executable, "-c", "import time; time.sleep(60)"])
    thread = family.thread(lambda: void(sleeping.wait()))
    family.end()
    assert sleeping.returncode == -signal.SIGKILL
    assert not thread.is_alive()
