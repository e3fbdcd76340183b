"""The machine that a bench runs on: its name, and how fast it reads and copies memory."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

import quantrature

SETTLE_SECONDS = 0.01
"""Pause before a turn. The OpenMP threads of torch keep a core busy for some milliseconds after a call."""


def machine(threads: int) -> str:
    """Return one line with the processor, number of threads, load, kernels and versions."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = models[0] if models else model
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{model}, {os.cpu_count()} cores, {threads} threads{load}; kernels {quantrature.target()}; "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )


class Machine:
    """Measures with machine.c how long the machine takes to read, copy and write memory, on a number of threads."""

    READ, READ_STREAMS, COPY, COPY_PAST_CACHE, WRITE = range(5)

    def __init__(self, threads: int) -> None:
        self.threads = threads
        source = Path(__file__).with_name("machine.c")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "machine.so"
            command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
            subprocess.run([*command, str(source), "-o", str(library)], check=True)
            self._seconds = ctypes.CDLL(str(library)).machine_seconds
        self._seconds.restype = ctypes.c_double
        self._seconds.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]

    def seconds(self, way: int, source: torch.Tensor, target: torch.Tensor, size: int) -> float:
        """Return the seconds of one of the ways above, for ``size`` bytes."""
        return float(self._seconds(way, source.data_ptr(), target.data_ptr(), size, self.threads))

    def read(self, source: torch.Tensor) -> float:
        """Return the seconds to read a tensor: from end to end, or four parts in turn, whichever is faster."""
        return min(self.seconds(way, source, source, source.nbytes) for way in (self.READ, self.READ_STREAMS))

    def copy(self, source: torch.Tensor, target: torch.Tensor, size: int | None = None) -> float:
        """Return the seconds to copy: plainly, or with stores that bypass the cache, whichever is faster."""
        size = source.nbytes if size is None else size
        return min(self.seconds(way, source, target, size) for way in (self.COPY, self.COPY_PAST_CACHE))

    def move(self, source: torch.Tensor, target: torch.Tensor) -> float:
        """Return the seconds to read ``source`` and write ``target``, which may have different sizes."""
        both = min(source.nbytes, target.nbytes)
        seconds = self.copy(source, target, both)
        if source.nbytes > both:
            seconds += self.seconds(self.READ, source[both:], target, source.nbytes - both)
        if target.nbytes > both:
            seconds += self.seconds(self.WRITE, source, target[both:], target.nbytes - both)
        return seconds
