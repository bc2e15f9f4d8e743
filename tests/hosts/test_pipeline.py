"""Gadgetron's XML pipelines: what is read from them, what is refused, and what the embedded host can run."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.chaining import chain
from voxelsigma.gadgets.context import Context
from voxelsigma.hosts.embedded import connect
from voxelsigma.hosts.pipeline import External, Native, gadgets_of, load_pipeline, parse_pipeline, shipped_pipelines

Outcome = subprocess.CompletedProcess[str]

OURS = '<execute name="voxelsigma.gadgets.prewhiten" target="gadget" type="python"/>'
CPP = (
    "<gadget><name>NoiseAdjust</name><dll>gadgetron_mricore</dll><classname>NoiseAdjustGadget</classname>"
    '<property name="pass_nonconformant_data" value="true"/></gadget>'
)


def with_stream(stream: str) -> bytes:
    return f"<configuration><version>2</version><stream>{stream}</stream></configuration>".encode()


def external(execute: str = OURS, configuration: str = "") -> str:
    return f"<external>{execute}<configuration>{configuration}</configuration></external>"


@pytest.mark.parametrize("name", shipped_pipelines())
def test_shipped_pipelines_are_found_and_whole(name: str, scan: SimulatedScan) -> None:
    pipeline = load_pipeline(name)
    assert pipeline.source.endswith(name)
    context = Context(header=parse_header(scan.header_xml))
    # every gadget is built, with its properties, before anything runs
    if any(isinstance(node, Native) for node in pipeline.nodes):
        with pytest.raises(ValueError, match="needs a real Gadgetron server"):
            connect(pipeline, context, iter(()))
    else:
        connect(pipeline, context, iter(())).close()
    assert chain(gadgets_of(pipeline), context).gadgets


def test_the_shipped_pipelines_are_those_that_are_documented() -> None:
    assert {"sense_sigma.xml", "unrolled_sigma.xml"} <= set(shipped_pipelines())
    (node,) = load_pipeline("sense_sigma.xml").nodes
    assert isinstance(node, External)
    assert (node.module, node.target) == ("voxelsigma.gadgets.chain", "gadget")
    gadgets = [gadget.get("name") for gadget in node.configuration]
    assert gadgets == ["prewhiten", "accumulate", "coil_maps", "reconstruct", "sketch"]


def test_nodes_come_in_their_order() -> None:
    foreign = external('<execute name="their.module" target="run" type="Python"/>', "<anything>at all</anything>")
    pipeline = parse_pipeline(with_stream(f"<!-- first -->{CPP}{external()}{foreign}"), "mine.xml")
    native, ours, theirs = pipeline.nodes
    assert native == Native("NoiseAdjust", "NoiseAdjustGadget")
    assert isinstance(ours, External)
    assert (ours.module, ours.target) == ("voxelsigma.gadgets.prewhiten", "gadget")
    assert isinstance(theirs, External)
    assert theirs.configuration.findtext("anything") == "at all"


def test_an_external_may_go_without_configuration() -> None:
    (node,) = parse_pipeline(with_stream(f"<external>{OURS}</external>"), "mine.xml").nodes
    assert isinstance(node, External)
    assert node.configuration.tag == "configuration"
    assert len(node.configuration) == 0


def test_a_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sense_sigma.xml").write_bytes(with_stream(external()))
    monkeypatch.chdir(tmp_path)
    (node,) = load_pipeline("sense_sigma.xml").nodes
    assert isinstance(node, External)
    assert node.module == "voxelsigma.gadgets.prewhiten"


@pytest.mark.parametrize("name", ["mine.xml", "folder/sense_sigma.xml", "sense_sigma", ""])
def test_an_unknown_file_lists_those_shipped(name: str) -> None:
    listed = ", ".join(shipped_pipelines())
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such pipeline file; shipped are {listed}$"):
        load_pipeline(name)


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        (b"", "not well-formed XML"),
        (b"<configuration><version>2</version>", "not well-formed XML"),
        (
            b'<!DOCTYPE a [<!ENTITY b "c">]>' + with_stream(external()),
            "document types and entities are refused .*DTDForbidden",
        ),
        (
            b'<!DOCTYPE a SYSTEM "file:///etc/passwd">' + with_stream(external()),
            "document types and entities are refused",
        ),
        (
            b"<gadgetronStreamConfiguration/>",
            "expected <configuration><version>2</version>…, Gadgetron's version 2 format, "
            "got <gadgetronStreamConfiguration>",
        ),
        (b"<configuration><version>1</version></configuration>", "got <version>1</version>"),
        (b"<configuration><stream/></configuration>", "got <version>None</version>"),
        (b"<configuration><version>2</version></configuration>", "has no <stream> with nodes"),
        (with_stream(""), "has no <stream> with nodes"),
        (
            with_stream("<external><configuration/></external>"),
            "an <external> node with neither <execute> nor <connect>",
        ),
        (with_stream(external('<connect port="0"/>')), "<connect port='0'>; expected a port from 1 to 65535"),
        (with_stream(external("<connect/>")), "<connect port=''>; expected a port from 1 to 65535"),
        (
            with_stream("<parallel><branch/><merge/></parallel>"),
            "<parallel> nodes run in a real Gadgetron server only; the embedded host runs <external> nodes",
        ),
        (with_stream("<distributed/>"), "<distributed> nodes run in a real Gadgetron server only"),
        (
            with_stream(external('<execute target="gadget" type="python"/>')),
            "<execute> needs the attributes name and target, got {'target': 'gadget', 'type': 'python'}",
        ),
        (
            with_stream(external('<execute name="voxelsigma.gadgets.chain" type="python"/>')),
            "<execute> needs the attributes name and target, got {'name': 'voxelsigma.gadgets.chain', 'type'",
        ),
        (
            with_stream(external('<execute name="a" target="b" type="matlab"/>')),
            "<execute name='a'> is of type 'matlab'; only 'python' can be run",
        ),
        (
            with_stream(external('<execute name="a" target="b"/>')),
            "is of type ''; only 'python' can be run",
        ),
    ],
)
def test_bad_pipelines_are_refused(tmp_path: Path, xml: bytes, text: str) -> None:
    path = tmp_path / "mine.xml"
    path.write_bytes(xml)
    with pytest.raises(ValueError, match=f"^{path}: .*{text}"):
        load_pipeline(str(path))


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (
            external() + CPP,
            r"mine.xml: the C\+\+ gadget NoiseAdjust \(NoiseAdjustGadget\) needs a real Gadgetron server; the embedded "
            "host runs Python externals only",
        ),
        ("<gadget><classname>FFTGadget</classname></gadget>", r"the C\+\+ gadget FFTGadget needs a real Gadgetron"),
        ("<gadget/>", r"the C\+\+ gadget unnamed needs a real Gadgetron server"),
        (
            external('<execute name="voxelsigma.gadgets.denoise" target="gadget" type="python"/>'),
            "mine.xml: <execute name='voxelsigma.gadgets.denoise' target='gadget'> is no gadget of voxelsigma; "
            "known are voxelsigma.gadgets.prewhiten, .*voxelsigma.gadgets.chain with target 'gadget'",
        ),
        (
            external('<execute name="voxelsigma.gadgets.sketch" target="main" type="python"/>'),
            "<execute name='voxelsigma.gadgets.sketch' target='main'> is no gadget of voxelsigma",
        ),
        (
            external(configuration='<property name="colour" value="red"/>'),
            "prewhiten: unknown property 'colour'; known are forward",
        ),
        (
            external(configuration='<property name="forward" value="everything"/>'),
            "prewhiten: property 'forward' must be any of covariance, kspace, sensitivities, .*got 'everything'",
        ),
        (
            external(configuration=2 * '<property name="forward" value="covariance"/>'),
            "prewhiten: property 'forward' is given twice",
        ),
        (external(configuration='<property name="forward"/>'), "prewhiten: unexpected <property>; expected <property"),
        (
            external(configuration="<forward>covariance</forward>"),
            "prewhiten: unexpected <forward>; expected",
        ),
        (
            external(OURS.replace("prewhiten", "chain"), '<gadget name="denoise"/>'),
            "no gadget is called 'denoise'; known are prewhiten, accumulate",
        ),
        (
            external(OURS.replace("prewhiten", "chain"), "<gadget/>"),
            "chain: unexpected <gadget>; expected",
        ),
        (external(OURS.replace("prewhiten", "chain")), "chain: its configuration lists no gadget"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(scan: SimulatedScan, stream: str, text: str) -> None:
    context = Context(header=parse_header(scan.header_xml))
    with pytest.raises(ValueError, match=text):
        connect(parse_pipeline(with_stream(stream), "mine.xml"), context, iter(()))


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        (b"<configuration><version>2</version>", "mine.xml: not well-formed XML"),
        (with_stream(CPP), "mine.xml: the C.. gadget NoiseAdjust .NoiseAdjustGadget. needs a real Gadgetron server"),
        (
            with_stream(external(configuration=2 * '<property name="forward" value="kspace"/>')),
            "prewhiten: property 'forward' is given twice",
        ),
    ],
)
def test_a_bad_pipeline_is_one_line_at_the_command_line(
    cli: Callable[..., Outcome], scan_file: Path, tmp_path: Path, xml: bytes, text: str
) -> None:
    (tmp_path / "mine.xml").write_bytes(xml)
    found = cli("replay", scan_file, "-p", "mine.xml", "-o", "out.h5")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.count("\n") == 1
    assert re.match(f"error: {text}", found.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.xml"]
