"""The shipped predictors on heads that they have not seen: what eight probes are worth with them."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import torch

from voxelsigma.models.cards import available_cards, load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import plane_features, probe_features
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.noise.instant import Priors, instant_sketch
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Sketch, Stopping, sketch
from voxelsigma.training.compare import plane_of
from voxelsigma.training.held_out import HELD_OUT, Setting, held_out_slices
from voxelsigma.training.volumes import load_volumes

WORTH: Final = {
    "modl_small": 50,
    "unet_small": 40,
    "unrolled_n2r": 100,
    "unrolled_small": 55,
    "unrolled_ssdu": 100,
    "unrolled_vortex": 100,
    "varnet_small": 30,
}
"""Probes of a plain sketch that eight do the work of, at least, 96², R=6."""

REFERENCE: Final = 96
KINDS: Final[tuple[MapKind, ...]] = ("magnitude", "complex")


def test_every_predictor_has_its_worth() -> None:
    assert {name for name in available_cards() if load_card(name).predictor is not None} == set(WORTH)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WORTH))
def test_eight_probes_do_the_work_of_many(name: str, shared_data: Path) -> None:
    card, cpu = load_card(name), torch.device("cpu")
    network, predictor = load_model(card, cpu), load_predictor(card, cpu)
    assert isinstance(network, Network)
    assert predictor is not None
    setting = Setting(mask="random_2d", acceleration=6, matrix=96, snr=20)
    (scan,) = held_out_slices(load_volumes(shared_data, only=HELD_OUT), setting.examples(), slices=1, seed=5)
    plane = plane_of(scan)
    assert network.bind(plane) is not None
    linearization = linearize(network.bind(plane), scan.kspace)
    real = not linearization.value.is_complex()
    covariate = plane.covariate(scan.kspace if real else None)
    assert covariate.normal is not None
    kinds = KINDS[:1] if real else KINDS
    features = plane_features(plane, scan.kspace, linearization.value, covariate)
    covariate = replace(covariate, learned=predictor.surrogate.surrogate(features, covariate.normal))

    def predict(state: Sketch) -> Priors:
        seen = torch.cat([features, probe_features(state, covariate.variance, real=real)])
        return {kind: prior for kind, prior in predictor.predict(seen, covariate.variance).items() if kind in kinds}

    def probes(seed: int) -> ProbeSource:
        return ProbeSource(variance=plane.variance, coils=len(scan.kspace), seed=seed)

    found = instant_sketch(
        linearization, probes(1), Stopping(probes=64), predict, scale=covariate.variance, covariate=covariate
    )
    assert found.certified
    assert found.sketch.sums.count == 8
    truth = sketch(linearization, probes(2), Stopping(probes=REFERENCE), covariate=covariate)
    inside = truth.inside
    for kind in kinds:
        one, other = found.map(kind), truth.map(kind)
        square = (one.sigma / other.sigma - 1)[inside].square().mean() - other.relative_error()[inside].square().mean()
        # a plain sketch of S probes has a relative error of 1/√(2S), or less where the voxel is complex
        assert 1 / (2 * float(square)) > WORTH[name]
        assert float(one.relative_error()[inside].median()) == pytest.approx(float(square) ** 0.5, rel=0.25)
