"""Models loaded and run before the first scan."""

from collections.abc import Callable

import pytest
import torch

from voxelsigma.gadgets import warming
from voxelsigma.gadgets.chaining import GadgetSpec
from voxelsigma.gadgets.warming import warm
from voxelsigma.hosts.worker import preload
from voxelsigma.noise.linearize import Linearization, linearize


def spec(**properties: str) -> GadgetSpec:
    return GadgetSpec("reconstruct", properties)


def test_every_model_once() -> None:
    specs = [GadgetSpec("sketch", {"model": "ignored"}), spec(), spec(regularization="1")]
    assert warm(specs) == ("sense",)
    assert warm([]) == ()


def test_each_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its set-up and one probe: what the first scan would have to wait for."""
    pushed: list[Linearization] = []

    def linearized(function: Callable[[torch.Tensor], torch.Tensor], kspace: torch.Tensor) -> Linearization:
        found = linearize(function, kspace)
        pushed.append(found)
        return found

    monkeypatch.setattr(warming, "linearize", linearized)
    warm([spec(model="unrolled_small"), spec(model="sense")])
    assert len(pushed) == 2
    assert all(torch.isfinite(torch.view_as_real(found.value)).all() for found in pushed)


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (spec(model="nothing"), FileNotFoundError, "no model card is called 'nothing'; shipped are"),
        (spec(model="nothing.yaml"), FileNotFoundError, r"nothing\.yaml: no such model card"),
        (spec(modle="sense"), ValueError, "reconstruct: unknown property 'modle'"),
        (spec(device="tpu"), ValueError, "reconstruct: property 'device' must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_what_is_bad_is_known_at_the_start(bad: GadgetSpec, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        warm([bad])


def test_pipelines_are_warmed_by_name() -> None:
    assert preload([]) == ()
    assert preload(["sense_sigma.xml", "sense_sigma_worker.xml", "sense_sigma_hybrid.xml"]) == ("sense",)
    with pytest.raises(FileNotFoundError, match=r"nothing\.xml: no such pipeline file; shipped are modl_sigma\.xml"):
        preload(["sense_sigma.xml", "nothing.xml"])
