"""Timing in turns: contenders take turns in one process, so that what disturbs one disturbs all."""

import platform
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version

import torch

BUSY = "import torch; torch.set_num_threads(1); x = torch.randn(512, 512)\nwhile True: x @ x"


def disturbed_by(count: int) -> ExitStack:
    """A context in which so many other processes multiply matrices, a core each."""
    others = ExitStack()
    for _ in range(count):
        others.callback(subprocess.Popen([sys.executable, "-c", BUSY]).kill)
    return others


def in_turns(contenders: dict, repeats: int) -> dict:
    """{name: seconds of each turn} of functions without arguments, each called once before."""
    for function in contenders.values():
        function()
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return middle, low, high


def machine(*packages: str) -> str:
    """A line that says what the figures are from."""
    found = []
    for package in ("torch", *packages):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return f"{', '.join(found)}, Python {platform.python_version()}, {torch.get_num_threads()} threads"
