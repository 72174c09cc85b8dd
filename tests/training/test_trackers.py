"""A tracker's run: the run folder's name, its pictures, and one run for a run that was resumed."""

import json

import pytest

from flags import RunError
from train import pretrain
from training import trackers

OPTIONS = dict(backbone="resnet_tiny", batch_size=32, image_size=16, eval_every=4, log_every=2, split="train[:200]")


@pytest.fixture(autouse=True)
def offline(place, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(place / "trackio")}.items():
        monkeypatch.setenv(name, value)


def test_tensorboard(place):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain(log_with="tensorboard", out="runs/mine", steps=4, **OPTIONS)
    pretrain(resume="runs/mine", steps=8)
    events = reader.EventAccumulator("runs/mine", size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Scalars("five_labels")] == [4, 8]
    assert {*events.Tags()["images"]} == {"views", "neighbours", "curves"}


def test_wandb(place, monkeypatch):
    wandb = pytest.importorskip("wandb")
    begun, real = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda *a, **k: begun.append(k) or real(*a, **k))
    pretrain(log_with="wandb", out="mine", steps=4, **OPTIONS)
    pretrain(resume="mine", steps=8)
    assert [k["name"] for k in begun] == ["mine"] * 2 and begun[0]["id"] == begun[1]["id"]
    assert [k["resume"] for k in begun] == ["allow"] * 2
    assert json.loads((place / "mine" / "tracker.json").read_text()) == {"wandb": begun[0]["id"]}
    pictures = {path.name.split("_")[0] for path in (place / "mine" / "wandb").rglob("*.png")}
    assert pictures == {"views", "neighbours", "curves"}


def test_trackio(place, monkeypatch):
    trackio = pytest.importorskip("trackio")
    begun, logged, real = [], [], trackio.init

    def init(*given, **options):
        begun.append(options)
        run = real(*given, **options)
        log = run.log
        monkeypatch.setattr(run, "log", lambda values, **k: logged.append(values) or log(values, **k))
        return run

    monkeypatch.setattr(trackio, "init", init)
    pretrain(log_with="trackio", out="mine", steps=4, **OPTIONS)
    pretrain(resume="mine", steps=8)
    assert [(k["name"], k["resume"]) for k in begun] == [("mine", "never"), ("mine", "allow")]
    assert {"views", "neighbours", "curves"} <= {name for values in logged for name in values}


def test_a_tracker_without_room_ends_the_run_in_a_line(place, monkeypatch):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.raises(RunError, match=r"mine/tensorboard cannot be written \(No space left on device\)"):
        pretrain(log_with="tensorboard", out="mine", steps=4, **OPTIONS)
    assert trackers.PROJECT == "bsim"
