"""What distillations of the tests begin from."""

from pathlib import Path

import pytest
from tests.training.distilled import run, tiny_card, tiny_scan, volume_folder

from voxelsigma.training.config import DataSettings
from voxelsigma.training.example import Example


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    return volume_folder(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_card(tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="session")
def whole(card: Path, data: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distillation that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(card, data, folder)
    return folder


@pytest.fixture(scope="session")
def scan() -> Example:
    return tiny_scan()
