"""Runs that are resumed: they end as undisturbed ones, and damaged or foreign folders are refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flags import UserError
from methods import METHODS
from tests.test_data import table
from tests.test_train import SHORT, lines, same, weights
from train import pretrain
from training import guards


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_an_undisturbed_one(place, method):
    options = dict(method=method, sim_weight=0.5, **{**SHORT, "log_every": 4}, checkpoint_every=3, accumulate=2)
    whole = pretrain(**options, out="whole")
    runs_on = pretrain(**options, out="cut")
    # Back to the state after step 3, as a kill leaves it: nothing of the end, and metrics beyond the checkpoint.
    last = sorted((runs_on / "checkpoints").iterdir())[-1]
    assert last.name == "step_000006"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    (runs_on / "backbone.safetensors").unlink()
    with open(runs_on / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    pretrain(resume="cut")
    assert same(weights(whole), weights(runs_on))
    ends = [load_file(folder / "checkpoints" / "step_000006" / "method.safetensors") for folder in (whole, runs_on)]
    assert same(*ends)
    for one, two in zip(lines(whole), lines(runs_on), strict=True):
        assert {**one, "images_per_second": 0} == {**two, "images_per_second": 0}


def test_a_finished_run_can_be_trained_longer(place):
    pretrain(method="simclr", **SHORT, out="run")
    with pytest.raises(UserError, match="is finished at step 6; to train longer raise --epochs or --steps"):
        pretrain(resume="run")
    pretrain(resume=True, out="run", steps=8)
    assert [line["step"] for line in lines("run")][-1] == 8
    assert json.loads(Path("run/config.json").read_text())["steps"] == 8


def test_damaged_files_are_named(place):
    pretrain(**SHORT, checkpoint_every=3, out="run")
    Path("run/backbone.safetensors").unlink()
    weights = Path("run/checkpoints/step_000006/method.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"step_000006: is damaged .*; without it --resume takes the one before"):
        pretrain(resume="run")
    for file in weights.parent.iterdir():
        file.unlink()
    weights.parent.rmdir()
    state = Path("run/checkpoints/step_000003/state.json")
    state.write_text(state.read_text().replace('"resnet_tiny"', '"resnet18"'))
    with pytest.raises(UserError, match="step_000003: was made with backbone resnet18, this run has resnet_tiny"):
        pretrain(resume="run")
    Path("run/config.json").write_text("{")
    with pytest.raises(UserError, match="--resume run: its config.json is damaged"):
        pretrain(resume="run")


def test_a_resumed_run_proposes_what_it_was_started_with(place, capsys):
    options = {**SHORT, "eval_every": 0}
    pretrain(method="simclr", **options, out="run")
    capsys.readouterr()
    pretrain(resume="run", steps=options["steps"] + 2)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "--method simclr" in said and f"--batch_size {options['batch_size']}" in said and "--resume" not in said


def test_a_run_is_not_resumed_to_an_earlier_end(place):
    pretrain(**{**SHORT, "steps": 4, "checkpoint_every": 2}, out="run")
    Path("run/backbone.safetensors").unlink()  # as of a run that was killed
    before = Path("run/config.json").read_bytes()
    with pytest.raises(UserError, match="--resume run: is at step 4; to train longer raise --epochs or --steps"):
        pretrain(resume="run", steps=2)
    assert Path("run/config.json").read_bytes() == before and not Path("run/backbone.safetensors").exists()


def test_a_stream_is_not_resumed_by_epochs(place):
    table(60, size=(16, 16)).to_parquet("rows.parquet")
    flags = dict(backbone="resnet_tiny", batch_size=8, workers=0, eval_every=0)
    pretrain(dataset="rows.parquet", streaming=True, steps=2, out="run", **flags)
    with pytest.raises(UserError, match="--epochs 5: the length of a stream is not known; say --steps"):
        pretrain(resume="run", epochs=5)
    with pytest.raises(UserError, match="is finished at step 2; to train longer raise --steps$"):
        pretrain(resume="run")


def test_a_copy_of_a_checkpoint_is_the_users(place):
    pretrain(**{**SHORT, "steps": 4, "checkpoint_every": 1}, out="run")
    kept = Path("run/checkpoints")
    shutil.copytree(kept / "step_000004", kept / "step_000003_keep")
    shutil.copytree(kept / "step_000004", kept / "step_1")
    (kept / "step_000009.tar").write_text("mine")
    pretrain(resume="run", steps=6)
    assert sorted(path.name for path in kept.iterdir()) == [
        "step_000003_keep",
        "step_000005",
        "step_000006",
        "step_000009.tar",
        "step_1",
    ]


def test_a_folder_that_is_no_run_of_ours_is_named(place):
    Path("other").mkdir()
    Path("other/config.json").write_text('{"architectures": ["ViT"]}')
    with pytest.raises(UserError, match="--resume other: its config.json has no method or no dataset, so it is no run"):
        pretrain(resume="other")


def test_bad_input_of_a_resumed_run_deletes_nothing(place):
    with pytest.raises(UserError, match="bad"), guards.leaves_nothing(place / "old", new=False):
        (place / "old").mkdir()
        raise UserError("bad")
    assert (place / "old").exists()
    with pytest.raises(UserError, match="bad"), guards.leaves_nothing(place / "old", new=True):
        raise UserError("bad")
    assert not (place / "old").exists()
