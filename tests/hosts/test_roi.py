"""Questions to kept probes, as a user asks them."""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ismrmrd
import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from voxelsigma.formats.image_file import image_writer
from voxelsigma.formats.probe_file import TOKEN_KEY, VolumeMeta, open_probes, probe_path
from voxelsigma.formats.probe_writer import probe_writer
from voxelsigma.hosts.cli import app
from voxelsigma.hosts.roi import box_spectrum, kept_probes, stack_of, voxel_correlation
from voxelsigma.hosts.roi_regions import Regions, region_noise
from voxelsigma.noise.moments import moments
from voxelsigma.noise.sigma import sigma_map
from voxelsigma.noise.voxels import phase_factor

Outcome = subprocess.CompletedProcess[str]
SIZE = (20, 24)
META = VolumeMeta(
    counters={"slice": 0}, bias=1.1, covariance_error=0.03, voxel_mm=(5.0, 2.0, 1.0), model="net", labels="uncalibrated"
)
Cube = NDArray[np.complex64]


def random_complex(shape: tuple[int, ...], seed: int) -> Cube:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def smooth(shape: tuple[int, ...], seed: int) -> Cube:
    """Noise that neighbours share."""
    white = random_complex(shape, seed)
    return (white + 0.7 * np.roll(white, 1, axis=-1) + 0.5 * np.roll(white, 1, axis=-2)).astype(np.complex64)


def keep(path: Path, volumes: list[tuple[VolumeMeta, Cube, list[Cube], int]], *, token: str | None = None) -> None:
    """An image file at `path`, and beside it the probes of volumes: metadata, image, probes of each plane, axis."""
    with image_writer(path) as images, probe_writer(probe_path(path)) as writer:
        for meta, image, planes, axis in volumes:
            volume = writer.volume(meta, image, plane_axis=axis, probes=max(map(len, planes)))
            for number, plane in enumerate(planes):
                volume.plane(number)(torch.from_numpy(plane))
            item = ismrmrd.Image.from_array(np.abs(image), transpose=False, image_series_index=2000)
            item.meta = ismrmrd.Meta({TOKEN_KEY: token or writer.token})
            images.write(item)


@pytest.fixture
def slices(tmp_path: Path) -> tuple[Path, list[Cube], list[Cube]]:
    """Three slices, written out of order, with different numbers of probes: file, images, probes."""
    images = [random_complex((1, *SIZE), number) for number in range(3)]
    probes = [smooth((count, *SIZE), 10 + number) for number, count in enumerate((32, 24, 40))]
    keep(
        tmp_path / "out.h5",
        [(replace(META, counters={"slice": n}), images[n], [probes[n]], 0) for n in (2, 0, 1)],
    )
    return tmp_path / "out.h5", images, probes


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """One slice, of one phase."""
    image = (10j * np.abs(random_complex((1, *SIZE), 1))).astype(np.complex64)
    keep(tmp_path / "out.h5", [(META, image, [smooth((64, *SIZE), 2)], 0)])
    return tmp_path / "out.h5"


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the command in the test's folder, in this process: errors are printed as `main` prints them."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        found = CliRunner().invoke(app, ["roi", *map(str, arguments)])
        error = found.exception
        if error is not None and not isinstance(error, (ValueError, OSError, ModuleNotFoundError)):
            raise error
        stderr = "" if error is None else f"error: {error}\n"
        return subprocess.CompletedProcess([], found.exit_code, found.stdout, stderr)

    return run


def in_phase(image: Cube, probes: Cube) -> NDArray[np.float64]:
    turned: NDArray[np.float64] = 1.1 * (probes * np.exp(-1j * np.angle(image))).real.astype(np.float64)
    return turned


# --- answers


