"""Reconstruction: k-space and sensitivities to an image in SNR units, by the method of a model card."""

import logging
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from ismrmrd import Image
from torch import Tensor

from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.images import (
    IMAGE_FACTOR,
    SERIES_IMAGE,
    SeriesNumbers,
    described,
    make_image,
    provenance,
    scaled_by,
    stored_as,
    window,
)
from voxelsigma.gadgets.items import KSpace, Sensitivities, Stream, VolumeKey
from voxelsigma.gadgets.planes import Plane, assemble, pick_device, planes_of
from voxelsigma.gadgets.properties import choice, number, several, text
from voxelsigma.gadgets.recon_data import refuse_collected
from voxelsigma.models.cards import CARD_FOLDER, BoundReconstruction, ModelCard, Reconstructor, load_card, load_model
from voxelsigma.models.grid import Window
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.tensor_cores import tensor_cores

logger = logging.getLogger("voxelsigma.reconstruct")

MOST_LOADED: Final = 8

_loading = threading.Lock()
_loaded: dict[tuple[str, str, float | None, int], Reconstructor] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructProperties:
    """Properties of `reconstruct`.

    `model` is a shipped card's name or the path of a YAML file; `regularization` is for linear methods; `output` is the
    type of the image series and `dtype` its data type: integers are ten times the SNR units. `linearization`, forwarded
    inside a chain only, hands the sketch what was computed here.
    """

    model: str = text("sense")
    regularization: float | None = number(None, 0.0, 1e6)
    output: str = choice("magnitude", "magnitude", "complex")
    dtype: str = choice("float32", "float32", "uint16")
    device: str = choice("auto", "auto", "cpu", "cuda")
    forward: tuple[str, ...] = several((), "covariance", "kspace", "sensitivities", "linearization")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reconstruction:
    """What `reconstruct` hands to `sketch` inside a process.

    Parameters
    ----------
    image
        The image item.
    planes
        Its planes.
    functions
        The reconstruction of each.
    values
        The complex image of each.
    card
        The method.
    sensitivities
        How they were estimated.
    """

    image: Image
    planes: list[Plane]
    functions: list[BoundReconstruction]
    values: list[Tensor]
    card: ModelCard
    sensitivities: str

    def linearize(self, number: int) -> Linearization:
        """Linearization of one plane: made when it is needed, so that the image does not wait for it."""
        return linearize(self.functions[number], self.planes[number].kspace)


class Reconstruct:
    """Reconstruct every k-space whose sensitivities came before it."""

    def __init__(self, properties: ReconstructProperties, context: Context) -> None:
        if properties.dtype == "uint16" and properties.output == "complex":
            raise ValueError(
                "reconstruct: property 'dtype' is 'uint16' and 'output' is 'complex'; integers are for magnitude "
                "images, 'float32' would do"
            )
        self.properties = properties
        self.context = context
        self.card = load_card(properties.model)
        check_regularization("reconstruct", self.card, properties.regularization)
        self.device = pick_device(properties.device)
        self.method = load_method(self.card, self.device, properties.regularization)

    def __call__(self, items: Stream) -> Stream:
        """`Sensitivities` and `KSpace` in, one image a k-space out."""
        maps: dict[VolumeKey, Sensitivities] = {}
        numbers = SeriesNumbers()
        warned: set[str] = set()
        done = 0
        for item in items:
            if isinstance(item, Sensitivities):
                maps[item.key] = item
                if "sensitivities" in self.properties.forward:
                    yield item
            elif isinstance(item, KSpace):
                found = matching(maps, item, "reconstruct")
                # a long series must not keep what it is done with
                del maps[item.key]
                with self.context.turns():
                    result = self._reconstruct(item, found, numbers, warned)
                done += 1
                self.context.progress("slices", done, 0)
                if "linearization" in self.properties.forward:
                    yield result
                    continue
                if "kspace" in self.properties.forward:
                    yield item
                yield result.image
            else:
                refuse_collected("reconstruct", item)
                yield item

    def _reconstruct(
        self, kspace: KSpace, sensitivities: Sensitivities, numbers: SeriesNumbers, warned: set[str]
    ) -> Reconstruction:
        planes, functions, values = reconstruct_planes(kspace, sensitivities, self.method, self.device)
        reason = unfit(self.card, kspace, planes[0], functions[0].windows)
        if reason and reason not in warned:
            warned.add(reason)
            logger.warning("model %r was not made for this data: %s", self.card.name, reason)
        volume = assemble(kspace, values).cpu().numpy()
        magnitude = np.abs(volume).astype(np.float32)
        comment = f"{self.card.name} image, SNR units"
        array: npt.NDArray[np.generic]
        if self.properties.output == "complex":
            array, scale = volume.astype(np.complex64), {**window(magnitude), **scaled_by(1)}
        else:
            array, scale = stored_as(magnitude, self.properties.dtype, IMAGE_FACTOR, comment)
        meta = {
            **described("Image", comment, ["voxelsigma", self.card.name], kspace),
            **provenance(kspace),
            **method_meta(self.card, self.properties.regularization, sensitivities.method),
            **scale,
            "voxelsigma_acceleration": f"{planes[0].problem.acceleration(functions[0].windows):.4g}",
            "voxelsigma_unfit": reason,
        }
        return Reconstruction(
            image=make_image(array, kspace, numbers, SERIES_IMAGE, meta),
            planes=planes,
            functions=functions,
            values=values,
            card=self.card,
            sensitivities=sensitivities.method,
        )


