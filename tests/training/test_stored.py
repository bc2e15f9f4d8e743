"""Measured values as they are stored: whole, or refused."""

import numpy as np
import pytest
import torch

from voxelsigma.training.stored import stored


def test_values_become_the_type_that_is_wanted() -> None:
    values = torch.tensor([[1.0, -2.5], [3e-5, 65504.0]], dtype=torch.float64)
    assert stored(values).dtype == np.float32
    half = stored(values, np.float16)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, values.numpy().astype(np.float16))


@pytest.mark.parametrize(
    ("value", "kind"),
    [(float("nan"), np.float32), (float("inf"), np.float32), (-1e39, np.float32), (7e4, np.float16)],
)
def test_what_cannot_be_stored_is_refused(value: float, kind: type) -> None:
    """With a clear error alone, not with a warning before it."""
    with pytest.raises(ValueError, match="not finite, or too large to be stored"):
        stored(torch.tensor([1.0, value], dtype=torch.float64), kind)