def test_means_of_labels_over_slices(slices: tuple[Path, list[Cube], list[Cube]]) -> None:
    path, images, probes = slices
    labels = np.random.default_rng(3).integers(0, 4, (3, *SIZE))
    labels[1][labels[1] == 2] = 0
    with kept_probes(path) as kept:
        stack = stack_of(kept)
        assert stack.shape == (3, *SIZE)
        found, noise = region_noise(stack, Regions.of_labels("m", labels))
    assert [region.name for region in found] == ["m:1", "m:2", "m:3"]
    for label, region in enumerate(found, start=1):
        count = int((labels == label).sum())
        assert (region.voxels, region.quantity, region.probes) == (count, "mean", 24)
        assert region.value == pytest.approx(np.abs(np.concatenate(images))[labels == label].mean(), rel=1e-5)
        variance, independent = 0.0, 0.0
        for number in range(3):
            a = in_phase(images[number][0], probes[number])[:, labels[number] == label] / count
            variance += np.mean(a.sum(axis=1) ** 2)
            independent += np.mean(a**2, axis=0).sum()
        assert noise.covariance[label - 1, label - 1] == pytest.approx(variance, rel=1e-5)
        assert region.independent_sigma == pytest.approx(independent**0.5, rel=1e-5)
        assert region.ratio == pytest.approx((variance / independent) ** 0.5, rel=1e-5)
        assert region.effective_voxels == pytest.approx(count * independent / variance, rel=1e-5)
        assert region.lower < region.sigma < region.upper
        assert region.snr == pytest.approx(region.value / region.sigma)


def test_one_voxel_is_the_sigma_map(slices: tuple[Path, list[Cube], list[Cube]]) -> None:
    path, images, probes = slices
    direction = phase_factor(torch.from_numpy(images[1][0]))
    expected = sigma_map(moments(torch.from_numpy(probes[1]), None), "magnitude", direction=direction)
    labels = np.zeros((1, *SIZE), dtype=np.int64)
    labels[0, 7, 9] = 1
    with kept_probes(path) as kept:
        stack = stack_of(kept, slice_number=1)
        ((region,), _) = region_noise(stack, Regions.of_labels("m", labels))
        correlation, sigma, place, axes = voxel_correlation(stack, (7, 9))
    assert region.name == "m"
    assert region.sigma == pytest.approx(1.1 * float(expected.sigma[7, 9]), rel=1e-5)
    assert region.median_sigma == pytest.approx(region.sigma)
    assert (place, axes) == ((7, 9), "(y, x)")
    assert float(sigma.sigma[7, 9]) == pytest.approx(region.sigma)
    assert float(correlation.coefficient[7, 9]) == pytest.approx(1)


def test_a_region_in_one_of_several_slices_is_that_slices(slices: tuple[Path, list[Cube], list[Cube]]) -> None:
    labels = np.zeros((3, *SIZE), dtype=np.int64)
    labels[2, 3:6, 4:8] = 1
    with kept_probes(slices[0]) as kept:
        whole, _ = region_noise(stack_of(kept), Regions.of_labels("m", labels))
        alone, _ = region_noise(stack_of(kept, slice_number=2), Regions.of_labels("m", labels[2:]))
    assert whole == alone
    assert whole[0].probes == 40


@pytest.mark.parametrize("counts", [(30, 30, 30, 30, 30, 30), (30, 20, 30, 40, 30, 30)])
def test_a_volume_decoupled_along_the_readout(tmp_path: Path, counts: tuple[int, ...]) -> None:
    shape = (5, 8, 6)
    image = random_complex(shape, 1)
    probes = [smooth((count, *shape[:2]), 20 + x) for x, count in enumerate(counts)]
    keep(tmp_path / "out.h5", [(META, image, probes, 2)])
    weights = np.random.default_rng(4).standard_normal(shape) * (np.random.default_rng(5).random(shape) < 0.5)
    parts = [in_phase(image[..., x], probes[x]) for x in range(6)]
    with kept_probes(tmp_path / "out.h5") as kept:
        ((region,), _) = region_noise(stack_of(kept), Regions.of_weights("w", weights))
        layer = stack_of(kept, slice_number=3)
        ((flat,), noise) = region_noise(layer, Regions.of_weights("w", weights[3:4]))
        correlation, _, place, axes = voxel_correlation(layer, (2, 4))
        spectrum, unit = box_spectrum(layer, (slice(1, 7), slice(0, 5)))
    value = float((weights * np.abs(image)).sum())
    assert region.value == pytest.approx(value, rel=1e-5)
    assert (region.quantity, region.effective_voxels) == ("sum", None)
    assert region.voxels == np.count_nonzero(weights)
    own = [np.mean((part * weights[..., x]).sum(axis=(1, 2)) ** 2) for x, part in enumerate(parts)]
    freedom = sum(own) ** 2 / sum(v**2 / (n - 1) for v, n in zip(own, counts, strict=True))
    # σ is corrected for the square root at these degrees of freedom, about 1 + 1/4ν
    assert region.sigma == pytest.approx(sum(own) ** 0.5 * (1 + 0.25 / freedom), rel=1e-3)
    layered = sum(np.mean((part[:, 3] * weights[3, :, x]).sum(axis=1) ** 2) for x, part in enumerate(parts))
    assert noise.covariance[0, 0] == pytest.approx(layered, rel=1e-5)
    assert flat.voxels == np.count_nonzero(weights[3])
    assert (place, axes) == ((3, 2), "(z, y)")
    a = parts[4]
    expected = (a * a[:, 3:4, 2:3]).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (a[:, 3, 2] ** 2).sum())
    np.testing.assert_allclose(correlation.coefficient, expected, rtol=1e-4, atol=1e-6)
    draws = np.stack([part[: min(counts[:5]), 3, 1:7] for part in parts[:5]], axis=-1)
    assert (spectrum.probes, unit) == (min(counts[:5]), "mm")
    assert spectrum.variance == pytest.approx((draws**2).mean(), rel=1e-5)


