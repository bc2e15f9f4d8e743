"""Cards with predictors that nobody trained, pipelines that use them, and a volume."""

from pathlib import Path

import torch

import voxelsigma.pipelines
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.simulate import Simulation, simulate
from voxelsigma.models.cards import load_card
from voxelsigma.models.predictor import SigmaPredictor
from voxelsigma.training.card import record_predictor, save_predictor, write_card
from voxelsigma.training.start import start_network

FOLDER = Path(voxelsigma.pipelines.__path__[0])
TINY = {"steps": 2, "blocks": 1, "channels": 4}


def named(folder: Path) -> Path:
    """A card with a predictor that nobody trained."""
    path = written(folder)
    add_predictor(path, path)
    return path


def written(folder: Path, *, seed: int = 1) -> Path:
    """A card without a predictor."""
    folder.mkdir(exist_ok=True)
    path = folder / "mine.yaml"
    write_card(
        path,
        start_network("unrolled", TINY, seed=seed),
        architecture="unrolled",
        hyperparameters=TINY,
        fit_for={"acceleration": [1, 8], "coils": [1, 32], "dimension": 2},
        trained_on="nothing",
        evaluation="none",
        licence="none",
    )
    return path


def add_predictor(path: Path, of: Path) -> None:
    """Give a card a predictor that was made for the network of a card, its own or another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        predictor = SigmaPredictor(channels=4, levels=2, surrogate_channels=4, surrogate_levels=2)
    file = path.with_name("mine.sigma.safetensors")
    record_predictor(path, file.name, save_predictor(file, predictor, load_card(str(of))))


def pipeline(card: Path, folder: Path, **properties: str) -> str:
    """The shipped pipeline with this card and these properties of the sketch, in a folder."""
    text = (FOLDER / "unrolled_sigma.xml").read_text(encoding="utf-8")
    given = {"maps": "magnitude complex freedom", **properties}
    sketch = "".join(f'<property name="{name}" value="{value}"/>' for name, value in given.items())
    before, _, after = text.partition('<gadget name="sketch">')
    old, end, rest = after.partition("</gadget>")
    assert old.count('name="probes" value="64"') == 1
    if "probes" not in properties:
        sketch += '<property name="probes" value="64"/>'
    changed = f'{before}<gadget name="sketch">{sketch}{end}{rest}'
    path = folder / "mine.xml"
    path.write_text(changed.replace('value="unrolled_small"', f'value="{card}"'), encoding="utf-8")
    return str(path)


def write_volume(folder: Path) -> Path:
    """A small 3D scan, of 16 planes along the readout."""
    made = simulate(
        Simulation(
            matrix=(8, 16, 16),
            coils=4,
            acceleration=2,
            mask="uniform_1d",
            reference_lines=12,
            snr=30,
            noise_samples=4096,
            seed=2,
        )
    )
    path = folder / "volume.h5"
    write_raw(path, made.header_xml, made.blocks)
    return path
