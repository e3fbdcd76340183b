"""The machine that a bench runs on: its name, and the time that its memory alone takes."""

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
"""Before a turn: OpenMP's threads, which torch uses, keep a core busy for some milliseconds after a call."""


def machine(threads: int) -> str:
    """One line about where this runs."""
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
    """What machine.c measures: the time that memory alone takes, on as many threads as the ops have."""

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
        """Of one of the ways above to touch so many bytes."""
        return float(self._seconds(way, source.data_ptr(), target.data_ptr(), size, self.threads))

    def read(self, source: torch.Tensor) -> float:
        """The faster of reading from one end to the other and of reading four parts in turn."""
        return min(self.seconds(way, source, source, source.nbytes) for way in (self.READ, self.READ_STREAMS))

    def copy(self, source: torch.Tensor, target: torch.Tensor, size: int | None = None) -> float:
        """The faster of a plain copy and of one whose stores pass the cache by."""
        size = source.nbytes if size is None else size
        return min(self.seconds(way, source, target, size) for way in (self.COPY, self.COPY_PAST_CACHE))

    def move(self, source: torch.Tensor, target: torch.Tensor) -> float:
        """Reading the one and writing the other, of different sizes."""
        both = min(source.nbytes, target.nbytes)
        seconds = self.copy(source, target, both)
        if source.nbytes > both:
            seconds += self.seconds(self.READ, source[both:], target, source.nbytes - both)
        if target.nbytes > both:
            seconds += self.seconds(self.WRITE, source, target[both:], target.nbytes - both)
        return seconds
