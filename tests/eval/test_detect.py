"""Detection: batches, schedules, the network, and whole runs on scenes of digits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.boxes import Batches, open_scenes, picture
from eval.detect import RECIPES, _lr, _settings, detect
from eval.detector import detector
from eval.results import read_results
from eval.settings import Detection
from flags import Given, UserError
from methods.networks import backbone
from tests.eval.scenes import coco_folder, voc_folder
from tests.training.test_lock import held
from training import folder as run_folder

ROOT = Path(__file__).parents[2]
TINY = dict(
    run="resnet_tiny", init="random", batch_size=2, min_size=32, workers=0, log_every=2, checkpoint_every=3, steps=5
)


def finished_run(place, name="resnet_tiny", size=32):
    folder = place / "run"
    folder.mkdir()
    network = backbone(name, size)
    save_file(network.state_dict(), folder / "backbone.safetensors")
    (folder / "config.json").write_text(json.dumps({"backbone": name, "image_size": size}))
    return folder, network


# ---------------------------------------------------------------------------------------------------------------------
# Batches, schedule, network.


def test_a_batch_is_the_same_however_many_processes_share_it(place):
    train, _, _ = open_scenes("coco", str(coco_folder(place, 5, 2)))
    options = dict(classes=[3], masks=True, batch_size=4, seed=1)
    whole = Batches(train, **options, rank=0, world=1)
    parts = [Batches(train, **options, rank=rank, world=2) for rank in range(2)]
    mirrored = 0
    for step in range(3):
        images, targets = whole(step)
        shared = [part(step) for part in parts]
        for one, two in zip(images, [image for part in shared for image in part[0]], strict=True):
            assert np.array_equal(one, two)
        for one, two in zip(targets, [target for part in shared for target in part[1]], strict=True):
            assert all(np.array_equal(one[key], two[key]) for key in ("boxes", "labels", "masks"))
        for row, image, target in zip(whole.step_rows(step).tolist(), images, targets):
            flipped = not np.array_equal(image, picture(train, row))
            mirrored += flipped
            plain = picture(train, row)
            assert np.array_equal(image, plain[:, ::-1] if flipped else plain)
            for (x1, y1, x2, y2), mask in zip(target["boxes"].astype(int), target["masks"], strict=True):
                rows, columns = np.where(mask)  # the boxes of the scenes are those of the masks
                assert (x1, y1, x2, y2) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert 0 < mirrored < 12
    rows = torch.cat([whole.step_rows(step) for step in range(5)])  # four epochs of five images
    assert all(sorted(epoch.tolist()) == [0, 1, 2, 3, 4] for epoch in rows.view(4, 5))
    assert len({tuple(epoch.tolist()) for epoch in rows.view(4, 5)}) > 1


def settings(**given):
    return _settings(Detection(**dict(run="resnet_tiny", init="random") | given), Given({}, {}))[0]


def test_the_schedules_are_mocos(place):
    s = settings(task="voc")
    assert (s.steps, s.milestones, s.warmup_steps) == (24_000, [18_000, 22_000], 100)
    assert s.sides == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800] and s.max_size == 1333
    rates = [_lr(step, s) for step in (0, 49, 100, 17_999, 18_000, 22_000, 23_999)]
    assert rates == pytest.approx([0.0002, 0.01, 0.02, 0.02, 0.002, 0.0002, 0.0002])
    s = settings(task="coco")
    assert (s.steps, s.milestones, s.sides) == (90_000, [60_000, 80_000], [640, 672, 704, 736, 768, 800])
    s = settings(task="coco", schedule="2x")
    assert (s.steps, s.milestones) == (180_000, [120_000, 160_000])
    s = settings(task="voc", steps=2400, batch_size=32)
    assert (s.milestones, s.warmup_steps, s.peak_lr) == ([1800, 2200], 100, 0.04)
    assert settings(task="voc", steps=60).warmup_steps == 6
    assert all(0 < recipe.drops[0] < recipe.drops[1] < 1 for recipe in RECIPES.values())


def test_the_detector_has_the_runs_weights_and_trains_all_of_it():
    torch.manual_seed(0)
    network = backbone("resnet50", 224)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = detector(network, 20, True, [640, 800], 1333)
    assert model.backbone.out_channels == 256
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for part, count in (("backbone.pyramid", 8), ("roi_heads.mask_head", 4), ("backbone.stages", 52)):
        assert sum(name.startswith(part) for name in norms) == count
    assert all(parameter.requires_grad for parameter in model.parameters())
    anchors = [float(cell[1, 2] - cell[1, 0]) for cell in model.rpn.anchor_generator.cell_anchors]
    assert anchors == [32, 64, 128, 256, 512]
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 512
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        network.eval(), model.eval()
        fourth = model.backbone.stages[:4]
        found = model.backbone.stem(x)
        for stage in fourth:
            found = stage(found)
        assert torch.equal(found, network.forward_features(x))
        assert [tuple(m.shape[1:]) for m in model.backbone(x).values()] == [
            (256, 16, 24), (256, 8, 12), (256, 4, 6), (256, 2, 3), (256, 1, 2)
        ]  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def ends(folder):
    return load_file(Path(folder) / "checkpoints" / "step_000005" / "method.safetensors")


def test_a_run_leaves_its_result_and_goes_on_as_if_nothing_had_been(place, capsys):
    data = str(coco_folder(place, 4, 2))
    run, network = finished_run(place)
    options = {**TINY, "run": str(run), "init": "run", "task": "coco", "data": data}
    metrics = detect(**options)
    folder = run / "detect-coco"
    assert list(metrics) == ["AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75"]
    (line,) = read_results(run)
    assert (line["protocol"], line["dataset"], line["metrics"]) == ("detect", data, metrics)
    assert line["settings"]["steps"] == 5 and line["settings"]["backbone"] == "resnet_tiny"
    said = capsys.readouterr().out
    assert "mask_AP75" in said and f"added to {run / 'results.jsonl'}" in said
    lines = run_folder.read_metrics(folder)
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        parts = [value for name, value in line.items() if name.startswith("loss_")]
        assert len(parts) == 5 and line["loss"] == pytest.approx(sum(parts), rel=1e-5)
    with pytest.raises(UserError, match="holds a finished run; write to another folder"):
        detect(**options)
    with pytest.raises(UserError, match="holds a finished run"):
        detect(resume=str(folder))

    detect(**options, out="cut")
    # Back to the state after step 3, as a kill leaves it.
    for path in (last := run_folder.last_checkpoint(Path("cut"))).iterdir():
        path.unlink()
    last.rmdir()
    Path("cut/result.json").unlink()
    with pytest.raises(UserError, match="holds an unfinished run; resume it: --resume cut"):
        detect(**options, out="cut")
    with pytest.raises(UserError, match="that run has --lr 0.02, not 0.5"):
        detect(resume="cut", lr=0.5)
    with held(Path("cut")), pytest.raises(UserError, match="--resume cut: process 7 on node3 trains there"):
        detect(resume="cut", workers=1)
    assert detect(resume="cut", workers=1) == metrics
    one, two = ends(folder), ends("cut")
    assert all(torch.equal(one[name], two[name]) for name in one)
    stripped = [
        [{**line, "images_per_second": 0} for line in run_folder.read_metrics(f)] for f in (folder, Path("cut"))
    ]
    assert stripped[0] == stripped[1]
    assert not torch.equal(one["backbone.stem.0.weight"], network.conv1.weight)  # it was trained
    assert torch.allclose(one["backbone.stem.0.weight"], network.conv1.weight, atol=0.1)  # and from the run's


@pytest.mark.slow
def test_a_signal_saves_and_says_how_to_go_on(place):
    data = voc_folder(place, dict(train=4, test=2))
    words = f"--run resnet_tiny --init random --data {data} --batch_size 2 --min_size 32 --workers 0 --log_every 1"
    run = subprocess.Popen(
        [sys.executable, "-m", "eval.detect", *words.split(), "--steps", "4000", "--out", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    while not Path("run/metrics.jsonl").exists() or len(run_folder.read_metrics(Path("run"))) < 2:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    step = int(run_folder.last_checkpoint(Path("run")).name[5:])
    assert run.returncode == 0
    assert f"stopped at step {step}; resume it: python -m eval.detect --resume run" in out.decode()
    assert run_folder.read_metrics(Path("run"))[-1]["step"] == step and not Path("run/result.json").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(run="resnet50", init="run"), "a timm name brings no weights; say --init random or --init imagenet"),
        (dict(init="imagenet"), "has the stem for small images"),
        (dict(run="resnet18", init="imagenet"), "timm's weights of resnet18 cannot be had"),
        (dict(run="vit_tiny_patch16_224"), "detection wants a ResNet"),
        (dict(run="nowhere/at/all"), "no such folder or file"),
        (dict(init="other"), "--init other: want run, random, imagenet"),
        (dict(task="lvis"), "--task lvis: want voc, coco"),
        (dict(schedule="1x"), "--schedule 1x: only coco has schedules"),
        (dict(task="coco", schedule="3x"), "--schedule 3x: want 1x, 2x"),
        (dict(steps=0), "--steps 0: want 1 or more"),
        (dict(lr=-1.0), "--lr -1.0: want a number above 0"),
        (dict(min_size=8), "--min_size 8: want 32 or more"),
        (dict(max_size=31), "--max_size 31: want at least --min_size, 32"),
        (dict(data=""), "--data: want a VOCdevkit folder"),
        (dict(resume="nowhere"), "--resume nowhere: no run there"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(place, flags, said):
    with pytest.raises(UserError, match=said):
        detect(**{**TINY, "data": "data", "out": "out", **({"out": None} if "resume" in flags else {}), **flags})
    assert not list(place.iterdir())


def test_a_run_that_is_not_finished_is_refused(place):
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"backbone": "resnet_tiny", "image_size": 32}))
    with pytest.raises(UserError, match="--run run: is not finished"):
        detect(run="run", data="data")
    save_file(backbone("resnet18", 32).state_dict(), "run/backbone.safetensors")
    with pytest.raises(UserError, match="of its weights do not fit resnet_tiny"):
        detect(run="run", data="data")
    assert [path.name for path in place.iterdir()] == ["run"] and not Path("run/detect-voc").exists()


def test_an_image_of_another_size_is_named_and_leaves_no_folder(place):
    data = voc_folder(place, dict(train=2, test=2))
    Image.new("RGB", (40, 30)).save(data / "VOC2007/JPEGImages/000001.jpg")
    with pytest.raises(UserError, match=r"000001.jpg: has 40 x 30 pixels, and its annotation says 128 x 128"):
        detect(**TINY, data=str(data), out="out")
    (data / "VOC2007/JPEGImages/000001.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000001.jpg: is not an image that can be read"):
        detect(**TINY, data=str(data), out="out")
    assert not Path("out").exists()


TOGETHER = """import sys, flags
from eval.detect import detect
sys.argv[1:] = [f"--{word}" for word in sys.argv[1:]]  # to torchrun, --run is short for a flag of its own
flags.launch(detect, "eval.detect")
"""


@pytest.mark.slow
def test_two_processes_share_a_run_and_go_on_as_if_nothing_had_been(place):
    data, script = coco_folder(place, 6, 3), place / "together.py"
    script.write_text(TOGETHER)
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def together(*words):
        done = subprocess.run([*head, *words], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    flags = {**TINY, "task": "coco", "data": data, "out": "two", "batch_size": 4}
    together(*(f"{name}={value}" for name, value in flags.items()))
    shutil.copytree("two", "cut")
    shutil.rmtree("cut/checkpoints/step_000005")
    Path("cut/result.json").unlink()
    together("resume=cut")
    one, two = ends("two"), ends("cut")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert Path("two/result.json").read_text() == Path("cut/result.json").read_text()
    assert [line["step"] for line in run_folder.read_metrics(Path("cut"))] == [2, 4, 5]
    assert len(read_results(Path())) == 2


LEARN = dict(run="resnet_tiny", init="random", min_size=64, workers=0)


@pytest.mark.slow
def test_faster_r_cnn_finds_digits(place):
    metrics = detect(**LEARN, data=str(voc_folder(place, dict(train=160, test=30))), steps=240, batch_size=4, lr=0.3)
    assert metrics["AP50"] > 50


@pytest.mark.slow
def test_mask_r_cnn_finds_digits_and_their_shapes(place):
    options = dict(task="coco", data=str(coco_folder(place, 160, 30)), steps=140, batch_size=4, lr=0.3)
    metrics = detect(**LEARN, **options)
    assert metrics["AP50"] > 50 and metrics["mask_AP50"] > 40
