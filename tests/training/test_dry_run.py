"""--dry_run: it times the run that was asked for, its figures agree with each other, and it leaves nothing."""

import re
from pathlib import Path

import pytest
import torch

import bsim
from flags import UserError
from methods import METHODS
from methods.networks import backbone
from tests.test_data import table
from tests.test_train import SHORT, same, weights
from train import pretrain

SAID = re.compile(
    r"dry run: (?P<timed>\d+) steps timed, the (?P<skipped>\d+) before them left out; nothing is written\n"
    r" +parameters +(?P<trained>[\d,]+) trained, (?P<every>[\d,]+) in all\n"
    r" +peak memory +(?P<memory>[\d.]+) GiB .*\n"
    r" +speed +(?P<speed>[\d,.]+) images/s, (?P<seconds>[\d.e-]+) s a step\n"
    r" +the run +(?P<steps>[\d,]+) steps, (?:(?P<days>\d+) days?, )?(?P<time>[\d:]+) \(h:m:s\)"
)


def figures(text):
    found = SAID.search(text).groupdict()
    hours, minutes, seconds = map(int, found.pop("time").split(":"))
    took = ((24 * int(found.pop("days") or 0) + hours) * 60 + minutes) * 60 + seconds
    return {"time": took, **{name: float(value.replace(",", "")) for name, value in found.items()}}


def test_it_leaves_nothing_and_its_figures_agree(place, capsys):
    options = {**SHORT, "steps": 90_000, "log_every": 1}
    assert pretrain(method="moco", sim_weight=0.5, **options, accumulate=2, dry_run=7) is None
    assert list(place.iterdir()) == []
    found = figures(capsys.readouterr().out)
    assert (found["timed"], found["skipped"], found["steps"]) == (4, 3, 90_000)
    assert found["speed"] * found["seconds"] == pytest.approx(32, rel=0.01)
    assert found["seconds"] * found["steps"] == pytest.approx(found["time"], rel=0.001, abs=1)
    defaults = METHODS["moco"].defaults(image_size=16, width=192, steps=90_000, images=180)
    heads = {k: v for k, v in defaults.items() if k not in ("optimizer", "lr", "weight_decay", "warmup_epochs")}
    model = METHODS["moco"].Method(backbone("resnet_tiny", 16), **heads)
    count = {grad: sum(p.numel() for p in model.parameters() if p.requires_grad == grad) for grad in (True, False)}
    assert (found["trained"], found["every"]) == (count[True], count[True] + count[False])
    assert 0.1 < found["memory"] < 50


def test_what_is_set_up_once_is_not_timed(place, capsys, monkeypatch):
    """By a clock of the test's own: views of the first four steps take a minute each, later ones a second."""
    calls = []

    def view(images, recipe, generator):
        calls.append(60 if len(calls) < 8 else 1)
        return bsim.make_view(images, recipe, generator=generator)

    monkeypatch.setattr("train.make_view", view)
    monkeypatch.setattr("training.dry_run._now", lambda accelerator: sum(calls))
    pretrain(**{**SHORT, "steps": 8}, dry_run=100)
    found = figures(capsys.readouterr().out)
    assert (found["timed"], found["skipped"], len(calls)) == (4, 4, 16)  # no longer than the run
    assert (found["seconds"], found["speed"], found["time"]) == (2, 16, 16)


def test_a_stream_with_workers_is_timed(place, capsys):
    for shard in range(2):
        table(64).select(range(shard * 32, shard * 32 + 32)).to_parquet(place / f"{shard}.parquet")
    options = dict(label_column="none", batch_size=8, image_size=16, backbone="resnet_tiny", workers=2)
    pretrain(dataset="*.parquet", streaming=True, steps=1000, **options, dry_run=6, out="run")
    assert sorted(path.name for path in place.iterdir()) == ["0.parquet", "1.parquet"]
    said = capsys.readouterr().out
    assert figures(said)["steps"] == 1000
    assert "workers hold 4 batches ready; are the data slow? --dry_run 8" in said  # three steps were left out


def test_it_takes_the_steps_that_the_run_takes(place, monkeypatch):
    """The weights after a dry run of six steps are those of the run, to the bit."""
    seen = []
    monkeypatch.setattr("training.dry_run.report", lambda found, model, *rest: seen.append(model.backbone.state_dict()))
    options = {**SHORT, "eval_every": 0}
    pretrain(method="byol", **options, dry_run=6)
    folder = pretrain(method="byol", **options)
    assert same(weights(folder), {name: value.contiguous() for name, value in seen[0].items()})
    pretrain(method="byol", **{**options, "steps": 7}, resume=True, out="new", dry_run=6)  # nothing there to go on with
    pretrain(method="byol", **{**options, "steps": 7}, resume=True, out=str(folder), dry_run=6)  # nor does it go on
    assert not Path("new").exists() and not torch.equal(*(seen[i]["conv1.weight"] for i in (0, 1)))
    with pytest.raises(UserError) as caught:
        pretrain(resume=str(folder), steps=60, dry_run=20)
    assert str(caught.value) == f"--dry_run 20: times a new run, and --resume resumes {folder}; drop --resume"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dry_run=5), "--dry_run 5: want 6 or more"),
        (dict(dry_run=0), "--dry_run 0: want 6 or more"),
        (dict(dry_run=20, steps=5), "--dry_run 20: the run has 5 steps; want 6 or more"),
        (dict(dry_run=20, resume="nothing"), "--dry_run 20: times a new run, and --resume resumes nothing; drop"),
    ],
)
def test_refusals_write_nothing(place, options, message):
    with pytest.raises(UserError) as caught:
        pretrain(**options)
    assert str(caught.value).startswith(message) and list(place.iterdir()) == []


@pytest.mark.slow
def test_two_processes_speak_once(place):
    from tests.training.test_processes import torchrun

    words = "--split train[:200] --batch_size 32 --steps 5000 --dry_run 8 --method simclr".split()
    said = torchrun(place, 2, *words).stdout
    assert said.count("dry run: ") == 1 and figures(said)["speed"] > 0 and list(place.iterdir()) == []
