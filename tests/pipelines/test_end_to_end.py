"""Every shipped pipeline that needs nothing but this package, end to end with its shipped weights."""

from pathlib import Path

import pytest
from tests.pipelines.runs import check_image_and_maps, run, write_scan

from voxelsigma.hosts.pipeline import External, gadgets_of, load_pipeline, shipped_pipelines
from voxelsigma.models.cards import available_cards, load_card

# Gadgetron's own gadgets need Gadgetron, and a worker has to run somewhere: tests/hosts has both
NAMES = sorted(
    name
    for name in shipped_pipelines()
    if all(isinstance(node, External) for node in load_pipeline(name).nodes) and not name.endswith("_worker.xml")
)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan"))


def test_there_is_one_for_every_shipped_architecture() -> None:
    shipped = {load_card(name).architecture for name in available_cards()}
    assert {"modl", "sense", "unet", "unrolled"} <= shipped
    assert {f"{architecture}_sigma.xml" for architecture in shipped} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_pipeline_makes_an_image_and_its_maps(scan: Path, tmp_path: Path, name: str) -> None:
    series = run(scan, name, tmp_path / "out.h5")
    model = model_of(name)
    check_image_and_maps(series, model=model, own_sensitivities=model.startswith("varnet"))


def model_of(name: str) -> str:
    """The model that the gadgets of a pipeline are told; `sense` where they are told none."""
    specs = gadgets_of(load_pipeline(name))
    (model,) = {spec.properties["model"] for spec in specs if "model" in spec.properties} or {"sense"}
    return model
