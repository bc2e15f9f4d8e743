"""The comparison of a network with the linear reconstruction."""

import numpy as np
import pytest
import torch

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.evaluate import Comparison, compare, held_out_scans, least_squares, psnr, table
from voxelsigma.training.examples import Example, ExampleSettings
from voxelsigma.training.fit import start_network
from voxelsigma.training.volumes import Volume


@pytest.fixture(scope="module")
def scans() -> Example:
    z, y, x = np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]
    ball = Volume("ball", (np.sqrt(z**2 + y**2 + x**2) < 0.95).astype(np.int16), 2)
    settings = ExampleSettings(
        matrix=(16, 16), coils=(4, 4), kinds=("random_2d",), acceleration=(2, 2), snr=(20, 20), support_share=0.0
    )
    return held_out_scans([ball], settings, slices=2, seed=0)


def test_psnr_of_a_known_error() -> None:
    reference = torch.tensor([[[3j, 4.0], [0.0, 0.0]], [[10.0, 0.0], [0.0, 0.0]]])
    image = torch.tensor([[[3.0, 4.4], [0.0, 0.0]], [[-10.0, 0.0], [0.0, 2.0]]])
    # peak 4 over 0.4/2; peak 10 over 2/2; phases do not count
    torch.testing.assert_close(psnr(image, reference), torch.tensor([20 * np.log10(20), 20.0]).float())


def test_psnr_of_equal_images_is_infinite() -> None:
    assert torch.isinf(psnr(torch.ones(3, 3), torch.ones(3, 3)))


def test_least_squares_is_the_dense_solution(scans: Example) -> None:
    regularization = 0.05
    encoding = SenseEncoding(scans.sensitivities[0], scans.mask[0])
    basis = torch.eye(256, dtype=torch.complex64).reshape(256, 16, 16)
    matrix = encoding.forward(basis).reshape(256, -1).T.to(torch.complex128)
    normal = matrix.mH @ matrix + regularization * torch.eye(256)
    expected = torch.linalg.solve(normal, matrix.mH @ scans.kspace[0].flatten().to(torch.complex128))
    found = least_squares(scans, regularization)[0].flatten().to(torch.complex128)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_comparison_takes_the_best_regularization(scans: Example) -> None:
    network = start_network({"steps": 2, "blocks": 1, "channels": 4}, seed=0)
    result = compare(network, scans, regularizations=(1e-3, 0.1, 100.0))
    each = {value: psnr(least_squares(scans, value), scans.target).mean() for value in (1e-3, 0.1, 100.0)}
    assert result.linear == pytest.approx(float(max(each.values())))
    assert each[result.regularization] == max(each.values())
    assert result.gain == pytest.approx(result.network - result.linear, abs=1e-4)


def test_table_has_a_line_a_setting() -> None:
    result = Comparison(20.0, 30.0, 36.0, (5.0, 7.0), 0.1)
    lines = table({"2D random R=6": result}).splitlines()
    assert lines[1].split() == ["2D", "random", "R=6", "20.00", "30.00", "0.100", "36.00", "+6.00", "+5.00"]
