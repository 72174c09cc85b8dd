"""Evaluation on finished runs: k-NN, linear, few labels; what is refused; what is written down."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

import data
import train
from bsim import ViewRecipe, make_view
from eval.features import refuse_not_finite
from eval.geometry import geometry
from eval.knn import knn
from eval.linear import choose_strength, fingerprint, linear
from eval.results import read_results, write_result
from eval.semi import balanced_part, listed_part, semi
from eval.settings import KNN
from flags import RunError, UserError, help_text
from tests.test_data import folder, picture, table
from train import pretrain
from training import folder as run_folder
from training.weights import load_backbone

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on the digits; tests write only to its results."""
    place = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        options = dict(method="simclr", batch_size=64, steps=30, checkpoint_every=15, eval_every=15)
        return place / pretrain(**options, out=str(place / "run"))


def before_training(run):
    return next(line for line in run_folder.read_metrics(run) if "knn_pixels" in line)


def last_line(run):
    return read_results(run)[-1]


# k-NN.


def test_knn_of_a_run_is_the_one_it_ended_with(run, capsys):
    metrics = knn(run=str(run))
    assert metrics["top1"] == pytest.approx(run_folder.read_metrics(run)[-1]["knn"], abs=1e-3)
    assert metrics["pixels_top1"] == pytest.approx(before_training(run)["knn_pixels"], abs=1e-3)
    assert metrics["top5"] > metrics["top1"]
    line = last_line(run)
    assert line["protocol"] == "knn" and line["dataset"] == "digits" and line["metrics"] == metrics
    assert line["settings"]["k"] == 16 and line["versions"]["torch"] == torch.__version__.split("+")[0]
    said = capsys.readouterr().out
    assert re.search(rf"\| top1 +\| {metrics['top1']:.2f}", said)
    assert said.index("one_label ") < said.index("five_labels ") < said.index("top1 ")  # few labels first
    evaluated = [x for x in run_folder.read_metrics(run) if "knn" in x][-1]
    for name in ("one_label", "five_labels"):
        assert metrics[name] == pytest.approx(evaluated[name], abs=0.3)  # the same draws


def test_a_checkpoint_a_file_and_a_name_are_backbones_too(run, place):
    half = knn(run=str(run / "checkpoints" / "step_000015"))
    ends = {line["step"]: line["knn"] for line in run_folder.read_metrics(run) if "knn" in line}
    assert half["top1"] == pytest.approx(ends[15], abs=1e-3) and last_line(run)["metrics"] == half
    (place / "weights").mkdir()
    weights = place / "weights" / "backbone.safetensors"
    weights.write_bytes((run / "backbone.safetensors").read_bytes())
    found = knn(run=str(weights), backbone="resnet_tiny", image_size=16, dataset="digits")
    assert found["top1"] == pytest.approx(ends[30], abs=1e-3) and last_line(place / "weights")["metrics"] == found
    found = knn(run="resnet_tiny", image_size=16, dataset="digits")
    assert found["top1"] == pytest.approx(before_training(run)["knn_random"], abs=1e-3)  # the seed's random weights
    assert last_line(place)["settings"]["run"] == "resnet_tiny"


