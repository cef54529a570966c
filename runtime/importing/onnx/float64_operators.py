"""Operators of ONNX in float64 where the reference evaluator's are wrong, or slow for real models:
convolutions, pooling, normalisation, resizing. Recurrent ones are in `float64_recurrent.py`.

By torch on the CPU where it has them. Semantics as in the ONNX operators' specification; what is
not covered raises `NotImplementedError`, and the graph then has no float64 form.
"""

import math
from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from torch.nn import functional as F

from runtime.importing.onnx.float64_recurrent import GRU, LSTM, RNN

Array = np.ndarray[Any, Any]


class _Torch(OpRun):
    op_domain = ""


def _padding(attributes: dict[str, Any], sizes: tuple[int, ...], kernel: list[int]) -> list[int]:
    """Beginnings, then ends, of each spatial axis."""
    auto = attributes.get("auto_pad") or "NOTSET"
    num_axes = len(sizes)
    if auto == "NOTSET":
        return list(attributes.get("pads") or [0] * 2 * num_axes)
    if auto == "VALID":
        return [0] * 2 * num_axes
    strides, dilations = _steps(attributes, num_axes)
    begins, ends = [], []
    for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        missing = max(0, (-(-size // stride) - 1) * stride + (length - 1) * dilation + 1 - size)
        small, large = missing // 2, missing - missing // 2
        begins.append(large if auto == "SAME_LOWER" else small)
        ends.append(small if auto == "SAME_LOWER" else large)
    return begins + ends


def _steps(attributes: dict[str, Any], num_axes: int) -> tuple[list[int], list[int]]:
    strides = attributes.get("strides") or [1] * num_axes
    return list(strides), list(attributes.get("dilations") or [1] * num_axes)


def _padded(x: torch.Tensor, pads: list[int], value: float = 0.0) -> torch.Tensor:
    num_axes = len(pads) // 2
    flat = [pads[axis + side] for axis in reversed(range(num_axes)) for side in (0, num_axes)]
    return F.pad(x, flat, value=value) if any(pads) else x


def _tensor(x: Array) -> torch.Tensor:
    """The same memory, unless it is a weight's, which torch might write to."""
    return torch.from_numpy(x if x.flags.writeable else x.copy())


def _bias(b: Array | None) -> torch.Tensor | None:
    return None if b is None else _tensor(b)


class Conv(_Torch):
    def _run(self, x: Array, w: Array, b: Array | None = None, **attributes: Any) -> Any:
        kernel = list(w.shape[2:])
        strides, dilations = _steps(attributes, len(kernel))
        pads = _padding(attributes, x.shape[2:], kernel)
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
        y = convolve(
            _padded(_tensor(x), pads),
            _tensor(w),
            _bias(b),
            strides,
            0,
            dilations,
            attributes.get("group") or 1,
        )
        return (y.numpy(),)


class ConvTranspose(_Torch):
    def _run(self, x: Array, w: Array, b: Array | None = None, **attributes: Any) -> Any:
        num_axes = w.ndim - 2
        auto = attributes.get("auto_pad") or "NOTSET"
        if attributes.get("output_shape") or auto not in ("NOTSET", "VALID"):
            raise NotImplementedError("ConvTranspose to a given shape")
        strides, dilations = _steps(attributes, num_axes)
        extra = list(attributes.get("output_padding") or [0] * num_axes)
        pads = list(attributes.get("pads") or [0] * 2 * num_axes)
        convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[num_axes]
        y = convolve(
            _tensor(x),
            _tensor(w),
            _bias(b),
            strides,
            0,
            0,
            attributes.get("group") or 1,
            dilations,
        )
        cut = [-pad for pad in pads]
        for axis, size in enumerate(extra):
            cut[num_axes + axis] += size
        return (_padded(y, cut).numpy(),)


def _windows(
    x: torch.Tensor, attributes: dict[str, Any], value: float
) -> tuple[torch.Tensor, list[int]]:
    """Every window of a pool, as `[..., out_1, .., out_n, kernel_1, .., kernel_n]`, and the pads
    before rounding up."""
    kernel = list(attributes["kernel_shape"])
    strides, dilations = _steps(attributes, len(kernel))
    pads = _padding(attributes, tuple(x.shape[2:]), kernel)
    more = [0] * len(kernel)
    if attributes.get("ceil_mode"):
        for axis, length in enumerate(kernel):
            size = x.shape[2 + axis] + pads[axis] + pads[axis + len(kernel)]
            span = (length - 1) * dilations[axis] + 1
            count = math.ceil((size - span) / strides[axis]) + 1
            if (count - 1) * strides[axis] >= x.shape[2 + axis] + pads[axis]:
                count -= 1  # a window that would begin in the padding after the end
            more[axis] = max(0, (count - 1) * strides[axis] + span - size)
    ends = [pads[axis + len(kernel)] + more[axis] for axis in range(len(kernel))]
    x = _padded(x, pads[: len(kernel)] + ends, value)
    for axis, length in enumerate(kernel):
        span = (length - 1) * dilations[axis] + 1
        x = x.unfold(2 + axis, span, strides[axis])[..., :: dilations[axis]]
    return x, pads


class MaxPool(_Torch):
    def _run(self, x: Array, **attributes: Any) -> Any:
        if len(self.onnx_node.output) > 1:
            raise NotImplementedError("the places of a MaxPool's maxima")
        values = _tensor(x)
        if not values.is_floating_point():
            raise NotImplementedError("MaxPool of integers")
        windows, _ = _windows(values, attributes, -math.inf)
        return (windows.amax(tuple(range(x.ndim, windows.dim()))).numpy(),)


class AveragePool(_Torch):
    def _run(self, x: Array, **attributes: Any) -> Any:
        values = _tensor(x)
        windows, pads = _windows(values, attributes, 0.0)
        axes = tuple(range(x.ndim, windows.dim()))
        # Padding that was asked for may count as values; what rounding up adds never does.
        counted = torch.ones_like(values[:1, :1])
        if attributes.get("count_include_pad"):
            counted = _padded(counted, pads, 1.0)
            attributes = attributes | {"pads": [0] * len(pads), "auto_pad": "NOTSET"}
        counts, _ = _windows(counted, attributes, 0.0)
        total = counts.sum(axes)
        sums = windows.sum(axes)
        fits = tuple(slice(0, size) for size in total.shape[2:])
        return ((sums[(..., *fits)] / total).numpy(),)


class BatchNormalization(_Torch):
    """In evaluation mode, which is the only one that is served."""

    def _run(
        self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, **attributes: Any
    ) -> Any:
        shape = (-1, *[1] * (x.ndim - 2))
        factor = scale / np.sqrt(var + attributes["epsilon"])
        return ((x - mean.reshape(shape)) * factor.reshape(shape) + bias.reshape(shape),)


class Erf(_Torch):
    def _run(self, x: Array) -> Any:
        return (torch.erf(_tensor(np.asarray(x))).numpy(),)


class Gelu(_Torch):
    def _run(self, x: Array, approximate: str = "none") -> Any:
        return (F.gelu(_tensor(np.asarray(x)), approximate=approximate).numpy(),)


class Resize(_Torch):
    """Separable: each axis is a matrix from its old places to its new ones."""

    def _run(
        self,
        x: Array,
        roi: Array | None = None,
        scales: Array | None = None,
        sizes: Array | None = None,
        **attributes: Any,
    ) -> Any:
        way = attributes.get("coordinate_transformation_mode") or "half_pixel"
        policy = attributes.get("keep_aspect_ratio_policy") or "stretch"
        is_plain = not (attributes.get("antialias") or attributes.get("exclude_outside"))
        if way == "tf_crop_and_resize" or policy != "stretch" or not is_plain:
            raise NotImplementedError(f"Resize by {way}")
        axes = attributes.get("axes") or range(x.ndim)
        for index, axis in enumerate(axes):
            size = x.shape[axis]
            if sizes is not None and sizes.size:
                new, scale = int(sizes[index]), float(sizes[index]) / size
            else:
                assert scales is not None, "one of the two is given"
                # float32 scales are the graph's own; their product is rounded down.
                scale = float(np.float32(scales[index]))
                new = math.floor(size * scale)
            if new != size or scale != 1.0:
                matrix = _taps(size, new, scale, way, attributes)
                x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
        return (x,)


def _taps(size: int, new: int, scale: float, way: str, attributes: dict[str, Any]) -> Array:
    """`[new, size]`: what of each old value each new one is made of."""
    at = _places(size, new, scale, way)
    mode = attributes.get("mode") or "nearest"
    matrix = np.zeros((new, size))
    rows = np.arange(new)
    if mode == "nearest":
        chosen = _nearest(at, attributes.get("nearest_mode") or "round_prefer_floor")
        matrix[rows, np.clip(chosen, 0, size - 1)] = 1.0
        return matrix
    low = np.floor(at).astype(int)
    t = at - low
    if mode == "linear":
        weights = {0: 1 - t, 1: t}
    else:
        a = attributes.get("cubic_coeff_a")
        a = -0.75 if a is None else a
        weights = {
            -1: ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a,
            0: ((a + 2) * t - (a + 3)) * t * t + 1,
            1: ((a + 2) * (1 - t) - (a + 3)) * (1 - t) * (1 - t) + 1,
            2: ((a * (2 - t) - 5 * a) * (2 - t) + 8 * a) * (2 - t) - 4 * a,
        }
    for offset, weight in weights.items():
        np.add.at(matrix, (rows, np.clip(low + offset, 0, size - 1)), weight)
    return matrix


def _places(size: int, new: int, scale: float, way: str) -> Array:
    """Where each new value lies among the old ones."""
    x = np.arange(new, dtype=np.float64)
    match way:
        case "asymmetric":
            return x / scale
        case "align_corners":
            return x * (size - 1) / (new - 1) if new > 1 else x * 0
        case "pytorch_half_pixel":
            return (x + 0.5) / scale - 0.5 if new > 1 else x * 0
        case "half_pixel":
            return (x + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            adjustment = new / (scale * size)
            return size / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    raise NotImplementedError(f"Resize by {way}")


def _nearest(at: Array, mode: str) -> Array:
    match mode:
        case "floor":
            found = np.floor(at)
        case "ceil":
            found = np.ceil(at)
        case "round_prefer_ceil":
            found = np.floor(at + 0.5)
        case _:
            found = np.ceil(at - 0.5)
    return found.astype(int)


OPERATORS: tuple[type[OpRun], ...] = (
    *(Conv, ConvTranspose, MaxPool, AveragePool, BatchNormalization),
    *(Erf, Gelu, Resize, LSTM, GRU, RNN),
)
