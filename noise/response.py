"""The covariate that fits a reconstruction: the zero-filled image through a filter learned from the first probes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from voxelsigma.noise.local_filter import filtered, shifted, square
from voxelsigma.noise.voxels import neighbourhood_mean, object_mask

REACH: Final = 3
"""Voxels to either side that the filter sees: 7 × 7."""
VARYING_REACH: Final = 2
"""Of these the inner 5 × 5 weights may change with the image; the outer ones are the same everywhere."""
OBSERVATIONS_PER_WEIGHT: Final = 100
"""Fewer would let the filter follow the noise of the very probes that it is learned from."""
MOST_VOXELS: Final = 4096
_RIDGE: Final = 3e-3
_LARGEST_FACTOR: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    r"""A filter of its own for each voxel, :math:`c_i = \sum_\delta h_i(\delta)\, w_{i+\delta}`.

    Parameters
    ----------
    offsets
        δ, `(y, x)` each.
    weights
        h, real, shape `(offsets, y, x)`.
    """

    offsets: tuple[tuple[int, int], ...]
    weights: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Filter images, `(probes, y, x)` to the same shape; beyond the border they are 0."""
        return filtered(images, self.weights.to(images.real.dtype), self.offsets)


def fit_responses(
    pushed: Tensor,
    covariates: Sequence[Tensor],
    image: Tensor,
    direction: Tensor,
    *,
    reaches: Sequence[tuple[int, int]] = ((REACH, VARYING_REACH),),
) -> tuple[Response, ...] | None:
    r"""Learn the filters whose sum best predicts pushed probes from linear images of the same probes.

    .. math:: \min_h \sum_{s,i} \frac{1}{e_i}
        \Big( a_{s,i} - \sum_{j,\delta} h_{j,i}(\delta)\, b_{j,s,i,\delta} \Big)^2, \qquad
        h_{j,i}(\delta) = \sum_f \theta_{j,f,\delta} \, \varphi_f(i)

    with :math:`a = \Re(e^{-i\phi_i} u_i)`, :math:`b_{j,\delta} = \Re(e^{-i\phi_i} w_{j,i+\delta})`, the local energy e,
    and features φ of the image (brightness, edges and their direction, texture): a network smooths where nothing is and
    along edges. One ridge regression for the whole object has a hundred observations a weight, so that the filters
    owe next to nothing to the noise of these probes; how good they are decides about the error alone, never about the
    expectation, which is known for any filter. A second regression, on products of features, then scales the filters
    of each voxel, so that gains are near 1 and neighbours have much the same.

    Parameters
    ----------
    pushed
        First probes u, shape `(probes, y, x)`.
    covariates
        Images of the same probes, of the same shape: the zero-filled one w first.
    image, direction
        The reconstruction and its phase factor, shape `(y, x)`.
    reaches
        Of the filter of each: voxels to either side that it sees, and that may vary with the image.

    Returns
    -------
        A filter for each; None where there are too few observations for any, no coil sees anything, or no numbers come
        of it.
    """
    inside = object_mask(image)
    chosen = _spread(inside)
    if not bool(covariates[0].flatten(1)[:, chosen].any()):
        return None
    features = image_features(image)
    found = _shapes(reaches, len(features), len(pushed) * len(chosen))
    if found is None:
        return None
    shapes, count = found
    phase = direction.conj().to(covariates[0].dtype)
    turned = (phase * pushed).real
    energy = neighbourhood_mean(turned.square().mean(dim=0), 5)
    scale = energy.flatten()[chosen]
    # a voxel that passes nothing on teaches nothing
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale.rsqrt(), 0)
    here = phase.flatten()[chosen]
    wanted = turned.flatten(1)[:, chosen] * scale
    # of different images by their size, so that one ridge is for all
    sizes = [_size(one) for one in covariates]
    # seen: (probes, offsets, chosen) of each
    seen = [
        torch.stack([(here * part.flatten(1)[:, chosen]).real for part in shifted(one, shape.offsets)], dim=1)
        * (scale / size)
        for one, shape, size in zip(covariates, shapes, sizes, strict=True)
    ]
    weights = _regressed(seen, wanted, shapes, features[:count], chosen)
    if count > 1:
        products = _products(features)
        fitted = torch.stack(
            [(one.flatten(1)[:, chosen] * values).sum(dim=1) for one, values in zip(weights, seen, strict=True)]
        ).sum(dim=0)
        factors = _ridge_regression((products.flatten(1)[:, chosen] * values for values in fitted), wanted)
        scaled = torch.einsum("f,fyx->yx", factors, products).clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
        weights = [one * scaled for one in weights]
    if not all(bool(one.isfinite().all()) for one in weights):
        return None
    return tuple(
        Response(offsets=shape.offsets, weights=_beside(one / size, shape.offsets, inside, first=place == 0))
        for place, (one, shape, size) in enumerate(zip(weights, shapes, sizes, strict=True))
    )


