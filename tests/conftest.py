import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it are skipped where it is not there."""
    given = os.environ.get("VOXELSIGMA_TEST_DATA")
    folder = Path(given) if given else Path.cwd().parent / "shared" / "data"
    if not (folder / "snr_r3.h5").is_file():
        pytest.skip(f"real data are not at {folder}; VOXELSIGMA_TEST_DATA can name their folder")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
