"""The study of the test of predictions: what counts as wrong, and what is counted."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """`bench`, which is no part of the installed package, from the source tree."""
    if not (ROOT / "bench" / "certificate.py").is_file():
        pytest.skip(f"{ROOT / 'bench'} is not there")
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("bench.certificate")
    sys.path.remove(str(ROOT))


def test_the_worst_region_is_that_of_the_largest_ratio(module: Any) -> None:
    labels = torch.tensor([[0, 0, 1, 1, -1]])
    truth = torch.tensor([[1.0, 3.0, 2.0, 2.0, 1.0]])
    scale = torch.ones(1, 5)
    # means over the regions: 2 and 2; said: 2.42 and 1
    said = torch.tensor([[1.42, 3.42, 1.0, 1.0, 99.0]])
    assert module.worst_region(said, truth, labels, scale) == pytest.approx(math.sqrt(2) - 1)
    assert module.worst_region(truth, truth, labels, scale) == pytest.approx(0, abs=1e-12)


def test_voxels_that_no_coil_sees_do_not_count(module: Any) -> None:
    labels = torch.zeros(1, 3, dtype=torch.long)
    truth, said = torch.tensor([[1.0, 1.0, 5.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert module.worst_region(said, truth, labels, torch.tensor([[1.0, 1.0, 0.0]])) == pytest.approx(0, abs=1e-12)


def test_what_was_found_and_what_was_missed(module: Any) -> None:
    found = [
        module.Told("right", 0.02, kept=True),
        module.Told("right", 0.1, kept=False),
        module.Told("wrong", 0.2, kept=True),
        module.Told("wrong", 0.5, kept=False),
        module.Told("wrong", 0.6, kept=True),
    ]
    made = module.table(found)
    columns = [list(column.cells) for column in made.columns]
    assert columns[0] == ["right", "wrong", "all"]
    assert columns[3] == ["1", "1", "2"]
    assert columns[4] == ["-", "1 of 2", "1 of 2"]
    assert columns[5] == ["1 of 2", "-", "1 of 2"]