def test_results_are_only_ever_added_to(place, capsys):
    (place / "results.jsonl").write_text('{"protocol": "old"}\n{"half": ')
    write_result(place, "knn", "digits", {"seed": 3}, {"top1": 1.0})
    lines = (place / "results.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"protocol": "old"}', '{"half": '] and json.loads(lines[2])["seed"] == 3
    assert [line["protocol"] for line in read_results(place)] == ["old", "knn"]
    assert capsys.readouterr().err == f"{place / 'results.jsonl'}: line 2 was cut off and is left out\n"


# Linear.


def test_features_agree_with_scikit_learn(run):
    metrics = linear(run=str(run))
    settings = last_line(run)["settings"]
    loaded = load_backbone(str(run))
    train, test = data.open_labelled("digits", seed=0)
    found = []
    for part in (train, test):
        pixels = part.images.whole(part.rows, None)[0]
        clean = ViewRecipe(16, scale=(1, 1), ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=0)
        with torch.no_grad():
            found.append(loaded.network.eval()(make_view(pixels, clean, generator=torch.Generator())).numpy())
    assert set(settings["accuracy_by_C"]) >= {"1.0", "0.1"}
    centre, scale = found[0].mean(0), found[0].std(0) + 1e-6
    model = LogisticRegression(C=settings["C"], max_iter=3000).fit((found[0] - centre) / scale, train.labels.numpy())
    wanted = 100 * (model.predict((found[1] - centre) / scale) == test.labels.numpy()).mean()
    assert metrics["top1"] == pytest.approx(wanted, abs=0.2) and metrics["top1"] > 90


@pytest.mark.parametrize("preset", ["moco", "simsiam"])
def test_sgd_learns_and_leaves_the_backbone_alone(run, monkeypatch, preset):
    kept = []
    whole = fingerprint
    monkeypatch.setattr("eval.linear.fingerprint", lambda network: kept.append(whole(network)) or kept[-1])
    rate = {"moco": 3.0, "simsiam": 2.0}[preset]
    metrics = linear(run=str(run), protocol="sgd", preset=preset, epochs=8, batch_size=64, lr=rate)
    assert metrics["top1"] > 70
    assert kept[0] == kept[1] == whole(load_backbone(str(run)).network)
    assert last_line(run)["settings"]["optimizer"] == {"moco": "sgd", "simsiam": "lars"}[preset]


def test_a_backbone_that_changed_is_no_linear_evaluation(run, monkeypatch):
    def tampers(task, *rest, **options):
        next(task.backbone.network.parameters()).data.add_(1e-3)
        return {}

    monkeypatch.setattr("eval.linear.by_sgd", tampers)
    with pytest.raises(RuntimeError, match="weights changed"):
        linear(run=str(run), protocol="sgd", batch_size=64)


# Few labels.


def test_parts_are_balanced_seeded_and_of_the_size_asked_for():
    labels = torch.arange(1000) % 10
    for percent, each in ((1, 1), (10, 10), (100, 100)):
        kept = balanced_part(labels, percent, 0)
        assert torch.bincount(labels[kept]).tolist() == [each] * 10
    assert torch.equal(balanced_part(labels, 10, 0), balanced_part(labels, 10, 0))
    assert not torch.equal(balanced_part(labels, 10, 0), balanced_part(labels, 10, 1))


def test_more_labels_help_and_the_file_stays(run):
    before = load_file(run / "backbone.safetensors")
    few, many = (semi(run=str(run), percent=p, epochs=8, lr=0.2)["top1"] for p in (1.0, 20.0))
    assert many > few + 10
    assert last_line(run)["settings"]["images"] == 320
    after = load_file(run / "backbone.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_list_of_names_is_the_part(place, monkeypatch, capsys):
    path = folder(place, 40, (70, 80))
    train, _ = data.open_labelled(str(path), seed=0)
    picked = [train.rows[train.labels == number][:3] for number in (0, 1)]
    names = [Path(train.images.table[row]["image"]["path"]).name for row in torch.cat(picked).tolist()]
    (place / "list.txt").write_text("".join(f"n01/{name}\n" for name in names))
    options = dict(run="resnet_tiny", image_size=16, dataset=str(path), epochs=1, batch_size=4, files="list.txt")
    semi(**options)
    assert "6 labels, 3 to 3 of each class" in capsys.readouterr().out
    (place / "list.txt").write_text(f"{names[0]}\nnone.png\nno.png\n")
    with pytest.raises(UserError, match="--files list.txt: the split has no image no.png, nor 1 more of its names"):
        semi(**options)


# Refusals.


def labelled(place, name, train, test, train_names=("cat", "dog"), test_names=("cat", "dog")):
    def rows(labels, names):
        features = Features(image=ImageFeature(), label=ClassLabel(names=list(names)))
        return Dataset.from_dict({"image": [picture(i) for i in range(len(labels))], "label": labels}, features)

    DatasetDict(train=rows(train, train_names), test=rows(test, test_names)).save_to_disk(place / name)


def test_refusals(run, place):
    unfinished = place / "unfinished"
    (unfinished / "checkpoints" / "step_000007").mkdir(parents=True)
    (unfinished / "config.json").write_text((run / "config.json").read_text())
    labelled(place, "names", [0, 1] * 10, [0, 1], test_names=("cat", "cow"))
    labelled(place, "new", [0, 1] * 10, [0, 2], ("cat", "dog", "cow"), ("cat", "dog", "cow"))
    table(20).remove_columns("label").to_parquet(place / "unlabelled.parquet")
    wrong = load_file(run / "backbone.safetensors")
    wrong["more.weight"] = wrong.pop("conv1.weight")
    (place / "wrong").mkdir()
    save_file(wrong, place / "wrong" / "backbone.safetensors")
    (place / "wrong" / "config.json").write_text((run / "config.json").read_text())
    tiny = dict(run="resnet_tiny", image_size=16)
    for options, message in (
        (dict(), "--run: want a run's folder, a checkpoint's folder, a file of weights, or a timm name"),
        (dict(run="runs/none"), "--run runs/none: no such folder or file"),
        (dict(run="resnet_tinny"), "and no timm model; did you mean resnet_tiny"),
        (dict(run="resnet_tiny"), "--dataset: name the images to evaluate on"),
        (dict(run=str(unfinished)), "is not finished; take its last checkpoint: --run .*/checkpoints/step_000007"),
        (
            dict(run=str(place / "wrong")),
            "1 of its weights do not fit resnet_tiny at 16 pixels: conv1.weight is missing",
        ),
        (dict(**tiny, dataset="names"), "class 'dog' there is 'cow' here; want the classes of the split to train"),
        (dict(**tiny, dataset="new"), "class cow is only in the split to evaluate, which cannot be learnt"),
        (dict(**tiny, dataset="unlabelled.parquet"), "has no labels; no column could be"),
        (dict(**tiny, dataset="digits", k=0), "--k 0: want 1 or more"),
        (dict(**tiny, dataset="digits", temperature=0.0), "--temperature 0.0: want a number above 0"),
        (dict(**tiny, dataset="digits", seed=-1), "--seed -1: want from 0"),
    ):
        with pytest.raises(UserError, match=message):
            knn(**options)
    for options, message in (
        (dict(protocol="sdg"), "--protocol sdg: want features, sgd; did you mean sgd"),
        (dict(lr=3.0), "--lr 3.0: is of --protocol sgd"),
        (
            dict(protocol="sgd", batch_size=5000),
            "--batch_size 5000: want a multiple of 1 processes, up to the 1618 images",
        ),
    ):
        with pytest.raises(UserError, match=message):
            linear(**tiny, dataset="digits", **options)
    with pytest.raises(UserError, match="--percent 0.0: want above 0, up to 100"):
        semi(**tiny, dataset="digits", percent=0.0)
    with pytest.raises(UserError, match="small images are cached without their names"):
        (place / "list.txt").write_text("a.png")
        semi(**tiny, dataset="digits", files="list.txt")
    assert not (place / "results.jsonl").exists()


def test_it_is_a_command(run):
    command = [sys.executable, "-m", "eval.knn", "--run", str(run)]
    done = subprocess.run([*command, "--kk", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "eval.knn: --kk: no such flag; did you mean"
    )
    done = subprocess.run([*command, "--k", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and last_line(run)["settings"]["k"] == 3
    text = help_text(KNN, "eval.knn")
    assert "--temperature       of the votes (0.1)" in text and "--run " in text


@pytest.mark.slow
def test_two_processes_evaluate_as_one(run):
    alone = linear(run=str(run), protocol="sgd", epochs=8, batch_size=64, lr=1.0)
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    head += ["-m", "--", "eval.linear"]  # torchrun would take --run for its own --run-path
    words = f"--run {run} --protocol sgd --epochs 8 --batch_size 64 --lr 1".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*head, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    # Each image is drawn by another generator, so the two are alike, not equal; and one line is written, not two.
    assert abs(last_line(run)["metrics"]["top1"] - alone["top1"]) < 4
    assert done.stdout.count("added to") == 1


# What is no figure.


def changed_run(run, place, change):
    """A copy of a run whose backbone.safetensors holds what `change` makes of the weights."""
    shutil.copytree(run, place / "changed", ignore=shutil.ignore_patterns("results.jsonl"))
    weights = load_file(run / "backbone.safetensors")
    save_file({k: change(k, v) for k, v in weights.items()}, place / "changed" / "backbone.safetensors")
    return place / "changed"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "protocol, options",
    [(knn, {}), (linear, {}), (linear, dict(protocol="sgd", epochs=1)), (semi, dict(epochs=1)), (geometry, {})],
)
def test_features_that_are_not_finite_are_no_figure(run, place, protocol, options, value):
    bad = changed_run(run, place, lambda k, v: torch.full_like(v, value) if k == "layer4.0.bn2.bias" else v)
    with pytest.raises(RunError, match="features .*are NaN or infinite") as error:
        protocol(run=str(bad), **options)
    assert error.value.code == 1 and "\n" not in str(error.value) and not (bad / "results.jsonl").exists()


def test_only_images_with_such_features_are_counted_and_unreadable_ones_are_not():
    refuse_not_finite(torch.ones(4, 3))
    values = torch.ones(5, 3)
    values[1, 2], values[3, 0], values[3, 1] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(RunError, match="the features of 2 of 5 images"):
        refuse_not_finite(values)


def test_knn_during_training_refuses_them_too(place, monkeypatch):
    """Running statistics that overflow leave the loss as it is: the network of NaN is met by k-NN alone."""
    whole = train.average_statistics
    monkeypatch.setattr(
        train, "average_statistics", lambda method: (whole(method), method.backbone.bn1.running_mean.fill_(torch.nan))
    )
    with pytest.raises(RunError, match="are NaN or infinite"):
        pretrain(method="simclr", batch_size=64, steps=2, eval_every=2, out="run")
    assert not (place / "run" / "backbone.safetensors").exists() and not list(place.glob("run/checkpoints/step_*"))


@pytest.mark.parametrize(
    "protocol, options",
    [
        (semi, dict(epochs=6, lr=1e6)),
        (linear, dict(protocol="sgd", epochs=2, lr=1e30)),
        (linear, dict(protocol="sgd", epochs=2, preset="simsiam", lr=1e12)),
    ],
)
def test_a_classifier_that_diverges_is_no_accuracy(run, protocol, options):
    before = (run / "results.jsonl").read_text() if (run / "results.jsonl").exists() else ""
    with pytest.raises(RunError, match="the classifier has diverged: its loss .* try a lower --lr"):
        protocol(run=str(run), **options)
    assert before == ((run / "results.jsonl").read_text() if before else "")


def test_a_number_that_json_has_not_is_named_and_not_written(place):
    with pytest.raises(RunError, match="metrics shares 1 is NaN or infinite"):
        write_result(place, "geometry", "digits", {}, {"top1": 1.0, "shares": [0.5, float("nan")]})
    with pytest.raises(RunError, match="loss is NaN or infinite"):
        run_folder.append_metrics(place, {"step": 3, "loss": float("inf")})
    assert not list(place.iterdir())


def test_results_that_cannot_be_written_are_found_before_the_work(run, place, monkeypatch):
    (place / "results.jsonl").mkdir()
    monkeypatch.setattr(data, "open_labelled", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(UserError, match="results.jsonl, where the result goes, cannot be written") as error:
        knn(run="resnet_tiny", image_size=16, dataset="digits")
    assert error.value.code == 2
    with pytest.raises(RunError, match="results.jsonl cannot be written .*'top1': 61.5"):
        write_result(place, "knn", "digits", {}, {"top1": 61.5})


def test_one_image_a_class_leaves_nothing_to_choose_by(place):
    labelled(place, "few", [0, 1], [0, 1])
    with pytest.raises(UserError, match="--dataset few: 2 images of 2 classes .* want two or more of a class"):
        linear(run="resnet_tiny", image_size=16, dataset="few")
    assert choose_strength(np.eye(3, dtype=np.float32), np.array([0, 0, 1]), 0)[0] > 0
    with pytest.raises(UserError, match="2 images of 1 classes"):
        choose_strength(np.eye(2, dtype=np.float32), np.array([1, 1]), 0)


# Lists of files.


@pytest.fixture
def three_folders(place):
    """Three class folders of images that share their names."""
    for number, name in enumerate(("ant", "bee", "cat")):
        for i in range(12):
            path = place / "zoo" / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number * 12 + i, 70, 80).save(path)
            if i < 2:
                (place / "zoo" / "test" / name).mkdir(parents=True, exist_ok=True)
                picture(100 + i, 70, 80).save(place / "zoo" / "test" / name / f"t{i}.png")
    return data.open_labelled(str(place / "zoo"))[0]


def test_a_line_names_one_image_by_its_path(three_folders, place):
    def part(*lines):
        (place / "list.txt").write_text("\n".join(lines))
        rows = three_folders.rows[listed_part(three_folders, "list.txt")].tolist()
        paths = [Path(three_folders.images.table[row]["image"]["path"]) for row in rows]
        return sorted(f"{path.parent.name}/{path.name}" for path in paths)

    wanted = ["ant/3.png", "ant/4.png", "bee/3.png", "bee/5.png", "cat/0.png", "cat/1.png"]
    assert part(*wanted) == wanted
    assert part(*(f"train/{name}" for name in wanted)) == wanted
    assert part(*(f"./{name}" for name in wanted), "", wanted[0], f"train/{wanted[0]}") == wanted
    assert part(*(str(place / "zoo" / "train" / name) for name in wanted)) == wanted
    with pytest.raises(UserError, match=r"3.png names 3 images, such as .*3.png and .*write more of the path, as in"):
        part("ant/4.png", "3.png")
    with pytest.raises(UserError, match="--files list.txt: the split has no image dog/3.png$"):
        part("dog/3.png", "ant/4.png")
    with pytest.raises(UserError, match="--files list.txt: is empty; want a list of file names"):
        part("", "  ")
    with pytest.raises(UserError, match="--files list.txt: names one image; want two or more"):
        part("ant/4.png")
    (place / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="--files list.txt: cannot be read"):
        listed_part(three_folders, "list.txt")


def test_features_show_how_many_images_a_second(run, capsys):
    knn(run=str(run))
    said = capsys.readouterr().err
    assert "features: 100%" in said and "1618/1618" in said and "179/179" in said and " images/s" in said


def test_the_first_decoding_of_small_images_shows_it_too(place, capsys):
    table(30).to_parquet(place / "small.parquet")
    for first in (True, False):
        data.open_labelled("small.parquet")
        said = capsys.readouterr().err
        assert (("decoding: 100%" in said) and ("30/30" in said) and (" images/s" in said)) == first, said
