"""Simulated scans to train on."""

from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch

from voxelsigma.formats.masks import Kind
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.examples import (
    Example,
    ExampleSettings,
    draw_example,
    draw_sizes,
    object_voxels,
    scale_to_snr,
    simulate,
    stream,
)
from voxelsigma.training.volumes import Volume

SMALL = ExampleSettings(matrix=(24, 40), coils=(2, 5), many_coils=7, acceleration=(2, 4))


@pytest.fixture(scope="module")
def volumes() -> list[Volume]:
    """A ball of three labels and a ball of intensities."""
    z, y, x = np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]
    radius = np.sqrt(z**2 + y**2 + x**2)
    labels = (radius < 0.95).astype(np.int16) + (radius < 0.6) + (radius < 0.3)
    return [Volume("labels", labels, 4), Volume("scan", (300 * np.maximum(1 - radius, 0)).astype(np.int16), 0)]


def equal(one: Example, other: Example) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Example))


def test_a_seed_fixes_the_stream(volumes: list[Volume]) -> None:
    first, again, other = (list(islice(stream(volumes, SMALL, batch=2, seed=s), 3)) for s in (5, 5, 6))
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(equal(a, b) for a, b in zip(first, other, strict=True))
    assert not equal(first[0], first[1])


def test_shapes_and_types(volumes: list[Volume]) -> None:
    for example in islice(stream(volumes, SMALL, batch=2, seed=0), 8):
        batch, coils, y, x = example.kspace.shape
        assert batch == 2
        assert coils in {2, 3, 4, 5, 7}
        assert 24 <= y <= 40
        assert 24 <= x <= 40
        assert y % 4 == x % 4 == 0
        assert example.sensitivities.shape == example.kspace.shape
        assert example.mask.shape == (2, 1, y, x)
        assert example.target.shape == (2, y, x)
        assert example.kspace.dtype == example.target.dtype == torch.complex64
        assert example.mask.dtype == torch.float32
        assert (example.kspace[(example.mask == 0).expand_as(example.kspace)] == 0).all()


@pytest.mark.parametrize("kind", ["uniform_1d", "random_1d", "random_2d", "poisson_disc"])
def test_acceleration_and_snr_are_those_asked_for(volumes: list[Volume], kind: Kind) -> None:
    settings = replace(SMALL, kinds=(kind,), acceleration=(3, 3), snr=(20, 20), matrix=(36, 36))
    for seed in range(6):
        example = draw_example(volumes, settings, (4, 36, 36), np.random.default_rng(seed))
        magnitude = example.target.abs().numpy()
        assert magnitude[object_voxels(magnitude)].mean() == pytest.approx(20, rel=1e-3)
        sampled = float(example.mask.mean())
        assert sampled >= 1 / 3 - 1e-6 if kind == "uniform_1d" else sampled == pytest.approx(1 / 3, rel=1e-3)
        along_readout = (example.mask == example.mask[..., :1]).all()
        assert bool(along_readout) == kind.endswith("1d")


def test_snr_is_that_of_the_fully_sampled_unit_norm_image(volumes: list[Volume]) -> None:
    settings = replace(SMALL, acceleration=(1, 1), snr=(20, 20), support_share=0.0, kinds=("random_2d",))
    example = draw_example(volumes, settings, (4, 40, 40), np.random.default_rng(1))
    error = SenseEncoding(example.sensitivities, example.mask).adjoint(example.kspace) - example.target
    # fully sampled, whitened, unit norm: one per real component
    assert float(error.real.std()) == pytest.approx(1, rel=0.06)
    assert float(error.imag.std()) == pytest.approx(1, rel=0.06)


def test_noise_has_variance_two_where_sampled() -> None:
    rng = np.random.default_rng(0)
    shape = (8, 64, 64)
    mask = rng.random(shape[1:]) < 0.5
    noise = rng.standard_normal((*shape, 2), dtype=np.float32)
    example = simulate(np.zeros(shape[1:], np.complex64), np.ones(shape, np.complex64), mask, noise)
    samples = example.kspace[:, torch.from_numpy(mask)]
    assert float(samples.abs().square().mean()) == pytest.approx(2, rel=0.02)
    assert abs(complex((samples**2).mean())) < 0.05
    assert (example.kspace[:, torch.from_numpy(~mask)] == 0).all()


def test_without_noise_the_data_are_the_encoded_target(volumes: list[Volume]) -> None:
    example = draw_example(volumes, replace(SMALL, snr=(1e5, 1e5)), (4, 32, 28), np.random.default_rng(2))
    encoded = SenseEncoding(example.sensitivities, example.mask).forward(example.target)
    torch.testing.assert_close(example.kspace, encoded, rtol=0, atol=10)
    assert float(encoded.abs().max()) > 1e4


@pytest.mark.parametrize("support_share", [0.0, 1.0])
def test_sensitivities_end_at_the_dilated_object_or_nowhere(volumes: list[Volume], support_share: float) -> None:
    settings = replace(SMALL, support_share=support_share)
    for seed in range(4):
        example = draw_example(volumes, settings, (4, 40, 40), np.random.default_rng(seed))
        norm = example.sensitivities.abs().square().sum(dim=0)
        seen = norm > 0
        torch.testing.assert_close(norm[seen], torch.ones_like(norm[seen]), rtol=1e-4, atol=1e-4)
        magnitude = example.target.abs()
        assert seen[magnitude > 0.1 * magnitude.max()].all()
        assert bool(seen.all()) == (support_share == 0)


def test_sizes_cover_their_ranges() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_sizes(replace(SMALL, many_coils_share=0.2), rng) for _ in range(300)]
    assert {coils for coils, _, _ in drawn} == {2, 3, 4, 5, 7}
    assert {y for _, y, _ in drawn} == {x for _, _, x in drawn} == {24, 28, 32, 36, 40}


def test_impossible_settings_and_volumes_are_refused(volumes: list[Volume]) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"snr must be a range of positive numbers, got \(5, 2\)"):
        ExampleSettings(snr=(5, 2))
    with pytest.raises(ValueError, match="kinds must name at least one mask, got none"):
        ExampleSettings(kinds=())
    with pytest.raises(ValueError, match="there are no volumes to draw from"):
        draw_example([], SMALL, (4, 32, 32), rng)
    empty = Volume("empty", np.zeros((8, 8, 8), np.int16), 1)
    with pytest.raises(ValueError, match="20 slices in a row were nearly empty"):
        draw_example([empty], SMALL, (4, 32, 32), rng)
    with pytest.raises(ValueError, match="the image is empty"):
        scale_to_snr(np.zeros((4, 4), np.float32), 20)
