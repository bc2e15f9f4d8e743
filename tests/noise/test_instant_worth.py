"""What later probes tell of the worth that a prediction states."""

import pytest
from tests.noise.predicted import COVARIATE, WORTH, Predictor, covered, instant, knowing, priors

from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Covariate, Stopping

KINDS: tuple[MapKind, ...] = ("magnitude", "complex")
COVARIATES = pytest.mark.parametrize("covariate", [None, COVARIATE], ids=["plain", "covariate"])


@COVARIATES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("states", "probes"), [(400.0, 64), (1000.0, 256)])
def test_later_probes_tell_of_a_worth_that_is_overstated(
    covariate: Covariate | None, kind: MapKind, states: float, probes: int
) -> None:
    found = instant(Predictor(priors(worth=states)), Stopping(probes=probes, target_error=1e-3), covariate)
    assert found.certified
    # taken at its word it covers 30 to 57 %
    assert covered(found.map(kind)) > 0.87
    assert WORTH / 2 < float(found.priors[kind].freedom.median()) < 2 * WORTH


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_found_out_of_one_prediction_holds_for_the_next(kind: MapKind) -> None:
    at_8, at_16 = (
        instant(Predictor(priors(worth=400.0)), Stopping(probes=probes, target_error=1e-3), COVARIATE)
        for probes in (8, 16)
    )
    assert (at_8.before.count, at_16.before.count) == (8, 16)
    assert float(at_8.priors[kind].freedom.median()) > 300
    # by eight probes that only the first had not seen
    assert float(at_16.priors[kind].freedom.median()) < 150
    assert covered(at_16.map(kind)) > covered(at_8.map(kind)) + 0.2


@COVARIATES
@pytest.mark.parametrize("probes", [40, 64, 128])
@pytest.mark.parametrize("worth", [40.0, 400.0])
def test_what_states_its_worth_is_believed(covariate: Covariate | None, worth: float, probes: int) -> None:
    found = instant(Predictor(knowing(worth)), Stopping(probes=probes, target_error=1e-3), covariate)
    for kind in KINDS:
        assert float(found.priors[kind].freedom.median()) == pytest.approx(worth, rel=0.1)
