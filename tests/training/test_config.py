"""Training configurations: checked once, errors that name the field."""

from pathlib import Path

import pytest

from voxelsigma.training.config import PRESET_FOLDER, FitSettings, available_presets, load_config
from voxelsigma.training.objectives import make_objective
from voxelsigma.training.start import start_network

GOOD = """
name: tiny
architecture: unrolled
hyperparameters: {steps: 2, blocks: 1, channels: 4}
objective: ssdu
objective_settings: {label_share: 0.3}
data: {folder: scans, kind: fastmri, exclude: [a, b], labelled: []}
examples: {matrix: [32, 48], kinds: [random_1d], centre: 8, snr: [10, 20.5]}
fit: {steps: 10, learning_rate: 1, precision: bf16-mixed}
"""


def written(folder: Path, text: str) -> str:
    path = folder / "train.yaml"
    path.write_text(text)
    return str(path)


def test_values_are_what_the_file_says(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, GOOD))
    assert (config.name, config.architecture, config.objective) == ("tiny", "unrolled", "ssdu")
    assert config.hyperparameters == {"steps": 2, "blocks": 1, "channels": 4}
    assert config.data.exclude == ("a", "b")
    assert config.data.labelled == ()
    assert config.examples.matrix == (32, 48)
    assert config.examples.kinds == ("random_1d",)
    assert config.examples.centre == 8
    assert config.examples.snr == (10.0, 20.5)
    assert isinstance(config.fit.learning_rate, float)
    assert config.fit == FitSettings(steps=10, learning_rate=1.0, precision="bf16-mixed")
    # what is not said has its default
    bare = load_config(written(tmp_path, "{name: x, architecture: unet, data: {folder: y}}"))
    assert bare.data.labelled is None
    assert bare.licence == "not stated"


def test_another_data_folder_is_taken(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, GOOD), folder="/elsewhere").data.folder == "/elsewhere"
    assert load_config(written(tmp_path, "{name: x, architecture: unet}"), folder="y").data.folder == "y"


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("name: tiny", "nome: tiny", "unknown field 'nome'; known are name, architecture"),
        ("fit: {steps", "fit: {stops", r"unknown field 'fit\.stops'; known are steps, batch"),
        ("name: tiny", "", "lacks the fields name"),
        ("name: tiny", "name: 7", "field 'name' must be a text, got 7"),
        ("name: tiny", "name: ../tiny", r"name must be a file name without folders, got '\.\./tiny'"),
        ("architecture: unrolled", "architecture: vit", "architecture must be one of modl, unet, .*, got 'vit'"),
        ("objective: ssdu", "objective: gan", "objective must be one of supervised, .*, got 'gan'"),
        ("steps: 10", "steps: 10.5", r"field 'fit\.steps' must be a whole number, got 10\.5"),
        ("steps: 10", "steps: true", r"field 'fit\.steps' must be a whole number, got True"),
        ("steps: 10", "steps: 0", "fit: steps must be above 0, got 0"),
        # in YAML this is text
        ("learning_rate: 1", "learning_rate: 1e-3", r"field 'fit\.learning_rate' must be a number, got '1e-3'"),
        ("bf16-mixed", "bf8", r"field 'fit\.precision' must be one of 32-true, .*, got 'bf8'"),
        ("kind: fastmri", "kind: dicom", r"field 'data\.kind' must be one of volumes, .*, got 'dicom'"),
        ("[a, b]", "a", r"field 'data\.exclude' must be a list, got 'a'"),
        ("[a, b]", "[1]", r"field 'data\.exclude' must be a text, got 1"),
        ("[32, 48]", "[32]", r"field 'examples\.matrix' must be a list of 2, got \[32\]"),
        ("[10, 20.5]", "[20, 10]", r"examples: .*snr must be a range"),
        ("data: {", "data: [] #", "field 'data' must be a mapping, got list"),
        ("hyperparameters: {", "hyperparameters: [] #", "field 'hyperparameters' must be a mapping, got"),
        ("name: tiny", "name: [", "not valid YAML"),
        ("folder: scans", "folder: ''", "data.folder is missing: name it here or with --data"),
        # these would be something else without a word
        ("ssdu", "supervised", "objective 'supervised' takes references of all scans"),
        ("ssdu", "noise2recon", "objective 'noise2recon' needs references of some scans: data.labelled is empty"),
    ],
)
def test_what_is_not_valid_is_named(tmp_path: Path, before: str, after: str, told: str) -> None:
    assert before in GOOD
    with pytest.raises(ValueError, match=rf"^\S*train\.yaml: {told}"):
        load_config(written(tmp_path, GOOD.replace(before, after)))


def test_consistency_needs_scans_without_references(tmp_path: Path) -> None:
    text = "{name: x, architecture: unet, objective: vortex, data: {folder: y}%s}"
    with pytest.raises(ValueError, match="objective 'vortex' needs scans without references, else it is 'supervised'"):
        load_config(written(tmp_path, text % ""))
    load_config(written(tmp_path, text % ", objective_settings: {supervised_consistency: true}"))


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.yaml: a training configuration must be a mapping, got list"):
        load_config(written(tmp_path, "[1, 2]"))


@pytest.mark.parametrize("name", ["nothing", "../presets/modl_small", "/etc/passwd", ""])
def test_names_are_those_of_presets_alone(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no training preset is called .*; name a YAML file, or one of modl_"):
        load_config(name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such training configuration"):
        load_config(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("name", available_presets())
def test_every_preset_can_be_trained(name: str) -> None:
    config = load_config(name, folder="somewhere")
    assert config.name == name == (PRESET_FOLDER / f"{name}.yaml").stem
    make_objective(config.objective, config.objective_settings)
    # on the meta device, as the papers' networks are large
    import torch

    with torch.device("meta"):
        network = start_network(config.architecture, config.hyperparameters, 0)
    size = sum(parameter.numel() for parameter in network.parameters()) * 4
    if not name.startswith("paper_"):
        assert size <= 4_000_000
        assert set(config.data.exclude) == {"head_07", "head_09"}
