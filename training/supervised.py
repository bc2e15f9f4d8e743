"""Supervised training."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from voxelsigma.training.examples import Example
from voxelsigma.training.losses import object_magnitude, relative_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    r"""Mean absolute error against the reference, in units of its object.

    .. math:: L = \operatorname{mean} \frac{|f(y) - \rho|}{\overline{|\rho|}_\mathrm{object}}

    It has no hyperparameters and draws nothing.
    """

    def __call__(
        self, network: nn.Module, example: Example, rng: np.random.Generator, *, progress: float = 1.0
    ) -> Tensor:
        """Loss of a batch; see `Objective`.

        Raises
        ------
        ValueError
            The batch has no target, or one that is empty.
        """
        if example.target is None:
            raise ValueError("supervised: the batch has no target; expected scans with a fully sampled reference")
        return supervised_error(network, example, example.target)


def supervised_error(network: nn.Module, example: Example, target: Tensor) -> Tensor:
    """Error of the network's images of a batch against its target.

    Raises
    ------
    ValueError
        A target is 0 everywhere.
    """
    empty = (object_magnitude(target) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"supervised: targets {empty} of the batch are empty; expected an object in each")
    return relative_error(network, network(example.kspace, example.sensitivities, example.mask), target)