def _regressed(
    seen: Sequence[Tensor], wanted: Tensor, shapes: Sequence["_Shape"], features: Tensor, chosen: Tensor
) -> list[Tensor]:
    """Weights of each filter, `(offsets, y, x)`, of one regression."""
    described = features[1:].flatten(1)[:, chosen]

    def rows(of_probe: Sequence[Tensor]) -> Iterator[Tensor]:
        for values, shape in zip(of_probe, shapes, strict=True):
            yield values
            yield (described.unsqueeze(1) * values[shape.inner]).flatten(0, 1)

    solution = _ridge_regression((torch.cat(list(rows(one))) for one in zip(*seen, strict=True)), wanted)
    weights = []
    for shape in shapes:
        own, solution = solution.tensor_split([shape.weights(len(features))])
        constant, varying = own.tensor_split([len(shape.offsets)])
        one = constant[:, None, None].expand(-1, *features.shape[1:]).clone()
        by_feature = varying.view(len(features) - 1, len(shape.inner))
        one[shape.inner] += torch.einsum("fk,fyx->kyx", by_feature, features[1:])
        weights.append(one)
    return weights


def fit_response(pushed: Tensor, covariate: Tensor, image: Tensor, direction: Tensor) -> Response | None:
    """`fit_responses` of the zero-filled image alone."""
    found = fit_responses(pushed, (covariate,), image, direction)
    return None if found is None else found[0]


def unexplained(pushed: Tensor, covariate: Tensor, image: Tensor, direction: Tensor) -> float:
    r"""Part of the probes' energy in phase that a covariate leaves, by the local energy, mean over the object.

    Parameters
    ----------
    pushed, covariate
        Probes u, and the covariate c of the same, shape `(probes, y, x)`.
    image, direction
        The reconstruction and its phase factor, shape `(y, x)`.
    """
    inside, phase = object_mask(image), direction.conj()
    left = (phase * (pushed - covariate)).real.square().mean(dim=0)[inside]
    energy = neighbourhood_mean((phase * pushed).real.square().mean(dim=0), 5)[inside]
    told = energy > torch.finfo(energy.dtype).tiny
    return float((left[told] / energy[told]).mean()) if bool(told.any()) else 0.0


@dataclass(frozen=True, slots=True)
class _Shape:
    """Weights of one filter, and which of them vary with the image."""

    offsets: tuple[tuple[int, int], ...]
    inner: list[int]

    def weights(self, features: int) -> int:
        """How many coefficients they have."""
        return len(self.offsets) + (features - 1) * len(self.inner)


def _shapes(reaches: Sequence[tuple[int, int]], features: int, observations: int) -> tuple[list[_Shape], int] | None:
    """The largest filters, and the number of features that they vary with, that so many observations can teach."""
    for most, varying, count in ((REACH, VARYING_REACH, features), (REACH, 0, 1), (1, 0, 1)):
        shapes = []
        for reach, inner in reaches:
            offsets = square(min(reach, most))
            near = min(inner, varying)
            shapes.append(_Shape(offsets, [n for n, one in enumerate(offsets) if max(map(abs, one)) <= near]))
        if observations >= OBSERVATIONS_PER_WEIGHT * sum(shape.weights(count) for shape in shapes):
            return shapes, count
    return None


def _beside(weights: Tensor, offsets: Sequence[tuple[int, int]], inside: Tensor, *, first: bool) -> Tensor:
    """Weights in the object; what it teaches does not hold beside it: there w itself is the covariate."""
    alone = torch.tensor([first and offset == (0, 0) for offset in offsets], device=weights.device)
    return torch.where(inside, weights, alone[:, None, None].to(weights))


