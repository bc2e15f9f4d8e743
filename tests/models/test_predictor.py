"""The network that predicts σ maps, and what it sees of a scan and of its first probes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from voxelsigma.models.predictor import FEATURES, KINDS, LAGS, OF_SCAN, SigmaPredictor, probe_features, scan_features
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.fusion import measured_variance
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask, phase_factor

Maps = Callable[[int, int, int], Tensor]
SMOOTHED = slice(OF_SCAN + len(KINDS), OF_SCAN + 2 * len(KINDS))


def seeded(*, channels: int = 3, levels: int = 2, seed: int = 0) -> SigmaPredictor:
    """A predictor whose last layer says something too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = SigmaPredictor(channels=channels, levels=levels, surrogate_channels=2, surrogate_levels=1)
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


def test_before_training_it_is_the_smoothed_measured_variance_worth_ten() -> None:
    predictor = SigmaPredictor(channels=3, levels=2)
    variance = normal(9, 10).square()
    for features in (torch.zeros(FEATURES, 9, 10), normal(FEATURES, 9, 10)):
        found = predictor.predict(features, variance)
        smooth = variance.double() * features[SMOOTHED].double().exp()
        torch.testing.assert_close(found["magnitude"].variance, smooth[0] / 2)
        torch.testing.assert_close(found["complex"].variance, smooth[1])
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


def test_what_it_says_is_a_difference_from_the_smoothed_maps() -> None:
    predictor = SigmaPredictor(channels=3, levels=2)
    with torch.no_grad():
        assert predictor.last.bias is not None
        predictor.last.bias.copy_(torch.tensor([0.3, 2.0, -0.7, 3.0]))
    features = normal(2, FEATURES, 9, 10)
    found = predictor(features).detach()
    torch.testing.assert_close(found[:, :, 0], features[:, SMOOTHED] + torch.tensor([0.3, -0.7]).view(2, 1, 1))
    torch.testing.assert_close(found[:, :, 1], torch.tensor([2.0, 3.0]).view(2, 1, 1).expand(2, 2, 9, 10))


def test_features_are_stored_in_half_the_space() -> None:
    predictor, features = seeded(), normal(FEATURES, 8, 8).half()
    found = predictor.predict(features, torch.ones(8, 8))
    expected = predictor.predict(features.float(), torch.ones(8, 8))
    assert torch.equal(found["complex"].variance, expected["complex"].variance)


def test_the_worth_stays_within_bounds() -> None:
    predictor, features = seeded(), normal(1, FEATURES, 16, 16)
    assert predictor.last.bias is not None
    for level, bound in ((-50, 2), (50, 1000)):
        with torch.no_grad():
            predictor.last.bias.fill_(level)
        freedom = predictor(features)[:, :, 1].detach().exp()
        assert float(freedom.min()) == pytest.approx(bound)
        assert float(freedom.max()) == pytest.approx(bound)


def test_gradients() -> None:
    predictor = seeded(channels=1, levels=1).double()
    features = 0.3 * normal(1, FEATURES, 4, 4).double().requires_grad_(True)
    torch.autograd.gradcheck(predictor, (features,), nondet_tol=1e-12)


@pytest.mark.parametrize("sizes", [{"channels": 0}, {"levels": 0}, {"surrogate_channels": 0}, {"surrogate_levels": 0}])
def test_sizes_that_make_no_network_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="predictor: levels and channels must be at least 1"):
        SigmaPredictor(**sizes)


def test_its_surrogate_sees_the_scan_alone_and_says_nothing_of_the_maps() -> None:
    predictor, features = seeded(), normal(FEATURES, 9, 10)
    assert predictor.surrogate.levels == 1
    assert predictor.surrogate.last.in_channels == 2
    before = predictor.predict(features, torch.ones(9, 10))["magnitude"]
    surrogate = predictor.surrogate.surrogate(features[:OF_SCAN], lambda images: images)
    assert len(surrogate.stages) == len(predictor.surrogate.stages)
    assert surrogate.stages[0].kept.weights.shape == surrogate.stages[0].passed.weights.shape == (49, 9, 10)
    with torch.no_grad():
        for parameter in predictor.surrogate.parameters():
            parameter.fill_(torch.nan)
    after = predictor.predict(features, torch.ones(9, 10))["magnitude"]
    assert torch.equal(after.variance, before.variance)
    assert torch.equal(after.freedom, before.freedom)


