"""Blocks of readouts."""

import numpy as np
import pytest
from ismrmrd import constants

from voxelsigma.formats.readouts import HEADER_DTYPE, ReadoutBlock, acquisitions_of, block_of, shape_of


@pytest.fixture
def block() -> ReadoutBlock:
    """Six readouts of 2 coils and 4 samples, with a trajectory of 3 dimensions."""
    rng = np.random.default_rng(1)
    headers = np.zeros(6, dtype=HEADER_DTYPE)
    headers["active_channels"], headers["available_channels"] = 2, 2
    headers["number_of_samples"], headers["trajectory_dimensions"] = 4, 3
    headers["scan_counter"] = np.arange(6) + 1
    headers["idx"]["kspace_encode_step_1"] = np.arange(6)
    headers["flags"][2] = 1 << (constants.ACQ_IS_NOISE_MEASUREMENT - 1)
    headers["flags"][5] = 1 << (constants.ACQ_LAST_IN_MEASUREMENT - 1) | 1 << (constants.ACQ_IS_REVERSE - 1)
    samples = (rng.normal(size=(6, 2, 4)) + 1j * rng.normal(size=(6, 2, 4))).astype(np.complex64)
    return ReadoutBlock(headers, samples, rng.normal(size=(6, 4, 3)).astype(np.float32))


def test_flags_are_told_by_their_numbers(block: ReadoutBlock) -> None:
    assert block.flagged(constants.ACQ_IS_NOISE_MEASUREMENT).tolist() == [False, False, True, False, False, False]
    either = block.flagged(constants.ACQ_IS_NOISE_MEASUREMENT, constants.ACQ_IS_REVERSE)
    assert np.flatnonzero(either).tolist() == [2, 5]
    assert not block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION).any()


def test_the_highest_flag_can_be_asked_for(block: ReadoutBlock) -> None:
    block.headers["flags"][0] = np.uint64(1 << 63)
    assert np.flatnonzero(block.flagged(constants.ACQ_USER8)).tolist() == [0]


def test_some_readouts_can_be_selected(block: ReadoutBlock) -> None:
    part = block.select(slice(1, 3))
    assert len(part) == 2
    assert part.headers["scan_counter"].tolist() == [2, 3]
    np.testing.assert_array_equal(part.samples, block.samples[1:3])
    np.testing.assert_array_equal(part.trajectory, block.trajectory[1:3])
    chosen = block.select(block.flagged(constants.ACQ_IS_REVERSE))
    assert chosen.headers["scan_counter"].tolist() == [6]


def test_runs_split_where_the_mark_changes(block: ReadoutBlock) -> None:
    runs = list(block.runs(block.flagged(constants.ACQ_IS_NOISE_MEASUREMENT)))
    assert [(part.headers["scan_counter"].tolist(), bool(mark)) for part, mark in runs] == [
        ([1, 2], False),
        ([3], True),
        ([4, 5, 6], False),
    ]
    assert list(block.select(slice(0, 0)).runs(np.zeros(0))) == []


def test_other_samples_keep_the_headers(block: ReadoutBlock) -> None:
    doubled = block.with_samples(2 * block.samples)
    assert doubled.headers is block.headers
    np.testing.assert_array_equal(doubled.samples, 2 * block.samples)


def test_acquisitions_and_back(block: ReadoutBlock) -> None:
    acquisitions = list(acquisitions_of(block))
    assert [item.scan_counter for item in acquisitions] == [1, 2, 3, 4, 5, 6]
    assert acquisitions[2].is_flag_set(constants.ACQ_IS_NOISE_MEASUREMENT)
    assert acquisitions[4].idx.kspace_encode_step_1 == 4
    again = block_of(acquisitions)
    np.testing.assert_array_equal(again.headers, block.headers)
    np.testing.assert_array_equal(again.samples, block.samples)
    np.testing.assert_array_equal(again.trajectory, block.trajectory)
    assert shape_of(again.headers[0]) == (2, 4, 3)
