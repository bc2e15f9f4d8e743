"""Compare a trained network with the linear reconstruction on held-out heads.

``python -m voxelsigma.training.evaluate --data FOLDER --card CARD.yaml``
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from voxelsigma.models.conjugate_gradients import conjugate_gradients
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.card import load_unrolled, record
from voxelsigma.training.examples import Example, ExampleSettings, collate, draw_example
from voxelsigma.training.volumes import Volume, load_volumes

HELD_OUT = ("head_07", "head_09")
REGULARIZATIONS = tuple(float(value) for value in np.logspace(-2.5, 0.5, 13))

_SCANS = ExampleSettings(matrix=(192, 192), coils=(8, 8), many_coils_share=0.0, snr=(20, 20), centre=24)
_SAMPLED: Mapping[str, ExampleSettings] = {
    "2D random R=6": replace(_SCANS, kinds=("random_2d",), acceleration=(6, 6)),
    "1D random R=4": replace(_SCANS, kinds=("random_1d",), acceleration=(4, 4)),
    "1D random R=6": replace(_SCANS, kinds=("random_1d",), acceleration=(6, 6)),
}
# sensitivities that cover the field of view, and, as ESPIRiT makes them, that end at the object
_SUPPORTS: Mapping[str, float] = {"full maps": 0.0, "masked maps": 1.0}
SETTINGS: Mapping[str, ExampleSettings] = {
    f"{sampled}, {support}": replace(settings, support_share=share)
    for sampled, settings in _SAMPLED.items()
    for support, share in _SUPPORTS.items()
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean PSNR in dB over the slices of one setting.

    Parameters
    ----------
    zero_filled
        Of the coil-combined zero-filled image.
    linear
        Of regularised least squares at `regularization`.
    network
        Of the network.
    gains
        Network minus linear, of every slice.
    regularization
        The one λ that is best over all slices.
    """

    zero_filled: float
    linear: float
    network: float
    gains: tuple[float, ...]
    regularization: float

    @property
    def gain(self) -> float:
        """Mean of the network's PSNR above the linear reconstruction's."""
        return float(np.mean(self.gains))


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio of magnitude images.

    .. math:: 20 \log_{10} \frac{\max_i |\rho_i|}{\sqrt{\operatorname{mean}_i (|x_i| - |\rho_i|)^2}}

    Parameters
    ----------
    image, reference
        Shape `(..., y, x)`, real or complex.

    Returns
    -------
        dB, shape `(...)`; infinite where the magnitudes agree.
    """
    error = (image.abs() - reference.abs()).square().mean(dim=(-2, -1)).sqrt()
    return 20 * torch.log10(reference.abs().amax(dim=(-2, -1)) / error)


def least_squares(example: Example, regularization: float, *, tolerance: float = 1e-5) -> Tensor:
    r"""Regularised linear reconstruction :math:`(A^H A + \lambda)^{-1} A^H y`, shape `(batch, y, x)`."""
    encoding = SenseEncoding(example.sensitivities, example.mask)

    def normal(images: Tensor) -> Tensor:
        return encoding.adjoint(encoding.forward(images)) + regularization * images

    return conjugate_gradients(normal, encoding.adjoint(example.kspace), tolerance=tolerance)


def held_out_scans(volumes: Sequence[Volume], settings: ExampleSettings, *, slices: int, seed: int) -> Example:
    """A batch of `slices` scans, taken from the volumes in turn; the settings must name one size."""
    sizes = settings.coils[0], settings.matrix[0], settings.matrix[0]
    return collate(
        [
            draw_example([volumes[number % len(volumes)]], settings, sizes, np.random.default_rng([seed, number]))
            for number in range(slices)
        ]
    )


@torch.no_grad()
def compare(network: nn.Module, scans: Example, regularizations: Sequence[float] = REGULARIZATIONS) -> Comparison:
    """Mean PSNR of zero-filled, linear and network reconstructions of a batch."""
    zero_filled = SenseEncoding(scans.sensitivities, scans.mask).adjoint(scans.kspace)
    linear = {value: psnr(least_squares(scans, value), scans.target) for value in regularizations}
    best = max(linear, key=lambda value: float(linear[value].mean()))
    learned = psnr(network(scans.kspace, scans.sensitivities, scans.mask), scans.target)
    return Comparison(
        zero_filled=float(psnr(zero_filled, scans.target).mean()),
        linear=float(linear[best].mean()),
        network=float(learned.mean()),
        gains=tuple((learned - linear[best]).tolist()),
        regularization=best,
    )


def summary(results: Mapping[str, Comparison], slices: int, volumes: Sequence[Volume]) -> str:
    """One sentence a setting, for the card."""
    about = _SCANS
    lines = [
        f"Mean PSNR (magnitude, peak of the reference) over {slices} slices of "
        f"{', '.join(volume.name for volume in volumes)}, {about.matrix[0]} x {about.matrix[0]}, "
        f"{about.coils[0]} coils, SNR {about.snr[0]:g}, {about.centre} fully sampled centre lines "
        "(2D: square), sensitivities over the whole field of view (full) or 0 outside the object (masked):"
    ]
    for name, result in results.items():
        lines.append(
            f"{name}: zero-filled {result.zero_filled:.1f} dB, regularised least squares at its best lambda "
            f"{result.linear:.1f} dB, this network {result.network:.1f} dB."
        )
    return " ".join(lines)


def table(results: Mapping[str, Comparison]) -> str:
    """The results as lines of fixed width."""
    lines = [f"{'setting':28}{'zero-filled':>12}{'linear':>9}{'lambda':>9}{'network':>9}{'gain':>8}{'least':>8}"]
    for name, result in results.items():
        lines.append(
            f"{name:28}{result.zero_filled:12.2f}{result.linear:9.2f}{result.regularization:9.3f}"
            f"{result.network:9.2f}{result.gain:+8.2f}{min(result.gains):+8.2f}"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate from the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        volumes = load_volumes(options.data, only=options.heads)
        network = load_unrolled(options.card)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    results = {}
    for name, settings in SETTINGS.items():
        scans = held_out_scans(volumes, settings, slices=options.slices, seed=options.seed)
        results[name] = compare(network, scans)
    sys.stdout.write(table(results))
    if options.record:
        record(options.card, summary(results, options.slices, volumes))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m voxelsigma.training.evaluate",
        description="Compare a trained network with the linear reconstruction on held-out heads.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the volumes")
    parser.add_argument(
        "--card",
        type=Path,
        default=Path(str(files("voxelsigma.models"))) / "unrolled_small.yaml",
        help="model card; by default the one that is shipped",
    )
    parser.add_argument("--heads", nargs="+", default=list(HELD_OUT), help="volumes to take slices of")
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write the figures into the card")
    return parser


if __name__ == "__main__":
    sys.exit(main())
