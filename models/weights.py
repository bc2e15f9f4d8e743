"""Weights of networks: read from files that may be anybody's, and put into a network all or none."""

import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

PICKLED = (".pt", ".pth", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)
_SAFE_SINCE = (2, 6)
_TYPES = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
)
"""Of others, packed for some device, nothing can be said."""


def read_weights(path: Path, *, sha256: str | None = None, stated_by: str = "") -> dict[str, Tensor]:
    """Read named tensors from a safetensors file, or from a checkpoint of PyTorch or Lightning.

    Checkpoints are pickles, which can run code: they are read with `weights_only=True`, and what wants more than
    tensors and plain containers is refused. Of a Lightning checkpoint its `state_dict` is read.

    Parameters
    ----------
    path
        File ending in .safetensors, .pt, .pth or .ckpt.
    sha256
        Checked before anything in the file is looked at, if given.
    stated_by
        Name of the card that states it, for the error's text.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If its hash differs, if it cannot be read, or if it holds anything but finite named tensors.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: weights must be a file of type {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    return weights_of(path, path.read_bytes(), sha256=sha256, stated_by=stated_by)


def weights_of(path: Path, content: bytes, *, sha256: str | None = None, stated_by: str = "") -> dict[str, Tensor]:
    """`read_weights` of what was read from a file."""
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{path}: sha256 is {digest}, the card {stated_by} states {sha256}")
    tensors = _unpickled(path, content) if path.suffix in PICKLED else _safe(path, content)
    strange = sorted(f"{key} ({value.dtype})" for key, value in tensors.items() if value.dtype not in _TYPES)
    if strange:
        raise ValueError(f"{path}: weights of types that cannot be computed with: {', '.join(strange)}")
    broken = sorted(key for key, value in tensors.items() if not bool(torch.isfinite(value).all()))
    if broken:
        raise ValueError(f"{path}: weights that are not finite: {', '.join(broken)}")
    return tensors


def fill(network: nn.Module, tensors: Mapping[str, Tensor], *, origin: Path, description: str) -> None:
    """Put weights into a network, all or none.

    Where the names all have one prefix that the network's lack, as checkpoints of a trainer do (`varnet.`, `module.`),
    it is taken off; what a checkpoint of a trainer has outside of it (its loss, its metrics) is not the network's.

    Parameters
    ----------
    network
        The network.
    tensors
        As `read_weights` gives them.
    origin, description
        File and architecture, for error texts.

    Raises
    ------
    ValueError
        If keys are missing, too many, or of another shape; all of them are listed.
    """
    expected = network.state_dict()
    given = _without_prefix(tensors, set(expected))
    if differing := shape_differences(given, expected):
        raise ValueError(f"{origin}: does not fit {description}: {', '.join(differing)}")
    network.load_state_dict(dict(given))


def shape_differences(found: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> list[str]:
    """Of weights that were found and those that a network needs: which are missing, unknown, or of another shape."""
    differing = []
    for key in sorted({*found, *needed}):
        has, needs = (tuple(one[key].shape) if key in one else None for one in (found, needed))
        if has is None:
            differing.append(f"{key} (missing, needs {needs})")
        elif needs is None:
            differing.append(f"{key} (unknown, has {has})")
        elif has != needs:
            differing.append(f"{key} (has {has}, needs {needs})")
    return differing


def _without_prefix(tensors: Mapping[str, Tensor], wanted: set[str]) -> Mapping[str, Tensor]:
    """Names as the network has them."""
    if wanted & set(tensors):
        return tensors
    matches: dict[str, int] = {}
    for key in tensors:
        parts = key.split(".")
        for end in range(1, len(parts)):
            if ".".join(parts[end:]) in wanted:
                prefix = ".".join(parts[:end]) + "."
                matches[prefix] = matches.get(prefix, 0) + 1
    if not matches:
        return tensors
    prefix = max(matches, key=lambda candidate: matches[candidate])
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _safe(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return load_safetensors(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    except KeyError as error:
        raise ValueError(f"{path}: weights of types that cannot be computed with: {error.args[0]}") from None


def check_safe_pickles(path: Path) -> None:
    """Refuse to read a pickle with a torch whose `weights_only` lets code run (CVE-2025-32434)."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _SAFE_SINCE:
        raise ValueError(
            f"{path}: torch {torch.__version__} cannot read a pickle safely; install torch>=2.6, or convert the file "
            "to .safetensors"
        )


def _unpickled(path: Path, content: bytes) -> dict[str, Tensor]:
    check_safe_pickles(path)
    try:
        with warnings.catch_warnings():
            # of a protocol that its reader may not know: then it says so
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is not None:
            raise ValueError(
                f"{path}: is a pickle that wants to run code ({wanted[1]}); only tensors and plain containers are "
                "read: save the state_dict alone"
            ) from None
        raise ValueError(f"{path}: not a checkpoint that can be read ({_reason(error)})") from None
    return _state_dict(path, loaded)


def _reason(error: Exception) -> str:
    """What torch found wrong, in one line, without its advice to run the code after all."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Weights only load", "Please file", "Check the"))]
    return told[0][:120] if told else type(error).__name__


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The named tensors of what a checkpoint holds."""
    content = loaded["state_dict"] if isinstance(loaded, dict) and "state_dict" in loaded else loaded
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: must hold named tensors, got a {type(content).__name__}")
    others = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path}: must hold named tensors only; others are {', '.join(others[:10])}")
    return dict(content)
