"""What leaves on a connection: checked against what the other side can read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from ismrmrd import Image

from voxelsigma.gadgets.items import Item
from voxelsigma.gadgets.wire import message
from voxelsigma.gadgets.wire_items import SERIES_COVARIANCE, SERIES_VARIANCE, to_wire

GADGETRON_TYPES: Final = ("uint16", "uint32", "float32", "float64", "complex64", "complex128")
"""Voxel types that a Gadgetron server takes from Python."""

_SIDECARS: Final = range(SERIES_COVARIANCE, SERIES_VARIANCE + 1)


class DownstreamError(ConnectionError):
    """Who reads our output is gone: it failed, or a node behind it did."""


@dataclass(slots=True)
class Outgoing:
    """Sends items.

    Parameters
    ----------
    send
        Sends all of some bytes.
    types
        Voxel types that the other side reads.
    """

    send: Callable[[bytes], None]
    types: tuple[str, ...] = GADGETRON_TYPES
    _layouts: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def __call__(self, item: Item) -> None:
        """Send one item, as one message or several.

        Raises
        ------
        ValueError
            If an image has voxels that the other side cannot read, or differs in type or size from its series.
        TypeError
            If the item has no message.
        DownstreamError
            If the other side is gone.
        """
        for part in to_wire(item):
            if isinstance(part, Image):
                self._check(part)
            self.bytes(message(part))

    def bytes(self, content: bytes) -> None:
        """Send bytes.

        Raises
        ------
        DownstreamError
            If the other side is gone.
        """
        try:
            self.send(content)
        except ConnectionError as error:
            raise DownstreamError(f"who reads the output is gone ({error.strerror or error})") from None

    def _check(self, image: Image) -> None:
        """Refuse what would hang or corrupt the stream, or make a client lose its file."""
        series = int(image.image_series_index)
        dtype, shape = str(np.asarray(image.data).dtype), tuple(image.data.shape)
        # ismrmrd-python holds 32-bit integers in 64 bits; the wire has 32 of them
        if (dtype if dtype != "int64" else "int32") not in self.types:
            raise ValueError(
                f"image series {series} has {dtype} voxels, which the server cannot read; "
                f"it reads {', '.join(self.types)}"
            )
        if series in _SIDECARS:
            return
        known = self._layouts.setdefault(series, (dtype, shape))
        if known != (dtype, shape):
            raise ValueError(
                f"image series {series} began with {known[0]} images of shape {known[1]} and goes on with {dtype} "
                f"of shape {shape}; clients lose the whole file of such a series"
            )
