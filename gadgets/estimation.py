"""σ of a slice or volume, plane by plane, by the cheapest estimator that its reconstruction allows."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from voxelsigma.formats.probe_file import VolumeMeta
from voxelsigma.formats.probe_writer import VolumeWriter
from voxelsigma.gadgets.afterwork import Stop
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.images import image_fov_mm, labels
from voxelsigma.gadgets.items import Whitening
from voxelsigma.gadgets.planes import Plane, assemble, independent_planes
from voxelsigma.gadgets.prediction import Judged, Refused, prediction, predictor_of, told_of, with_prior
from voxelsigma.gadgets.reconstruction import Reconstruction, unfit
from voxelsigma.gadgets.sketch_properties import SketchProperties
from voxelsigma.models.predictor import SigmaPredictor
from voxelsigma.models.sense import SenseReconstruction
from voxelsigma.noise.covariance import covariance_error
from voxelsigma.noise.gfactor import noise_ratio
from voxelsigma.noise.instant import FEWEST, instant_sketch
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.pico import estimate_linear
from voxelsigma.noise.precision import Precision, in_precision, reduced
from voxelsigma.noise.sigma import MapKind, SigmaMap, exact_map
from voxelsigma.noise.sketch import Covariate, Stopping, sketch
from voxelsigma.noise.tensor_cores import tensor_cores
from voxelsigma.noise.voxels import object_mask

logger = logging.getLogger("voxelsigma.sketch")

Maps: TypeAlias = dict[MapKind, SigmaMap]

_told: set[tuple[str, tuple[str, ...]]] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeEstimate:
    """Maps of a slice or volume, before the covariance's bias is taken into account, shape `(z, y, x)` each.

    Parameters
    ----------
    magnitude, complex
        The two σ maps; the second is None for a real reconstruction.
    freedom
        Degrees of freedom of the magnitude map, infinite where it is exact.
    ratio
        Noise against full sampling.
    freedom_median, explained
        Medians over the object: degrees of freedom, what the control variate explains.
    probes
        Largest number of probes of a plane.
    estimator, precision, prior
        In words; the last says what became of a predicted map.
    """

    magnitude: Tensor
    complex: Tensor | None
    freedom: Tensor
    ratio: Tensor
    freedom_median: float
    explained: float
    probes: int
    estimator: str
    precision: str
    prior: str

    @property
    def error(self) -> float:
        """Median over the object of the relative standard error."""
        return (2 * self.freedom_median) ** -0.5

    @property
    def relative_error(self) -> Tensor:
        """Relative standard error of the magnitude map."""
        return self._magnitude_map().relative_error()

    def bound(self, level: float) -> Tensor:
        """What the magnitude map's σ is below with a probability."""
        return self._magnitude_map().bound(level)

    def _magnitude_map(self) -> SigmaMap:
        return SigmaMap(
            sigma=self.magnitude,
            degrees_of_freedom=self.freedom,
            kind="magnitude",
            probes=self.probes,
            explained=torch.zeros_like(self.magnitude),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """Estimates volumes as its properties ask."""

    properties: SketchProperties
    context: Context
    seed: int
    device: torch.device

    def estimate(self, reconstruction: Reconstruction, whitening: Whitening, bias: float, stop: Stop) -> VolumeEstimate:
        """Maps of all planes, assembled."""
        kspace = reconstruction.planes[0].item
        kept = self._keep(reconstruction, whitening, bias)
        found: list[Maps] = []
        names: dict[str, None] = {}
        precisions: list[Precision] = []
        judged: list[Judged] = []
        ratios, objects = [], []
        for index, plane in enumerate(reconstruction.planes):
            maps, name = self._plane(reconstruction, index, kept, precisions, judged, stop)
            found.append(maps)
            names[name] = None
            windows = reconstruction.functions[index].windows
            gain = plane.readout_gain * plane.problem.interpolation_gain(windows).to(self.device)
            sensitivities = plane.problem.sensitivities_on(plane.problem.size, plane.problem.field_of_view)
            magnitude = maps["magnitude"]
            ratios.append(noise_ratio(magnitude.sigma / gain, sensitivities, plane.problem.acceleration(windows)))
            freedom = magnitude.degrees_of_freedom
            inside = object_mask(reconstruction.values[index]).to(freedom.device)
            objects.append(torch.stack([freedom[inside], magnitude.explained[inside]]))
        freedom_median, explained = torch.cat(objects, dim=1).median(dim=1).values.tolist()
        magnitudes = [maps["magnitude"] for maps in found]
        # there may be fewer than were allowed
        pushed = sum(one.probes for one in magnitudes)
        if 0 < pushed < len(found) * self.properties.probes:
            self.context.progress("probes", pushed, pushed)
        result = VolumeEstimate(
            magnitude=assemble(kspace, [one.sigma for one in magnitudes]),
            complex=assemble(kspace, [maps["complex"].sigma for maps in found]) if "complex" in found[0] else None,
            freedom=assemble(kspace, [one.degrees_of_freedom for one in magnitudes]),
            ratio=assemble(kspace, ratios),
            freedom_median=freedom_median,
            explained=explained,
            probes=max(one.probes for one in magnitudes),
            estimator=with_prior(" and ".join(names), judged),
            precision=str(precisions[0]) if precisions else "float32",
            prior=told_of(judged),
        )
        logger.info(
            "sigma of %s: %s, %d probes, relative standard error %.1f %% (median over the object)",
            kspace.key,
            result.estimator,
            result.probes,
            100 * result.error,
        )
        return result

    def _plane(
        self,
        reconstruction: Reconstruction,
        index: int,
        kept: VolumeWriter | None,
        precisions: list[Precision],
        judged: list[Judged],
        stop: Stop,
    ) -> tuple[Maps, str]:
        """Maps of one plane, and how they were estimated."""
        chosen = self.properties
        function = reconstruction.functions[index]
        linear = isinstance(function, SenseReconstruction)
        # kept probes are those of the sketch
        if chosen.estimator in ("auto", "exact") and kept is None:
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
        if chosen.estimator == "pico" and not linear:
            raise ValueError(
                f"sketch: property 'estimator' is 'pico', but {reconstruction.card.name!r} is not linear; 'auto' or "
                "'sketch' would do"
            )
        if linear and chosen.estimator != "sketch" and kept is None:
            return self._linear(reconstruction, index, precisions, stop)
        return self._sketch(reconstruction, index, kept, precisions, judged, stop)

    def _linear(
        self, reconstruction: Reconstruction, index: int, precisions: list[Precision], stop: Stop
    ) -> tuple[Maps, str]:
        function, plane = reconstruction.functions[index], reconstruction.planes[index]
        assert isinstance(function, SenseReconstruction)
        source = plane.probes(self.seed)
        with self.context.turns():
            probing = function.probing(source)
        samples = probing.samples

        def taking_turns(images: Tensor) -> Tensor:
            with self.context.turns():
                return samples(images)

        found = estimate_linear(
            self._taking_turns(reconstruction, index, precisions),
            replace(probing, samples=taking_turns),
            source,
            self._stopping(),
            covariate=self._covariate(plane, reconstruction.values[index]),
            estimator="pico" if self.properties.estimator == "pico" else "auto",
            chunk=self.properties.chunk,
            progress=self._reporting(reconstruction, index, stop),
        )
        name = "image-space probing" if found.estimator == "pico" else self._sketch_name()
        return {"magnitude": found.magnitude, "complex": found.complex}, name

    def _sketch(
        self,
        reconstruction: Reconstruction,
        index: int,
        kept: VolumeWriter | None,
        precisions: list[Precision],
        judged: list[Judged],
        stop: Stop,
    ) -> tuple[Maps, str]:
        plane = reconstruction.planes[index]
        linearization = self._taking_turns(reconstruction, index, precisions)
        value = linearization.value
        kinds: tuple[MapKind, ...] = ("magnitude", "complex") if value.is_complex() else ("magnitude",)
        covariate, source = self._covariate(plane, value), plane.probes(self.seed)
        report = self._reporting(reconstruction, index, stop)
        predictor = self._predictor(reconstruction, kept)
        # of a plane that no coil sees nothing can be predicted
        if predictor is not None and covariate is not None and bool(covariate.variance.any()):
            if not isinstance(predictor, Refused):
                with self.context.turns():
                    predict, covariate = prediction(predictor, plane, value, covariate)
                instant = instant_sketch(
                    linearization,
                    source,
                    self._stopping(),
                    predict,
                    scale=covariate.variance,
                    fewest=self._fewest(reconstruction, index),
                    covariate=covariate,
                    chunk=self.properties.chunk,
                    progress=report,
                )
                judged.append(Judged(certified=instant.certified, worst=instant.certificate.worst))
                return {kind: instant.map(kind) for kind in kinds}, self._sketch_name()
            judged.append(Judged(refused=predictor))
        found = sketch(
            linearization,
            source,
            self._stopping(),
            covariate=covariate,
            chunk=self.properties.chunk,
            keep=None if kept is None else kept.plane(index, complex_linear=linearization.complex_linear),
            progress=report,
        )
        return {kind: found.map(kind) for kind in kinds}, self._sketch_name()

    def _covariate(self, plane: Plane, image: Tensor) -> Covariate | None:
        if not self.properties.control_variate:
            return None
        return plane.problem.covariate(None if image.is_complex() else plane.kspace)

    def _predictor(self, reconstruction: Reconstruction, kept: VolumeWriter | None) -> SigmaPredictor | Refused | None:
        """The model's predictor, if it is to be asked."""
        chosen = self.properties
        if chosen.prior == "off" or not chosen.control_variate or self._stopping().probes < FEWEST:
            return None
        # of kept probes as many are wanted as were asked for
        if kept is not None:
            return None
        return predictor_of(reconstruction.card, self.device)

    def _fewest(self, reconstruction: Reconstruction, index: int) -> int:
        """Probes before a prediction may end the sketch: of a run to be repeated all, so that no value decides it."""
        most, asked = self._stopping().probes, self.properties.prior_probes
        if self.properties.seed is not None:
            return most
        plane, windows = reconstruction.planes[index], reconstruction.functions[index].windows
        if unfit(reconstruction.card, plane.item, plane, windows):
            # what a prediction of such data is worth others must tell than those that it was made of
            asked = max(asked, 2 * FEWEST)
        return min(asked, most)

    def _sketch_name(self) -> str:
        return "sketch with control variate" if self.properties.control_variate else "sketch"

    def _stopping(self) -> Stopping:
        chosen = self.properties
        asked = Stopping(probes=chosen.probes, target_error=chosen.target_error, time_budget=chosen.time_budget)
        return asked if chosen.seed is None else asked.seeded()

    def _reporting(self, reconstruction: Reconstruction, index: int, stop: Stop) -> Callable[[int, int], None]:
        total = len(reconstruction.planes)

        def report(done: int, limit: int) -> None:
            stop()
            self.context.progress("probes", index * limit + done, total * limit)

        return report

    def _in_its_precision(self, whole: Linearization, plane: Plane, precisions: list[Precision]) -> Linearization:
        """The linearization in the precision that the first plane of the volume showed to do."""
        if self.properties.precision == "float32" or whole.complex_linear:
            # stock torch would take less; a linear reconstruction has no convolutions to gain by that
            return in_precision(whole, "float32", self.device)
        if precisions:
            return in_precision(whole, precisions[0].name, self.device)
        found, precision = reduced(whole, plane.probes(self.seed).block(0), chunk=self.properties.chunk)
        precisions.append(precision)
        for reason in precision.rejected:
            logger.info("precision of the probes: %s", reason)
        return found

    def _taking_turns(self, reconstruction: Reconstruction, index: int, precisions: list[Precision]) -> Linearization:
        """Linearization of one plane that leaves the device to others between its batches."""
        on_gpu = self.device.type == "cuda"
        with self.context.turns():
            # the image is float32, whatever the process allows
            with tensor_cores(False) if on_gpu else nullcontext():
                whole = reconstruction.linearize(index)
            _tell(reconstruction.card.name, whole)
            if on_gpu:
                whole = self._in_its_precision(whole, reconstruction.planes[index], precisions)

        def push(tangents: Tensor) -> Tensor:
            with self.context.turns():
                return whole.push(tangents)

        return replace(whole, push=push)

    def _keep(self, reconstruction: Reconstruction, whitening: Whitening, bias: float) -> VolumeWriter | None:
        """Where the pushed probes are kept, None if nobody wants them."""
        if self.context.probes is None:
            return None
        if self.properties.estimator in ("exact", "pico"):
            raise ValueError(
                f"sketch: property 'estimator' is {self.properties.estimator!r}, but the pushed probes are to be kept; "
                "'auto' or 'sketch' would do"
            )
        kspace = reconstruction.planes[0].item
        image = assemble(kspace, reconstruction.values).cpu().numpy()
        z, y, x = (length / count for length, count in zip(image_fov_mm(kspace), image.shape, strict=True))
        meta = VolumeMeta(
            counters=asdict(kspace.key),
            bias=bias,
            covariance_error=covariance_error(whitening.effective_samples) if whitening.samples else 0.0,
            independent_planes=independent_planes(kspace),
            voxel_mm=(z, y, x),
            model=reconstruction.card.name,
            seed=str(self.seed),
            labels=labels(kspace),
        )
        axis = 2 if kspace.volumetric else 0
        return self.context.probes.volume(meta, image, plane_axis=axis, probes=self.properties.probes)


def _tell(model: str, linearization: Linearization) -> None:
    """Log once a process and model what is slow, and what the derivative leaves out."""
    for texts, meaning in (
        (linearization.fallbacks, "operations without a fast derivative, which are evaluated again for every probe"),
        (linearization.cuts, "values that its derivative, and so sigma, takes as fixed"),
    ):
        if texts and (model, texts) not in _told:
            _told.add((model, texts))
            logger.warning("model %r has %s: %s", model, meaning, ", ".join(texts))
