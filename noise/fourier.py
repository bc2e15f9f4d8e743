"""Centred, orthonormal Fourier transforms on numpy arrays, for the rooms that never import torch."""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

ComplexArray = npt.NDArray[np.complexfloating[Any, Any]]


def fft_centred(array: ComplexArray, axis: int = -1) -> ComplexArray:
    """Image space to k-space along one axis; complex64 stays complex64."""
    shifted = np.fft.ifftshift(array, axes=axis)
    return np.fft.fftshift(scipy.fft.fft(shifted, axis=axis, norm="ortho", overwrite_x=True), axes=axis)


def ifft_centred(array: ComplexArray, axis: int = -1) -> ComplexArray:
    """K-space to image space along one axis: the inverse, and the adjoint, of `fft_centred`."""
    shifted = np.fft.ifftshift(array, axes=axis)
    return np.fft.fftshift(scipy.fft.ifft(shifted, axis=axis, norm="ortho", overwrite_x=True), axes=axis)
