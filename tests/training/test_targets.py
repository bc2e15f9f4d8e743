"""What a predictor is taught: measured as a sketch measures, stored, read back, and refused where it is damaged."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.training.distilled import nan, same, tiny_network

from voxelsigma.models.predictor import FEATURES, OF_SCAN, plane_features, probe_features, scan_features
from voxelsigma.models.surrogate_net import SurrogateNet
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sketch import Stopping, sketch
from voxelsigma.noise.voxels import object_mask, phase_factor
from voxelsigma.training.compare import plane_of
from voxelsigma.training.examples import Example
from voxelsigma.training.targets import ScanTarget, measure


@pytest.fixture(scope="module")
def target(scan: Example) -> ScanTarget:
    return measure(tiny_network(), scan, first=16, probes=6, seed=3, number=2)


def test_it_is_what_the_pushed_probes_say(scan: Example, target: ScanTarget) -> None:
    plane = plane_of(scan)
    with torch.no_grad():
        linearization = linearize(tiny_network().bind(plane), scan.kspace)
        source = ProbeSource(variance=plane.variance, coils=len(scan.kspace), seed=3, counters=(2, 2))
        pushed = linearization.push(source.block(0)[:6]).to(torch.complex128)
    in_phase = (phase_factor(linearization.value).conj() * pushed).real.square().mean(dim=0)
    energy = pushed.abs().square().mean(dim=0)
    np.testing.assert_allclose(target.measured, torch.stack([in_phase, energy]).numpy(), rtol=1e-5)
    kappa = (pushed.square().sum(dim=0).abs() / pushed.abs().square().sum(dim=0).clamp_min(1e-30)).square()
    circularity = ((6 * kappa - 1) / 5).clamp(0, 1)
    # of voxels that no coil sees it is known how often they were looked at, and nothing else
    freedom = torch.where(energy > 0, 12 / (1 + circularity), 5)
    assert bool((energy == 0).any())
    np.testing.assert_allclose(target.freedom[1], freedom.numpy(), rtol=1e-5)
    assert np.all(target.freedom[0] == 6)
    variance = 2 * scan.mask.mean() * scan.sensitivities.abs().square().sum(dim=0)
    np.testing.assert_allclose(target.zero_filled, variance.numpy(), rtol=1e-5)
    assert np.array_equal(target.inside, object_mask(linearization.value).numpy())
    assert (target.first, target.probes, target.real) == (16, 6, False)
    assert target.shape == tuple(scan.kspace.shape[-2:])


def test_its_features_are_of_the_scan_and_of_the_first_probes(scan: Example, target: ScanTarget) -> None:
    plane = plane_of(scan)
    covariate = plane.covariate()
    assert covariate.correlation is not None
    with torch.no_grad():
        linearization = linearize(tiny_network().bind(plane), scan.kspace)
        source = ProbeSource(variance=plane.variance, coils=len(scan.kspace), seed=3, counters=(2, 1))
        # as a pipeline begins: the control variate's filter is learned from the first block
        state = sketch(linearization, source, Stopping(probes=16), covariate=covariate)
        zero_filled = covariate.push(scan.kspace[None])[0]
    of_scan = scan_features(
        linearization.value, zero_filled, covariate.variance, covariate.correlation, float(scan.mask.mean())
    )
    expected = torch.cat([of_scan, probe_features(state, covariate.variance)]).half().numpy()
    assert target.features.dtype == np.float16
    assert target.features.shape == (FEATURES, *target.shape)
    np.testing.assert_array_equal(target.features, expected)


def test_a_surrogate_changes_what_the_first_probes_say_alone(scan: Example, target: ScanTarget) -> None:
    plane = plane_of(scan)
    covariate = plane.covariate()
    assert covariate.normal is not None
    net = surrogate_net()
    found = measure(tiny_network(), scan, first=16, probes=6, seed=3, number=2, surrogate=net)
    of_scan = found.features[:OF_SCAN]
    assert np.array_equal(of_scan, target.features[:OF_SCAN])
    assert not np.array_equal(probe_planes(found)[0], probe_planes(target)[0])
    for name in ("measured", "freedom", "zero_filled", "inside"):
        assert np.array_equal(getattr(found, name), getattr(target, name))
    with torch.no_grad():
        linearization = linearize(tiny_network().bind(plane), scan.kspace)
        features = plane_features(plane, scan.kspace, linearization.value, covariate)
        source = ProbeSource(variance=plane.variance, coils=len(scan.kspace), seed=3, counters=(2, 1))
        learned = replace(covariate, learned=net.surrogate(features, covariate.normal))
        state = sketch(linearization, source, Stopping(probes=16), covariate=learned)
    expected = probe_features(state, covariate.variance).half().numpy()
    np.testing.assert_array_equal(probe_planes(found), expected)


def surrogate_net() -> SurrogateNet:
    """One that says something of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SurrogateNet(given=OF_SCAN, channels=2, levels=1)
        torch.nn.init.normal_(net.last.weight, std=0.05)
    return net


