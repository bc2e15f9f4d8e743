"""What an evaluation found, as tables, as a sentence, and as the figures of a card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from voxelsigma.models.figures import MASK_TITLES, Figures
from voxelsigma.training.agreement import ESTIMATOR, Agreement
from voxelsigma.training.compare import PROBES, REGULARIZATIONS, TOLERANCE, Comparison
from voxelsigma.training.held_out import CENTRE, COILS, CORRELATION, Setting
from voxelsigma.training.tables import Grid


@dataclass(frozen=True, slots=True)
class Result:
    r"""A network on one setting.

    Parameters
    ----------
    comparison
        Its PSNR and SSIM beside others'.
    sigma, noise_ratio
        Medians over the object of its magnitude σ map, and of that over :math:`\sigma_\text{full} \sqrt{R}`.
    """

    comparison: Comparison
    sigma: float
    noise_ratio: float


Results: TypeAlias = Mapping[str, Mapping[Setting, Result]]
"""By name of the card, then by setting."""

Agreements: TypeAlias = Mapping[str, Mapping[Setting, Agreement]]


def figures(found: Mapping[Setting, Result]) -> tuple[Figures, ...]:
    """Rows for a card, rounded to what a mean over some slices is worth."""
    return tuple(
        Figures(
            mask=setting.mask,
            acceleration=setting.acceleration,
            maps=setting.maps,
            psnr=round(result.comparison.network, 2),
            ssim=round(result.comparison.network_ssim, 4),
            linear_psnr=round(result.comparison.linear, 2),
            linear_ssim=round(result.comparison.linear_ssim, 4),
            zero_filled_psnr=round(result.comparison.zero_filled, 2),
            zero_filled_ssim=round(result.comparison.zero_filled_ssim, 4),
            sigma=round(result.sigma, 3),
            noise_ratio=round(result.noise_ratio, 3),
        )
        for setting, result in found.items()
    )


def grids(results: Results) -> tuple[Grid, ...]:
    """Tables of PSNR, SSIM and σ, a row a setting, a column a network."""
    chosen = list(next(iter(results.values())))
    first = {setting: next(iter(results.values()))[setting].comparison for setting in chosen}
    networks = tuple(results)
    peaks = tuple(
        (
            setting.name,
            f"{first[setting].zero_filled:.1f}",
            f"{first[setting].linear:.1f}",
            f"{first[setting].regularization:.3g}",
            *(_peak(results[name][setting].comparison) for name in networks),
        )
        for setting in chosen
    )
    structures = tuple(
        (
            setting.name,
            f"{first[setting].zero_filled_ssim:.3f}",
            f"{first[setting].linear_ssim:.3f}",
            *(f"{results[name][setting].comparison.network_ssim:.3f}" for name in networks),
        )
        for setting in chosen
    )
    noise = tuple(
        (
            setting.name,
            *(f"{results[name][setting].sigma:.2f} ({results[name][setting].noise_ratio:.2f})" for name in networks),
        )
        for setting in chosen
    )
    return (
        Grid("PSNR in dB (above zero-filled, above linear)", ("scan", "zero-filled", "linear", "λ", *networks), peaks),
        Grid("SSIM", ("scan", "zero-filled", "linear", *networks), structures),
        Grid("σ, median over the object, full sampling has 1 (over √R)", ("scan", *networks), noise),
    )


def agreement_grid(found: Agreements) -> Grid:
    """Table of the sketch against repetitions, a row a network and setting."""
    rows = tuple(
        (
            name,
            setting.name,
            one.kind,
            f"{100 * one.correlation:.2f} %",
            f"{100 * one.normalized_error:.2f} %",
            f"{100 * one.object_error:.2f} %",
            f"{100 * one.expected_error:.2f} %",
        )
        for name, settings in found.items()
        for setting, one in settings.items()
    )
    headings = ("network", "scan", "map", "PCC", "NRMSE", "‖a−b‖/‖b‖ in the object", "expected of it")
    return Grid("σ of the sketch against repetitions", headings, rows)


def scans_text(chosen: Sequence[Setting], *, slices: int, heads: Sequence[str]) -> str:
    """The scans of an evaluation in one sentence."""
    width, snr = chosen[0].matrix, chosen[0].snr
    return (
        f"Means over {slices} slices of {', '.join(heads)}, {width} x {width}, {COILS} coils (noise "
        f"correlated by up to {CORRELATION:g}, whitened), SNR {snr:g}, {CENTRE} fully sampled centre lines (2D: "
        "square) or, where those are fewer, three quarters of all, sensitivities over the whole field of view (full) "
        "or 0 outside the object (masked); PSNR and SSIM of magnitudes, peak and range of the reference."
    )


def method_text() -> str:
    """How the figures are made, in two sentences."""
    return (
        f"Linear is regularised least squares (conjugate gradients to a relative residual of {TOLERANCE:g}) at the "
        f"one λ of {', '.join(f'{value:g}' for value in REGULARIZATIONS)} whose mean PSNR over all slices is best. "
        f"σ is of one slice, magnitude map, by the {ESTIMATOR}, {PROBES} probes."
    )


def agreement_text(found: Agreements, *, heads: Sequence[str]) -> str:
    """How an agreement was measured."""
    settings = next(iter(found.values()))
    setting, one = next(iter(settings.items()))
    return (
        f"One slice of {heads[0]}, {setting.matrix} x {setting.matrix}, {COILS} coils, SNR {setting.snr:g}: "
        f"{ESTIMATOR}, S = {one.probes} probes, against N = {one.trials} repetitions with fresh noise of the scan's "
        "own level (α = 1). PCC and NRMSE (over the reference's maximum) over the whole image; what is expected of the "
        "relative error is the two estimates' own randomness."
    )


def summary(
    found: Mapping[Setting, Result], *, slices: int, heads: Sequence[str], others: Sequence[Figures] = ()
) -> str:
    """One sentence a setting, for the card, and which other figures it has from before."""
    lines = [scans_text(list(found), slices=slices, heads=heads), method_text()]
    for setting, result in found.items():
        one = result.comparison
        lines.append(
            f"{setting.name}: zero-filled {one.zero_filled:.1f} dB, linear {one.linear:.1f} dB, this network "
            f"{one.network:.1f} dB, SSIM {one.network_ssim:.3f}, sigma {result.sigma:.2f} in the object."
        )
    if others:
        named = "; ".join(f"{MASK_TITLES[row.mask]} R={row.acceleration:g}, {row.maps} maps" for row in others)
        lines.append(f"Figures of an earlier evaluation: {named}.")
    return " ".join(lines)


def _peak(one: Comparison) -> str:
    return f"{one.network:.1f} ({one.gain_over_zero_filled:+.1f}, {one.gain:+.1f})"
