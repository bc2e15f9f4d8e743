"""The σ series: noise standard deviation of every voxel of the image that goes by."""

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from ismrmrd import Image
from torch import Tensor

from voxelsigma.gadgets.afterwork import Stop, Task, with_afterwork
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.images import (
    SERIES_GFACTOR,
    SERIES_IMAGE,
    SERIES_SIGMA,
    SERIES_SIGMA_COMPLEX,
    SERIES_SIGMA_ERROR,
    SERIES_SNR,
    MetaValue,
    SeriesNumbers,
    described,
    history_of,
    make_image,
    provenance,
    scale_of,
    stored_as,
)
from voxelsigma.gadgets.items import Item, KSpace, Sensitivities, Stream, VolumeKey, Whitening
from voxelsigma.gadgets.planes import assemble, pick_device
from voxelsigma.gadgets.properties import boolean, choice, integer, number, several
from voxelsigma.gadgets.recon_data import refuse_collected
from voxelsigma.gadgets.reconstruction import (
    Reconstruction,
    load_method,
    matching,
    method_meta,
    reconstruct_planes,
)
from voxelsigma.models.cards import load_card
from voxelsigma.models.sense import SenseReconstruction
from voxelsigma.noise.covariance import covariance_bias, covariance_error
from voxelsigma.noise.gfactor import noise_ratio
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.sigma import MapKind, SigmaMap, exact_map
from voxelsigma.noise.sketch import Stopping, object_mask, sketch

logger = logging.getLogger("voxelsigma.sketch")


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchProperties:
    """Properties of `sketch`.

    It stops at `probes`, at `target_error` (relative, median over the object) or after `time_budget` seconds a plane,
    whichever comes first; with a `seed` on counts alone, so that it can be repeated. `maps` lists the series to
    emit. `estimator` `auto` computes exactly where that is cheap (a linear reconstruction with sampling along one
    axis). `dtype` is the data type of the series.
    """

    probes: int = integer(64, 2, 65536)
    target_error: float | None = number(None, 1e-4, 1.0)
    time_budget: float | None = number(None, 1e-3, 86400.0)
    seed: int | None = integer(None, 0, 2**62)
    maps: tuple[str, ...] = several(("magnitude",), "magnitude", "complex", "error", "snr", "gfactor")
    estimator: str = choice("auto", "auto", "sketch", "exact")
    control_variate: bool = boolean(True)
    chunk: int | None = integer(None, 1, 4096)
    dtype: str = choice("float32", "float32", "uint16")
    device: str = choice("auto", "auto", "cpu", "cuda")
    forward: tuple[str, ...] = several((), "covariance", "kspace", "sensitivities")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """Maps of a slice or volume, before the covariance's bias is taken into account, shape `(z, y, x)` each."""

    magnitude: Tensor
    complex: Tensor
    relative_error: Tensor
    ratio: Tensor
    error: float
    probes: int
    estimator: str
    explained: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """How a map leaves: its series, role, comment, and factor as an integer."""

    series: int
    role: str
    comment: str
    factor: float


_LAYERS = {
    "magnitude": _Layer(SERIES_SIGMA, "STD_MAP", "sigma magnitude, SNR units", 1000),
    "complex": _Layer(SERIES_SIGMA_COMPLEX, "STD_MAP", "sigma complex, SNR units", 1000),
    "error": _Layer(SERIES_SIGMA_ERROR, "STD_MAP", "standard error of sigma magnitude (sketch's part)", 1000),
    "snr": _Layer(SERIES_SNR, "SNR_MAP", "SNR", 10),
    "gfactor": _Layer(SERIES_GFACTOR, "GFACTOR", "g-factor", 1000),
}


