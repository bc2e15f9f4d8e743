"""A scan to train on, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Example:
    """One simulated scan, or a batch of them with a leading axis `batch`.

    Parameters
    ----------
    kspace
        Noisy, sampled k-space, shape `(coils, k1, k0)`, complex64, noise of variance 2 (1 per real component).
    sensitivities
        Coil sensitivities, shape `(coils, y, x)`, complex64, unit norm (or 0 outside the object).
    mask
        Sampled positions, shape `(1, k1, k0)`, float32, 1 where sampled.
    target
        The image to be reconstructed, shape `(y, x)`, complex64, in SNR units; None if there is no reference.
    """

    kspace: Tensor
    sensitivities: Tensor
    mask: Tensor
    target: Tensor | None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Example":
        """Move all tensors to a device.

        Parameters
        ----------
        device
            Where to.
        dtype
            Real type of the mask, such as `torch.float64`; complex tensors get the complex type that matches it.
            By default types stay as they are.

        Raises
        ------
        ValueError
            `dtype` is not a real floating-point type.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"examples: dtype must be a real floating-point type, got {dtype}")
        matching = None if dtype is None else dtype.to_complex()
        return Example(
            kspace=self.kspace.to(device, matching),
            sensitivities=self.sensitivities.to(device, matching),
            mask=self.mask.to(device, dtype),
            target=None if self.target is None else self.target.to(device, matching),
        )


def collate(examples: Sequence[Example]) -> Example:
    """Stack examples of equal sizes along a new first axis.

    Raises
    ------
    ValueError
        Some have a target and some have none.
    """
    targets = [example.target for example in examples if example.target is not None]
    if targets and len(targets) < len(examples):
        raise ValueError(
            f"examples: {len(targets)} of the {len(examples)} examples of a batch have a target; expected all or none"
        )
    return Example(
        kspace=torch.stack([example.kspace for example in examples]),
        sensitivities=torch.stack([example.sensitivities for example in examples]),
        mask=torch.stack([example.mask for example in examples]),
        target=torch.stack(targets) if targets else None,
    )
