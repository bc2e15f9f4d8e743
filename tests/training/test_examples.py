"""Simulated scans to train on."""

from dataclasses import fields, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from voxelsigma.formats.coils import unit_norm
from voxelsigma.formats.masks import Kind
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.examples import (
    Example,
    ExampleSettings,
    collate,
    draw_example,
    draw_sizes,
    object_voxels,
    scale_to_snr,
    simulate,
    stream,
)
from voxelsigma.training.receive import draw_covariance, draw_sensitivities, whitened_coils
from voxelsigma.training.sampling import check_drawable, draw_mask
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


def tensors(example: Example) -> list[torch.Tensor]:
    values = [getattr(example, f.name) for f in fields(Example)]
    return [value for value in values if value is not None]


def target_of(example: Example) -> torch.Tensor:
    assert example.target is not None
    return example.target


def test_a_seed_fixes_the_stream(volumes: list[Volume]) -> None:
    first, again, other = (list(islice(stream(volumes, SMALL, batch=2, seed=s), 3)) for s in (5, 5, 6))
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(equal(a, b) for a, b in zip(first, other, strict=True))
    assert not equal(first[0], first[1])


def test_a_stream_goes_on_where_it_is_told_to(volumes: list[Volume]) -> None:
    whole = list(islice(stream(volumes, SMALL, batch=2, seed=5), 5))
    for start in (1, 4):
        rest = list(islice(stream(volumes, SMALL, batch=2, seed=5, start=start), 5 - start))
        assert all(equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_volumes_without_references_have_no_target(volumes: list[Volume]) -> None:
    def drawn(labelled: list[str] | None) -> list[Example]:
        return list(islice(stream(volumes, SMALL, batch=2, seed=5, labelled=labelled), 6))

    everything, named, none = drawn(None), drawn(["labels", "scan"]), drawn([])
    assert all(equal(a, b) for a, b in zip(everything, named, strict=True))
    for one, other in zip(everything, none, strict=True):
        assert other.target is None
        assert torch.equal(one.kspace, other.kspace)
    mixed = drawn(["labels"])
    assert [example.target is None for example in mixed] == [False, True] * 3
    alone = [list(islice(stream([volume], SMALL, batch=2, seed=5), 6)) for volume in volumes]
    for number, example in enumerate(mixed):
        assert torch.equal(example.kspace, alone[number % 2][number].kspace)
    with pytest.raises(ValueError, match="labelled names other, which is not there; there are labels, scan"):
        stream(volumes, SMALL, batch=2, seed=5, labelled=["labels", "other"])


def test_a_batch_has_all_targets_or_none(volumes: list[Volume]) -> None:
    one = draw_example(volumes, SMALL, (4, 32, 32), np.random.default_rng(0))
    assert collate([replace(one, target=None)] * 2).target is None
    with pytest.raises(ValueError, match="1 of the 2 examples of a batch have a target; expected all or none"):
        collate([one, replace(one, target=None)])


def test_correlated_noise_whitened_is_the_direct_road(volumes: list[Volume]) -> None:
    """Simulate a scan with correlated noise, whiten its k-space: the direct road's data, target and statistics."""
    rng = np.random.default_rng(3)
    shape = (40, 36)
    maps = draw_sensitivities(5, shape, rng)
    image = (np.hypot(*np.ogrid[-1:1:40j, -1:1:36j]) < 0.8).astype(np.complex64) * 10
    covariance = draw_covariance(5, 0.5, rng)
    factor = np.linalg.cholesky(covariance)
    inverse = torch.from_numpy(np.linalg.inv(factor))
    mask = np.ones(shape, bool)
    white = rng.standard_normal((5, *shape, 2), dtype=np.float32)
    silent = np.zeros_like(white)
    coloured = np.tensordot(factor, white.view(np.complex64)[..., 0], axes=1)

    measured = simulate(image, maps, mask, silent).kspace + torch.from_numpy(coloured)
    whitened = torch.tensordot(inverse, measured, dims=1)
    unit, brightness = whitened_coils(maps, covariance)
    direct = simulate(image * brightness, unit, mask, white)
    torch.testing.assert_close(whitened, direct.kspace, rtol=0, atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=0), 1, rtol=1e-5)
    noise = (whitened - simulate(image * brightness, unit, mask, silent).kspace).numpy().reshape(5, -1)
    found = noise @ noise.conj().T / noise.shape[1]
    # five standard errors of 2/sqrt(1440) an entry
    assert np.abs(found - 2 * np.eye(5)).max() < 0.27
    coloured_found = coloured.reshape(5, -1) @ coloured.reshape(5, -1).conj().T / noise.shape[1]
    assert np.abs(coloured_found - 2 * np.eye(5)).max() > 0.4


