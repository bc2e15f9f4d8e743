"""Networks as they are before training, and how fast their parts learn."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from voxelsigma.models.cards import ARCHITECTURES
from voxelsigma.models.unrolled import ResidualNetwork

# they weigh the data
_SCALARS = ("step_sizes", "raw_weights", "dc_weight")


def start_network(architecture: str, hyperparameters: Mapping[str, Any], seed: int) -> nn.Module:
    """A network with seeded weights whose residual corrections begin at 0, so that it begins as its linear part.

    Raises
    ------
    ValueError
        If the hyperparameters do not fit the architecture.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            network = ARCHITECTURES[architecture](**hyperparameters)
        except TypeError as error:
            raise ValueError(f"hyperparameters do not fit {architecture} ({error})") from None
    for module in network.modules():
        if isinstance(module, ResidualNetwork):
            nn.init.zeros_(module.leave.weight)
            assert module.leave.bias is not None
            nn.init.zeros_(module.leave.bias)
    return network


def parameter_groups(network: nn.Module, scalar_rate: float) -> list[dict[str, Any]]:
    """Groups for an optimiser, each with its rate `relative` to the learning rate: 1, and `scalar_rate`."""
    scalars = [value for name, value in network.named_parameters() if name.split(".")[-1] in _SCALARS]
    others = [value for name, value in network.named_parameters() if name.split(".")[-1] not in _SCALARS]
    groups = [{"params": others, "relative": 1.0}, {"params": scalars, "relative": scalar_rate, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
