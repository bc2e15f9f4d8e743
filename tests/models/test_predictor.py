"""The network that predicts σ maps, and what it sees of a scan."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxelsigma.models.predictor import FEATURES, KINDS, LAGS, SigmaPredictor, scan_features
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.voxels import object_mask

Maps = Callable[[int, int, int], Tensor]


def seeded(*, channels: int = 3, levels: int = 2, seed: int = 0) -> SigmaPredictor:
    """A predictor whose last layer says something too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = SigmaPredictor(channels=channels, levels=levels)
        torch.nn.init.normal_(predictor.last.weight, std=0.3)
    return predictor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (8, 12), (13, 30), (33, 17)])
def test_every_matrix_is_predicted(shape: tuple[int, int]) -> None:
    predictor = seeded()
    assert predictor(normal(2, FEATURES, *shape)).shape == (2, len(KINDS), 2, *shape)
    found = predictor.predict(normal(FEATURES, *shape), torch.ones(shape))
    assert list(found) == ["magnitude", "complex"]
    for prior in found.values():
        assert prior.variance.shape == prior.freedom.shape == shape
        assert prior.variance.dtype == prior.freedom.dtype == torch.float64
        assert not prior.variance.requires_grad


def test_before_training_it_is_the_zero_filled_variance_worth_ten() -> None:
    predictor = SigmaPredictor(channels=3, levels=2)
    variance = normal(9, 10).square()
    for features in (torch.zeros(FEATURES, 9, 10), normal(FEATURES, 9, 10)):
        found = predictor.predict(features, variance)
        torch.testing.assert_close(found["magnitude"].variance, variance.double() / 2)
        torch.testing.assert_close(found["complex"].variance, variance.double())
        for prior in found.values():
            torch.testing.assert_close(prior.freedom, torch.full((9, 10), 10.0).double(), rtol=1e-5, atol=0)


def test_a_prediction_is_what_the_outputs_say() -> None:
    predictor, features = seeded(), normal(FEATURES, 9, 10)
    variance = 1 + normal(9, 10, seed=1).square()
    predictor.calibration.copy_(torch.tensor([0.5, 3.0]))
    outputs = predictor(features[None])[0].detach().double()
    found = predictor.predict(features, variance)
    for kind, output, part, factor in zip(KINDS, outputs, (0.5, 1.0), (0.5, 3.0), strict=True):
        torch.testing.assert_close(found[kind].variance, part * variance * output[0].exp())
        torch.testing.assert_close(found[kind].freedom, factor * output[1].exp())


def test_features_are_stored_in_half_the_space() -> None:
    predictor, features = seeded(), normal(FEATURES, 8, 8).half()
    found = predictor.predict(features, torch.ones(8, 8))
    expected = predictor.predict(features.float(), torch.ones(8, 8))
    assert torch.equal(found["complex"].variance, expected["complex"].variance)


def test_the_worth_stays_within_bounds() -> None:
    predictor = seeded()
    freedom = predictor(100 * normal(1, FEATURES, 16, 16))[:, :, 1].detach().exp()
    assert float(freedom.min()) == pytest.approx(2)
    assert float(freedom.max()) == pytest.approx(1000)


def test_gradients() -> None:
    predictor = seeded(channels=1, levels=1).double()
    features = 0.3 * normal(1, FEATURES, 4, 4).double().requires_grad_(True)
    torch.autograd.gradcheck(predictor, (features,), nondet_tol=1e-12)


@pytest.mark.parametrize("sizes", [{"channels": 0}, {"levels": 0}])
def test_sizes_that_make_no_network_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="predictor: levels and channels must be at least 1"):
        SigmaPredictor(**sizes)


# --- features


def scan(smooth_maps: Maps, scale: float = 1.0, *, real: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Image, zero-filled image, variance, correlation and sampled fraction of a plane, in some unit."""
    rows, columns, coils = 20, 24, 4
    mask = (torch.rand(rows, 1, generator=torch.Generator().manual_seed(1)) < 0.5).float().expand(rows, columns)
    mask = mask.clone()
    mask[8:13] = 1
    mask[0] = mask[-1] = 1
    plane = PlaneProblem(
        sensitivities=smooth_maps(coils, rows, columns).to(torch.complex64),
        variance=scale**2 * 2 * mask,
        weights=mask,
        limits=((0, rows - 1), (0, columns - 1)),
        size=(rows, columns),
    )
    kspace = scale * mask * torch.complex(normal(coils, rows, columns, seed=2), normal(coils, rows, columns, seed=3))
    covariate = plane.covariate()
    zero_filled = covariate.push(kspace[None])[0]
    assert covariate.correlation is not None
    image = 1.3 * zero_filled + 0.2 * zero_filled.roll(1, dims=0)
    return image.abs() if real else image, zero_filled, covariate.variance, covariate.correlation, float(mask.mean())


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e5])
def test_features_are_the_same_in_other_units(smooth_maps: Maps, scale: float, real: bool) -> None:
    one, other = scan(smooth_maps, real=real), scan(smooth_maps, scale, real=real)
    found = [scan_features(*parts) for parts in (one, other)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_features_by_their_formulas(smooth_maps: Maps) -> None:
    image, zero_filled, variance, correlation, fraction = scan(smooth_maps)
    found = scan_features(image, zero_filled, variance, correlation, fraction).double()
    assert found.shape == (FEATURES, 20, 24)
    level = image.abs()[object_mask(image)].mean()
    turned = zero_filled * (image.conj() / image.abs()) / level
    expected = torch.stack([turned.real, turned.imag, (image.abs() / level - turned).abs()]).double()
    torch.testing.assert_close(found[1:4], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], ((image.abs() / level + 1e-3).log() / 2).double(), rtol=1e-4, atol=1e-4)
    noise = ((variance.sqrt() / level + 1e-3).log() + 2).double()
    torch.testing.assert_close(found[4], noise, rtol=1e-4, atol=1e-4)
    assert float(found[5].mean()) == pytest.approx(math.log(fraction) + 1, abs=1e-5)
    middle = correlation.shape[0] // 2
    for plane, (y, x) in zip(found[6:], LAGS, strict=True):
        ratio = abs(complex(correlation[middle + y, middle + x])) / abs(complex(correlation[middle, middle]))
        assert float(plane.min()) == float(plane.max()) == pytest.approx(ratio, abs=1e-6)


def test_a_real_image_takes_the_phase_of_the_zero_filled_one(smooth_maps: Maps) -> None:
    parts = scan(smooth_maps, real=True)
    found = scan_features(*parts)
    level = parts[0][object_mask(parts[0])].mean()
    torch.testing.assert_close(found[1], parts[1].abs() / level, rtol=1e-4, atol=1e-4)
    assert float(found[2].abs().max()) < 1e-5