def test_white_noise_leaves_coils_as_they_are() -> None:
    maps = draw_sensitivities(4, (16, 20), np.random.default_rng(0))
    unit, brightness = whitened_coils(maps, np.eye(4, dtype=np.complex64))
    np.testing.assert_allclose(unit, unit_norm(maps), atol=1e-6)
    np.testing.assert_allclose(brightness, 1, rtol=1e-5)


def test_random_covariances_stay_in_their_range() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_covariance(8, 0.5, rng) for _ in range(200)]
    for covariance in drawn:
        deviations = np.sqrt(np.diag(covariance).real)
        correlation = np.abs(covariance / np.outer(deviations, deviations))
        assert correlation[~np.eye(8, dtype=bool)].max() <= 0.5 + 1e-6
        assert np.linalg.eigvalsh(covariance).min() > 0
        assert 0.4 < deviations.min() < deviations.max() < 2.5
    neighbours = [np.abs(c[0, 1]) / np.sqrt((c[0, 0] * c[1, 1]).real) for c in drawn]
    assert min(neighbours) < 0.05
    assert max(neighbours) > 0.45


@pytest.mark.parametrize("kind", ["uniform_1d", "random_1d", "random_2d", "poisson_disc"])
def test_the_largest_acceleration_has_a_mask(volumes: list[Volume], kind: Kind) -> None:
    settings = replace(ExampleSettings(), kinds=(kind,), acceleration=(12, 12))
    for seed in range(3):
        draw_example(volumes, settings, (4, 96, 100), np.random.default_rng(seed))


def lines_of(settings: ExampleSettings, seed: int, lines: int = 96) -> list[int]:
    mask = draw_mask((lines, 8), settings, np.random.default_rng(seed))
    return np.flatnonzero(mask[:, 0]).tolist()


def test_reference_lines_are_as_many_and_as_frequent_as_asked_for() -> None:
    settings = ExampleSettings(kinds=("uniform_1d",), acceleration=(8, 8), centre=24, reference_share=1.0)
    regular = list(range(0, 96, 8))
    for seed in range(20):
        assert lines_of(settings, seed) == sorted({*regular, *range(36, 60)})
        assert lines_of(replace(settings, centre=0), seed) == regular
        assert lines_of(replace(settings, reference_share=0.0), seed) == regular
        assert len(lines_of(replace(settings, centre=None), seed)) > len(regular)
        # wider than the matrix: all of its lines
        assert lines_of(replace(settings, centre=None, acceleration=(2, 2)), seed, 4) == list(range(4))
    some = [lines_of(replace(settings, reference_share=0.7), seed) != regular for seed in range(400)]
    # 4 standard deviations of a binomial share: false alarm in 1 of 16,000
    assert np.mean(some) == pytest.approx(0.7, abs=0.092)
    with pytest.raises(ValueError, match="centre must be from 0 to 16, got 24"):
        lines_of(settings, 0, lines=16)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("uniform_1d", {"acceleration": (2, 30)}, "centre random, matrix 24 .* acceleration 30 .*must be from 1 to 24"),
        ("uniform_1d", {"centre": 25}, "centre 25, matrix 24 .* acceleration 4 .*centre must be from 0 to 24"),
        ("random_1d", {"centre": 7}, "random_1d cannot be drawn with centre 7, matrix 24 .* acceleration 4 .* 6 lines"),
        ("random_2d", {"centre": 13}, "random_2d cannot be drawn with centre 13, matrix 24 .* acceleration 4 .* 144"),
        ("poisson_disc", {"centre": 13}, "poisson_disc cannot be drawn with centre 13, matrix 24 .* 144 positions"),
        ("poisson_disc", {"acceleration": (2, 600)}, "centre random, matrix 24 .* acceleration 600 .* from 1 to 576"),
    ],
)
def test_masks_that_could_not_be_drawn_are_found_at_once(kind: Kind, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"examples: .*{message}"):
        check_drawable(replace(SMALL, kinds=(kind,), **changes))


@pytest.mark.parametrize("kind", ["uniform_1d", "random_1d", "random_2d", "poisson_disc"])
def test_drawable_settings_are_drawn(kind: Kind) -> None:
    fitting = {"uniform_1d": 24, "random_1d": 6, "random_2d": 12, "poisson_disc": 12}
    for centre in (None, 0, fitting[kind]):
        settings = replace(SMALL, kinds=(kind,), centre=centre, reference_share=1.0)
        check_drawable(settings)
        for seed in range(4):
            rng = np.random.default_rng(seed)
            draw_mask(draw_sizes(settings, rng)[1:], settings, rng)


