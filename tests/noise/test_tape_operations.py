"""Operations on the tape, alone and in random compositions, against forward mode."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.noise.tape_checks import check, draw, forward_mode
from torch import Tensor

from voxelsigma.noise.linearize import linearize

Function = Callable[[Tensor], Tensor]

POINT = draw(3, 6, 4)
CONSTANT = draw(3, 6, 4, seed=2)
MATRIX = draw(4, 5, seed=3)
SQUARE = draw(4, 4, seed=4)
BIAS = draw(6, 5, seed=9)
WHERE = CONSTANT.real > 0
INDEX = torch.tensor([2, 0, 1, 1])

COMPLEX: dict[str, Function] = {
    "identity": lambda y: y,
    "conjugate": lambda y: y.conj(),
    "conjugate resolved": lambda y: y.conj().resolve_conj() + 1,
    "conjugate, then view as real": lambda y: torch.view_as_real(y.conj().resolve_conj()).square(),
    "real and imaginary": lambda y: y.real * y.imag,
    "imaginary of conjugate": lambda y: y.conj().imag + y.real,
    "absolute": lambda y: y.abs(),
    "angle": lambda y: y.angle(),
    "phase": lambda y: y.sgn(),
    "phase by division": lambda y: y / y.abs(),
    "polar": lambda y: torch.polar(y.abs(), y.angle() * 2),
    "complex": lambda y: torch.complex(y.real.sin(), y.imag),
    "complex of one": lambda y: torch.complex(y.real.sin(), CONSTANT.imag),
    "view as real and back": lambda y: torch.view_as_complex(torch.view_as_real(y).relu()),
    "real of another order": lambda y: torch.view_as_complex(
        torch.view_as_real(y).movedim(-1, 0).sin().movedim(0, -1).contiguous()
    ),
    "fft2": torch.fft.fft2,
    "centred fft": lambda y: torch.fft.fftshift(
        torch.fft.ifftn(torch.fft.ifftshift(y, dim=(-2, -1)), dim=(-2, -1), norm="ortho"), dim=(-2, -1)
    ),
    "fft of a real": lambda y: torch.fft.fft(y.abs()),
    "rfft and irfft": lambda y: torch.fft.irfft2(torch.fft.rfft2(y.real.sin()) * 2j),
    "times complex number": lambda y: (2 - 1j) * y.sin(),
    "times own conjugate": lambda y: y * y.conj(),
    "square": lambda y: y.square() + y**3 + y**2,
    "exponential": lambda y: torch.exp(0.3 * y),
    "logarithm": torch.log,
    "root": torch.sqrt,
    "reciprocal": lambda y: 1 / y,
    "hyperbolic": lambda y: torch.tanh(0.2 * y) + torch.sin(y) * torch.cos(y),
    "complex to real type": lambda y: y.abs().to(torch.float32).double(),
}
REAL: dict[str, Function] = {
    "where": lambda y: torch.where(WHERE, y, y.conj() * 2),
    "where with numbers": lambda y: torch.where(WHERE, y.real, 0.0),
    "where shields the infinite": lambda y: torch.where(y.real > 0, y.real, torch.ones_like(y.real)).sqrt(),
    "masked fill": lambda y: y.masked_fill(WHERE, 0),
    "masked by index": lambda y: y[WHERE],
    "gathered": lambda y: y[:, INDEX] * y[0, INDEX],
    "index select": lambda y: y.index_select(1, INDEX),
    "take along": lambda y: y.take_along_dim(INDEX.view(1, 4, 1), 1),
    "maximum": lambda y: torch.maximum(y.real, y.imag) - torch.minimum(y.real, CONSTANT.real),
    "clamp": lambda y: y.real.clamp(-0.5, 0.5) + y.imag.clamp_min(0),
    "clamp by tensor": lambda y: y.abs().clamp(max=CONSTANT.abs()),
    "largest": lambda y: y.abs().max() * y.abs().amax(dim=-1),
    "largest along": lambda y: y.abs().max(dim=1).values,
    "sorted": lambda y: y.abs().sort(dim=-1).values,
    "top": lambda y: y.abs().topk(2, dim=1).values,
    "median": lambda y: y.abs().median(dim=1).values,
    "norm": lambda y: y / torch.linalg.vector_norm(y, dim=(0, 2), keepdim=True),
    "norm of all": lambda y: y * torch.linalg.vector_norm(y),
    "other norms": lambda y: (
        torch.linalg.vector_norm(y, ord=1, dim=1) + torch.linalg.vector_norm(y.abs(), ord=3, dim=1)
    ),
    "frobenius": lambda y: y.norm() * y,
    "root sum of squares": lambda y: y.abs().square().sum(dim=0).sqrt(),
    "mean and deviation": lambda y: (y.real - y.real.mean()) / y.real.std(),
    "deviation along": lambda y: y.real.std(dim=(0, 1), unbiased=False) + y.imag.var(dim=0, keepdim=True),
    "complex deviation": lambda y: y.var(dim=0) * y.std(),
    "variance and mean": lambda y: torch.var_mean(y.real, dim=1)[0],
    "product": lambda y: y.real.prod(dim=1),
    "cumulated": lambda y: y.cumsum(dim=-1) * y.real.cumsum(dim=0),
    "log-sum-exp": lambda y: y.real.logsumexp(dim=1),
    "softmax": lambda y: y.abs().softmax(dim=-2),
    "arctangent": lambda y: torch.atan2(y.real, y.imag),
    "power of a tensor": lambda y: y.abs() ** y.real,
    "hypotenuse": lambda y: torch.hypot(y.real, y.imag),
    "interpolated": lambda y: torch.lerp(y.real, y.imag, 0.3),
    "rounded": lambda y: y.real.sin() + y.real.round() * 0.1,
    "sign": lambda y: y.real.sign() * y.imag,
    "error function": lambda y: torch.special.erf(y.real) + torch.special.expit(y.imag),
    "loss": lambda y: torch.nn.functional.mse_loss(y.real, y.imag),
}
SHAPES: dict[str, Function] = {
    "flatten": lambda y: y.flatten(),
    "scalar": lambda y: y.abs().sum(),
    "mean": lambda y: y.mean() * y.mean(dim=(0, -1), keepdim=True),
    "scalar arithmetic": lambda y: y.sum() * y.conj().mean() + 1,
    "permuted": lambda y: y.permute(2, 0, 1).contiguous() * y.permute(2, 0, 1),
    "negative axes": lambda y: y.transpose(-1, -2).sum(dim=-2, keepdim=True).squeeze(-2).unsqueeze(-1),
    "squeezed": lambda y: y[:1].squeeze() * y[:1].squeeze(0),
    "reshaped": lambda y: y.reshape(6, -1).T,
    "expanded": lambda y: y[:1].expand(4, -1, -1) * y[0, 0].expand(4, 6, 4),
    "repeated": lambda y: y.repeat(2, 1, 3) + y.tile(2, 1, 3),
    "repeat interleave": lambda y: y.repeat_interleave(2, dim=1),
    "narrowed": lambda y: y[..., 1:3] * y[:, ::2, :2].repeat(1, 2, 1),
    "from the end": lambda y: y[-1, -2:, ...] - y.select(0, -1)[-3:-1],
    "flipped": lambda y: y.flip(-1) + y.roll((1, -2), (0, 1)) + y.roll(1),
    "diagonal": lambda y: torch.diagonal(y, dim1=1, dim2=2) + y.diagonal(1, 0, 1)[:1].T[:1],
    "concatenated": lambda y: torch.cat([y, CONSTANT, y.conj()], dim=1),
    "concatenated with real": lambda y: torch.cat([y, CONSTANT.real, y.real]),
    "stacked": lambda y: torch.stack([y, CONSTANT, 2 * y], dim=-1),
    "split": lambda y: y.split([1, 3, 2], dim=1)[1] * y.chunk(2, dim=1)[0] + y.unbind(0)[0][:3],
    "unfolded": lambda y: y.unfold(1, 3, 1) * 2,
    "triangle": lambda y: y.tril() + y.triu(1),
    "padded": lambda y: torch.nn.functional.pad(y, (1, 0, 2, 1)),
    "broadcast up": lambda y: y[0] + y + y[0, 0] * CONSTANT,
    "outer": lambda y: torch.outer(y[0, 0], y[1, 0].conj()),
    "meshes": lambda y: torch.meshgrid(y[0, 0], y[0, 1], indexing="ij")[0] * 2,
    "matmul": lambda y: y @ MATRIX,
    "matmul from the left": lambda y: MATRIX.T @ y[0].T,
    "product with itself": lambda y: y @ y.mH,
    "batched product": lambda y: torch.bmm(y, y.transpose(1, 2)),
    "vectors": lambda y: torch.dot(y[0, 0], y[1, 1]) + torch.vdot(y[0, 0], y[1, 1]) + y[0].mv(y[0, 0])[0],
    "einsum": lambda y: torch.einsum("cij,cik->cjk", y.conj(), y),
    "einsum with a constant": lambda y: torch.einsum("cij,jk->cik", y, MATRIX),
    "tensordot": lambda y: torch.tensordot(y, CONSTANT, dims=([1, 2], [1, 2])),
    "addmm": lambda y: torch.addmm(BIAS, y[0], MATRIX),
    "linear": lambda y: torch.nn.functional.linear(y, MATRIX.T, BIAS[0]),
    "addcmul": lambda y: torch.addcmul(y, y, y.conj(), value=0.5),
    "sub with factor": lambda y: torch.sub(y, y.conj(), alpha=2) + torch.rsub(y, 1),
    "weights of the data": lambda y: (y.conj() * y).sum(dim=0).real / (y.abs().sum() + 1),
    "constant": lambda y: torch.zeros_like(y) + 0 * y,
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_arithmetic(name: str) -> None:
    tolerance = 1e-6 if name == "complex to real type" else 1e-10
    fallback = {"polar": "polar"}.get(name)
    check(COMPLEX[name], POINT, tolerance=tolerance, fallback=fallback)


SLOW = {
    "loss": "mse_loss",
    "other norms": "linalg_vector_norm",
    "variance and mean": "var_mean",
    "product": "prod",
}


@pytest.mark.parametrize("name", REAL)
def test_real_functions(name: str) -> None:
    check(REAL[name], POINT, fallback=SLOW.get(name))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_products(name: str) -> None:
    check(SHAPES[name], POINT, fallback=SLOW.get(name))


def test_operation_without_rule_falls_back_alone_and_is_named() -> None:
    found = check(
        lambda y: torch.linalg.inv(y[0, :4] @ y[0, :4].mH + 4 * torch.eye(4)).abs(), POINT, fallback="linalg_inv"
    )
    assert len(found.fallbacks) == 1
    assert "test_tape_operations.py" in found.fallbacks[0]


def in_place(y: Tensor) -> Tensor:
    x = y * 2
    x.add_(y.conj()).mul_(CONSTANT)
    x *= x.abs()
    x -= 1
    return x


def of_views(y: Tensor) -> Tensor:
    x = torch.view_as_real(y * 1)
    x[..., 0] *= 2
    x[..., 1].add_(x[..., 0])
    return torch.view_as_complex(x)


def into_constant(y: Tensor) -> Tensor:
    out = torch.zeros(3, 6, 4, 2, dtype=torch.float64)
    out[..., 0] = y.real.square()
    out[..., 1] = y.imag
    first = out[..., 0] + 0
    out[..., 0] = y.abs()
    return torch.view_as_complex(out) * first


def erased(y: Tensor) -> Tensor:
    x = y.sin()
    x[0] = 0
    x[:, 1].zero_()
    x[WHERE] = 1
    x.real.clamp_(min=-0.5)
    return x


def seen_through_another(y: Tensor) -> Tensor:
    x = y * y
    view = x.permute(1, 0, 2)
    x.mul_(y)
    kept = view.exp()
    view[2:4] += y.permute(1, 0, 2)[:2]
    return x * kept.permute(1, 0, 2)


def over_what_a_derivative_needs(y: Tensor) -> Tensor:
    x = y.exp()
    z = x * x.conj() + torch.tanh(x)
    x.zero_()
    return z + x


def row_by_row(y: Tensor) -> Tensor:
    out = torch.empty(3, 6, 4, dtype=torch.complex128)
    for coil in range(3):
        out[coil] = torch.fft.fft(y[coil]) * (coil + 1)
    out[..., -1].conj_physical_()
    return out


def swapped(y: Tensor) -> Tensor:
    x = y.clone()
    x[0], x[1] = x[1].clone(), x[0].clone()
    x.index_put_((torch.tensor([2]),), y[0] * 2)
    x.masked_fill_(WHERE, 0)
    x.scatter_(1, torch.zeros(3, 1, 4, dtype=torch.long), y[:, 2:3].sin())
    x.index_add_(0, torch.tensor([1]), y[:1].conj())
    return x.t_() if x.dim() == 2 else x


def of_the_input(y: Tensor) -> Tensor:
    y = y * 1
    y.real.relu_()
    return y


def through_a_strided_buffer(y: Tensor) -> Tensor:
    out = torch.zeros(6, 3, 4, dtype=torch.complex128).transpose(0, 1)
    out.copy_(y.cos())
    out[:, ::2] = y[:, :3]
    return out.contiguous() * out


@pytest.mark.parametrize(
    "function",
    [
        in_place,
        of_views,
        into_constant,
        erased,
        seen_through_another,
        over_what_a_derivative_needs,
        row_by_row,
        swapped,
        of_the_input,
        through_a_strided_buffer,
    ],
    ids=lambda function: function.__name__,
)
def test_writing(function: Function) -> None:
    check(function, POINT)


def test_writing_into_a_constant_that_was_used_takes_a_second_evaluation() -> None:
    def function(y: Tensor) -> Tensor:
        weights = torch.ones(3, 6, 4, dtype=torch.complex128)
        first = y * weights
        weights.mul_(2)
        return first + y * weights

    check(function, POINT, calls=2)


def test_writing_into_the_input_leaves_the_callers_data() -> None:
    kept = POINT.clone()
    pushed = linearize(lambda y: y.mul_(2).abs(), POINT).push(CONSTANT.unsqueeze(0))
    assert torch.equal(POINT, kept)
    expected = forward_mode(lambda y: (2 * y).abs(), POINT, CONSTANT)
    torch.testing.assert_close(pushed[0], expected, rtol=1e-12, atol=1e-12)


def test_detached_parts_are_constants_and_told() -> None:
    found = check(lambda y: y * y.detach().abs() + y.abs().sum().item(), POINT)
    assert len(found.cuts) == 2
    assert "Tensor.detach" in found.cuts[0]
    assert "_local_scalar_dense" in found.cuts[1]
    assert "test_tape_operations.py" in found.cuts[0]


def test_a_detached_view_stays_constant_when_its_memory_changes() -> None:
    def function(y: Tensor) -> Tensor:
        x = y * 2
        frozen = x.detach().clone()
        x.add_(1)
        return x * frozen

    check(function, POINT)


def test_masks_of_the_data_are_no_cut() -> None:
    assert check(lambda y: y * (y.abs() > 0.5), POINT).cuts == ()


def test_probes_do_not_see_each_other() -> None:
    push = linearize(lambda y: torch.view_as_complex(torch.view_as_real(y.sin()).relu_()) / y.abs().std(), POINT).push
    batch = draw(4, *POINT.shape, seed=31)
    changed = batch.clone()
    changed[1:] *= -7
    torch.testing.assert_close(push(batch)[0], push(changed)[0], rtol=0, atol=0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_probes(count: int) -> None:
    push = linearize(lambda y: torch.fft.fft2(y).abs(), POINT).push
    assert push(draw(count, *POINT.shape)).shape == (count, *POINT.shape)


def test_tangents_need_not_be_contiguous() -> None:
    push = linearize(in_place, POINT).push
    batch = draw(6, 4, 3, 5, seed=3).permute(3, 2, 0, 1)
    torch.testing.assert_close(push(batch), push(batch.contiguous()), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(push(batch.conj()), push(batch.conj().resolve_conj()), rtol=1e-13, atol=1e-13)
    one = batch[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(push(one), push(one.contiguous()), rtol=1e-13, atol=1e-13)


STEPS: list[Function] = [
    lambda x: x * CONSTANT,
    lambda x: x + x.conj(),
    lambda x: torch.fft.fft2(x, norm="ortho"),
    lambda x: torch.view_as_complex(torch.view_as_real(x).relu()),
    lambda x: x.roll((1, 2), (-1, -2)),
    lambda x: torch.where(WHERE, x, 2j * x),
    lambda x: x * x.abs().tanh(),
    lambda x: x / (1 + x.abs().square().mean()),
    lambda x: torch.cat([x[:, 3:], x[:, :3].conj()], dim=1),
    lambda x: x - x.mean(dim=(-2, -1), keepdim=True),
    lambda x: x.flip(0).transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: torch.complex(x.imag, x.real.sin()),
    lambda x: torch.einsum("cij,dj->cid", x, SQUARE) / 2,
    lambda x: x.clone().mul_(0.5).add_(x),
    lambda x: torch.view_as_complex(torch.view_as_real(x * 1).clamp_(-1.5, 1.5)),
]


def _written(x: Tensor) -> Tensor:
    x = x * 1
    x[1] = x[0] * x[2]
    x[..., ::2] += 1
    return x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*STEPS, _written]), min_size=2, max_size=7), st.booleans())
def test_random_compositions(steps: list[Function], residual: bool) -> None:
    def function(y: Tensor) -> Tensor:
        x = y
        for step in steps:
            x = step(x) + 0.5 * x if residual else step(x)
        return x

    linearization = linearize(function, POINT)
    batch = draw(3, *POINT.shape, seed=41)
    assert not linearization.fallbacks
    assert torch.equal(linearization.value, function(POINT))
    for tangent, pushed in zip(batch, linearization.push(batch), strict=True):
        expected = forward_mode(function, POINT, tangent)
        torch.testing.assert_close(pushed, expected, rtol=1e-9, atol=1e-9 * max(1.0, float(expected.abs().max())))