def filtered_variance(response: Response, sensitivities: Tensor, correlation: Tensor) -> Tensor:
    r"""Variance of the filtered zero-filled image, in closed form.

    .. math:: E|c_i|^2 = \sum_{\delta,\epsilon} h_i(\delta) h_i(\epsilon) \, p(\delta - \epsilon)
        \sum_c S^*_{c,i+\delta} S_{c,i+\epsilon}

    since coil images of white k-space noise are stationary, :math:`E[z_a z_b^*] = p(a - b)`.

    Parameters
    ----------
    response
        The filter.
    sensitivities
        On the grid of the image, shape `(coils, y, x)`, complex.
    correlation
        p at the distances -2 `REACH` to 2 `REACH`, shape `(4 REACH + 1, 4 REACH + 1)`, complex.

    Returns
    -------
        Shape `(y, x)`, real, float64.
    """
    middle = correlation.shape[0] // 2
    table = torch.stack(
        [
            torch.stack([correlation[middle + y - v, middle + x - u] for v, u in response.offsets])
            for y, x in response.offsets
        ]
    ).to(sensitivities.dtype)
    weights = response.weights.to(sensitivities.real.dtype)
    alone = response.offsets.index((0, 0))
    own = weights[alone].double().square() * float(correlation[middle, middle].real)
    total = (own * sensitivities.abs().square().sum(dim=0)).flatten()
    # beside the object the filter is one weight, and that was its variance
    places = (weights != 0).sum(dim=0).sub((weights[alone] != 0).int()).flatten().nonzero().flatten()
    weights = weights.flatten(1)[:, places]
    energy = torch.zeros(len(places), dtype=torch.float64, device=total.device)
    for coil in sensitivities.conj():
        # weighted: (offsets, places)
        weighted = weights * torch.stack([part.flatten()[places] for part in shifted(coil, response.offsets)])
        energy += (weighted * (table.conj() @ weighted).conj()).real.sum(dim=0)
    total[places] = energy
    return total.reshape(sensitivities.shape[1:]).clamp_min(0)


def image_features(image: Tensor) -> Tensor:
    """What a filter may depend on: 1, brightness, edges, their direction, details, texture; shape `(7, y, x)`."""
    inside = object_mask(image)
    bright = image.abs() / image.abs()[inside].mean()
    down, right = torch.zeros_like(bright), torch.zeros_like(bright)
    down[1:-1] = bright[2:] - bright[:-2]
    right[:, 1:-1] = bright[:, 2:] - bright[:, :-2]
    edges = (_smooth(down.square() + right.square(), 3) + 1e-4).sqrt()
    found = (
        (bright + 0.03).log(),
        edges.log(),
        _smooth(right.square() - down.square(), 3) / edges,
        _smooth(down * right, 3) / edges,
        _smooth(bright, 5) - bright,
        ((_smooth(bright.square(), 5) - _smooth(bright, 5).square()).clamp_min(0) + 1e-4).log(),
    )
    normalised = [(one - one[inside].mean()) / one[inside].std(correction=0).clamp_min(1e-6) for one in found]
    return torch.stack([torch.ones_like(bright), *(one.clamp(-4, 4) for one in normalised)])


def _ridge_regression(rows: Iterable[Tensor], wanted: Tensor) -> Tensor:
    """Coefficients of the rows `(coefficients, observations)` of each probe, for its row of `wanted`."""
    normal, right = torch.zeros(()), torch.zeros(())
    for given, target in zip(rows, wanted, strict=True):
        normal, right = normal + (given @ given.mT).double().cpu(), right + (given @ target).double().cpu()
    ridge = _RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=normal.dtype)
    return torch.linalg.solve(normal + ridge, right).to(wanted)


def _products(features: Tensor) -> Tensor:
    """The features, of which the first is 1, and the products of all two others."""
    others = list(features[1:])
    pairs = [one * other for place, one in enumerate(others) for other in others[place:]]
    return torch.cat([features, torch.stack(pairs)])


def _spread(inside: Tensor) -> Tensor:
    """Places of voxels of the object to learn from, evenly spread."""
    places = inside.flatten().nonzero().flatten()
    if len(places) <= MOST_VOXELS:
        return places
    return places[torch.arange(MOST_VOXELS, device=places.device) * len(places) // MOST_VOXELS]


def _size(images: Tensor) -> Tensor:
    """Root mean square of images, 1 where they are nothing."""
    found = images.abs().square().mean().sqrt()
    return torch.where(found > torch.finfo(found.dtype).tiny, found, 1)


def _smooth(values: Tensor, size: int) -> Tensor:
    """Mean over a square of neighbours, of those that are there."""
    return avg_pool2d(values[None, None], size, stride=1, padding=size // 2, count_include_pad=False)[0, 0]
