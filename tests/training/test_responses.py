"""What a surrogate is taught: pushed probes beside their zero-filled images, scan by scan."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.training.distilled import nan, same, tiny_network
from torch import Tensor

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.network import Network
from voxelsigma.models.normal_equations import normal_operator
from voxelsigma.models.predictor import OF_SCAN
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.voxels import object_mask, phase_factor
from voxelsigma.training.compare import plane_of
from voxelsigma.training.example import Example
from voxelsigma.training.responses import (
    PROBES_A_STEP,
    ResponseScan,
    ResponseTarget,
    measure_response,
    response_drawer,
)
from voxelsigma.training.targets import measure

NAMES = tuple(field.name for field in fields(ResponseTarget))
IN_STEP = tuple(field.name for field in fields(ResponseScan))


@pytest.fixture(scope="module")
def target(scan: Example) -> ResponseTarget:
    return measure_response(tiny_network(), scan, seed=3, number=2)


def check_close(found: NDArray[np.float16], expected: Tensor) -> None:
    """To what float16 holds, 11 bits."""
    np.testing.assert_allclose(found.astype(np.float32), expected.numpy(), rtol=2e-3, atol=2e-3)


def parts(values: Tensor) -> Tensor:
    """`(..., y, x)` to `(..., 2, y, x)`."""
    return torch.stack([values.real, values.imag], dim=-3)


def whole(values: NDArray[Any]) -> Tensor:
    """And back, complex64."""
    real, imaginary = torch.from_numpy(values.astype(np.float32)).unbind(dim=-3)
    return torch.complex(real, imaginary)


def pushed_through(network: Network, scan: Example, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivatives by torch's forward mode, a probe at a time."""
    reconstruction = network.bind(plane_of(scan))
    pushed = [torch.func.jvp(reconstruction, (scan.kspace,), (probe,))[1] for probe in batch]
    return reconstruction(scan.kspace), torch.stack(pushed)


