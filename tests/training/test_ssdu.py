"""Self-supervision by data undersampling."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.modl import Modl
from voxelsigma.models.unet import ImageUNet
from voxelsigma.models.unrolled import Unrolled
from voxelsigma.models.varnet import VarNet
from voxelsigma.training.examples import Example
from voxelsigma.training.ssdu import Ssdu, kspace_error, split_mask


class Remembering(nn.Module):
    """Zero-filled images, times a learned factor."""

    def __init__(self, *, real: bool = False) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.8))
        self.real = real
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        self.seen = (kspace.detach().clone(), mask.clone())
        images = self.factor * SenseEncoding(sensitivities, mask).adjoint(kspace)
        return images.abs() if self.real else images


def make_example(*, batch: int = 2, coils: int = 3, shape: tuple[int, int] = (13, 12), lines: bool = False) -> Example:
    rng = np.random.default_rng(0)

    def draw(*sizes: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(sizes) + 1j * rng.standard_normal(sizes)).to(torch.complex64)

    mask = (
        torch.from_numpy(rng.random((batch, 1, shape[0], 1 if lines else shape[1])) < 0.6)
        .float()
        .expand(-1, -1, *shape)
    )
    mask = mask.clone()
    mask[..., shape[0] // 2, shape[1] // 2] = 1
    sensitivities = draw(batch, coils, *shape)
    sensitivities /= sensitivities.abs().square().sum(dim=1, keepdim=True).sqrt()
    return Example(mask * draw(batch, coils, *shape), sensitivities, mask, draw(batch, *shape))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(9, 24),
    columns=st.integers(9, 24),
    density=st.floats(0.3, 1.0),
    share=st.floats(0.05, 0.5),
    centre=st.integers(0, 5),
    lines=st.booleans(),
    seed=st.integers(0, 99),
)
def test_seen_positions_and_labels_are_a_partition(
    batch: int, rows: int, columns: int, density: float, share: float, centre: int, lines: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    drawn = np.broadcast_to(rng.random((batch, 1, rows, 1 if lines else columns)) < density, (batch, 1, rows, columns))
    mask = torch.from_numpy(drawn.copy()).float()
    # enough outside any centre
    mask[:, :, 0] = mask[:, :, -1] = 1
    kept, labels = split_mask(mask, share, centre, rng)
    assert torch.equal(kept + labels, mask)
    assert float((kept * labels).sum()) == 0
    for one, whole in zip(labels, mask, strict=True):
        assert int(one.sum()) == max(round(share * int(whole.sum())), 1)
    top, left = rows // 2 - centre // 2, columns // 2 - centre // 2
    assert float(labels[..., top : top + centre, left : left + centre].sum()) == 0


def test_labels_are_uniform_over_the_samples_outside_the_centre() -> None:
    mask = torch.zeros(1, 1, 8, 9)
    mask[..., :, ::2] = 1
    rng = np.random.default_rng(0)
    draws = 2000
    counts = sum(split_mask(mask, 0.25, 4, rng)[1] for _ in range(draws))
    assert isinstance(counts, Tensor)
    candidates = (mask != 0).clone()
    candidates[..., 2:6, 2:6] = False
    assert int(candidates.sum()) == 32
    # 10 of 32 candidates: 6 standard deviations, false-alarm probability below 1e-7
    expected, spread = draws * 10 / 32, np.sqrt(draws * 10 / 32 * 22 / 32)
    assert float((counts[candidates] - expected).abs().max()) < 6 * spread
    assert float(counts[~candidates].abs().max()) == 0


@pytest.mark.parametrize("shape", [(13, 12), (12, 13)])
def test_the_loss_is_that_of_the_formula(shape: tuple[int, int]) -> None:
    example, network = make_example(shape=shape), Remembering()
    loss = Ssdu()(network, example, np.random.default_rng(5))
    kept, labels = split_mask(example.mask, 0.2, 4, np.random.default_rng(5))
    expected = []
    for y, s, theta, label in zip(
        *(value.numpy() for value in (example.kspace, example.sensitivities, kept, labels)), strict=True
    ):
        image = np.zeros(shape, complex)
        for coil in range(len(y)):
            image += s[coil].conj() * np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(theta[0] * y[coil]), norm="ortho"))
        differences, measured = [], []
        for coil in range(len(y)):
            k = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(s[coil] * 0.8 * image), norm="ortho"))
            for row, column in np.argwhere(label[0] == 1):
                differences.append(abs(y[coil, row, column] - k[row, column]))
                measured.append(abs(y[coil, row, column]))
        d, m = np.array(differences), np.array(measured)
        expected.append(0.5 * np.sqrt((d**2).sum() / (m**2).sum()) + 0.5 * d.sum() / m.sum())
    assert loss.ndim == 0
    assert float(loss.detach()) == pytest.approx(np.mean(expected), rel=1e-5)
    loss.backward()
    assert network.factor.grad is not None
    assert float(network.factor.grad) != 0


def test_the_network_does_not_see_the_labels() -> None:
    example, network = make_example(lines=True), Remembering()
    kept, labels = split_mask(example.mask, 0.2, 4, np.random.default_rng(1))
    Ssdu()(network, example, np.random.default_rng(1))
    assert network.seen is not None
    kspace, mask = network.seen
    assert torch.equal(mask, kept)
    assert float((labels * kspace).abs().max()) == 0
    changed = replace(example, kspace=example.kspace + 100 * labels)
    Ssdu()(network, changed, np.random.default_rng(1))
    assert torch.equal(network.seen[0], kspace)


def test_the_loss_does_not_depend_on_the_target_and_leaves_the_example() -> None:
    example, network = make_example(), Remembering()
    before = [value.clone() for value in (example.kspace, example.sensitivities, example.mask)]
    losses = [
        float(Ssdu()(network, replace(example, target=target), np.random.default_rng(2)).detach())
        for target in (example.target, None, torch.zeros(1))
    ]
    assert losses[0] == losses[1] == losses[2]
    for value, old in zip((example.kspace, example.sensitivities, example.mask), before, strict=True):
        assert torch.equal(value, old)


def test_a_perfect_prediction_has_no_loss_and_a_finite_gradient() -> None:
    measured = make_example().kspace
    predicted = measured.clone().requires_grad_()
    loss = kspace_error(predicted, measured)
    assert float(loss.detach()) == 0
    loss.backward()
    assert predicted.grad is not None
    assert bool(predicted.grad.isfinite().all())


@pytest.mark.parametrize(
    "network",
    [Unrolled(steps=2, blocks=1, channels=4), Modl(steps=2, blocks=1, channels=4), ImageUNet(channels=4, levels=2)],
    ids=["unrolled", "modl", "unet"],
)
def test_real_networks_get_gradients(network: nn.Module) -> None:
    loss = Ssdu()(network, make_example(shape=(16, 17)), np.random.default_rng(0))
    loss.backward()
    gradients = [value.grad for value in network.parameters() if value.grad is not None]
    assert gradients
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_networks_without_given_sensitivities_are_refused() -> None:
    own = VarNet(cascades=1, channels=2, levels=1, sensitivity_channels=2, sensitivity_levels=1)
    with pytest.raises(ValueError, match="ssdu: the network estimates sensitivities of its own; expected one that"):
        Ssdu()(own, make_example(), np.random.default_rng(0))
    with pytest.raises(ValueError, match="ssdu: the network's images are real; expected complex ones"):
        Ssdu()(Remembering(real=True), make_example(), np.random.default_rng(0))


def test_masks_without_enough_samples_are_refused() -> None:
    rng = np.random.default_rng(0)
    mask = torch.ones(2, 1, 8, 8)
    mask[1] = 0
    mask[1, 0, 4, 4] = 1
    with pytest.raises(ValueError, match="ssdu: mask 1 of the batch has 1 samples, 0 of them outside the centre"):
        split_mask(mask, 0.2, 4, rng)
    with pytest.raises(ValueError, match="mask 0 of the batch has 16 samples, 0 of them outside"):
        split_mask(torch.ones(1, 1, 4, 4), 0.2, 9, rng)
    example = make_example()
    with pytest.raises(ValueError, match=r"ssdu: k-space of scans \[0, 1\] of the batch is 0 at every label"):
        Ssdu()(Remembering(), replace(example, kspace=0 * example.kspace), rng)


@pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), "0.2", True, None])
def test_label_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="ssdu: label_share must be"):
        Ssdu(label_share=share)


@pytest.mark.parametrize("centre", [-1, 4.0, "4", False])
def test_centres_that_are_no_widths_are_refused(centre: int) -> None:
    with pytest.raises(ValueError, match="ssdu: centre must be a whole number of at least 0"):
        Ssdu(centre=centre)
