"""What leaves is checked against what the other side can read."""

import errno
from typing import Any

import numpy as np
import pytest
from ismrmrd import Image

from voxelsigma.gadgets import wire
from voxelsigma.gadgets.items import Sensitivities, VolumeKey
from voxelsigma.gadgets.outgoing import GADGETRON_TYPES, DownstreamError, Outgoing
from voxelsigma.noise.covariance import NoiseCovariance


class Sent:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.content: list[bytes] = []

    def __call__(self, content: bytes) -> None:
        self.content.append(content)


def an_image(dtype: Any = np.float32, series: int = 1, shape: tuple[int, ...] = (1, 1, 3, 4)) -> Image:
    return Image.from_array(np.ones(shape, dtype), transpose=False, image_series_index=series)


class IntegerImage(Image):  # type: ignore[misc]
    """An image of a type that ismrmrd-python has no number for."""

    @property
    def data(self) -> Any:
        return np.ones((1, 1, 3, 4), np.int32)


@pytest.mark.parametrize("dtype", GADGETRON_TYPES)
def test_what_gadgetron_reads_is_sent(dtype: str) -> None:
    sent = Sent()
    image = an_image(dtype)
    Outgoing(sent)(image)
    assert sent.content == [wire.message(image)]


@pytest.mark.parametrize("dtype", ["int16", "int64", "int32"])
def test_what_gadgetron_cannot_read_is_refused_by_its_series(dtype: str) -> None:
    image = IntegerImage(an_image(np.float32, 27).getHead()) if dtype == "int32" else an_image(dtype, 27)
    sent = Sent()
    with pytest.raises(ValueError, match=f"image series 27 has {dtype} voxels, which the server cannot read; it reads"):
        Outgoing(sent)(image)
    assert not sent.content


def test_integers_of_64_bits_go_where_those_of_32_are_read() -> None:
    sent = Sent()
    send = Outgoing(sent, (*GADGETRON_TYPES, "int16", "int32"))
    send(an_image(np.int64))
    send(an_image(np.int16, 2))
    assert len(sent.content[0]) - len(sent.content[1]) == 2 * 12


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (an_image(np.uint16, 5), r"series 5 began with float32 images of shape \(1, 1, 3, 4\) and goes on with uint16"),
        (an_image(np.float32, 5, (1, 1, 4, 4)), r"goes on with float32 of shape \(1, 1, 4, 4\); clients lose"),
        (an_image(np.float32, 5, (2, 1, 3, 4)), r"goes on with float32 of shape \(2, 1, 3, 4\)"),
    ],
)
def test_a_series_that_changes_is_refused(second: Image, text: str) -> None:
    sent = Sent()
    send = Outgoing(sent)
    send(an_image(np.float32, 5))
    send(an_image(np.uint16, 6, (1, 1, 2, 2)))
    send(an_image(np.float32, 5))
    with pytest.raises(ValueError, match=text):
        send(second)
    assert len(sent.content) == 3
    # another stream begins anew
    Outgoing(sent)(second)


def test_sidecars_may_change() -> None:
    sent = Sent()
    send = Outgoing(sent)
    for coils in (2, 3):
        send(
            NoiseCovariance(
                matrix=np.eye(coils, dtype=np.complex128),
                samples=99,
                effective_samples=90.0,
                dwell_time_us=1.0,
                bandwidth=0.793,
            )
        )
        send(Sensitivities(maps=np.ones((coils, 1, 3, coils), np.complex64), key=VolumeKey(), method="test"))
        send(an_image(np.float32, 9002, (1, 1, coils, 4)))
    assert len(sent.content) == 6
    with pytest.raises(ValueError, match="image series 9001 has int16 voxels"):
        send(an_image(np.int16, 9001))


def test_only_images_belong_to_series() -> None:
    sent = Sent()
    Outgoing(sent)("a text")
    assert sent.content == [wire.message("a text")]
    with pytest.raises(TypeError, match="an item of type dict has no message"):
        Outgoing(sent)({})


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), r"who reads the output is gone \(Broken pipe\)"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), r"is gone \(Connection reset by peer\)"),
        (ConnectionAbortedError("aborted"), r"is gone \(aborted\)"),
    ],
)
def test_who_reads_is_gone(failure: OSError, text: str) -> None:
    def send(content: bytes) -> None:
        raise failure

    with pytest.raises(DownstreamError, match=text):
        Outgoing(send)(an_image())
    with pytest.raises(DownstreamError, match=text):
        Outgoing(send).bytes(wire.close_message())


def test_other_failures_to_send_are_not_the_readers() -> None:
    def send(content: bytes) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        Outgoing(send)(an_image())
    assert not isinstance(caught.value, ConnectionError)
