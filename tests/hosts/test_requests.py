"""What clients may ask for: names, XML, parameters."""

import json
from pathlib import Path

import pytest

from voxelsigma.gadgets.chaining import GadgetSpec
from voxelsigma.hosts.pipeline import Pipeline, gadgets_of, parse_pipeline, shipped_pipelines
from voxelsigma.hosts.requests import (
    MAX_PARAMETERS,
    is_noise_query,
    named_pipeline,
    parameters_of,
    sent_pipeline,
    with_parameters,
)

SKETCH = '<gadget name="sketch"><property name="probes" value="8"/></gadget>'
CHAIN = '<external><execute name="voxelsigma.gadgets.chain" target="gadget" type="python"/>{}</external>'


def xml(*nodes: str) -> bytes:
    listed = "".join(nodes)
    return f"<configuration><version>2</version><stream>{listed}</stream></configuration>".encode()


def chained(content: str) -> str:
    return CHAIN.format(f"<configuration>{content}</configuration>")


@pytest.mark.parametrize("name", shipped_pipelines())
def test_shipped_pipelines_are_known_with_and_without_ending(name: str) -> None:
    assert named_pipeline(name, ()).source == named_pipeline(name.removesuffix(".xml"), ()).source == name


def test_the_first_folder_counts(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        content = SKETCH.replace("8", str(number + 4))
        (folder / "sense_sigma.xml").write_bytes(xml(chained(content)))
    (folders[1] / "own.xml").write_bytes(xml(chained(SKETCH)))
    assert gadgets_of(named_pipeline("sense_sigma", folders)) == [GadgetSpec("sketch", {"probes": "4"})]
    assert gadgets_of(named_pipeline("own.xml", folders)) == [GadgetSpec("sketch", {"probes": "8"})]
    with pytest.raises(
        FileNotFoundError, match=r"pipeline 'other': there is none .* there are modl_sigma\.xml, own\.xml, s"
    ):
        named_pipeline("other", folders)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a..b",
        "/etc/passwd",
        "../x.xml",
        "x/y.xml",
        "x\\y",
        "x\0.xml",
        ".x.xml",
        "-x",
        "σ.xml",
        "x\n",
        "a b",
    ],
)
def test_what_is_no_plain_file_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a plain file name, without '/' or '\.\.'"):
        named_pipeline(name, [tmp_path])


def test_a_long_name_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="expected a plain file name") as found:
        named_pipeline("/" * 100_000, ())
    assert len(str(found.value)) < 500


def test_a_folder_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "x.xml").mkdir()
    with pytest.raises(FileNotFoundError, match="there is none of that name"):
        named_pipeline("x", [tmp_path])


def test_our_own_gadgets_may_be_sent() -> None:
    found = sent_pipeline(xml(chained(SKETCH)))
    assert found.source == "the configuration sent"
    assert gadgets_of(found) == [GadgetSpec("sketch", {"probes": "8"})]


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (
            '<external><execute name="os" target="system" type="python"/></external>',
            "the node 'os' is refused; a client may use voxelsigma.gadgets only",
        ),
        (
            '<external><execute name="voxelsigma.gadgetsx" target="gadget" type="python"/></external>',
            "the node 'voxelsigma.gadgetsx' is refused",
        ),
        ('<external><connect address="10.0.0.1" port="22"/></external>', "the node 'Listening' is refused"),
        ("<gadget><classname>X</classname></gadget>", "the node 'Native' is refused"),
        ('<external><execute name="x" target="y" type="matlab"/></external>', "is of type 'matlab'"),
        (
            chained('<gadget name="reconstruct"><property name="model" value="/tmp/card.yaml"/></gadget>'),
            "parameter 'model': '/tmp/card.yaml' is refused; a client may not name files of the server",
        ),
        (
            chained('<gadget name="reconstruct"><property name="model" value="card.YAML "/></gadget>'),
            "'card.YAML ' is refused",
        ),
        (
            chained('<gadget name="prewhiten"><property name="noise_file" value="noise.h5"/></gadget>'),
            "'noise.h5' is refused",
        ),
        (chained('<property name="x" value="..\\x"/>'), "is refused"),
        (chained("<a>" * 40 + "</a>" * 40), "elements are nested more than 32 deep"),
    ],
)
def test_what_may_not_be_sent(node: str, text: str) -> None:
    with pytest.raises(ValueError, match=r".") as found:
        sent_pipeline(xml(node))
    assert text in str(found.value)


def test_a_noise_query_is_a_legacy_script_with_its_gadget() -> None:
    script = b"<gadgetronStreamConfiguration><gadget><classname>%s</classname></gadget></gadgetronStreamConfiguration>"
    assert is_noise_query(script % b"NoiseSummaryGadget")
    assert not is_noise_query(script % b"NoiseAdjustGadget")
    assert not is_noise_query(xml("<gadget><classname>NoiseSummaryGadget</classname></gadget>"))


def test_parameters_of_texts() -> None:
    assert parameters_of('{"parameters": {"config": "x", "sketch.probes": 8}}') == {"config": "x", "sketch.probes": 8}
    for text in ("", "hello", "[1]", "8", "{}", '{"parameters": [1]}', '{"parameters": null}', "[" * 100_000, "{" * 50):
        assert parameters_of(text) == {}
    # what is no JSON may be long
    assert parameters_of("x" * (MAX_PARAMETERS + 1)) == {}
    with pytest.raises(ValueError, match=r"parameters: a JSON text of \d+ characters; at most 262144 are accepted"):
        parameters_of(json.dumps({"parameters": {f"sketch.x{number}": 1 for number in range(20_000)}}))


@pytest.fixture
def pipeline() -> Pipeline:
    single = '<external><execute name="voxelsigma.gadgets.coil_maps" target="gadget" type="python"/></external>'
    return parse_pipeline(xml(single, chained('<gadget name="reconstruct"/>' + SKETCH)), "own.xml")


def test_parameters_set_properties(pipeline: Pipeline) -> None:
    values = {
        "sketch.probes": 16,
        "sketch_maps": "magnitude snr",
        "sketch.control_variate": False,
        "coil_maps_method": "walsh",
        "coil_maps.crop": 0.5,
        "config": "own",
        "freq": "1",
        "sketching": 3,
    }
    found = with_parameters(pipeline, values)
    assert gadgets_of(found) == [
        GadgetSpec("coil_maps", {"method": "walsh", "crop": "0.5"}),
        GadgetSpec("reconstruct", {}),
        GadgetSpec("sketch", {"probes": "16", "maps": "magnitude snr", "control_variate": "false"}),
    ]
    # the pipeline itself may serve others
    assert gadgets_of(pipeline)[2] == GadgetSpec("sketch", {"probes": "8"})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"accumulate.sampling": "auto"}, "parameter 'accumulate.sampling': own.xml has no gadget 'accumulate'"),
        ({"reconstruct.model": "../x"}, "parameter 'reconstruct.model': '../x' is refused"),
        ({"reconstruct_model": ["a/b"]}, "parameter 'reconstruct_model': \"['a/b']\" is refused"),
        ({"prewhiten_noise_file": "x.h5"}, "parameter 'prewhiten_noise_file': 'x.h5' is refused"),
    ],
)
def test_bad_parameters(pipeline: Pipeline, values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match="parameter") as found:
        with_parameters(pipeline, values)
    assert text in str(found.value)