# --- features of the scan


class Scan(NamedTuple):
    """A plane and what is made of it, in some unit."""

    image: Tensor
    zero_filled: Tensor
    covariate: Covariate
    fraction: float
    source: ProbeSource

    @property
    def features(self) -> Tensor:
        assert self.covariate.correlation is not None
        return scan_features(
            self.image, self.zero_filled, self.covariate.variance, self.covariate.correlation, self.fraction
        )

    @property
    def real(self) -> bool:
        return not self.image.is_complex()

    def sketched(self, count: int) -> Sketch:
        """What so many probes say: some of the noise is explained by the zero-filled image's."""
        phase = phase_factor(self.zero_filled).to(torch.complex64)

        def push(probes: Tensor) -> Tensor:
            images = self.covariate.push(probes)
            turned = images if self.real else phase.conj() * images
            changed = 0.8 * turned + 0.5 * turned.roll(3, dims=-1).conj() + 0.2 * turned.roll(1, dims=-2)
            return changed.real if self.real else phase * changed

        linearization = Linearization(value=self.image, push=push)
        return sketch(linearization, self.source, Stopping(probes=count), covariate=self.covariate)

    def seen(self, count: int = 16) -> Tensor:
        """Features of so many probes."""
        return probe_features(self.sketched(count), self.covariate.variance, real=self.real).double()


def scan(smooth_maps: Maps, scale: float = 1.0, *, real: bool = False, dead: slice = slice(0)) -> Scan:
    """A scan in some unit, with rows that no coil sees."""
    rows, columns, coils = 20, 24, 4
    mask = (torch.rand(rows, 1, generator=torch.Generator().manual_seed(1)) < 0.5).float().expand(rows, columns)
    mask = mask.clone()
    mask[8:13] = 1
    mask[0] = mask[-1] = 1
    sensitivities = smooth_maps(coils, rows, columns).to(torch.complex64)
    sensitivities[:, dead] = 0
    plane = PlaneProblem(
        sensitivities=sensitivities,
        variance=scale**2 * 2 * mask,
        weights=mask,
        limits=((0, rows - 1), (0, columns - 1)),
        size=(rows, columns),
    )
    # a smooth image: no voxel of the object is on its own
    decay = (-(torch.linspace(-3, 3, rows)[:, None].square() + torch.linspace(-3, 3, columns).square())).exp()
    kspace = torch.complex(normal(coils, rows, columns, seed=2), normal(coils, rows, columns, seed=3))
    kspace = scale * mask * (decay + 0.02) * kspace
    zero_filled = plane.covariate().push(kspace[None])[0]
    image = 1.3 * zero_filled + 0.2 * zero_filled.roll(1, dims=0)
    return Scan(
        image.abs() if real else image,
        zero_filled,
        plane.covariate(kspace if real else None),
        float(mask.mean()),
        ProbeSource(variance=plane.variance, coils=coils, seed=4),
    )


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e5])
def test_features_are_the_same_in_other_units(smooth_maps: Maps, scale: float, real: bool) -> None:
    one, other = scan(smooth_maps, real=real), scan(smooth_maps, scale, real=real)
    torch.testing.assert_close(other.features, one.features, rtol=1e-4, atol=1e-4)


def test_features_by_their_formulas(smooth_maps: Maps) -> None:
    given = scan(smooth_maps)
    image, zero_filled, covariate, fraction, _ = given
    variance, correlation = covariate.variance, covariate.correlation
    assert correlation is not None
    found = given.features.double()
    assert found.shape == (OF_SCAN, 20, 24) == (6 + len(LAGS), 20, 24)
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
    given = scan(smooth_maps, real=True)
    found = given.features
    level = given.image[object_mask(given.image)].mean()
    torch.testing.assert_close(found[1], given.zero_filled.abs() / level, rtol=1e-4, atol=1e-4)
    assert float(found[2].abs().max()) < 1e-5


