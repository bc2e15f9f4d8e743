"""Voxel-wise noise standard deviation for deep-learning MRI reconstructions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from voxelsigma.noise.noise_map import NoiseMap, noise_map

__all__ = ["NoiseMap", "__version__", "noise_map"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only who asks for a map waits for it
    if name in ("NoiseMap", "noise_map"):
        import voxelsigma.noise.noise_map as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