def test_a_scan_and_its_number_decide(scan: Example, target: ScanTarget) -> None:
    assert same(measure(tiny_network(), scan, first=16, probes=6, seed=3, number=2), target)
    for seed, number in ((3, 1), (4, 2)):
        other = measure(tiny_network(), scan, first=16, probes=6, seed=seed, number=number)
        assert np.array_equal(other.features[:OF_SCAN], target.features[:OF_SCAN])
        assert not np.array_equal(probe_planes(other)[0], probe_planes(target)[0])
        assert not np.array_equal(other.measured, target.measured)


def test_both_sketches_are_their_own(scan: Example, target: ScanTarget) -> None:
    """What is to be predicted is not what is seen, whatever the numbers of probes."""
    more = measure(tiny_network(), scan, first=16, probes=8, seed=3, number=2)
    assert np.array_equal(more.features, target.features)
    fewer = measure(tiny_network(), scan, first=8, probes=6, seed=3, number=2)
    assert np.array_equal(fewer.measured, target.measured)
    assert not np.array_equal(probe_planes(fewer)[0], probe_planes(target)[0])
    np.testing.assert_allclose(probe_planes(fewer)[-1], 0)
    np.testing.assert_allclose(probe_planes(target)[-1], np.log(2), rtol=1e-3)
    # plain mean squares of as many probes of both sketches: over 500 voxels the same on average, voxel by voxel not
    equal = measure(tiny_network(), scan, first=8, probes=8, seed=3, number=2)
    seen = np.exp(probe_planes(equal)[4].astype(np.float64)) * equal.zero_filled / 2
    seen, wanted = seen[equal.inside], equal.measured[0][equal.inside]
    assert seen.mean() == pytest.approx(wanted.mean(), rel=0.2)
    assert np.mean(np.abs(seen / wanted - 1) > 0.05) > 0.7


def probe_planes(target: ScanTarget) -> NDArray[np.float16]:
    """The features of the first probes."""
    return target.features[OF_SCAN:]


def test_a_real_reconstruction_has_one_map(scan: Example) -> None:
    found = measure(tiny_network(real=True), scan, first=8, probes=4, seed=0)
    assert found.real
    np.testing.assert_allclose(found.measured[0], found.measured[1], rtol=1e-6)
    # its phase is that of the zero-filled image: nothing is out of phase
    assert float(np.abs(found.features[2]).max()) < 1e-2
    planes = probe_planes(found)
    np.testing.assert_array_equal(planes[[0, 2]], planes[[1, 3]])
    assert float(planes[5].max()) > 0.1


def test_values_that_are_not_finite_are_refused(scan: Example) -> None:
    large = replace(scan, kspace=torch.full_like(scan.kspace, 1e30))
    with pytest.raises(ValueError, match="not finite"):
        measure(tiny_network(), large, first=8, probes=4, seed=0)


# --- files


def test_files_come_back(tmp_path: Path, target: ScanTarget) -> None:
    target.save(tmp_path / "a.npz")
    found = ScanTarget.load(tmp_path / "a.npz")
    assert same(found, target)
    assert [type(one) for one in (found.first, found.probes, found.real)] == [int, int, bool]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_files_that_cannot_be_written_are_named(tmp_path: Path, target: ScanTarget) -> None:
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(OSError, match=r"a\.npz: cannot be written"):
        target.save(tmp_path / "a.npz")


def arrays(target: ScanTarget) -> dict[str, Any]:
    return {field.name: getattr(target, field.name) for field in fields(target)}


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("measured", None, "measured is not a file in the archive"),
        ("measured", nan, "'measured' is .* not finite"),
        ("features", nan, "'features' is .* not finite"),
        ("features", lambda values: values[:-1], rf"'features' is float16 of shape \({FEATURES - 1},"),
        ("first", None, "first is not a file in the archive"),
        ("first", lambda _: np.array(8.0), "'first' is float64"),
        ("features", lambda values: values.astype(np.float64), "'features' is float64 of shape"),
        ("inside", lambda values: values[:-1], "'features' is float16 of shape"),
        ("inside", lambda values: values[0], r"the matrix is \(\d+,\)"),
        ("inside", None, "inside is not a file in the archive"),
        ("zero_filled", lambda values: values[:-1], "'zero_filled' is float32 of shape"),
        ("probes", lambda _: np.array([3]), r"'probes' is int64 of shape \(1,\)"),
        ("measured", lambda values: values.astype(object), "pickle"),
    ],
)
def test_what_does_not_fit_is_damaged(
    tmp_path: Path, target: ScanTarget, name: str, change: Callable[[Any], Any] | None, told: str
) -> None:
    content = arrays(target)
    kept = content.pop(name)
    if change is not None:
        content[name] = change(kept)
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=rf"a\.npz: damaged \(.*{told}"):
        ScanTarget.load(tmp_path / "a.npz")


def test_every_cut_and_flipped_bit_is_seen(tmp_path: Path, target: ScanTarget) -> None:
    path = tmp_path / "a.npz"
    target.save(path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(len(content), size=30).tolist():
        path.write_bytes(content[:place])
        with pytest.raises(ValueError, match=r"a\.npz: damaged"):
            ScanTarget.load(path)
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        # of the archive's own fields some (dates, versions) mean nothing
        try:
            found = ScanTarget.load(path)
        except ValueError as error:
            assert "a.npz: damaged" in str(error)  # noqa: PT017
        else:
            assert same(found, target)