def load_method(card: ModelCard, device: torch.device, regularization: float | None) -> Reconstructor:
    """The method of a card, with another regularisation where one is given; what was loaded once is kept."""
    stamp = card.weights.stat().st_mtime_ns if card.weights is not None and card.weights.is_file() else 0
    key = (repr(card), str(device), regularization, stamp)
    with _loading:
        if key not in _loaded:
            overrides = {} if regularization is None else {"regularization": regularization}
            _loaded[key] = load_model(card, device, **overrides)
            while len(_loaded) > MOST_LOADED:
                del _loaded[next(iter(_loaded))]
        return _loaded[key]


def check_regularization(gadget: str, card: ModelCard, regularization: float | None) -> None:
    """Refuse a regularisation for a method that has none."""
    if regularization is not None and card.architecture != "sense":
        raise ValueError(
            f"{gadget}: property 'regularization' is {regularization:g}, but model {card.name!r} is a trained network "
            "and takes none; it is for 'sense'"
        )


def reconstruct_planes(
    kspace: KSpace,
    sensitivities: Sensitivities,
    method: Reconstructor,
    device: torch.device,
) -> tuple[list[Plane], list[BoundReconstruction], list[Tensor]]:
    """Planes, the reconstruction of each, and its image."""
    planes = list(planes_of(kspace, sensitivities, device))
    functions = [method.bind(plane.problem) for plane in planes]
    # stock torch multiplies in TF32 where it can: images are float32
    with torch.no_grad(), tensor_cores(False) if device.type == "cuda" else nullcontext():
        values = [function(plane.kspace) for function, plane in zip(functions, planes, strict=True)]
    return planes, functions, values


def matching(maps: dict[VolumeKey, Sensitivities], kspace: KSpace, gadget: str) -> Sensitivities:
    """The sensitivities of a k-space.

    Raises
    ------
    ValueError
        If none came before it, or their number of coils differs.
    """
    found = maps.get(kspace.key)
    if found is None:
        raise ValueError(
            f"{gadget}: no coil sensitivities came for {kspace.key}; put 'coil_maps' (with forward='kspace') before it"
        )
    if found.maps.shape[0] != kspace.data.shape[0]:
        raise ValueError(
            f"{gadget}: sensitivities of {kspace.key} have {found.maps.shape[0]} coils, k-space "
            f"{kspace.data.shape[0]}; expected equal coils"
        )
    return found


def unfit(card: ModelCard, kspace: KSpace, plane: Plane, windows: tuple[Window, Window]) -> str:
    """What the data ask beyond what a card is fit for, in words."""
    return card.unfit(
        acceleration=plane.problem.acceleration(windows),
        coils=kspace.data.shape[0],
        # a decoupled volume is a stack of planes to the model
        dimension=2,
    )


def method_meta(card: ModelCard, regularization: float | None, sensitivities: str) -> dict[str, Any]:
    """The method of an image or map, as metadata: enough to repeat it."""
    if regularization is None:
        regularization = card.hyperparameters.get("regularization")
    return {
        "voxelsigma_model": card.name,
        # other characters as escapes, from which the path can be had back
        "voxelsigma_model_card": ""
        if card.path.absolute().parent == CARD_FOLDER.absolute()
        else str(card.path.absolute()).encode("unicode_escape").decode(),
        "voxelsigma_model_sha256": card.sha256,
        "voxelsigma_regularization": "" if regularization is None else f"{regularization:.9g}",
        "voxelsigma_sensitivities": "estimated by the model"
        if card.estimates_sensitivities
        else f"{sensitivities}, held fixed",
    }
