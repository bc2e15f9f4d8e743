"""A small scan, and what a pipeline makes of it."""

import re
from pathlib import Path

import numpy as np

from voxelsigma.formats.image_file import Series, read_series
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.simulate import Simulation, simulate
from voxelsigma.hosts.replay import replay

SIZE = 48
SNR_MAP, STD_MAP, GFACTOR = 2100, 2000, 2200


def write_scan(folder: Path) -> Path:
    """R = 2, 6 coils, 16 reference lines, SNR 30."""
    scan = simulate(
        Simulation(
            matrix=(1, SIZE, SIZE),
            coils=6,
            acceleration=2,
            mask="uniform_1d",
            reference_lines=16,
            snr=30,
            noise_samples=4096,
            seed=2,
        )
    )
    path = folder / "scan.h5"
    write_raw(path, scan.header_xml, scan.blocks)
    return path


def run(scan: Path, pipeline: str, output: Path) -> dict[int, Series]:
    """The series that come out of a pipeline on the embedded host, by their index."""
    replay(scan, pipeline, output)
    return {series.index: series for series in read_series(output)}


def check_image_and_maps(series: dict[int, Series], *, model: str, own_sensitivities: bool) -> None:
    """An image, its σ, its SNR and its noise ratio, that go together and say of what they are."""
    sensitivities = "estimated by the model" if own_sensitivities else r"espirit \(.*\), held fixed"
    assert {1, STD_MAP, SNR_MAP, GFACTOR} == set(series)
    for one in series.values():
        assert one.data.shape == (1, 1, 1, SIZE, SIZE)
        assert one.data.dtype == np.float32
        assert np.isfinite(one.data).all()
        (meta,) = one.attributes
        assert meta["voxelsigma_model"] == model
        assert re.fullmatch(sensitivities, meta["voxelsigma_sensitivities"])
        assert meta["voxelsigma_noise_calibrated"] == "yes"
    image, sigma, snr = (series[index].data[0, 0, 0] for index in (1, STD_MAP, SNR_MAP))
    inside = image > 0.1 * np.percentile(image, 99)
    assert inside.mean() > 0.1
    assert (sigma[inside] > 0).all()
    # SNR and noise ratio are of voxels that a coil sees
    seen = inside & (series[GFACTOR].data[0, 0, 0] > 0)
    assert seen.mean() > 0.1
    np.testing.assert_allclose(snr[seen], image[seen] / sigma[seen], rtol=1e-4)
    (meta,) = series[STD_MAP].attributes
    assert {"Quantitative", "STD_MAP"} <= set(meta["DataRole"])
