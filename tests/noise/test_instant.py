"""Maps from a prediction and a few probes."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelsigma.noise.instant import Instant, instant_sketch
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Stopping, sketch

SIDE = 64
KINDS: tuple[MapKind, ...] = ("magnitude", "complex")
GAIN = 1 + torch.linspace(-0.5, 0.5, SIDE, dtype=torch.float64)[:, None] * torch.linspace(0.2, 1, SIDE)
WHITE = ProbeSource(variance=torch.full((SIDE, SIDE), 2.0), coils=1, seed=5, dtype=torch.complex128)
# uniform in magnitude, so that the whole square is the object
JACOBIAN = Linearization(
    value=torch.polar(torch.ones(SIDE, SIDE, dtype=torch.float64), GAIN),
    push=lambda batch: GAIN * batch[:, 0],
)


def guesses(factor: Tensor | float = 1.0, worth: float = 400.0) -> Mapping[MapKind, Prior]:
    """What a predictor that is right but for a factor of σ would say."""
    variance = (GAIN * factor).square()
    freedom = torch.full_like(variance, worth)
    return {
        "magnitude": Prior(variance=variance, freedom=freedom),
        "complex": Prior(variance=2 * variance, freedom=2 * freedom),
    }


def wrong() -> Mapping[MapKind, Prior]:
    factor = torch.ones(SIDE, SIDE, dtype=torch.float64)
    factor[: SIDE // 2] = 1.6
    return guesses(factor)


def error(found: Instant, kind: MapKind) -> float:
    truth = GAIN * (2**0.5 if kind == "complex" else 1)
    return float((found.map(kind).sigma / truth - 1).square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_prediction_is_enough_with_eight_probes(kind: MapKind) -> None:
    found = instant_sketch(JACOBIAN, WHITE, Stopping(probes=64), guesses())
    assert found.certified
    assert found.sketch.sums.count == 8
    stated = float(found.map(kind).relative_error().mean())
    # 1/sqrt(2 (8 + 400)) = 3.5 %, of which the share of the probes is far less: the prediction is right
    assert error(found, kind) < stated < 0.04


def test_a_wrong_prediction_changes_nothing_but_is_told() -> None:
    found = instant_sketch(JACOBIAN, WHITE, Stopping(probes=64), wrong())
    alone = sketch(JACOBIAN, WHITE, Stopping(probes=64))
    assert not found.certified
    assert found.certificate.worst > 0.3
    assert found.certificate.probes == 8
    for kind in KINDS:
        assert torch.equal(found.map(kind).sigma, alone.map(kind).sigma)
        assert torch.equal(found.map(kind).degrees_of_freedom, alone.map(kind).degrees_of_freedom)


def test_the_target_counts_the_prediction() -> None:
    worth_little = guesses(worth=60.0)
    found = instant_sketch(JACOBIAN, WHITE, Stopping(probes=512, target_error=0.06), worth_little)
    # 1/sqrt(2 (S - 1 + 60)) reaches 6 % with 80 squared numbers
    assert found.certified
    assert found.sketch.sums.count == 80
    assert float(found.map().relative_error().median()) <= 0.06


def test_the_target_of_a_dropped_prediction_is_the_sketches_own() -> None:
    found = instant_sketch(JACOBIAN, WHITE, Stopping(probes=512, target_error=0.06), wrong())
    alone = sketch(JACOBIAN, WHITE, Stopping(probes=512, target_error=0.06))
    assert found.sketch.sums.count == alone.sums.count


def test_fewer_probes_than_the_first_test_wants() -> None:
    found = instant_sketch(JACOBIAN, WHITE, Stopping(probes=4), guesses())
    assert found.certificate.probes == found.sketch.sums.count == 4


def test_what_is_kept_and_told_is_what_was_pushed() -> None:
    kept: list[Tensor] = []
    told: list[int] = []
    instant_sketch(
        JACOBIAN,
        WHITE,
        Stopping(probes=24),
        wrong(),
        keep=kept.append,
        progress=lambda done, limit: told.append(done),
    )
    expected = torch.cat([GAIN * WHITE.block(number)[:, 0] for number in range(3)])
    assert torch.equal(torch.cat(kept), expected)
    assert told == [8, 16, 24]


def test_a_real_image_has_one_map() -> None:
    real = Linearization(
        value=torch.ones(SIDE, SIDE, dtype=torch.float64), push=lambda batch: (GAIN * batch[:, 0]).real
    )
    found = instant_sketch(real, WHITE, Stopping(probes=64), {"magnitude": guesses()["magnitude"]})
    assert found.certified
    np.testing.assert_allclose(error(found, "magnitude"), 0, atol=0.04)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match="instant: 1 probes cannot test a prediction; expected at least 2"):
        instant_sketch(JACOBIAN, WHITE, Stopping(probes=64), guesses(), fewest=1)
    only: Mapping[MapKind, Prior] = {"magnitude": guesses()["magnitude"]}
    with pytest.raises(ValueError, match="instant: no prediction of the complex map; there are magnitude"):
        instant_sketch(JACOBIAN, WHITE, Stopping(probes=64), only, kind="complex")
