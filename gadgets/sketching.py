"""The σ series: noise standard deviation of every voxel of the image that goes by."""

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ismrmrd import Image
from torch import Tensor

from voxelsigma.formats.probe_file import TOKEN_KEY
from voxelsigma.gadgets.afterwork import Stop, Task, with_afterwork
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.estimation import Estimator, VolumeEstimate
from voxelsigma.gadgets.images import (
    SERIES_GFACTOR,
    SERIES_IMAGE,
    SERIES_SIGMA,
    SERIES_SIGMA_COMPLEX,
    SERIES_SIGMA_ERROR,
    SERIES_SIGMA_FREEDOM,
    SERIES_SIGMA_LOWER,
    SERIES_SIGMA_UPPER,
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
from voxelsigma.gadgets.recon_data import refuse_collected
from voxelsigma.gadgets.reconstruction import (
    Reconstruction,
    load_method,
    matching,
    method_meta,
    reconstruct_planes,
)
from voxelsigma.gadgets.sketch_properties import SketchProperties
from voxelsigma.models.cards import CARD_FOLDER, ModelCard, available_cards, load_card
from voxelsigma.models.sense import SenseReconstruction
from voxelsigma.noise.covariance import covariance_bias, covariance_error

logger = logging.getLogger("voxelsigma.sketch")


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
    "lower": _Layer(SERIES_SIGMA_LOWER, "STD_MAP", "sigma magnitude, lower 95 % limit (sketch's part)", 1000),
    "upper": _Layer(SERIES_SIGMA_UPPER, "STD_MAP", "sigma magnitude, upper 95 % limit (sketch's part)", 1000),
    "freedom": _Layer(SERIES_SIGMA_FREEDOM, "STD_MAP", "degrees of freedom of sigma squared, 0 where it is exact", 1),
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
        self.estimator = Estimator(properties=properties, context=context, seed=self.seed, device=self.device)

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
        card = self._card_of(image)
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

    def _card_of(self, image: Image) -> ModelCard:
        """The card that an image names: shipped, or configured here; a card may name code, which no message may."""
        path = str(image.meta.get("voxelsigma_model_card", "")).encode("ascii", "replace").decode("unicode_escape")
        name = str(image.meta["voxelsigma_model"])
        card = load_card(name if not path and name in available_cards() else self.properties.model)
        if card.path.absolute() != (Path(path) if path else CARD_FOLDER / f"{name}.yaml").absolute():
            raise ValueError(
                f"sketch: an image was made by the model card {path or name!r}, which is not shipped; property 'model' "
                f"must name it here too, got {self.properties.model!r}"
            )
        stated = str(image.meta.get("voxelsigma_model_sha256") or "")
        if stated != card.sha256:
            raise ValueError(
                f"sketch: an image was made by {name!r} with weights of sha256 {stated or 'none'}, the card "
                f"{card.path} has {card.sha256 or 'none'}; both gadgets must use the same model"
            )
        return card

    def _maps(self, reconstruction: Reconstruction, numbers: SeriesNumbers, stop: Stop) -> Iterator[Image]:
        kspace = reconstruction.planes[0].item
        if kspace.whitening is None:
            raise ValueError(
                f"sketch: the data of {kspace.key} were not whitened, so their noise is unknown; put 'prewhiten' "
                "before 'accumulate' (with forward='covariance'), or set prewhitened='true' there if something else "
                "did it"
            )
        if "complex" in self.properties.maps and not reconstruction.values[0].is_complex():
            raise ValueError(
                f"sketch: property 'maps' asks for 'complex', but {reconstruction.card.name!r} gives real images, "
                "which have only a magnitude map"
            )
        whitening = kspace.whitening
        bias = covariance_bias(whitening.coils, whitening.effective_samples) if whitening.samples else 1.0
        result = self.estimator.estimate(reconstruction, whitening, bias, stop)
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

    def _meta(
        self, reconstruction: Reconstruction, result: VolumeEstimate, whitening: Whitening, bias: float
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
            "voxelsigma_prior": result.prior,
            "voxelsigma_precision": "" if exact else result.precision,
            "voxelsigma_seed": "" if exact else str(self.seed),
            "voxelsigma_sketch_error": f"{result.error:.4g}",
            "voxelsigma_degrees_of_freedom": "" if exact else f"{result.freedom_median:.4g}",
            "voxelsigma_explained": "" if exact else f"{result.explained:.4g}",
            "voxelsigma_covariance_bias": f"{bias:.6g}" if whitening.samples else "unknown, none applied",
            "voxelsigma_covariance_error": f"{covariance_error(whitening.effective_samples):.4g}"
            if whitening.samples
            else "unknown",
            TOKEN_KEY: self.context.probes.token if self.context.probes is not None else "",
            "voxelsigma_image_scale": "" if image_scale is None else f"{image_scale:g}",
            "voxelsigma_acceleration": str(reconstruction.image.meta.get("voxelsigma_acceleration", "")),
            "voxelsigma_unfit": str(reconstruction.image.meta.get("voxelsigma_unfit", "")),
        }


def _is_ours(image: Image) -> bool:
    """Whether an image was made by `reconstruct`: others pass."""
    series = image.image_series_index in range(SERIES_IMAGE, SERIES_IMAGE + 10)
    return series and bool(image.meta.get("voxelsigma_model"))


def _values(name: str, result: VolumeEstimate, reconstruction: Reconstruction, bias: float) -> Tensor:
    """A map by its name, the covariance's bias taken into account, shape `(z, y, x)`."""
    sigma = result.magnitude * bias
    if name == "snr":
        image = assemble(reconstruction.planes[0].item, reconstruction.values).abs().to(sigma.device)
        # next to nothing over next to nothing, where no coil sees anything, is no SNR; a model with sensitivities of
        # its own sees further than those that were estimated here
        seen = sigma if reconstruction.card.estimates_sensitivities else result.ratio
        return torch.where(seen > 0, image / sigma.clamp_min(1e-30), 0)
    if name == "complex":
        assert result.complex is not None
        return result.complex * bias
    if name in ("lower", "upper"):
        return result.bound(0.025 if name == "lower" else 0.975) * bias
    made = {
        "magnitude": sigma,
        "error": sigma * result.relative_error,
        "freedom": torch.where(result.freedom.isfinite(), result.freedom, 0),
        "gfactor": result.ratio,
    }
    return made[name]