class Sketch:
    """Emit the image, then its σ maps."""

    def __init__(self, properties: SketchProperties, context: Context) -> None:
        if properties.seed is not None and properties.time_budget is not None:
            raise ValueError(
                "sketch: property 'time_budget' cannot go with 'seed': a repeatable run stops on counts alone"
            )
        self.properties = properties
        self.context = context
        self.device = pick_device(properties.device)
        self.seed = secrets.randbits(62) if properties.seed is None else properties.seed

    def __call__(self, items: Stream) -> Stream:
        """Images in; images out, and behind each its maps, as soon as they are there."""
        maps: dict[VolumeKey, Sensitivities] = {}
        kspaces: dict[VolumeKey, KSpace] = {}
        numbers = SeriesNumbers()

        def sort(item: Item) -> tuple[list[Item], Task | None]:
            if isinstance(item, Reconstruction):
                maps.pop(item.planes[0].item.key, None)
                return [item.image], partial(self._maps, item, numbers)
            if isinstance(item, Sensitivities):
                maps[item.key] = item
                return [item] if "sensitivities" in self.properties.forward else [], None
            if isinstance(item, KSpace):
                kspaces[item.key] = item
                return [item] if "kspace" in self.properties.forward else [], None
            if isinstance(item, Image) and _is_ours(item):
                kspace, found = self._take(item, kspaces, maps)
                return [item], partial(self._repeated_maps, item, kspace, found, numbers)
            refuse_collected("sketch", item)
            return [item], None

        return with_afterwork(items, sort)

    def _take(
        self, image: Image, kspaces: dict[VolumeKey, KSpace], maps: dict[VolumeKey, Sensitivities]
    ) -> tuple[KSpace, Sensitivities]:
        """What came before an image of another process; a long series must not keep what it is done with."""
        key = VolumeKey(**{name: int(getattr(image, name)) for name in VolumeKey.__dataclass_fields__})
        if key not in kspaces:
            raise ValueError(
                f"sketch: no k-space came for the image of {key}; set forward='kspace sensitivities' before it"
            )
        found = matching(maps, kspaces[key], "sketch")
        del maps[key]
        return kspaces.pop(key), found

    def _repeated_maps(
        self, image: Image, kspace: KSpace, sensitivities: Sensitivities, numbers: SeriesNumbers, stop: Stop
    ) -> Iterator[Image]:
        """Maps by the method that an image of another process names."""
        path = str(image.meta.get("voxelsigma_model_card", "")).encode("ascii").decode("unicode_escape")
        card = load_card(path or str(image.meta["voxelsigma_model"]))
        stated = image.meta.get("voxelsigma_regularization")
        method = load_method(card, self.device, None if stated is None else float(stated))
        with self.context.turns():
            planes, functions, values = reconstruct_planes(kspace, sensitivities, method, self.device)
        repeated = Reconstruction(
            image=image,
            planes=planes,
            functions=functions,
            values=values,
            card=card,
            sensitivities=sensitivities.method,
        )
        yield from self._maps(repeated, numbers, stop)

    def _maps(self, reconstruction: Reconstruction, numbers: SeriesNumbers, stop: Stop) -> Iterator[Image]:
        kspace = reconstruction.planes[0].item
        if kspace.whitening is None:
            raise ValueError(
                f"sketch: the data of {kspace.key} were not whitened, so their noise is unknown; put 'prewhiten' "
                "before 'accumulate' (with forward='covariance'), or set prewhitened='true' there if something else "
                "did it"
            )
        result = self._estimate(reconstruction, stop)
        whitening = kspace.whitening
        bias = covariance_bias(whitening.coils, whitening.effective_samples) if whitening.samples else 1.0
        common = self._meta(reconstruction, result, whitening, bias)
        for name in self.properties.maps:
            layer = _LAYERS[name]
            array = _values(name, result, reconstruction, bias).cpu().numpy().astype(np.float32)
            comment = layer.comment
            if name == "gfactor" and not isinstance(reconstruction.functions[0], SenseReconstruction):
                comment = "noise ratio to full sampling, not lost contrast"
            stored, scale = stored_as(array, self.properties.dtype, layer.factor, comment)
            history = [*history_of(reconstruction.image), result.estimator]
            meta: dict[str, MetaValue] = {
                **described(["Quantitative", layer.role], comment, history, kspace),
                **common,
                **scale,
                "Use_dedicated_scaling_factor": 1,
                "voxelsigma_map": name,
                "voxelsigma_kind": "complex" if name == "complex" else "magnitude",
            }
            yield make_image(stored, kspace, numbers, layer.series, meta)

    def _estimate(self, reconstruction: Reconstruction, stop: Stop) -> _Result:
        """Maps of all planes, assembled."""
        kspace = reconstruction.planes[0].item
        pairs, ratios = [], []
        objects: list[Tensor] = []
        for index, plane in enumerate(reconstruction.planes):
            found, estimator = self._plane(reconstruction, index, stop)
            pairs.append(found)
            windows = reconstruction.functions[index].windows
            gain = plane.readout_gain * plane.problem.interpolation_gain(windows).to(self.device)
            ratios.append(
                noise_ratio(
                    found["magnitude"].sigma / gain,
                    plane.problem.sensitivities_on(plane.problem.size, plane.problem.field_of_view),
                    plane.problem.acceleration(windows),
                )
            )
            error = found["magnitude"].relative_error()
            inside = object_mask(reconstruction.values[index]).to(error.device)
            objects.append(torch.stack([error[inside], found["magnitude"].explained[inside]]))
        median = torch.cat(objects, dim=1).median(dim=1).values
        result = _Result(
            magnitude=assemble(kspace, [pair["magnitude"].sigma for pair in pairs]),
            complex=assemble(kspace, [pair["complex"].sigma for pair in pairs]),
            relative_error=assemble(kspace, [pair["magnitude"].relative_error() for pair in pairs]),
            ratio=assemble(kspace, ratios),
            error=float(median[0]),
            probes=max(pair["magnitude"].probes for pair in pairs),
            estimator=estimator,
            explained=float(median[1]),
        )
        logger.info(
            "sigma of %s: %s, %d probes, relative standard error %.1f %% (median over the object)",
            kspace.key,
            estimator,
            result.probes,
            100 * result.error,
        )
        return result

    def _plane(self, reconstruction: Reconstruction, index: int, stop: Stop) -> tuple[dict[MapKind, SigmaMap], str]:
        """Both maps of one plane, and how they were estimated."""
        chosen = self.properties
        function, plane = reconstruction.functions[index], reconstruction.planes[index]
        if chosen.estimator != "sketch":
            stop()
            with self.context.turns():
                variance = function.exact_variance() if isinstance(function, SenseReconstruction) else None
            if variance is not None:
                return {
                    "magnitude": exact_map(variance / 2, "magnitude"),
                    "complex": exact_map(variance, "complex"),
                }, "exact"
            if chosen.estimator == "exact":
                raise ValueError(
                    f"sketch: property 'estimator' is 'exact', but {reconstruction.card.name!r} on this sampling has "
                    "no cheap exact map; 'auto' or 'sketch' would do"
                )
        stopping = Stopping(probes=chosen.probes, target_error=chosen.target_error, time_budget=chosen.time_budget)
        total = len(reconstruction.planes)

        def report(done: int, limit: int) -> None:
            stop()
            self.context.progress("probes", index * limit + done, total * limit)

        found = sketch(
            self._taking_turns(reconstruction, index),
            plane.probes(self.seed),
            stopping if chosen.seed is None else stopping.seeded(),
            covariate=plane.problem.covariate() if chosen.control_variate else None,
            chunk=chosen.chunk,
            progress=report,
        )
        estimator = "sketch with control variate" if chosen.control_variate else "sketch"
        return {"magnitude": found.map("magnitude"), "complex": found.map("complex")}, estimator

    def _taking_turns(self, reconstruction: Reconstruction, index: int) -> Linearization:
        """Linearization of one plane that leaves the device to others between its batches."""
        with self.context.turns():
            whole = reconstruction.linearize(index)

        def push(tangents: Tensor) -> Tensor:
            with self.context.turns():
                return whole.push(tangents)

        return replace(whole, push=push)

    def _meta(
        self, reconstruction: Reconstruction, result: _Result, whitening: Whitening, bias: float
    ) -> dict[str, MetaValue]:
        """Metadata that all maps share."""
        kspace = reconstruction.planes[0].item
        stated = reconstruction.image.meta.get("voxelsigma_regularization")
        exact = result.estimator == "exact"
        image_scale = scale_of(reconstruction.image)
        return {
            **provenance(kspace),
            **method_meta(reconstruction.card, None if stated is None else float(stated), reconstruction.sensitivities),
            "voxelsigma_estimator": result.estimator,
            "voxelsigma_probes": result.probes,
            "voxelsigma_seed": "" if exact else str(self.seed),
            "voxelsigma_sketch_error": f"{result.error:.4g}",
            "voxelsigma_explained": "" if exact else f"{result.explained:.4g}",
            "voxelsigma_covariance_bias": f"{bias:.6g}" if whitening.samples else "unknown, none applied",
            "voxelsigma_covariance_error": f"{covariance_error(whitening.effective_samples):.4g}"
            if whitening.samples
            else "unknown",
            "voxelsigma_image_scale": "" if image_scale is None else f"{image_scale:g}",
            "voxelsigma_acceleration": str(reconstruction.image.meta.get("voxelsigma_acceleration", "")),
            "voxelsigma_unfit": str(reconstruction.image.meta.get("voxelsigma_unfit", "")),
        }


def _is_ours(image: Image) -> bool:
    """Whether an image was made by `reconstruct`: others pass."""
    series = image.image_series_index in range(SERIES_IMAGE, SERIES_IMAGE + 10)
    return series and bool(image.meta.get("voxelsigma_model"))


def _values(name: str, result: _Result, reconstruction: Reconstruction, bias: float) -> Tensor:
    """A map by its name, the covariance's bias taken into account, shape `(z, y, x)`."""
    sigma = result.magnitude * bias
    if name == "magnitude":
        return sigma
    if name == "complex":
        return result.complex * bias
    if name == "error":
        return sigma * result.relative_error
    if name == "gfactor":
        return result.ratio
    image = assemble(reconstruction.planes[0].item, reconstruction.values).abs().to(sigma.device)
    # next to nothing over next to nothing, where no coil sees anything, is no SNR
    return torch.where(result.ratio > 0, image / sigma.clamp_min(1e-30), 0)