def test_stacks_are_told_apart_by_their_counters(tmp_path: Path) -> None:
    images = {n: (n + 1) * np.ones((1, *SIZE), dtype=np.complex64) for n in range(5)}
    counters = [{"slice": 0, "repetition": 1}, {"slice": 0}, {"slice": 1}, {"slice": 0, "repetition": 1}, {"slice": 4}]
    probes = [smooth((4, *SIZE), 1)]
    keep(tmp_path / "out.h5", [(replace(META, counters=c), images[n], probes, 0) for n, c in enumerate(counters)])
    with kept_probes(tmp_path / "out.h5") as kept:
        stacks = [
            [float(volume.image().real.max()) for volume in stack_of(kept, number).volumes] for number in range(3)
        ]
        assert stacks == [[2, 3, 5], [1], [4]]
        with pytest.raises(ValueError, match=r"has 3 sets of slices; there is none with number 3"):
            stack_of(kept, 3)
        with pytest.raises(ValueError, match=r"has 3 slices; there is none with number 3"):
            stack_of(kept, 0, 3)


# --- the command


def test_the_table(cli: Callable[..., Outcome], one: Path, tmp_path: Path) -> None:
    mask = np.zeros(SIZE, dtype=bool)
    mask[4:9, 5:12] = True
    np.save(tmp_path / "roi.npy", mask)
    np.save(tmp_path / "w.npy", np.where(mask, 1 / 35, 0.0))
    found = cli("roi", one, "--mask", "roi.npy", "--weights", "w.npy", "--box", "4:9,5:12", "--voxel", "6,7")
    assert (found.returncode, found.stderr) == (0, "")
    lines = [line for line in found.stdout.splitlines() if line.strip()]
    assert lines[0].startswith(str(one))
    assert lines[0].endswith("net, 1 x 20 x 24, SNR units, uncalibrated")
    assert lines[1].split()[:4] == ["region", "voxels", "of", "value"]
    mean, total, box = (line.split() for line in lines[3:6])
    assert (mean[:3], total[:3], box[:3]) == (
        ["roi.npy", "35", "mean"],
        ["w.npy", "35", "sum"],
        ["4:9,5:12", "35", "mean"],
    )
    # the same functional three times
    assert mean[3:9] == total[3:9] == box[3:9]
    assert lines[6].startswith("voxel 6,7: sigma ")
    assert "1.00" in found.stdout
    assert (
        lines[-1]
        == "coil covariance: factor 1.1 applied, random part 3 % of sigma, common to all, not in the intervals"
    )


