"""Whether a stream is a noise scan, of which no image is expected."""

from collections.abc import Iterator
from dataclasses import dataclass

from ismrmrd import constants

from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.gadgets.items import Item, Stream


@dataclass(slots=True)
class Watched:
    """The same items, and what readouts were among them.

    Parameters
    ----------
    items
        A stream.
    """

    items: Stream
    noise: int = 0
    others: int = 0

    def __iter__(self) -> Iterator[Item]:
        """Pass the items on."""
        for item in self.items:
            if isinstance(item, ReadoutBlock):
                noisy = int(item.flagged(constants.ACQ_IS_NOISE_MEASUREMENT).sum())
                self.noise += noisy
                self.others += len(item) - noisy
            elif item is not None:
                self.others += 1
            yield item

    @property
    def noise_scan(self) -> bool:
        """Whether noise readouts came and nothing else."""
        return self.noise > 0 and self.others == 0
