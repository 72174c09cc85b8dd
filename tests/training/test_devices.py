"""What is said of a precision before training."""

import pytest
import torch
from accelerate.state import AcceleratorState

from training.devices import open_accelerator

SLOW = "bf16 is slow on this CPU, which has no instructions for it; --mixed_precision no is faster\n"

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about CPUs")


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch):
    """A CPU without bf16, and a state of its own: Accelerate keeps the first precision of a process."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "precision, supported, said", [("bf16", False, SLOW), ("bf16", True, ""), ("no", False, ""), (None, False, "")]
)
def test_a_cpu_without_bf16_is_named(monkeypatch, capsys, precision, supported, said):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    open_accelerator(precision)
    assert capsys.readouterr().out == said


def test_the_precision_of_accelerate_config_counts(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate launch hands it on
    assert open_accelerator(None).mixed_precision == "bf16"
    assert capsys.readouterr().out == SLOW
