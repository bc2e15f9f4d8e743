"""The σ maps are what many noisy scans through the whole pipeline show, and their error bar holds.

The comparisons are those of `bench/truth.py`, with fewer scans; seeds are fixed, so that a test which passes goes on
passing. The probability that a right product would have failed with another seed is stated in each.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def truth() -> Any:
    """The module `bench.truth`, which is no part of the installed package."""
    path = ROOT / "bench" / "truth.py"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    spec = importlib.util.spec_from_file_location("bench_truth", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["bench_truth"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GADGETRON_STORAGE_ADDRESS", raising=False)


def test_spread_is_the_deviation_along_the_phase_of_the_mean(truth: Any) -> None:
    # 2,000 draws of 400 voxels: the median's relative error is about 0.1 %
    rng = np.random.default_rng(5)
    spread, phase = truth.Spread(), np.exp(1j * rng.uniform(0, 6, 400))
    for number in range(2000):
        along, across = rng.standard_normal((2, 400))
        spread.add(number, phase * (1000 + 2 * along + 0.5j * across))
    assert np.median(spread.deviation()) == pytest.approx(2, rel=0.005)
    found = spread.against(np.full(400, 2.0), np.ones(400, dtype=bool))
    assert found["ratio"] == pytest.approx(1, abs=0.005)
    assert 1e-4 < found["error"] < 3e-3


def test_scans_differ_in_their_noise_alone(truth: Any) -> None:
    found = truth.scene(mask="uniform_1d", noise=1024)
    first, second = found.scan(0, "shared"), found.scan(1, "shared")
    for part in (0, 1):
        np.testing.assert_array_equal(first[part].samples, second[part].samples)
    for reference, part in (("anew", 1), ("shared", 2), ("embedded", 1)):
        one, other = (found.scan(number, reference)[part] for number in (0, 1))
        np.testing.assert_array_equal(one.headers, other.headers)
        # 2 Ψ t_noise / (t_acq b) in the difference of two; a variance of 8 x 10,000 samples, four of its errors
        power = np.mean(np.abs(one.samples - other.samples) ** 2, axis=(0, 2))
        expected = 2 * np.diag(found.truth.covariance).real * 10 / (5 * 0.793)
        np.testing.assert_allclose(power, expected, rtol=0.08)


@pytest.mark.slow
def test_exact_sigma_of_a_linear_reconstruction_is_the_spread_of_scans(truth: Any) -> None:
    # 60 scans: standard error 0.4 % by the jackknife; 4096 noise samples: 0.8 % a voxel, about 0.5 % in the median.
    # Together below 0.7 %: 2 % is three of them, false alarms below 0.5 %
    found = truth.compare(truth.scene(mask="uniform_1d"), truth.LINES, 60, "shared")["sense_1d_exact"]
    assert found["voxels"] > 4000
    assert found["ratio"] == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_sketched_sigma_is_the_spread_of_scans(truth: Any) -> None:
    # standard errors as above, and at most 0.3 % of the sketch. A network is not linear: the spread of its images is
    # below the mean of its Jacobian's (Poincaré's inequality), by 2 % at SNR 20 and 0.5 % at SNR 80, where this test
    # is. False alarms: below 1 % for the linear one, below 0.1 % for the network
    cases = tuple(replace(case, probes=64) for case in truth.PLANES)
    found = truth.compare(truth.scene(mask="random_2d", snr=80), cases, 40, "shared")
    assert found["sense_2d_sketch"]["ratio"] == pytest.approx(1, abs=0.02)
    assert found["unrolled_2d_sketch"]["ratio"] == pytest.approx(1, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("acceleration", [1, 4])
def test_covariance_part_of_the_error_bar_is_what_short_noise_measurements_do(truth: Any, acceleration: int) -> None:
    # 30 scans of 96 noise samples: `truth` has a standard error of 0.005, `spread` one of about 7 %; with 3 and 4 of
    # them the false alarms are below 0.5 %
    found = truth.own_noise(30, acceleration=acceleration)
    assert found.truth == pytest.approx(found.derived, abs=0.015)
    assert found.spread == pytest.approx(found.stated, rel=0.28)
    # 1 + p/N takes no account of the voxels that share the coils' samples: too large by their number over N at most
    assert -0.015 < found.bias - found.truth < (acceleration + 0.5) / found.samples + 0.015
    # a voxel's deviation is partly its own: the whole map moves by less than the stated part
    assert 0.3 * found.stated < found.common < found.stated
