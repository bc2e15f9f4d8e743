"""Cards of every architecture, with every kind of file, and of networks of a user's own."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests.models.written_cards import TINY, card_writer, edited
from torch import Tensor

from voxelsigma.models.cards import ARCHITECTURES, load_card, load_model
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.network import Network
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.linearize import linearize

CPU = torch.device("cpu")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], str]:
    return card_writer(tmp_path)


HERE = "own_networks_of_the_tests"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module, importable."""
    spec = importlib.util.spec_from_file_location(HERE, Path(__file__).with_name("own_networks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, HERE, module)


@pytest.fixture
def problem(smooth_maps: Callable[..., Tensor]) -> PlaneProblem:
    return PlaneProblem(
        sensitivities=smooth_maps(4, 12, 10).to(torch.complex64),
        variance=torch.full((12, 10), 2.0),
        weights=torch.ones(12, 10),
        limits=((0, 11), (0, 9)),
        size=(12, 10),
    )


def scan() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 12, 10, dtype=torch.complex64, generator=generator)


def own_card(name: str, **changes: Any) -> dict[str, Any]:
    base = edited(architecture=f"python:{HERE}:{name}", hyperparameters=..., weights=..., sha256=...)
    return {**base, **changes}


SMALL: dict[str, dict[str, Any]] = {
    "modl": {"steps": 2, "blocks": 1, "channels": 2, "shared": True},
    "unet": {"channels": 2, "levels": 2, "residual": True},
    "unrolled": TINY,
    "varnet": {"cascades": 1, "channels": 2, "levels": 2, "sensitivity_channels": 2, "sensitivity_levels": 2},
}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_architecture_with_every_kind_of_file(
    write: Callable[[Any], str], tmp_path: Path, problem: PlaneProblem, architecture: str, suffix: str
) -> None:
    network = ARCHITECTURES[architecture](**SMALL[architecture])
    path = tmp_path / f"mine.{suffix}"
    if suffix == "safetensors":
        path.write_bytes(save(network.state_dict()))
    else:
        torch.save(network.state_dict() if suffix == "pt" else {"state_dict": network.state_dict()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    card = load_card(
        write(edited(architecture=architecture, hyperparameters=SMALL[architecture], weights=path.name, sha256=digest))
    )
    assert card.estimates_sensitivities == (architecture == "varnet")
    model = load_model(card, CPU)
    assert isinstance(model, Network)
    assert model.estimates_sensitivities == (architecture == "varnet")
    image = model.bind(problem)(scan())
    assert image.is_complex() == (architecture != "varnet")
    torch.testing.assert_close(image, network.eval()(scan(), problem.sensitivities, torch.ones(12, 10)).detach())


def test_card_with_a_pickle_that_wants_to_run_code(write: Callable[[Any], str], tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    # a function, of the module 'os', to be looked up
    torch.save({"a": os.getcwd}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    card = load_card(write(edited(weights="evil.pt", sha256=digest)))
    with pytest.raises(ValueError, match=r"evil\.pt: is a pickle that wants to run code \(posix\.getcwd\)"):
        load_model(card, CPU)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "hyperparameters", "factor"),
    [
        ("Weighted", {}, 1.0),
        ("Weighted", {"start": 1.5}, 1.5),
        ("doubled", {}, 2.0),
        ("doubled", {"factor": 5.0}, 5.0),
        ("Namespace.inner", {}, 2.0),
        ("built", {}, 3.0),
    ],
)
def test_a_network_of_a_user_s_own(
    write: Callable[[Any], str], problem: PlaneProblem, name: str, hyperparameters: dict[str, Any], factor: float
) -> None:
    card = load_card(write(own_card(name, hyperparameters=hyperparameters)))
    assert (card.weights, card.sha256, card.estimates_sensitivities) == (None, "", False)
    reconstruction = load_model(card, CPU).bind(problem)
    expected = factor * SenseEncoding(problem.sensitivities, torch.ones(12, 10)).adjoint(scan())
    torch.testing.assert_close(reconstruction(scan()), expected)
    # a sketch through it works
    linearization = linearize(reconstruction, scan())
    torch.testing.assert_close(linearization.push(scan().unsqueeze(0))[0], expected)


@pytest.mark.usefixtures("own")
def test_own_network_with_weights_and_sensitivities_of_its_own(write: Callable[[Any], str], tmp_path: Path) -> None:
    content = save({"factor": torch.tensor([7.0])})
    (tmp_path / "own.safetensors").write_bytes(content)
    weights = {"weights": "own.safetensors", "sha256": hashlib.sha256(content).hexdigest()}
    model = load_model(load_card(write(own_card("Weighted", estimates_sensitivities=True, **weights))), CPU)
    assert isinstance(model, Network)
    assert model.estimates_sensitivities
    assert isinstance(model.function, torch.nn.Module)
    assert model.function.state_dict()["factor"].tolist() == [7.0]
    with pytest.raises(ValueError, match=rf"field 'weights' is for modules, python:{HERE}:doubled is a function"):
        load_model(load_card(write(own_card("doubled", **weights))), CPU)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        (f"{HERE}:missing", {}, f"but '{HERE}' has no 'missing'"),
        (f"{HERE}:Namespace.missing", {}, f"but '{HERE}' has no 'Namespace.missing'"),
        (f"{HERE}:number", {}, "a int, nothing to call"),
        ("no_such_package.inside:Name", {}, r"cannot be imported \(ModuleNotFoundError: .*on PYTHONPATH"),
        ("module_that_raises:Name", {}, r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        (f"{HERE}:Weighted", {"stop": 1}, "hyperparameters do not fit python:.*stop"),
        (f"{HERE}:doubled", {"stop": 1}, "hyperparameters do not fit python:.*stop"),
        (f"{HERE}:built", {"start": 1}, "hyperparameters do not fit python:.*built already"),
    ],
)
def test_own_network_that_cannot_be_had(
    write: Callable[[Any], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    hyperparameters: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "module_that_raises.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    # reading the card runs nothing
    card = load_card(write(own_card("x", architecture=f"python:{name}", hyperparameters=hyperparameters)))
    with pytest.raises(ValueError, match=message) as refused:
        load_model(card, CPU)
    assert "tiny.yaml" in str(refused.value)


@pytest.mark.usefixtures("own")
def test_own_network_that_returns_no_image(write: Callable[[Any], str], problem: PlaneProblem) -> None:
    reconstruction = load_model(load_card(write(own_card("of_one_coil"))), CPU).bind(problem)
    with pytest.raises(
        ValueError, match=r"network: returned an image of shape \(4, 12, 10\), k-space has \(4, 12, 10\)"
    ):
        reconstruction(scan())
    reconstruction = load_model(load_card(write(own_card("nothing"))), CPU).bind(problem)
    with pytest.raises(TypeError, match="network: must return one tensor, got NoneType"):
        reconstruction(scan())


@pytest.mark.usefixtures("own")
def test_only_a_card_names_code() -> None:
    with pytest.raises(FileNotFoundError, match="no model card is called 'python:"):
        load_card(f"python:{HERE}:doubled")
