"""Weights from files of others: what is read, what is refused."""

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from voxelsigma.models.varnet import VarNet
from voxelsigma.models.weights import fill, read_weights

SMALL = {"cascades": 2, "channels": 2, "levels": 2, "sensitivity_channels": 2, "sensitivity_levels": 2}


def network(seed: int = 1) -> VarNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VarNet(**SMALL)


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch voxelsigma-was-here",)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(network().state_dict())


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth", "ckpt", "lightning", "parallel", "double"])
def test_every_kind_of_file_gives_the_same_network(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    suffix, content = {
        "safetensors": ("safetensors", save(state)),
        "lightning": (
            "ckpt",
            pickled(
                {
                    "state_dict": {**prefixed("varnet.", state), "loss.w": torch.ones(1, 1, 7, 7)},
                    "epoch": 3,
                    "hyper_parameters": {"num_cascades": 2},
                    "pytorch-lightning_version": "1.0",
                }
            ),
        ),
        "parallel": ("pt", pickled(prefixed("module.", state))),
        "double": ("pt", pickled({key: value.double() for key, value in state.items()})),
    }.get(kind, (kind, pickled(state)))
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    filled = network(seed=2)
    tensors = read_weights(path, sha256=hashlib.sha256(content).hexdigest())
    fill(filled, tensors, origin=path, description="varnet")
    for key, value in filled.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("prefix", ["", "varnet."])
def test_all_keys_that_do_not_fit_are_listed_and_none_is_loaded(
    prefix: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    wrong = dict(state)
    del wrong["sens_net.norm_unet.unet.conv.layers.0.weight"]
    wrong["cascades.0.dc_weight"] = torch.ones(2)
    wrong["cascades.7.dc_weight"] = torch.ones(1)
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickled({"state_dict": prefixed(prefix, wrong)}))
    target = network(seed=2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights\.ckpt: does not fit varnet of the test: ") as refused:
        fill(target, read_weights(path), origin=path, description="varnet of the test")
    assert str(refused.value).endswith(
        "cascades.0.dc_weight (has (2,), needs (1,)), cascades.7.dc_weight (unknown, has (1,)), "
        "sens_net.norm_unet.unet.conv.layers.0.weight (missing, needs (8, 4, 3, 3))"
    )
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("wrapped", [False, True])
def test_pickle_that_wants_to_run_code_is_refused(
    wrapped: bool, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    path.write_bytes(pickled({**state, "evil": Evil()}) if wrapped else pickle.dumps(Evil(), 2))
    with pytest.raises(ValueError, match=r"weights\.pt: .*") as refused:
        read_weights(path)
    assert "\n" not in str(refused.value)
    assert "is a pickle that wants to run code (posix.system); only tensors" in str(refused.value)
    assert not (tmp_path / "voxelsigma-was-here").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.pt", b"", "not a checkpoint that can be read"),
        ("weights.pt", b"PK\x03\x04 and no more", "not a checkpoint that can be read"),
        ("weights.ckpt", b"\x80\x02}q\x00.", "not a checkpoint that can be read"),
        ("weights.pt", pickle.dumps({"a": 1}, 5), r"not a checkpoint that can be read \(Unsupported operand 149\)"),
        ("weights.pt", pickled([1, 2]), "must hold named tensors, got a list"),
        ("weights.pt", pickled({"a": torch.ones(1), "b": 3}), "must hold named tensors only; others are b"),
        ("weights.ckpt", pickled({"state_dict": 3}), "must hold named tensors, got a int"),
        ("weights.pt", pickled({"a": torch.tensor([1.0, float("nan")])}), "weights that are not finite: a"),
        (
            "weights.safetensors",
            save({"a": torch.ones(2).to(torch.float8_e4m3fn), "b": torch.ones(2)}),
            r"weights of types that cannot be computed with: a \(torch.float8_e4m3fn\)",
        ),
        ("weights.safetensors", b"nothing", "not a safetensors file"),
        ("weights.onnx", b"nothing", r"must be a file of type \.safetensors, \.pt, \.pth, \.ckpt"),
    ],
)
def test_other_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_weights(path)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_truncated_files_are_refused(cut: int, state: dict[str, Tensor], tmp_path: Path) -> None:
    for name, content in (("weights.pt", pickled(state)), ("weights.safetensors", save(state))):
        path = tmp_path / name
        path.write_bytes(content[:-cut])
        with pytest.raises(ValueError, match="not a"):
            read_weights(path)


def test_hash_comes_before_the_file_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"sha256 is [0-9a-f]{64}, the card mine\.yaml states 00"):
        read_weights(path, sha256="00", stated_by="mine.yaml")


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights\.pt: no such file of weights"):
        read_weights(tmp_path / "weights.pt")


def test_old_torch_reads_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(pickled({"a": torch.ones(1)}))
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ValueError, match=r"torch 2\.5\.1\+cpu cannot read a pickle safely; install torch>=2\.6"):
        read_weights(path)