def test_json_and_files(ask: Callable[..., Outcome], one: Path, tmp_path: Path) -> None:
    arguments = ["--voxel", "0,23", "--box", "0:8,2:14", "--box", "0:0,0:0"][:4]
    found = ask(probe_path(one), *arguments, "--spectrum", "s.npy", "--correlation", "c.npy", "--json")
    assert (found.returncode, found.stderr) == (0, "")
    answer = json.loads(found.stdout)
    assert answer["shape"] == [1, *SIZE]
    (region,) = answer["regions"]
    assert region["effective_voxels"] < region["voxels"] == 96
    assert answer["covariance"][0][0] > 0
    assert answer["voxel"]["first"] == [0, 20]
    assert answer["voxel"]["correlation"][0][3] == pytest.approx(1)
    power = np.load(tmp_path / "s.npy")
    assert power.shape == (8, 12)
    # cycles/mm: the integral is the mean power over the area of a voxel
    assert answer["spectrum"]["variance"] == pytest.approx(power.mean() / 2)
    assert np.load(tmp_path / "c.npy").shape == SIZE
    drawn = ask(one, "--box", "0:8,2:14", "--spectrum", "s.png", "--window", "hann")
    assert drawn.returncode == 0
    assert (tmp_path / "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_nifti_labels_are_turned_round(one: Path, ask: Callable[..., Outcome], tmp_path: Path) -> None:
    labels = np.zeros(SIZE, dtype=np.int16)
    labels[3:5, 10:14] = 4
    labels[9, 0] = 7
    made = nibabel.nifti1.Nifti1Image(labels[None].T, np.eye(4))  # type: ignore[no-untyped-call]
    nibabel.save(made, tmp_path / "l.nii.gz")
    np.save(tmp_path / "l.npy", labels)
    answers = [json.loads(ask(one, "--mask", name, "--json").stdout) for name in ("l.nii.gz", "l.npy")]
    first, second = ([{**region, "name": ""} for region in answer["regions"]] for answer in answers)
    assert first == second
    assert [region["name"] for region in answers[1]["regions"]] == ["l.npy:4", "l.npy:7"]
    assert [region["voxels"] for region in first] == [8, 1]


def test_voxels_that_share_an_interpolated_readout_are_warned_of(ask: Callable[..., Outcome], tmp_path: Path) -> None:
    keep(
        tmp_path / "out.h5",
        [(replace(META, independent_planes=False), random_complex((1, 8, 8), 1), [smooth((8, 8, 8), 2)], 0)],
    )
    found = ask("out.h5", "--box", "0:4,0:4")
    assert found.stdout.splitlines()[-1].startswith("the readout was interpolated: noise of neighbouring x")


# --- bad input


def mask_of(value: Any, dtype: Any = None) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        np.save(folder / "m.npy", np.asarray(value, dtype=dtype))

    return save


def text_file(folder: Path) -> None:
    (folder / "m.npy").write_text("text")


def archive(folder: Path) -> None:
    np.savez(folder / "m.npz", a=np.ones(SIZE), b=np.ones(SIZE))
    (folder / "m.npz").rename(folder / "m.npy")


def no_file(folder: Path) -> None:
    del folder


ONES = np.ones(SIZE)


@pytest.mark.parametrize(
    ("make", "option", "text"),
    [
        (no_file, "--mask", r"m\.npy: no such file; expected a mask"),
        (text_file, "--mask", r"m\.npy: not a NumPy array of numbers"),
        (archive, "--mask", r"m\.npy: holds several arrays; expected one"),
        (
            mask_of(ONES.T),
            "--mask",
            r"m\.npy: has the shape \(24, 20\); expected \(z, y, x\) = \(1, 20, 24\)",
        ),
        (mask_of(0 * ONES), "--mask", r"m\.npy: the mask is empty: all of its 480 voxels are 0"),
        (mask_of(-ONES), "--mask", r"m\.npy: labels from -1.* expected 0 \(outside\) and above"),
        (mask_of(ONES / 2), "--mask", r"m\.npy: a mask of float64 with numbers that are not whole; .*--weights"),
        (mask_of(ONES, complex), "--mask", r"m\.npy: a mask of complex128; expected booleans or whole numbers"),
        (mask_of(ONES, str), "--weights", r"m\.npy: weights of <U32; expected real numbers"),
        (mask_of(ONES * np.nan), "--weights", r"m\.npy: 480 of 480 weights are NaN or Inf"),
        (mask_of(ONES * np.nan), "--mask", r"m\.npy: a mask of float64 with numbers that are not whole"),
        (mask_of(0 * ONES), "--weights", r"m\.npy: all of its 480 weights are 0"),
    ],
)
def test_bad_masks(
    ask: Callable[..., Outcome], one: Path, tmp_path: Path, make: Callable[[Path], None], option: str, text: str
) -> None:
    make(tmp_path)
    assert_error(ask(one, option, "m.npy"), text)


def assert_error(found: Outcome, text: str) -> None:
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.count("\n") == 1
    assert re.match(f"error: {text}", found.stderr)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "roi: nothing to look at; give --mask, --weights, --box or --voxel"),
        ("--voxel 20,0", r"roi: voxel 20,0 is outside; the image has \(y, x\) = \(20, 24\)"),
        ("--voxel 5", "roi: --voxel must be y,x, got '5'"),
        ("--box 1:5", "roi: --box must be y0:y1,x0:x1, got '1:5'"),
        ("--box 5:5,0:3", "roi: box 5:5,0:3 is empty or reaches outside"),
        ("--box 0:5,0:25", "roi: box 0:5,0:25 is empty or reaches outside"),
        ("--box 0:3,0:9 --spectrum s.npy", "a noise power spectrum needs a region of at least 4 x 4 voxels, got 3 x 9"),
        ("--box 0:8,0:9 --spectrum s.txt", r"s\.txt: a spectrum is written as \.npy or \.png, got '\.txt'"),
        ("--box 0:8,0:9 --spectrum no/s.npy", r"no/s\.npy: folder .* does not exist"),
        ("--voxel 1,1 --spectrum s.npy", "roi: --spectrum needs one --box"),
        ("--box 0:8,0:9 --window flat", "roi: --window must be none or hann, got 'flat'"),
        ("--box 0:8,0:9 --correlation c.npy", "roi: --correlation needs --voxel"),
        ("--voxel 1,1 --correlation c.png", r"c\.png: a correlation map is written as \.npy"),
        ("--voxel 1,1 --slice 1", r"out\.probes\.h5: has 1 slices; there is none with number 1"),
        ("--voxel 1,1 --stack 1", r"out\.probes\.h5: has 1 sets of slices; there is none with number 1"),
    ],
)
def test_bad_questions(ask: Callable[..., Outcome], one: Path, tmp_path: Path, arguments: str, text: str) -> None:
    assert_error(ask("out.h5", *arguments.split()), text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5", "out.probes.h5"]


def test_several_slices_need_to_be_told_apart(
    ask: Callable[..., Outcome], slices: tuple[Path, list[Cube], list[Cube]], tmp_path: Path
) -> None:
    np.save(tmp_path / "m.npy", ONES)
    assert_error(ask("out.h5", "--mask", "m.npy"), r"m\.npy: has the shape .*, of one slice among 3; .* --slice")
    assert_error(ask("out.h5", "--box", "0:5,0:5"), "roi: a box is looked at in one slice; name one of the 3")
    assert_error(ask("out.h5", "--voxel", "0,5"), "roi: a voxel is looked at in one slice; name one of the 3")
    assert ask("out.h5", "--mask", "m.npy", "--slice", 2, "--voxel", "0,5").returncode == 0


def test_images_without_probes(ask: Callable[..., Outcome], one: Path, tmp_path: Path) -> None:
    question = ("--box", "0:5,0:5")
    with image_writer(tmp_path / "bare.h5") as images:
        images.write(ismrmrd.Image.from_array(np.ones(SIZE, dtype=np.float32), transpose=False))
    assert_error(
        ask("bare.h5", *question), r"bare\.h5: no probes were kept with these images; .*replay .* --keep-probes"
    )
    one.rename(tmp_path / "moved.h5")
    assert_error(ask("moved.h5", *question), r"moved\.probes\.h5: no such file; the probes that belong to moved")
    assert_error(ask("none.h5", *question), r"none\.h5: no such file")
    keep(tmp_path / "out.h5", [(META, random_complex((1, *SIZE), 1), [smooth((4, *SIZE), 2)], 0)], token="other")
    assert_error(ask("out.h5", *question), r"out\.probes\.h5: its probes are of another run than out\.h5")


def test_a_damaged_file(cli: Callable[..., Outcome], one: Path) -> None:
    path = probe_path(one)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert_error(cli("roi", "out.h5", "--box", "0:5,0:5"), r"out\.probes\.h5: ")
    with pytest.raises((ValueError, OSError)), open_probes(path):
        pass
