"""The Post-quantization Integral, weight by weight (arXiv 2503.01901; contract: quantrature/integral.hpp)."""

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
        grad: the loss gradient at one node of the path, shaped like ``acc``; float32, float16 or bfloat16.
        weight: the node's quadrature weight, times the share of the sample.
        not_finite: int32 of one element, where ``acc`` is, which becomes 1 if ``grad`` has a NaN or an infinity and
            stays as it is otherwise; without another look at ``grad``, and without waiting for a device.

    The product rounds to float32, then the sum. After n calls the error is at most about ``(n + 1) * 2**-24`` times
    the sum of the absolute contributions. The same bits on every CPU and for every number of threads.

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
    """Multiply accumulated gradients by the way each weight went: its PQI, in nats if the loss is.

    Args:
        acc: float32, one or two dimensions, contiguous; what :func:`pqi_accumulate` left.
        w: the original weights, shaped like ``acc``; float32, float16 or bfloat16.
        w_quantized: the quantized weights, likewise.
        signed: keep the sign of each contribution instead of its absolute value.
        out: where the result goes, float32 and shaped like ``acc``; ``acc`` itself if not given.

    Returns:
        ``abs((w_quantized - w) * acc)``: ``out``, or ``acc``, which was overwritten. The same bits on every CPU.

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
    """Sum of ``(w_quantized - w) * acc`` over all weights in float64: the loss change that the integral predicts.

    Args:
        acc, w, w_quantized: as for :func:`pqi_finalize`; nothing is overwritten.

    Returns:
        The sum, added in a fixed order: the same bits on every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for other dtypes or shapes.
    """
    acc = as_input(acc, "pqi_sum", "acc", dtypes=("float32",), on_cuda=True)
    pair = _weights("pqi_sum", tuple(acc.shape), w, w_quantized)
    return _C.pqi_sum(core_view(acc), *pair, place("pqi_sum", acc=acc, w=w, w_quantized=w_quantized))


def interpolate(w: Array, w_quantized: Array, t: float, out: Array | None = None) -> Array:
    """The point ``w + t * (w_quantized - w)`` of the way from the weights to their quantized images.

    Args:
        w: the original weights, one or two dimensions, contiguous; float32, float16 or bfloat16.
        w_quantized: the quantized weights, shaped like ``w``.
        t: 0 gives ``w`` and 1 gives ``w_quantized`` without another rounding; formed in float32 in between.
        out: float32, float16 or bfloat16, shaped like ``w``; it may be ``w`` or ``w_quantized``. A new array of the
            library and dtype of ``w`` if not given.

    Returns:
        ``out``. The same bits on every CPU and for every number of threads.

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
