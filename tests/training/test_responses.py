"""What a surrogate is taught: pushed probes beside their zero-filled images, and a loss that says what is left."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.training.distilled import tiny_network, tiny_scan
from torch import Tensor, nn

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.predictor import OF_SCAN
from voxelsigma.models.surrogate_net import OFFSETS, SurrogateNet
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.voxels import object_mask, phase_factor
from voxelsigma.training.compare import plane_of
from voxelsigma.training.config import FitSettings
from voxelsigma.training.examples import Example
from voxelsigma.training.fit import fit, make_fabric
from voxelsigma.training.responses import (
    ResponseCrops,
    ResponseTarget,
    measure_response,
    response_drawer,
    response_loss,
)
from voxelsigma.training.targets import measure

NAMES = tuple(field.name for field in fields(ResponseTarget))


@pytest.fixture(scope="module")
def scan() -> Example:
    return tiny_scan()


@pytest.fixture(scope="module")
def target(scan: Example) -> ResponseTarget:
    return measure_response(tiny_network(), scan, seed=3, number=2)


def same(one: ResponseTarget, other: ResponseTarget) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in NAMES)


def check_close(found: NDArray[np.float16], expected: NDArray[Any]) -> None:
    """To what float16 holds, 11 bits."""
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2e-3, atol=2e-3)


def parts(values: Tensor) -> NDArray[Any]:
    """`(probes, y, x)` to `(probes, 2, y, x)`."""
    return torch.stack([values.real, values.imag], dim=-3).numpy()


# --- what is measured


@pytest.mark.parametrize("real", [False, True])
def test_it_is_what_a_block_of_probes_says(scan: Example, real: bool) -> None:
    found = measure_response(tiny_network(real=real), scan, seed=3, number=2)
    plane = plane_of(scan)
    with torch.no_grad():
        linearization = linearize(tiny_network(real=real).bind(plane), scan.kspace)
        batch = ProbeSource(variance=plane.variance, coils=len(scan.kspace), seed=3, counters=(2, 0)).block(0)
        pushed = linearization.push(batch)
    encoding = SenseEncoding(scan.sensitivities, scan.mask)
    images = encoding.adjoint(batch)
    second = encoding.adjoint(encoding.forward(images))
    variance = 2 * scan.mask.mean() * scan.sensitivities.abs().square().sum(dim=0)
    least = 0.05 * variance.max()
    scale = variance.clamp_min(least).rsqrt()
    phase = phase_factor(linearization.value).to(torch.complex64)
    if real:
        # it has no phase of its own: the images are turned by that of the zero-filled image
        turn = phase_factor(encoding.adjoint(scan.kspace)).to(torch.complex64).conj()
        images, second = turn * images, turn * second
        assert bool((phase == 1).all())
    assert found.pushed.shape == (BLOCK_SIZE, *found.shape)
    check_close(found.pushed, ((phase.conj() * pushed).real * scale).numpy())
    check_close(found.images, parts(images * scale))
    check_close(found.second, parts(second * scale))
    check_close(found.phase, parts(phase.conj()))
    assert np.array_equal(found.inside, (object_mask(linearization.value) & (variance > least)).numpy())
    assert 100 < found.inside.sum() < found.inside.size
    assert {getattr(found, name).dtype for name in NAMES} == {np.dtype(np.float16), np.dtype(bool)}


def test_levels_are_by_the_zero_filled_images_noise(target: ResponseTarget) -> None:
    """Of real and imaginary part each a half; of 8 probes and some 300 voxels, some of them alike: to a tenth."""
    energy = target.images.astype(np.float64)[:, :, target.inside]
    assert np.square(energy).sum(axis=1).mean() == pytest.approx(1, abs=0.1)
    # A^H A takes from it what aliasing does not bring back
    assert 0.1 < np.square(target.second.astype(np.float64)[:, :, target.inside]).sum(axis=1).mean() < 1


@pytest.mark.parametrize("real", [False, True])
def test_its_features_are_those_that_predictors_see(scan: Example, real: bool) -> None:
    found = measure_response(tiny_network(real=real), scan, seed=0)
    expected = measure(tiny_network(real=real), scan, first=2, probes=2, seed=1).features[:OF_SCAN]
    assert np.array_equal(found.features, expected)


def test_a_scan_and_its_number_decide(scan: Example, target: ResponseTarget) -> None:
    assert same(measure_response(tiny_network(), scan, seed=3, number=2), target)
    for seed, number in ((3, 1), (4, 2)):
        other = measure_response(tiny_network(), scan, seed=seed, number=number)
        for name in ("features", "phase", "inside"):
            assert np.array_equal(getattr(other, name), getattr(target, name))
        for name in ("pushed", "images", "second"):
            assert not np.array_equal(getattr(other, name), getattr(target, name))


def test_values_that_are_not_finite_are_refused(scan: Example) -> None:
    large = replace(scan, kspace=torch.full_like(scan.kspace, 1e30))
    with pytest.raises(ValueError, match="not finite"):
        measure_response(tiny_network(), large, seed=0)


# --- files


def test_files_come_back(tmp_path: Path, target: ResponseTarget) -> None:
    target.save(tmp_path / "a.npz")
    found = ResponseTarget.load(tmp_path / "a.npz")
    assert same(found, target)
    assert found.shape == target.shape == target.inside.shape
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def nan(values: NDArray[Any]) -> NDArray[Any]:
    changed = values.copy()
    changed.flat[3] = np.nan
    return changed


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("pushed", None, "pushed is not a file in the archive"),
        ("pushed", nan, "'pushed' is .* not finite"),
        ("second", nan, "'second' is .* not finite"),
        ("features", lambda values: values[:-1], rf"'features' is float16 of shape \({OF_SCAN - 1},"),
        ("images", lambda values: values[:, :1], r"'images' is float16 of shape \(8, 1, "),
        ("images", lambda values: values.astype(np.float32), "'images' is float32"),
        ("second", lambda values: values[..., 1:], "'second' is float16 of shape"),
        ("phase", lambda values: values[0], "'phase' is float16 of shape"),
        ("pushed", lambda values: values[0], "'pushed' is float16 of shape"),
        ("inside", lambda values: values[:-1], "'features' is float16 of shape"),
        ("inside", lambda values: values.astype(np.uint8), "'inside' is uint8"),
        ("inside", lambda values: values[0], r"the matrix is \(\d+,\)"),
        ("inside", None, "inside is not a file in the archive"),
    ],
)
def test_what_does_not_fit_is_damaged(
    tmp_path: Path, target: ResponseTarget, name: str, change: Callable[[Any], Any] | None, told: str
) -> None:
    content = {one: getattr(target, one) for one in NAMES}
    kept = content.pop(name)
    if change is not None:
        content[name] = change(kept)
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=rf"a\.npz: damaged \(.*{told}"):
        ResponseTarget.load(tmp_path / "a.npz")


def test_files_that_end_early_or_are_none_are_named(tmp_path: Path, target: ResponseTarget) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"a\.npz: damaged \(.*No such file"):
        ResponseTarget.load(path)
    target.save(path)
    content = path.read_bytes()
    for cut in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"a\.npz: damaged"):
            ResponseTarget.load(path)


# --- crops


def placed(number: int, shape: tuple[int, int]) -> ResponseTarget:
    """A scan whose values say where they are, and of which scan."""
    y, x = (values.astype(np.float16) for values in np.indices(shape))
    codes = np.stack([y, x, np.full(shape, number, dtype=np.float16)])
    return ResponseTarget(
        features=np.concatenate([codes, np.zeros((OF_SCAN - 3, *shape), dtype=np.float16)]),
        pushed=codes,
        images=np.stack([codes[:2], codes[1:], codes[::2]]),
        second=np.stack([codes[1:], codes[:2], codes[::2]]) + np.float16(1),
        phase=codes[:2] + np.float16(2),
        inside=(np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 3 == number),
    )


def test_crops_are_parts_of_scans_perhaps_mirrored(tmp_path: Path) -> None:
    scans = [placed(number, shape) for number, shape in enumerate([(16, 20), (18, 16), (24, 30)])]
    paths = [tmp_path / f"{number}.npz" for number in range(3)]
    for one, path in zip(scans, paths, strict=True):
        one.save(path)
    draw = response_drawer(paths, (16, 14), batch=4, seed=1)
    seen = set()
    for number in range(20):
        batch = draw(number)
        assert batch.features.shape == (4, OF_SCAN, 16, 14)
        for place in range(4):
            rows, columns, numbers = batch.features[place, :3].numpy().astype(int)
            whole = scans[numbers[0, 0]]
            # of neighbouring voxels of one scan, in their order or the reverse
            steps = rows[1, 0] - rows[0, 0], columns[0, 1] - columns[0, 0]
            assert {abs(step) for step in steps} == {1}
            assert np.array_equal(rows, rows[0, 0] + steps[0] * np.arange(16)[:, None] * np.ones((1, 14), dtype=int))
            assert np.array_equal(columns, columns[0, 0] + steps[1] * np.arange(14) * np.ones((16, 1), dtype=int))
            for name in NAMES:
                expected = getattr(whole, name)[..., rows, columns].astype(np.float32)
                assert np.array_equal(getattr(batch, name)[place].numpy(), expected)
            seen.add((int(numbers[0, 0]), *steps))
    # every scan either way along both axes: 80 draws of 12, of which one is missing with a probability of 1 %
    assert len(seen) == 12


def test_a_batch_depends_on_its_number_alone(tmp_path: Path, target: ResponseTarget) -> None:
    target.save(tmp_path / "a.npz")
    one, other = (response_drawer([tmp_path / "a.npz"], (16, 18), batch=3, seed=1) for _ in range(2))
    other(3)
    first, again = one(7), other(7)
    for name in NAMES:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert getattr(first, name).dtype == torch.float32
    assert not torch.equal(first.pushed, one(8).pushed)
    assert not torch.equal(first.pushed, response_drawer([tmp_path / "a.npz"], (16, 18), batch=3, seed=2)(7).pushed)
    assert first.to("cpu", torch.float64).second.dtype == torch.float64


# --- the loss


class Said(nn.Module):
    """A network that says always the same."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, features: Tensor) -> Tensor:
        del features
        return self.weights


