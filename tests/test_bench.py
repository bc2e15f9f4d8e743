"""The comparisons of `make bench` run on their smallest setting, and their figures have the documented keys."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TINY, SIZE = "tiny", 32


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    """Make `bench`, which is no part of the installed package, importable from the source tree."""
    if not (ROOT / "bench" / "__main__.py").is_file():
        pytest.skip(f"{ROOT / 'bench'} is not there")
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def probe() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # it silences torch for the whole of a process that this one is not
        patch.setattr("warnings.filters", [])
        yield importlib.import_module("bench.probe_cost").measure(TINY, [SIZE, SIZE], repeats=2, seconds=0.1)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def error(tmp_path_factory: pytest.TempPathFactory) -> Any:
    module = importlib.import_module("bench.error")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHE", tmp_path_factory.mktemp("references"))
        arguments = {"acceleration": 4.0, "probes": 64, "reference": 128, "data": None, "network": TINY, "size": SIZE}
        first, again = module.measure(**arguments), module.measure(**arguments)
        assert len(list(module.CACHE.iterdir())) == 1
    assert first == again
    return first


def test_every_road_has_a_cost(probe: Any) -> None:
    titles = importlib.import_module("bench.roads").TITLES
    assert probe["failed"] == {}
    assert set(probe["sides"]) == set(titles)
    for side in probe["sides"].values():
        assert 0 < side["least"] <= side["passes"] <= side["most"]
        assert side["setup_passes"] > 0


def test_errors_fall_as_the_square_root_says(error: Any) -> None:
    # 700 voxels, about 100 of them independent, 8 groups at S = 8 and 1 at S = 64, where 10 % is one standard error:
    # false alarms below 1 %. The plain magnitude map has √(1/2S) at any S
    plain = error["curves"]["sketch, plain"]["magnitude"]
    for count in ("8", "16", "32", "64"):
        assert plain[count] == pytest.approx((2 * int(count)) ** -0.5, rel=0.3)
    assert error["constants"]["sketch, plain"]["magnitude"] == pytest.approx(0.5**0.5, rel=0.2)
    repeated = error["constants"]["Monte Carlo, plain"]["magnitude"]
    assert repeated == pytest.approx(0.5**0.5, rel=0.2)


def test_both_methods_gain_by_a_covariate(error: Any) -> None:
    for method in ("sketch", "Monte Carlo"):
        for name in ("zero-filled", "learned filter"):
            assert error["constants"][f"{method}, {name}"]["magnitude"] < 0.7 * 0.5**0.5


def test_time_follows_from_cost_and_error(probe: Any, error: Any) -> None:
    times = importlib.import_module("bench.times")
    found = times.times_to_error([probe], [error])
    assert {(entry["kind"], entry["target"]) for entry in found} == {
        (kind, target) for kind in ("magnitude", "complex") for target in times.TARGETS
    }
    entry = found[0]
    assert set(entry["rows"]) == {name for name, _, _ in times.ROWS}
    ours, cost = entry["rows"]["ours, plain"], probe["sides"]["ours"]
    probes = (error["constants"]["sketch, plain"]["magnitude"] / entry["target"]) ** 2
    assert probes <= ours["probes"] < probes + 1
    assert ours["seconds"] == pytest.approx(
        (cost["setup_passes"] + ours["probes"] * cost["passes"]) * probe["forward_ms"] / 1000
    )
    assert entry["rows"]["Monte Carlo"]["against_monte_carlo"] == 1
    assert list(times.tables(found))


def test_a_run_has_tables_and_the_documented_keys(probe: Any, error: Any) -> None:
    main = importlib.import_module("bench.__main__")
    plan = main.Plan(parts=("memory",), settings=((TINY, (SIZE, SIZE)),), most=16, tries=1)
    found = {**importlib.import_module("bench.machine").record(), **main.measure(plan, None, lambda text: None)}
    found |= {"probe": [probe], "error": [error]}
    found["time_to_error"] = importlib.import_module("bench.times").times_to_error([probe], [error])
    (peaks,) = found["memory"]
    assert set(peaks["sides"]) == {"monte_carlo", "published", "chunked", "linearize_vmap", "ours"}
    assert all(peak["16"] >= peaks["base_mb"] for peak in peaks["sides"].values())
    console = main.Console(record=True, width=200)
    main.show(found, console)
    printed = console.export_text()
    for title in ("A probe in forward passes", "Peak memory", "Error of the complex map", "Time to σ error"):
        assert title in printed
    text = json.dumps(found)
    assert json.loads(text) == found
    documented = set(re.findall(r"`(\w+)(?:\[\])?`", (ROOT / "bench" / "README.md").read_text(encoding="utf-8")))
    assert set(found) <= documented
    for part in ("probe", "memory", "error", "time_to_error"):
        assert set(found[part][0]) <= documented
    assert set(probe["sides"]["ours"]) <= documented


def test_a_failing_process_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    call = importlib.import_module("bench.processes").Call(target="bench.processes:nothing", arguments={"size": 1})
    with pytest.raises(RuntimeError, match=r"bench.processes:nothing \{'size': 1\} ended with status 1"):
        call()
    assert "AttributeError" in capfd.readouterr().err
