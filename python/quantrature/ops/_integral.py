"""Post-quantization Integral (PQI) per weight (arXiv 2503.01901; contract: quantrature/integral.hpp)."""

from __future__ import annotations

from .. import _C
from ._arrays import Array, as_input, as_output, core_view, dtype_name, empty_like_kind, place


def _weights(op: str, shape: tuple[int, ...], w: Array, w_quantized: Array) -> tuple[Array, Array]:
    pair = as_input(w, op, "w", on_cuda=True), as_input(w_quantized, op, "w_quantized", on_cuda=True)
    _check_shapes(op, shape, w=pair[0], w_quantized=pair[1])
    return core_view(pair[0]), core_view(pair[1])


def _check_shapes(op: str, shape: tuple[int, ...], **arrays: Array) -> None:
    for name, x in arrays.items():
        if tuple(x.shape) != shape:
            raise _C.InvalidArgumentError(
                f"[{op}] {name} must have the shape of the other arrays: got shape={tuple(x.shape)}, expected={shape}"
            )


def pqi_accumulate(acc: Array, grad: Array, weight: float, not_finite: Array | None = None) -> None:
    """Add ``weight * grad`` to the accumulator, in place.

    Args:
        acc: float32, one or two dimensions, contiguous, writable; zeros before the first call.
        grad: gradient of the loss at one node of the path, of the shape of ``acc``; float32, float16 or bfloat16.
        weight: quadrature weight of the node, times the weight of the sample.
        not_finite: int32 tensor with one element, on the device of ``acc``. It is set to 1 if ``grad`` has a NaN or
            infinity, else it is unchanged. This needs no second pass and does not wait for a device.

    The product is rounded to float32, then the sum. After n calls the error is at most about ``(n + 1) * 2**-24`` times
    the sum of the absolute contributions. The result is bit-identical on every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for other dtypes or shapes, an accumulator that is read-only, a weight that is not
            finite in float32.
    """
    acc = as_output(acc, "pqi_accumulate", "acc", dtypes=("float32",), on_cuda=True)
    grad = as_input(grad, "pqi_accumulate", "grad", on_cuda=True)
    _check_shapes("pqi_accumulate", tuple(acc.shape), grad=grad)
    if not_finite is not None:
        flag = as_output(not_finite, "pqi_accumulate", "not_finite", dtypes=("int32",), ndim=(1,), on_cuda=True)
        _check_shapes("pqi_accumulate", (1,), not_finite=flag)
    where = place("pqi_accumulate", acc=acc, grad=grad, not_finite=not_finite)
    _C.pqi_accumulate(core_view(acc), core_view(grad), weight, None if not_finite is None else core_view(flag), where)


def pqi_finalize(acc: Array, w: Array, w_quantized: Array, signed: bool = False, *, out: Array | None = None) -> Array:
    """Multiply accumulated gradients with the change of each weight. The result is the PQI, in the unit of the loss.

    Args:
        acc: float32, one or two dimensions, contiguous: the accumulator of :func:`pqi_accumulate`.
        w: original weights, of the shape of ``acc``; float32, float16 or bfloat16.
        w_quantized: dequantized weights, of the same shapes and dtypes.
        signed: keep the sign of each value instead of taking absolute values.
        out: float32 array of the shape of ``acc`` for the result; by default ``acc`` is overwritten.

    Returns:
        ``abs((w_quantized - w) * acc)``, or with the sign if ``signed``, in ``out`` or ``acc``. The result is
        bit-identical on every CPU.

    Raises:
        InvalidArgumentError: for other dtypes or shapes, or a result array that is read-only.
    """
    result = acc if out is None else out
    target = as_output(result, "pqi_finalize", "acc" if out is None else "out", dtypes=("float32",), on_cuda=True)
    acc = as_input(acc, "pqi_finalize", "acc", dtypes=("float32",), on_cuda=True)
    shape = tuple(acc.shape)
    _check_shapes("pqi_finalize", shape, out=target)
    pair = _weights("pqi_finalize", shape, w, w_quantized)
    where = place("pqi_finalize", acc=acc, w=w, w_quantized=w_quantized, out=target)
    _C.pqi_finalize(core_view(acc), *pair, signed, core_view(target), where)
    return result


def pqi_sum(acc: Array, w: Array, w_quantized: Array) -> float:
    """Sum ``(w_quantized - w) * acc`` over all weights in float64: the loss change that the integral predicts.

    Args:
        acc, w, w_quantized: as in :func:`pqi_finalize`; nothing is overwritten.

    Returns:
        The sum. It is bit-identical on every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for other dtypes or shapes.
    """
    acc = as_input(acc, "pqi_sum", "acc", dtypes=("float32",), on_cuda=True)
    pair = _weights("pqi_sum", tuple(acc.shape), w, w_quantized)
    return _C.pqi_sum(core_view(acc), *pair, place("pqi_sum", acc=acc, w=w, w_quantized=w_quantized))


def interpolate(w: Array, w_quantized: Array, t: float, out: Array | None = None) -> Array:
    """Interpolate between original and quantized weights: ``w + t * (w_quantized - w)``.

    Args:
        w: original weights, one or two dimensions, contiguous; float32, float16 or bfloat16.
        w_quantized: dequantized weights, of the shape of ``w``.
        t: position on the path: 0 gives exactly ``w``, 1 exactly ``w_quantized``. Other values are computed in float32.
        out: float32, float16 or bfloat16 array of the shape of ``w``; it may be ``w`` or ``w_quantized``. By default a
            new array of the library and dtype of ``w``.

    Returns:
        ``out``. The result is bit-identical on every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for other dtypes or shapes, an ``out`` that is read-only, a ``t`` that is not finite.
    """
    start = as_input(w, "interpolate", "w", on_cuda=True)
    result = empty_like_kind(w, tuple(start.shape), dtype_name(w)) if out is None else out
    target = as_output(result, "interpolate", "out", on_cuda=True)
    _check_shapes("interpolate", tuple(start.shape), out=target)
    pair = _weights("interpolate", tuple(start.shape), w, w_quantized)
    _C.interpolate(*pair, t, core_view(target), place("interpolate", w=w, w_quantized=w_quantized, out=target))
    return result