def whole_numbers(*shape: int, most: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def explicit(weights: Tensor, images: Tensor, second: Tensor, phase: Tensor) -> Tensor:
    """In-phase part of both filtered images, voxel by voxel: `(probes, y, x)` of one scan."""
    w, again = (torch.complex(one[:, 0], one[:, 1]) for one in (images, second))
    total = torch.zeros_like(w)
    rows, columns = w.shape[-2:]
    for y in range(rows):
        for x in range(columns):
            for place, (down, right) in enumerate(OFFSETS):
                v, u = y + down, x + right
                if 0 <= v < rows and 0 <= u < columns:
                    total[:, y, x] += weights[0, place, y, x] * w[:, v, u] + weights[1, place, y, x] * again[:, v, u]
    return (torch.complex(phase[0], phase[1]) * total).real


def example() -> tuple[ResponseCrops, Tensor]:
    """Two crops, and the filters that made what was pushed; all whole numbers, so that nothing is rounded."""
    rows, columns, probes = 7, 9, 3
    weights = whole_numbers(2, 2, len(OFFSETS), rows, columns, most=2, seed=1)
    images, second = (whole_numbers(2, probes, 2, rows, columns, most=4, seed=seed) for seed in (2, 3))
    quarters = whole_numbers(2, rows, columns, most=1, seed=4)
    phase = torch.stack([1 - quarters.abs(), quarters], dim=1)
    pushed = torch.stack([explicit(*one) for one in zip(weights, images, second, phase, strict=True)])
    inside = (whole_numbers(2, rows, columns, most=1, seed=5) >= 0).float()
    features = torch.zeros(2, OF_SCAN, rows, columns)
    return ResponseCrops(features, pushed, images, second, phase, inside), weights


def loss_of(weights: Tensor, crops: ResponseCrops) -> Tensor:
    return response_loss(Said(weights), crops, np.random.default_rng()).detach()


def test_the_filters_that_made_it_leave_nothing() -> None:
    crops, weights = example()
    assert float(crops.pushed.abs().max()) > 10
    assert float(loss_of(weights, crops)) == 0
    changed = weights.clone()
    changed[0, 0, 10, 3, 4] += 1
    assert float(loss_of(changed, replace(crops, inside=torch.ones_like(crops.inside)))) > 0


def test_no_filters_leave_all_of_it_by_its_local_energy() -> None:
    crops, weights = example()
    # some of it next to nothing: there the energy has a least value
    weak = replace(crops, pushed=crops.pushed * torch.where(torch.arange(9) < 4, 1e-3, 1.0))
    for given in (crops, weak):
        squares = given.pushed.double().square().mean(dim=1)
        total, count = 0.0, 0
        for scan, y, x in given.inside.nonzero().tolist():
            around = squares[scan, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].mean()
            total += float(squares[scan, y, x] / around.clamp_min(0.03))
            count += 1
        assert float(loss_of(torch.zeros_like(weights), given)) == pytest.approx(total / count, rel=1e-5)


def test_voxels_beside_the_object_do_not_count() -> None:
    crops, weights = example()
    spoilt = torch.where(crops.inside[:, None, None] > 0, weights, weights + 1)
    assert float(loss_of(spoilt, crops)) == 0
    assert float(loss_of(spoilt, replace(crops, inside=1 - crops.inside))) > 0
    nothing = replace(crops, inside=torch.zeros_like(crops.inside))
    assert float(loss_of(spoilt, nothing)) == 0


def test_its_gradient_is_that_of_the_filters() -> None:
    crops, weights = example()
    double, network = crops.to("cpu", torch.float64), Said(0.1 * weights.double())
    response_loss(network, double, np.random.default_rng()).backward()
    assert network.weights.grad is not None
    for place in ((0, 0, 24, 3, 4), (1, 1, 10, 2, 5), (0, 1, 48, 0, 0)):
        losses = []
        for step in (-1e-4, 1e-4):
            moved = network.weights.detach().clone()
            moved[place] += step
            losses.append(float(loss_of(moved, double)))
        slope = (losses[1] - losses[0]) / 2e-4
        assert float(network.weights.grad[place]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


# --- and what is learned

# the same for a mirrored scan, as crops are mirrored
KNOWN = {
    (0, (0, 0)): 0.4,
    (0, (0, 1)): 0.4,
    (0, (0, -1)): 0.4,
    (1, (0, 0)): -0.4,
    (1, (1, 0)): 0.2,
    (1, (-1, 0)): 0.2,
}


def filtered_scan(seed: int) -> ResponseTarget:
    """A scan whose reconstruction is one filter everywhere."""
    rng = np.random.default_rng(seed)
    shape, probes = (28, 32), 4
    both = rng.normal(size=(2, probes, 2, *shape)) * 0.5**0.5
    total = np.zeros((probes, 2, *shape))
    for (which, (y, x)), weight in KNOWN.items():
        padded = np.pad(both[which], ((0, 0), (0, 0), (3, 3), (3, 3)))
        total += weight * padded[..., 3 + y : 3 + y + shape[0], 3 + x : 3 + x + shape[1]]
    angle = rng.uniform(0, 2 * np.pi, shape)
    phase = np.stack([np.cos(angle), np.sin(angle)])
    images, second = both.astype(np.float16)
    return ResponseTarget(
        features=rng.normal(size=(OF_SCAN, *shape)).astype(np.float16),
        pushed=(phase[0] * total[:, 0] - phase[1] * total[:, 1]).astype(np.float16),
        images=images,
        second=second,
        phase=phase.astype(np.float16),
        inside=np.ones(shape, dtype=bool),
    )


def test_a_known_filter_is_learned(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npz" for number in range(3)]
    for number, path in enumerate(paths):
        filtered_scan(number).save(path)
    draw = response_drawer(paths, (20, 24), batch=2, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SurrogateNet(given=OF_SCAN, channels=4, levels=1)
    begun = loss(net, draw(99))
    # what w alone leaves, (0.6² + 2 · 0.4² + 0.4² + 2 · 0.2²) by (3 · 0.4² + 0.4² + 2 · 0.2²)
    assert begun == pytest.approx(0.92 / 0.72, rel=0.1)
    settings = FitSettings(steps=60, warm_up=5, learning_rate=3e-2, batch=2, log_every=60)
    fabric = make_fabric(settings, tmp_path, accelerator="cpu")
    fabric.launch()
    fit(net, response_loss, draw, settings, folder=tmp_path, fabric=fabric)
    assert loss(net, draw(99)) < 0.1 * begun
    features = torch.from_numpy(filtered_scan(7).features).float()
    surrogate = net.surrogate(features)
    for which, response in enumerate((surrogate.near, surrogate.again)):
        for place, offset in enumerate(OFFSETS):
            mean = float(response.weights[place].mean())
            assert mean == pytest.approx(KNOWN.get((which, offset), 0.0), abs=0.05)


@torch.no_grad()
def loss(net: SurrogateNet, crops: ResponseCrops) -> float:
    return float(response_loss(net, crops, np.random.default_rng()))
