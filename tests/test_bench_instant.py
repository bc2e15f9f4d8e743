"""The comparison of predictions with sketches runs, and its figures mean what they say."""

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from voxelsigma.models.network import Network
from voxelsigma.models.predictor import SigmaPredictor
from voxelsigma.noise.sigma import SigmaMap, root_bias
from voxelsigma.training.start import start_network

ROOT = Path(__file__).resolve().parents[1]
SIZE = 48
COUNTS = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """`bench`, which is no part of the installed package, from the source tree, with fewer probes."""
    if not (ROOT / "bench" / "instant.py").is_file():
        pytest.skip(f"{ROOT / 'bench'} is not there")
    sys.path.insert(0, str(ROOT))
    with pytest.MonkeyPatch.context() as patch:
        found = importlib.import_module("bench.instant")
        patch.setattr(found, "COUNTS", COUNTS)
        yield found
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def data(module: Any) -> str:
    """Where the held-out heads are."""
    folder: str | None = importlib.import_module("bench.networks").data_folder()
    if folder is None:
        pytest.skip("needs the held-out heads")
    return folder


@pytest.fixture
def console() -> Console:
    """One that keeps what is printed."""
    return Console(record=True, width=200)


@pytest.fixture(scope="module")
def row(module: Any) -> Any:
    """Figures of a phantom, by a predictor that nobody trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        predictor = SigmaPredictor(channels=4, levels=2).eval()
    network = Network(function=start_network("unrolled", {"steps": 2, "blocks": 1, "channels": 4}, seed=1))
    made = importlib.import_module("bench.networks").make_case("tiny", (SIZE, SIZE), acceleration=3.0)
    case = module.Case(group="phantom", network=network, plane=made.plane, kspace=made.kspace)
    return module.one_scan(case, predictor, 1, 256)


def test_a_scan_has_figures_of_all_roads(module: Any, row: Any) -> None:
    names = {f"{kind} {road}" for kind in ("magnitude", "complex") for road in module.ROADS}
    assert set(row["squares"]) == set(row["covered"]) == names
    assert all(len(one) == len(COUNTS) for part in ("squares", "covered") for one in row[part].values())
    assert len(row["passed"]) == len(COUNTS)
    plain, own, ours = (row["seconds"][road] for road in module.ROADS)
    assert all(0 < one < two < three for one, two, three in zip(plain, own, ours, strict=True))
    assert plain == sorted(plain)
    assert row["worst_region"] >= 0


def test_the_plain_sketch_is_as_wrong_as_it_must_be(row: Any) -> None:
    for count, square, covered in zip(
        COUNTS, row["squares"]["magnitude plain"], row["covered"]["magnitude plain"], strict=True
    ):
        # 1/sqrt(2 S) of each voxel; neighbours are alike, so that some hundreds of numbers are left: a tenth
        assert square**0.5 == pytest.approx((2 * count) ** -0.5, rel=0.3)
        assert covered == pytest.approx(0.95, abs=0.04)


def test_tables_can_be_made(module: Any, row: Any) -> None:
    found = {"network": "mine", "group": "phantom", **module.pooled([row, row])}
    assert found["scans"] == 2
    for kind in found["kinds"]:
        made = module.table(found, kind)
        assert [column.header for column in made.columns] == ["road", "8", "16", "32", "64", "s to 5 %", "s to 3 %"]
        assert made.row_count == len(module.ROADS) + 2
    assert len(list(module.tables([found, found]))) == 2 * len(found["kinds"])


def test_a_short_run_is_of_held_out_heads_alone(module: Any, data: str, console: Console) -> None:
    groups = module.figures(name="unrolled_small", data=data, accelerations=[6.0], matrix=48, reference=64)
    (found,) = groups
    assert (found["network"], found["group"], found["scans"]) == ("unrolled_small", "held-out heads, R=6", 1)
    assert json.loads(json.dumps(groups)) == groups
    importlib.import_module("bench.__main__").show({"instant": groups}, console)
    printed = console.export_text()
    for kind in ("magnitude", "complex"):
        assert f"unrolled_small, held-out heads, R=6, {kind}, 1 scans" in printed


def test_a_whole_run_leaves_predictions_out_where_there_are_no_heads(module: Any) -> None:
    main = importlib.import_module("bench.__main__")
    said: list[str] = []
    assert main.measure(main.Plan(parts=("instant",)), None, said.append) == {}
    assert said == ["predictions: left out, there are no held-out heads"]


def test_a_whole_run_asks_for_what_the_short_run_takes(module: Any, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    main = importlib.import_module("bench.__main__")
    called: list[Any] = []

    def call_up(self: Any) -> list[Any]:
        called.append(self)
        return []

    monkeypatch.setattr(main.Call, "__call__", call_up)
    assert main.measure(main.Plan(parts=("instant",), predicted=(6.0,)), data, lambda text: None) == {"instant": []}
    (call,) = called
    assert call.target == "bench.instant:figures"
    inspect.signature(module.figures).bind(**call.arguments)
    assert call.arguments["accelerations"] == (6.0,)


def test_agreement_allows_for_the_error_of_the_reference(module: Any) -> None:
    generator = np.random.default_rng(1)

    def drawn(count: int) -> SigmaMap:
        energy = torch.from_numpy(generator.chisquare(count, (100, 100)) / count)
        freedom = torch.full_like(energy, count)
        return SigmaMap(
            sigma=energy.sqrt() / root_bias(freedom),
            degrees_of_freedom=freedom,
            kind="magnitude",
            probes=count,
            explained=torch.zeros_like(energy),
        )

    inside = torch.ones(100, 100, dtype=torch.bool)
    for ours, theirs in ((8, 64), (100, 100), (500, 64)):
        # 10000 voxels: a standard error of 0.22 %, five of them
        assert module.coverage(drawn(ours), drawn(theirs), inside) == pytest.approx(0.95, abs=0.011)


def test_the_time_to_an_error(module: Any) -> None:
    errors, seconds = [0.2, 0.1, 0.05], [1.0, 2.0, 8.0]
    assert module.time_to(0.3, errors, seconds) == 1.0
    assert module.time_to(0.1, errors, seconds) == pytest.approx(2.0)
    assert module.time_to(2**0.5 / 20, errors, seconds) == pytest.approx(4.0)
    assert module.time_to(0.025, errors, seconds) == pytest.approx(32.0)


def test_the_certificate_is_judged_by_the_worst_region(module: Any) -> None:
    def scan(worst: float, *, kept: bool, ours: float = 0.01) -> dict[str, Any]:
        squares = {"magnitude instant": [ours], "magnitude control variate": [0.0095]}
        return {"worst_region": worst, "kept": kept, "kinds": ["magnitude"], "squares": squares}

    told = module.certified([scan(0.05, kept=True), scan(0.1, kept=False), scan(0.2, kept=False)])
    assert (told["scans"], told["wrong_found"], told["false_alarms"]) == (3, None, 0.5)
    # 1.05 of the error is 1.1025 of its square
    assert told["worse_than_control_variate"] == 0.0
    told = module.certified([scan(0.4, kept=True, ours=0.011), scan(0.5, kept=False), scan(0.2, kept=True)])
    assert (told["wrong_found"], told["false_alarms"]) == (0.5, None)
    assert told["worse_than_control_variate"] == pytest.approx(1 / 3)


def test_scans_are_measured_in_turns(module: Any, data: str) -> None:
    options = module.parsed(
        ["mine", "--slices", "2", "--elsewhere", "1", "-R", "4", "8", "--matrix", "48", "--data", data]
    )
    network = Network(function=start_network("unrolled", {"steps": 1, "blocks": 1, "channels": 4}, seed=1))
    cases = list(module.all_cases("unrolled_small", network, options))
    groups = [case.group for case in cases]
    heads = ["held-out heads, R=4", "held-out heads, R=8"]
    assert groups[:2] == groups[-2:] == heads
    assert groups[2:-2] == [
        "R=12",
        "lines, R=4, 144, 20 coils, masked maps",
        "phantom, R=6",
        "another network (unrolled_ssdu), R=6",
    ]
    sizes = {case.group: tuple(case.kspace.shape) for case in cases}
    assert sizes.pop("lines, R=4, 144, 20 coils, masked maps") == (20, 144, 144)
    assert set(sizes.values()) == {(8, 48, 48)}