# --- features of the first probes


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e5])
def test_probes_look_the_same_in_other_units(smooth_maps: Maps, scale: float, real: bool) -> None:
    one, other = scan(smooth_maps, real=real), scan(smooth_maps, scale, real=real)
    torch.testing.assert_close(other.seen(), one.seen(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [8, 16, 32])
def test_probes_by_their_formulas(smooth_maps: Maps, count: int) -> None:
    given = scan(smooth_maps, dead=slice(3, 6))
    state, variance = given.sketched(count), given.covariate.variance.double()
    found = given.seen(count)
    assert found.shape == (FEATURES - OF_SCAN, 20, 24)
    assert state.covariate_variance is not None
    known = variance > 0
    assert int((~known).sum()) == 3 * 24
    magnitude, whole = state.map("magnitude"), state.map("complex")
    ratios = [2 * measured_variance(magnitude) / variance, measured_variance(whole) / variance]
    for place, ratio in enumerate(ratios):
        torch.testing.assert_close(found[place][known], ratio[known].log(), rtol=1e-4, atol=1e-4)
        inside = state.inside & known
        for y, x in ((0, 0), (2, 7), (6, 11), (12, 12), (19, 23)):
            around = (slice(max(0, y - 2), y + 3), slice(max(0, x - 2), x + 3))
            alike = ratio[around][inside[around]]
            # where nothing of the object is near, a voxel's own
            expected = alike.mean() if len(alike) else ratio[y, x]
            assert float(found[2 + place, y, x]) == pytest.approx(math.log(float(expected)), abs=1e-3)
    plain = sketch_without_covariate(given, count)
    torch.testing.assert_close(found[4][known], (2 * plain / variance)[known].log(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[5], 2 * magnitude.explained, rtol=1e-4, atol=1e-4)
    assert float(magnitude.explained.max()) > 0.2
    control = (state.covariate_variance / variance)[known].log()
    torch.testing.assert_close(found[6][known], control, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[7], (magnitude.degrees_of_freedom / count).log(), rtol=1e-4, atol=1e-4)
    assert float(found[8].min()) == float(found[8].max()) == pytest.approx(math.log(count / 8))


def sketch_without_covariate(given: Scan, count: int) -> Tensor:
    """Mean square of the in-phase component."""
    state = given.sketched(count)
    bare = Sketch(
        sums=state.sums, direction=state.direction, covariate_variance=None, complex_linear=False, inside=state.inside
    )
    return measured_variance(bare.map("magnitude"))


def test_a_real_image_has_the_magnitudes_twice(smooth_maps: Maps) -> None:
    given = scan(smooth_maps, real=True)
    found = given.seen()
    for first, second in ((0, 1), (2, 3)):
        assert torch.equal(found[first], found[second])
    # its noise is all in phase, and is measured by half of the zero-filled image's as that of complex images is
    ratio = 2 * measured_variance(given.sketched(16).map("magnitude")) / given.covariate.variance
    torch.testing.assert_close(found[0], ratio.log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("dead", [slice(0, 7), slice(1, 20)], ids=["some", "most"])
def test_voxels_that_no_coil_sees_are_finite(smooth_maps: Maps, real: bool, dead: slice) -> None:
    given = scan(smooth_maps, real=real, dead=dead)
    assert not bool(given.covariate.variance[dead].any())
    features = torch.cat([given.features, given.seen().float()])
    assert bool(features.isfinite().all())
    assert float(features.abs().max()) < 20
    for prior in seeded().predict(features, given.covariate.variance).values():
        assert bool(prior.variance.isfinite().all())
        assert not bool(prior.variance[dead].any())
        assert bool((prior.variance[dead.stop :] > 0).all())


def test_more_probes_come_nearer_to_the_truth(smooth_maps: Maps) -> None:
    given = scan(smooth_maps)
    truth = given.seen(2000)[2:4]
    errors = [float((given.seen(count)[2:4] - truth).square().mean().sqrt()) for count in (8, 128)]
    assert errors[1] < 0.5 * errors[0]