def outer_lines_missing(scan: Example) -> Example:
    """Every second line, but for the outermost: they are a periodic grid of their own, smaller than the matrix."""
    rows = scan.mask.shape[-2]
    mask = torch.zeros_like(scan.mask)
    mask[:, 1 + 2 * torch.arange((rows - 2) // 2)] = 1
    generator = torch.Generator().manual_seed(1)
    image = 20 * torch.randn(scan.kspace.shape[-2:], generator=generator, dtype=torch.complex64)
    return Example(SenseEncoding(scan.sensitivities, mask).forward(image), scan.sensitivities, mask, None)


# --- what is measured


@pytest.mark.parametrize("real", [False, True])
def test_it_is_what_a_block_of_probes_says(scan: Example, real: bool) -> None:
    found = measure_response(tiny_network(real=real), scan, seed=3, number=2)
    batch = ProbeSource(variance=2 * scan.mask[0], coils=len(scan.kspace), seed=3, counters=(2, 0)).block(0)
    value, pushed = pushed_through(tiny_network(real=real), scan, batch)
    encoding = SenseEncoding(scan.sensitivities, scan.mask)
    images, sensitivities = encoding.adjoint(batch), scan.sensitivities
    variance = 2 * scan.mask.mean() * scan.sensitivities.abs().square().sum(dim=0)
    scale = variance.max().rsqrt()
    direction = phase_factor(value).to(torch.complex64)
    if real:
        # it has no phase of its own: the images are turned by that of the zero-filled image
        turn = phase_factor(encoding.adjoint(scan.kspace)).to(torch.complex64)
        images, sensitivities = turn.conj() * images, turn * sensitivities
        assert bool((direction == 1).all())
    assert found.pushed.shape == (BLOCK_SIZE, *found.shape)
    check_close(found.pushed, (direction.conj() * pushed).real * scale)
    check_close(found.images, parts(images * scale))
    check_close(found.direction, parts(direction))
    check_close(found.sensitivities, parts(sensitivities))
    assert np.array_equal(found.sampled, scan.mask[0].numpy() > 0)
    assert np.array_equal(found.inside, (object_mask(value) & (variance > 0.05 * variance.max())).numpy())
    assert 100 < found.inside.sum() < found.inside.size
    assert {getattr(found, name).dtype for name in NAMES} == {np.dtype(np.float16), np.dtype(bool)}


def test_levels_are_by_the_zero_filled_images_noise(target: ResponseTarget) -> None:
    """Of real and imaginary part each a half; of 8 probes and some 300 voxels, some of them alike: to a tenth."""
    energy = target.images.astype(np.float64)[:, :, target.inside]
    assert np.square(energy).sum(axis=1).mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("outer", [True, False])
def test_training_has_the_operator_of_pipelines(scan: Example, real: bool, outer: bool) -> None:
    """Where the outermost lines were not sampled, too: their images are made of a smaller grid."""
    seen = scan if outer else outer_lines_missing(scan)
    plane = plane_of(seen)
    windows = plane.windows(symmetric=True)
    assert windows[0].whole == outer
    found = measure_response(tiny_network(real=real), seen, seed=3)
    normal = plane.covariate(seen.kspace if real else None).normal
    assert normal is not None
    images = whole(found.images)
    stored = normal_operator(whole(found.sensitivities), torch.from_numpy(found.sampled))(images)
    torch.testing.assert_close(stored, normal(images), rtol=5e-3, atol=5e-3)
    assert float(stored.abs().mean()) > 0.1
    # the images are of those samples: nothing else is in them
    everything = normal_operator(whole(found.sensitivities), torch.ones_like(torch.from_numpy(found.sampled)))
    sampled_energy = (images.conj() * stored).real.sum()
    assert float(sampled_energy) < float((images.conj() * everything(images)).real.sum())


@pytest.mark.parametrize("real", [False, True])
def test_its_features_are_those_that_predictors_see(scan: Example, real: bool) -> None:
    found = measure_response(tiny_network(real=real), scan, seed=0)
    expected = measure(tiny_network(real=real), scan, first=2, probes=2, seed=1).features[:OF_SCAN]
    assert np.array_equal(found.features, expected)


def test_a_scan_and_its_number_decide(scan: Example, target: ResponseTarget) -> None:
    assert same(measure_response(tiny_network(), scan, seed=3, number=2), target)
    for seed, number in ((3, 1), (4, 2)):
        other = measure_response(tiny_network(), scan, seed=seed, number=number)
        for name in NAMES:
            assert np.array_equal(getattr(other, name), getattr(target, name)) == (name not in ("pushed", "images"))


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


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("pushed", None, "pushed is not a file in the archive"),
        ("pushed", nan, "'pushed' is .* not finite"),
        ("sensitivities", nan, "'sensitivities' is .* not finite"),
        ("features", lambda values: values[:-1], rf"'features' is float16 of shape \({OF_SCAN - 1},"),
        ("images", lambda values: values[:, :1], r"'images' is float16 of shape \(8, 1, "),
        ("images", lambda values: values.astype(np.float32), "'images' is float32"),
        ("images", lambda values: values[:-1], r"'images' is float16 of shape \(7, 2, "),
        ("direction", lambda values: values[0], "'direction' is float16 of shape"),
        ("sensitivities", lambda values: values[:0], r"'sensitivities' is float16 of shape \(0, 2, "),
        ("sensitivities", lambda values: values[..., 1:], "'sensitivities' is float16 of shape"),
        ("sampled", lambda values: values.astype(np.float16), "'sampled' is float16"),
        ("sampled", lambda values: values[1:], "'sampled' is bool of shape"),
        ("sampled", None, "sampled is not a file in the archive"),
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
        with pytest.raises(ValueError, match=r"a\.npz: damaged"):
            response_drawer([path], seed=0)(0)


# --- what a step sees


def placed(number: int, shape: tuple[int, int], coils: int) -> ResponseTarget:
    """A scan whose values say of which scan and which probe they are."""
    rng = np.random.default_rng(number)

    def normal(*leading: int) -> NDArray[np.float16]:
        return rng.normal(size=(*leading, *shape)).astype(np.float16)

    pushed, images = normal(BLOCK_SIZE), normal(BLOCK_SIZE, 2)
    pushed[:, 0, 0] = images[:, 0, 0, 0] = np.arange(BLOCK_SIZE)
    pushed[:, 0, 1] = images[:, 0, 0, 1] = number
    return ResponseTarget(
        features=normal(OF_SCAN),
        pushed=pushed,
        images=images,
        direction=normal(2),
        sensitivities=normal(coils, 2),
        sampled=normal() > 0,
        inside=normal() > 0,
    )


def test_a_step_sees_a_whole_scan_and_some_of_its_probes(tmp_path: Path) -> None:
    scans = [placed(number, *one) for number, one in enumerate([((16, 20), 3), ((18, 16), 4), ((24, 30), 1)])]
    paths = [tmp_path / f"{number}.npz" for number in range(3)]
    for one, path in zip(scans, paths, strict=True):
        one.save(path)
    draw, seen = response_drawer(paths, seed=1), set()
    for step in range(40):
        found = draw(step)
        number, probes = int(found.pushed[0, 0, 1]), found.pushed[:, 0, 0].long()
        assert len(set(probes.tolist())) == len(probes) == PROBES_A_STEP
        for name in IN_STEP:
            expected = torch.from_numpy(getattr(scans[number], name).astype(np.float32))
            expected = expected[probes] if name in ("pushed", "images") else expected
            assert torch.equal(getattr(found, name), expected)
            assert getattr(found, name).dtype == torch.float32
        seen |= {(number, probe) for probe in probes.tolist()}
    # each is in a draw with a probability of a sixth: that one of 24 is missing, of 2 %
    assert len(seen) == 3 * BLOCK_SIZE


def test_a_draw_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npz" for number in range(2)]
    for number, path in enumerate(paths):
        placed(number, (9, 8), 2).save(path)
    one, other = (response_drawer(paths, seed=1) for _ in range(2))
    other(3)
    first, again = one(7), other(7)
    for name in IN_STEP:
        assert torch.equal(getattr(first, name), getattr(again, name))
    shapes = [[draw(number).pushed for number in range(12)] for draw in (one, response_drawer(paths, seed=2))]
    assert not torch.equal(shapes[0][7], shapes[0][8])
    assert any(not torch.equal(*pair) for pair in zip(*shapes, strict=True))
    moved = first.to("cpu", torch.float64)
    assert {getattr(moved, name).dtype for name in IN_STEP} == {torch.float64}
    assert torch.equal(moved.sensitivities.float(), first.sensitivities)
    assert first.to("cpu").pushed.dtype == torch.float32
