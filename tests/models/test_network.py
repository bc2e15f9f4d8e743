"""Any network, bound to a plane."""

from collections.abc import Callable

import torch
from torch import Tensor

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.grid import Window
from voxelsigma.models.network import Network
from voxelsigma.models.problem import PlaneProblem

COILS, ROWS, COLUMNS = 3, 24, 10


def zero_filled(kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
    return SenseEncoding(sensitivities, mask).adjoint(kspace)


def problem_of(maps: Tensor, lines: range, limits: tuple[int, int], size: tuple[int, int]) -> PlaneProblem:
    weights = torch.zeros(ROWS, COLUMNS)
    weights[list(lines)] = 1
    weights[12] = 3
    return PlaneProblem(
        sensitivities=maps,
        variance=torch.where(weights > 0, 2 / weights.clamp_min(1), 0.0),
        weights=weights,
        limits=(limits, (0, COLUMNS - 1)),
        size=size,
    )


def test_network_sees_the_smallest_grid_around_the_origin(
    smooth_maps: Callable[[int, int, int], Tensor], complex_normal: Callable[..., Tensor]
) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def recording(kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        seen.append((kspace, sensitivities, mask))
        return zero_filled(kspace, sensitivities, mask)

    # lines 8, 9, ..., 19 of 24: around the origin 12 they need 4 to 19
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), range(8, 20), (8, 19), (ROWS, COLUMNS))
    reconstruction = Network(function=recording).bind(problem)
    assert reconstruction.windows == (Window(4, 16, ROWS), Window(0, COLUMNS, COLUMNS))
    data = complex_normal(COILS, ROWS, COLUMNS, seed=1)
    image = reconstruction(data)
    ((kspace, sensitivities, mask),) = seen
    torch.testing.assert_close(kspace, data[:, 4:20])
    torch.testing.assert_close(sensitivities, problem.sensitivities_on((16, COLUMNS)))
    # repeats are no more than sampled
    assert mask[:, 0].tolist() == [0.0] * 4 + [1.0] * 12
    assert mask.dtype == torch.float32
    assert image.shape == (ROWS, COLUMNS)


def test_image_is_zero_filled_to_the_wanted_matrix(
    smooth_maps: Callable[[int, int, int], Tensor], complex_normal: Callable[..., Tensor]
) -> None:
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), range(4, 20), (4, 19), (32, COLUMNS))
    data = complex_normal(COILS, ROWS, COLUMNS, seed=2)
    small = zero_filled(data[:, 4:20], problem.sensitivities_on((16, COLUMNS)), torch.ones(16, COLUMNS))
    padded = torch.zeros(32, COLUMNS, dtype=torch.complex128)
    padded[8:24] = torch.fft.fftshift(torch.fft.fft(torch.fft.ifftshift(small, dim=0), dim=0, norm="ortho"), dim=0)
    expected = torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(padded, dim=0), dim=0, norm="ortho"), dim=0) * (
        2**0.5
    )
    torch.testing.assert_close(Network(function=zero_filled).bind(problem)(data), expected)


def test_image_on_the_acquired_grid_is_the_network_s_own(
    smooth_maps: Callable[[int, int, int], Tensor], complex_normal: Callable[..., Tensor]
) -> None:
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), range(0, ROWS, 2), (0, ROWS - 1), (ROWS, COLUMNS))
    reconstruction = Network(function=zero_filled).bind(problem)
    assert reconstruction.output == (None, None)
    data = complex_normal(COILS, ROWS, COLUMNS, seed=3)
    expected = zero_filled(data, problem.sensitivities, (problem.weights > 0).double())
    torch.testing.assert_close(reconstruction(data), expected)