@pytest.mark.parametrize("target", [True, False])
def test_moving_keeps_types_or_matches_complex_to_real_ones(volumes: list[Volume], target: bool) -> None:
    one = draw_example(volumes, SMALL, (3, 24, 24), np.random.default_rng(0))
    one = one if target else replace(one, target=None)
    assert {tensor.dtype for tensor in tensors(one.to("cpu"))} == {torch.complex64, torch.float32}
    wide = one.to(torch.device("cpu"), torch.float64)
    assert (wide.mask.dtype, wide.kspace.dtype, wide.sensitivities.dtype) == (
        torch.float64,
        torch.complex128,
        torch.complex128,
    )
    assert (wide.target is None) != target
    assert all(torch.equal(a, b) for a, b in zip(tensors(wide.to("cpu", torch.float32)), tensors(one), strict=True))
    assert {tensor.device.type for tensor in tensors(one.to("meta"))} == {"meta"}
    with pytest.raises(ValueError, match=r"dtype must be a real floating-point type, got torch\.complex64"):
        one.to("cpu", torch.complex64)


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
        assert target_of(example).shape == (2, y, x)
        assert example.kspace.dtype == target_of(example).dtype == torch.complex64
        assert example.mask.dtype == torch.float32
        assert (example.kspace[(example.mask == 0).expand_as(example.kspace)] == 0).all()


@pytest.mark.parametrize("kind", ["uniform_1d", "random_1d", "random_2d", "poisson_disc"])
def test_acceleration_and_snr_are_those_asked_for(volumes: list[Volume], kind: Kind) -> None:
    settings = replace(SMALL, kinds=(kind,), acceleration=(3, 3), snr=(20, 20), matrix=(36, 36))
    for seed in range(6):
        example = draw_example(volumes, settings, (4, 36, 36), np.random.default_rng(seed))
        magnitude = target_of(example).abs().numpy()
        assert magnitude[object_voxels(magnitude)].mean() == pytest.approx(20, rel=1e-3)
        sampled = float(example.mask.mean())
        assert sampled >= 1 / 3 - 1e-6 if kind == "uniform_1d" else sampled == pytest.approx(1 / 3, rel=1e-3)
        along_readout = (example.mask == example.mask[..., :1]).all()
        assert bool(along_readout) == kind.endswith("1d")


def test_snr_is_that_of_the_fully_sampled_unit_norm_image(volumes: list[Volume]) -> None:
    settings = replace(SMALL, acceleration=(1, 1), snr=(20, 20), support_share=0.0, kinds=("random_2d",))
    example = draw_example(volumes, settings, (4, 40, 40), np.random.default_rng(1))
    error = SenseEncoding(example.sensitivities, example.mask).adjoint(example.kspace) - target_of(example)
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
    encoded = SenseEncoding(example.sensitivities, example.mask).forward(target_of(example))
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
        magnitude = target_of(example).abs()
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
    with pytest.raises(ValueError, match="correlation must be at least 0 and below 1, got 1"):
        ExampleSettings(correlation=1)
    with pytest.raises(ValueError, match=r"acceleration must be at least 1, got \(0.5, 2\)"):
        ExampleSettings(acceleration=(0.5, 2))
    with pytest.raises(ValueError, match="kinds must name at least one mask, got none"):
        ExampleSettings(kinds=())
    refused: list[tuple[dict[str, Any], str]] = [
        ({"matrix": (24, 38)}, r"matrix must be a range of multiples of 4, got \(24, 38\)"),
        ({"snr": (5, float("inf"))}, "snr must be a range of positive numbers"),
        ({"many_coils": 0}, "many_coils must be at least 1, got 0"),
        ({"many_coils_share": 1.1}, r"many_coils_share must be from 0 to 1, got 1\.1"),
        ({"reference_share": -0.1}, r"reference_share must be from 0 to 1, got -0\.1"),
        ({"support_share": 2.0}, r"support_share must be from 0 to 1, got 2\.0"),
        ({"intensity_share": float("nan")}, "intensity_share must be from 0 to 1, got nan"),
        ({"centre": -1}, "centre must be at least 0, got -1"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            ExampleSettings(**changes)
    with pytest.raises(ValueError, match="there are no volumes to draw from"):
        draw_example([], SMALL, (4, 32, 32), rng)
    empty = Volume("empty", np.zeros((8, 8, 8), np.int16), 1)
    with pytest.raises(ValueError, match="20 slices in a row were nearly empty"):
        draw_example([empty], SMALL, (4, 32, 32), rng)
    with pytest.raises(ValueError, match="the image is empty"):
        scale_to_snr(np.zeros((4, 4), np.float32), 20)
