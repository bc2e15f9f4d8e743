"""Every shipped configuration, without running it: well formed, as Gadgetron takes it, and the same method each way."""

from pathlib import Path
from xml.etree.ElementTree import Element

import defusedxml.ElementTree
import pytest

import voxelsigma.pipelines
from voxelsigma.formats.header import parse_header
from voxelsigma.formats.simulate import Simulation, simulate
from voxelsigma.gadgets.chaining import GadgetSpec, chain, properties_of, specs_of
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.registry import GADGETS, create

FOLDER = Path(voxelsigma.pipelines.__path__[0])
NAMES = sorted(path.name for path in FOLDER.glob("*.xml"))
METHODS = ("sense_sigma", "unrolled_sigma")
WAYS = ("", "_externals", "_hybrid", "_worker")
# whoever wants these another way writes the model into one of those
NETWORKS = ("modl_sigma", "unet_sigma", "varnet_sigma")
PREFIX = "voxelsigma.gadgets."


def root_of(name: str) -> Element:
    root = defusedxml.ElementTree.parse(FOLDER / name, forbid_dtd=True).getroot()
    assert isinstance(root, Element)
    return root


def externals(name: str) -> list[Element]:
    return root_of(name).findall("stream/external")


def alone(external: Element) -> GadgetSpec:
    """An external that is one gadget."""
    execute, configuration = external.find("execute"), external.find("configuration")
    assert execute is not None
    assert configuration is not None
    module = execute.get("name", "")
    assert module.startswith(PREFIX)
    name = module.removeprefix(PREFIX)
    return GadgetSpec(name, properties_of(configuration, name))


def listed(external: Element) -> list[GadgetSpec]:
    """The gadgets of an external that is a chain."""
    configuration = external.find("configuration")
    assert configuration is not None
    return specs_of(configuration)


@pytest.fixture(scope="module")
def context() -> Context:
    scan = simulate(Simulation(matrix=(1, 16, 16), coils=2, acceleration=1, mask="uniform_1d", noise_samples=64))
    return Context(header=parse_header(scan.header_xml))


def test_each_method_is_shipped_each_way() -> None:
    every_way = {f"{method}{way}.xml" for method in METHODS for way in WAYS}
    assert every_way | {f"{network}.xml" for network in NETWORKS} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_frame_is_what_the_server_takes(name: str) -> None:
    root = root_of(name)
    assert root.tag == "configuration"
    assert root.findtext("version") == "2"
    assert [entry.text for entry in root.iterfind("readers/reader/classname")] == [
        "AcquisitionReader",
        "WaveformReader",
    ]
    assert [entry.text for entry in root.iterfind("writers/writer/classname")] == ["ImageWriter"]
    assert len(root.findall("stream")) == 1
    assert "Use this one" in (FOLDER / name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_there_that_the_server_would_garble(name: str) -> None:
    root = root_of(name)
    for element in root.iter():
        assert all("@" not in value for value in element.attrib.values())
        assert "@" not in (element.text or "")
        if element.tag == "property":
            assert set(element.attrib) == {"name", "value"}
            assert element.get("value")
            assert not list(element)
    for external in root.iterfind("stream/external"):
        assert external.find(".//configuration//name") is None
        assert len(external.findall("execute")) + len(external.findall("connect")) == 1
        for execute in external.findall("execute"):
            assert (execute.get("target"), execute.get("type")) == ("gadget", "python")
            name = execute.get("name", "").removeprefix(PREFIX)
            assert name in {*GADGETS, "chain"}


@pytest.mark.parametrize("name", NAMES)
def test_native_nodes_have_their_three_names(name: str) -> None:
    for gadget in root_of(name).findall("stream/gadget"):
        assert [child.tag for child in gadget][:3] == ["name", "dll", "classname"]
        assert all((gadget.findtext(tag) or "").strip() for tag in ("name", "dll", "classname"))
        assert {child.tag for child in gadget} <= {"name", "dll", "classname", "property"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", ["", "_hybrid", "_worker"])
def test_chains_can_be_built(method: str, way: str, context: Context) -> None:
    (external,) = externals(f"{method}{way}.xml")
    chain(listed(external), context)


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_differ_in_the_model_alone(network: str) -> None:
    (external,), (model,) = externals(f"{network}.xml"), externals("unrolled_sigma.xml")
    specs = listed(external)
    assert specs[3] == GadgetSpec("reconstruct", {"model": network.replace("_sigma", "_small")})
    expected = listed(model)
    assert [*specs[:3], *specs[4:]] == [*expected[:3], *expected[4:]]


@pytest.mark.parametrize("method", METHODS)
def test_externals_are_the_chain_with_what_must_be_forwarded(method: str, context: Context) -> None:
    specs = [alone(external) for external in externals(f"{method}_externals.xml")]
    (whole,) = externals(f"{method}.xml")
    assert [spec.name for spec in specs] == [spec.name for spec in listed(whole)]
    for number, (spec, other) in enumerate(zip(specs, listed(whole), strict=True)):
        behind = {need for later in specs[number + 1 :] for need in GADGETS[later.name].needs}
        given = set(spec.properties.get("forward", "").split())
        # what a gadget makes itself it emits anyway, and nobody can forward what has not been made yet
        made = {"prewhiten": {"covariance"}, "accumulate": {"kspace"}, "coil_maps": {"sensitivities"}}
        before = {item for earlier in specs[: number + 1] for item in made.get(earlier.name, set())}
        emitted = made.get(spec.name, set()) if spec.name != "prewhiten" else set()
        assert given == (behind & before) - emitted
        assert {key: value for key, value in spec.properties.items() if key != "forward"} == other.properties
        create(spec.name, spec.properties, context)


@pytest.mark.parametrize("method", METHODS)
def test_the_worker_is_told_the_chain(method: str) -> None:
    (whole,), (external,) = externals(f"{method}.xml"), externals(f"{method}_worker.xml")
    connect = external.find("connect")
    assert connect is not None
    assert connect.attrib == {"port": "18000"}
    assert listed(external) == listed(whole)


@pytest.mark.parametrize("method", METHODS)
def test_hybrid_is_the_chain_behind_the_servers_front_end(method: str) -> None:
    (whole,), (external,) = externals(f"{method}.xml"), externals(f"{method}_hybrid.xml")
    first, *rest = listed(external)
    assert first == GadgetSpec("accumulate", {"prewhitened": "true"})
    assert rest == listed(whole)[2:]
    nodes = list(root_of(f"{method}_hybrid.xml").find("stream") or ())
    assert [node.findtext("classname") for node in nodes] == [
        "NoiseAdjustGadget",
        "AsymmetricEchoAdjustROGadget",
        "RemoveROOversamplingGadget",
        "AcquisitionAccumulateTriggerGadget",
        "BucketToBufferGadget",
        None,
    ]
    buffer = {entry.get("name"): entry.get("value") for entry in nodes[4].findall("property")}
    assert buffer["S_dimension"] == "average"
