"""The comparison of networks with the linear reconstruction, and its tables."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from voxelsigma.models.cards import ARCHITECTURES, load_card
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.figures import Figures
from voxelsigma.models.network import Network, NetworkFunction
from voxelsigma.training.agreement import Agreement, agreement
from voxelsigma.training.card import write_card
from voxelsigma.training.compare import (
    REGULARIZATIONS,
    Comparison,
    Scores,
    applied,
    baselines,
    compared,
    least_squares,
    median_sigma,
    plane_of,
    scores,
    sketched,
    zero_filled,
)
from voxelsigma.training.evaluate import EvaluateOptions, run
from voxelsigma.training.examples import Example, collate
from voxelsigma.training.held_out import Setting, held_out_scans, held_out_slices, settings
from voxelsigma.training.report import Result, agreement_grid, figures, grids
from voxelsigma.training.volumes import Volume

SMALL: dict[str, dict[str, Any]] = {
    "modl": {"steps": 1, "blocks": 1, "channels": 2},
    "unet": {"channels": 2, "levels": 2, "residual": True},
    "unrolled": {"steps": 2, "blocks": 1, "channels": 3},
    "varnet": {"cascades": 1, "channels": 2, "levels": 2, "sensitivity_channels": 2, "sensitivity_levels": 2},
}


def ball() -> Volume:
    z, y, x = np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]
    return Volume("ball", (np.sqrt(z**2 + y**2 + x**2) < 0.95).astype(np.int16), 2)


@pytest.fixture(scope="module")
def scans() -> list[Example]:
    setting = Setting(mask="random_2d", acceleration=2, matrix=32)
    return held_out_slices([ball()], setting.examples(), slices=2, seed=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two heads, of whom one is a ball."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("head_07", "head_09"):
        np.savez(folder / f"{name}.npz", vol=ball().values * 100)
    return folder


@pytest.fixture
def cards(tmp_path: Path) -> dict[str, Path]:
    """A card of every architecture, of networks that nobody trained."""
    for architecture, values in SMALL.items():
        write_card(
            tmp_path / f"my_{architecture}.yaml",
            network(architecture),
            architecture=architecture,
            hyperparameters=values,
            fit_for={"acceleration": [2, 8], "coils": [4, 32], "dimension": 2},
            trained_on="nothing",
            evaluation="Not measured yet.",
            licence="CC0-1.0",
        )
    return {architecture: tmp_path / f"my_{architecture}.yaml" for architecture in SMALL}


def network(architecture: str) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return ARCHITECTURES[architecture](**SMALL[architecture]).eval()


def shipped(function: NetworkFunction) -> Network:
    return Network(function=function, estimates_sensitivities=bool(getattr(function, "estimates_sensitivities", False)))


def evaluated(console: Console | None = None, **options: Any) -> list[str]:
    told: list[str] = []
    given = {"matrix": 32, "slices": 2, "masks": ("random_2d",), "accelerations": (2.0,), **options}
    run(EvaluateOptions(**given), console or Console(file=io.StringIO()), told.append)
    return told


# --- reconstructions


def test_least_squares_is_the_dense_solution() -> None:
    scan = held_out_slices([ball()], Setting(mask="random_2d", acceleration=2, matrix=32).examples(), slices=1, seed=0)[
        0
    ]
    part = Example(scan.kspace[:4, :16, :16], scan.sensitivities[:4, :16, :16], scan.mask[:, :16, :16], None)
    regularization = 0.05
    encoding = SenseEncoding(part.sensitivities, part.mask)
    basis = torch.eye(256, dtype=torch.complex64).reshape(256, 16, 16)
    matrix = encoding.forward(basis).reshape(256, -1).T.to(torch.complex128)
    normal = matrix.mH @ matrix + regularization * torch.eye(256)
    expected = torch.linalg.solve(normal, matrix.mH @ part.kspace.flatten().to(torch.complex128))
    found = least_squares(part, regularization, tolerance=1e-6).flatten().to(torch.complex128)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize(
    "tried", [(1e-3, 0.1, 100.0), (0.3, 1.0, 3.0, 10.0, 30.0), (1e-5, 1e-4, 1e-3, 1e-2), (0.02,)], ids=str
)
def test_comparison_takes_the_best_regularization(scans: list[Example], tried: tuple[float, ...]) -> None:
    result = compared(scores(applied(shipped(network("unrolled"))), scans), baselines(scans, tried))
    each = {value: scores(lambda scan, by=value: least_squares(scan, by), scans).mean_psnr for value in tried}  # type: ignore[misc]
    assert result.linear == max(each.values())
    assert each[result.regularization] == max(each.values())
    assert result.gain == pytest.approx(result.network - result.linear, abs=1e-4)
    assert result.zero_filled == scores(zero_filled, scans).mean_psnr
    assert result.gain_over_zero_filled == result.network - result.zero_filled


@pytest.mark.parametrize("architecture", sorted(SMALL))
def test_slices_are_those_of_the_batch(scans: list[Example], architecture: str) -> None:
    module, together = network(architecture), collate(scans)
    drawn = held_out_scans([ball()], Setting(mask="random_2d", acceleration=2, matrix=32).examples(), slices=2, seed=0)
    assert torch.equal(drawn.kspace, together.kspace)
    with torch.no_grad():
        batch = module(together.kspace, together.sensitivities, together.mask)
        single = [applied(shipped(module))(scan) for scan in scans]
    for image, found in zip(batch, single, strict=True):
        torch.testing.assert_close(found, image, rtol=1e-4, atol=1e-3)


def ones(kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
    """A network with a bias, beside the zero-filled image."""
    return zero_filling(kspace, sensitivities, mask) + 3


@pytest.mark.parametrize("maps", ["full", "masked"])
def test_networks_are_evaluated_as_pipelines_have_them(maps: Any) -> None:
    setting = Setting(mask="random_2d", acceleration=2, matrix=32, maps=maps)
    (scan,) = held_out_slices([ball()], setting.examples(), slices=1, seed=0)
    unseen = scan.sensitivities.abs().square().sum(dim=0) == 0
    assert bool(unseen.any()) == (maps == "masked")
    for model in (shipped(ones), Network(function=ones, estimates_sensitivities=True)):
        image = applied(model)(scan)
        linearization, sketch = sketched(model, scan, probes=4, seed=1)
        torch.testing.assert_close(linearization.value, image)
        torch.testing.assert_close(image, model.bind(plane_of(scan))(scan.kspace))
        # where no coil sees anything the bias is neither image nor noise, unless the model sees for itself
        outside = image[unseen]
        expected = 3 if model.estimates_sensitivities else 0
        torch.testing.assert_close(outside, torch.full_like(outside, expected))
        assert not bool(sketch.map("complex").sigma[unseen].any())


def test_a_scan_without_reference_is_no_scan_to_compare_with(scans: list[Example]) -> None:
    blind = [dataclasses.replace(scan, target=None) for scan in scans]
    with pytest.raises(ValueError, match="evaluate: a scan has no reference to compare with"):
        baselines(blind)


# --- σ


def zero_filling(kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
    return SenseEncoding(sensitivities, mask).adjoint(kspace)


def rooted(kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
    return torch.view_as_real(zero_filling(kspace, sensitivities, mask)).square().sum(dim=-1).sqrt()


def test_sigma_of_zero_filling_is_known(scans: list[Example]) -> None:
    # unit-norm maps: σ² is the sampled part; as its own control variate it has no error
    sigma, ratio = median_sigma(shipped(zero_filling), scans[0], probes=16)
    assert sigma == pytest.approx(0.5**0.5, rel=1e-3)
    assert ratio == pytest.approx(0.5, rel=1e-3)


def test_the_sketch_agrees_with_repetitions(scans: list[Example]) -> None:
    found = agreement(shipped(zero_filling), scans[0], probes=64, trials=400, seed=3)
    assert (found.kind, found.probes, found.trials) == ("complex", 64, 400)
    # the sketch is exact here, and a complex circular map of 400 trials errs by 1/(2 √400) = 2.5 %; over hundreds of
    # nearly independent voxels that is known to 5 %: false alarms below 1e-6
    assert found.object_error == pytest.approx(0.025, rel=0.3)
    assert found.expected_error == pytest.approx(0.025, rel=0.1)
    assert found.normalized_error == pytest.approx(0.025, rel=0.3)


@pytest.mark.parametrize("function", [rooted, network("unrolled")])
def test_agreement_is_as_chance_has_it(scans: list[Example], function: Any) -> None:
    found = agreement(shipped(function), scans[0], probes=200, trials=200, seed=1)
    assert found.kind == ("magnitude" if function is rooted else "complex")
    # as above, with a sketch that is random too
    assert found.object_error == pytest.approx(found.expected_error, rel=0.3)


def test_too_few_trials_are_refused(scans: list[Example]) -> None:
    with pytest.raises(ValueError, match="monte_carlo: 1 trials; a variance needs at least 2"):
        agreement(shipped(zero_filling), scans[0], probes=16, trials=1)


# --- tables and figures


def comparison(network: float) -> Comparison:
    return Comparison(20.0, 30.0, network, (network - 31, network - 29), 0.1, 0.5, 0.6, 0.7)


def test_the_tables_have_a_row_a_setting_and_a_column_a_network() -> None:
    chosen = settings(["random_2d"], [4, 6], ["full"])
    found = {
        name: {setting: Result(comparison(value), 0.71, 0.29) for setting in chosen}
        for name, value in (("one", 36.0), ("two", 28.5))
    }
    peaks, structures, noise = grids(found)
    assert peaks.headings == ("scan", "zero-filled", "linear", "λ", "one", "two")
    assert peaks.rows[1] == (
        "2D random R=6, full maps",
        "20.0",
        "30.0",
        "0.1",
        "36.0 (+16.0, +6.0)",
        "28.5 (+8.5, -1.5)",
    )
    assert structures.rows[0] == ("2D random R=4, full maps", "0.500", "0.600", "0.700", "0.700")
    assert noise.rows[0] == ("2D random R=4, full maps", "0.71 (0.29)", "0.71 (0.29)")
    row = figures(found["one"])[1]
    assert (row.mask, row.acceleration, row.psnr, row.linear_psnr, row.gain) == ("random_2d", 6, 36.0, 30.0, 6.0)


def test_the_table_of_an_agreement() -> None:
    one = Agreement(
        kind="complex",
        correlation=0.998765,
        normalized_error=0.01234,
        object_error=0.02,
        expected_error=0.021,
        probes=1000,
        trials=3000,
    )
    grid = agreement_grid({"mine": {Setting(mask="random_2d", acceleration=8): one}})
    assert grid.rows == (("mine", "2D random R=8, full maps", "complex", "99.88 %", "1.23 %", "2.00 %", "2.10 %"),)


def test_means_of_scores() -> None:
    assert (Scores((20.0, 30.0), (0.5, 0.7)).mean_psnr, Scores((1.0,), (0.5,)).mean_ssim) == (25, 0.5)


# --- the whole


def test_every_architecture_is_evaluated_and_recorded(cards: dict[str, Path], data: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    table.write_text("# Table\n\n<!-- reconstructions:begin -->\nold\n<!-- reconstructions:end -->\nend\n", "utf-8")
    output = io.StringIO()
    names = tuple(map(str, cards.values()))
    told = evaluated(Console(file=output, width=40), cards=names, data=data, record=True, table=table)
    assert len(told) == 1 + len(cards)
    written = table.read_text(encoding="utf-8")
    assert written.startswith(
        "# Table\n\n<!-- reconstructions:begin -->\n\nMeans over 2 slices of head_07, head_09, 32"
    )
    assert written.endswith("\n\n<!-- reconstructions:end -->\nend\n")
    assert "old" not in written
    for architecture, path in cards.items():
        card = load_card(str(path))
        (row,) = card.figures
        assert (row.mask, row.acceleration, row.maps) == ("random_2d", 2, "full")
        assert all(math.isfinite(value) for value in (row.psnr, row.ssim, row.linear_psnr, row.zero_filled_psnr))
        assert row.sigma > 0
        assert f"my_{architecture}" in written
        assert f"my_{architecture}" in output.getvalue()
        assert "SSIM" in yaml.safe_load(path.read_text(encoding="utf-8"))["evaluation"]
    rows = [line.strip("| ").split(" | ") for line in written.splitlines() if line.startswith("| 2D random R=2")]
    for path, peak, structure, noise in zip(cards.values(), rows[0][4:], rows[1][3:], rows[2][1:], strict=True):
        (row,) = load_card(str(path)).figures
        assert float(peak.split()[0]) == pytest.approx(row.psnr, abs=0.06)
        assert float(structure) == pytest.approx(row.ssim, abs=6e-4)
        assert float(noise.split()[0]) == pytest.approx(row.sigma, abs=6e-3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    evaluated(cards=names, data=data, record=True, table=table)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_recorded_figures_of_other_scans_stay(cards: dict[str, Path], data: Path) -> None:
    path = cards["unet"]

    def recorded(**options: Any) -> dict[tuple[str, float, str], Figures]:
        evaluated(cards=(str(path),), data=data, record=True, **options)
        return {row.key: row for row in load_card(str(path)).figures}

    first = recorded(accelerations=(2.0, 3.0))
    second = recorded(maps=("masked",))
    third = recorded(slices=1)
    key, kept, masked = ("random_2d", 2.0, "full"), ("random_2d", 3.0, "full"), ("random_2d", 2.0, "masked")
    assert set(first) == {key, kept}
    assert set(second) == set(third) == {key, kept, masked}
    assert third[kept] == second[kept] == first[kept]
    assert third[masked] == second[masked]
    assert third[key] != second[key] == first[key]
    text = " ".join(yaml.safe_load(path.read_text(encoding="utf-8"))["evaluation"].split())
    assert text.endswith("Figures of an earlier evaluation: 2D random R=3, full maps; 2D random R=2, masked maps.")


def test_the_other_reconstructions_are_made_once_for_all_cards(
    cards: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def counted(scan: Example, regularization: float) -> Tensor:
        tried.append(regularization)
        return zero_filled(scan)

    monkeypatch.setattr("voxelsigma.training.compare.least_squares", counted)
    evaluated(cards=(str(cards["unet"]), str(cards["unrolled"])), data=data)
    # all are equally good: the middle one and its neighbours, for both scans
    assert sorted(tried) == sorted(2 * REGULARIZATIONS[2:5])


def test_an_agreement_goes_into_the_same_file(cards: dict[str, Path], data: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    both = [f"<!-- {name}:{end} -->\n" for name in ("reconstructions", "agreement") for end in ("begin", "end")]
    table.write_text("".join(both), "utf-8")
    options: dict[str, Any] = {"against_trials": True, "probes": 16, "trials": 16, "table": table, "data": data}
    evaluated(cards=(str(cards["unrolled"]), str(cards["varnet"])), **options)
    written = table.read_text(encoding="utf-8")
    assert written.startswith("".join(both[:2]))
    rows = [line.split(" | ") for line in written.splitlines() if line.startswith("| my_")]
    assert [(row[0], row[2]) for row in rows] == [("| my_unrolled", "complex"), ("| my_varnet", "magnitude")]
    assert "S = 16 probes, against N = 16 repetitions" in written


def test_nothing_is_reconstructed_where_the_table_has_no_place(
    cards: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.md"
    table.write_text("no markers\n", "utf-8")
    with pytest.raises(ValueError, match=r"table\.md: must have the lines <!-- reconstructions:begin -->"):
        evaluated(cards=(str(cards["unet"]),), data=data, table=table)
    with pytest.raises(ValueError, match=r"table\.md: must have the lines <!-- agreement:begin -->"):
        evaluated(cards=(str(cards["unet"]),), data=data, table=table, against_trials=True)


def test_an_error_names_card_and_setting(cards: dict[str, Path], data: Path) -> None:
    path = cards["unrolled"]
    text = path.read_text(encoding="utf-8").replace("architecture: unrolled", 'architecture: "python:torch:nan_to_num"')
    lines = [line for line in text.splitlines() if not line.startswith(("weights", "sha256", "hyperparameters"))]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"my_unrolled\.yaml: 2D random R=2, full maps: "):
        evaluated(cards=(str(path),), data=data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cards": ()}, "evaluate: no model card is named"),
        ({"slices": 0}, "evaluate: slices must be at least 1, got 0"),
        ({"probes": 1}, "evaluate: probes must be at least 2, got 1"),
        ({"trials": 1}, "evaluate: trials must be at least 2, got 1"),
        ({"seed": -1}, "evaluate: seed must be at least 0, got -1"),
        ({"record": True, "against_trials": True}, "evaluate: a comparison with repetitions gives no figures"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    given = {"cards": ("unrolled_small",), "data": Path(), **changes}
    with pytest.raises(ValueError, match=message):
        EvaluateOptions(**given)


def test_cards_that_cannot_be_compared(cards: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sense\.yaml: 'sense' is not a network; expected the card of one"):
        evaluated(cards=("sense",), data=data)
    path = str(cards["unet"])
    with pytest.raises(ValueError, match=r"my_unet\.yaml: its name 'my_unet' is that of .*my_unet\.yaml too"):
        evaluated(cards=(path, path), data=data)
    with pytest.raises(ValueError, match=r"holds no \.nii\.gz, \.nii, \.npz file named nobody"):
        evaluated(cards=(path,), data=data, heads=("nobody",))
