"""Exports: each is loaded back by the library that it is for, and gives the same features; none is overwritten."""

import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub import ModelCard

import flags
from bsim import ViewRecipe
from eval.export import detectron2_key, export, torchvision_model
from eval.results import write_result
from flags import UserError
from methods.networks import backbone
from training import folder as run_folder
from training.weights import Backbone, load_backbone

CONFIG = dict(
    method="moco", sim_weight=0.5, mix="cutmix", dataset="my/pictures", steps=1234, batch_size=256, lr=0.03, seed=7
)


def trained(name, size):
    """A network in which everything counts: timm's own begins with blocks that add nothing and plain statistics."""
    torch.manual_seed(1)
    network = backbone(name, size).eval()
    for key, value in network.state_dict().items():
        if key.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight")):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", ".bias")):
            value.normal_(0, 0.2)
    return network


def a_run(place, name, size):
    """A run's folder, and the features [2, D] of two images by the network that it holds."""
    folder = place / f"{name}-{size}"
    folder.mkdir()
    network = trained(name, size)
    run_folder.save_backbone(folder, network)
    run_folder.write_json(
        folder / "config.json", {**CONFIG, "backbone": name, "image_size": size, "versions": {"torch": "9.8.7"}}
    )
    return folder, features(network, size)


@torch.no_grad()
def features(network, size):
    return network.eval()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3)))


def same(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def loaded_as_said(said):
    space = {}
    exec(re.search(r"^load it: (.*)$", said, re.M)[1], space)
    return space["network"]


@pytest.mark.parametrize("name, size", [("test_resnet", 96), ("resnet18", 32), ("vit_tiny_patch16_224", 48)])
def test_timm_loads_it_by_the_line_that_is_printed(place, capsys, name, size):
    folder, wanted = a_run(place, name, size)
    target = export(run=str(folder))
    assert target == folder / "export" / "timm.safetensors"
    network = loaded_as_said(capsys.readouterr().out)
    assert same(features(network, size), wanted)
    if size == 96:
        network = timm.create_model(name, num_classes=0)
        assert not same(features(network, size), wanted)
        network.load_state_dict(safetensors.torch.load_file(target), strict=True)
        assert same(features(network, size), wanted)
    assert [path.name for path in target.parent.iterdir()] == ["timm.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnext50_32x4d", "wide_resnet50_2"))],
)
def test_torchvision_lacks_only_its_classifier(place, capsys, name):
    folder, wanted = a_run(place, name, 72)
    target = export(run=str(folder), format="torchvision", out=str(place / "its.safetensors"))
    network = torchvision.models.get_model(name)
    missing, unexpected = network.load_state_dict(safetensors.torch.load_file(target), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    for loaded in (network, loaded_as_said(capsys.readouterr().out)):
        loaded.fc = torch.nn.Identity()
        assert same(features(loaded, 72), wanted)


def test_torchvision_is_compared_by_what_it_computes(place):
    """The same keys and shapes, but the last stage keeps its resolution: another network."""
    network = timm.create_model("resnet18", num_classes=0, output_stride=16)
    network.load_state_dict(trained("resnet18", 96).state_dict())
    with pytest.raises(UserError, match="torchvision's resnet18 computes other features"):
        torchvision_model(Backbone(network, "resnet18", 96, Path(), {}))


def test_detectron2_keys():
    """As its documentation and MoCo's convert-pretrain-to-detectron2.py have them."""
    for ours, theirs in {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer2.0.downsample.1.running_var": "res3.0.shortcut.norm.running_var",
        "layer3.5.bn3.bias": "res4.5.conv3.norm.bias",
        "layer4.2.conv2.weight": "res5.2.conv2.weight",
    }.items():
        assert detectron2_key(ours) == theirs


def detectron2_resnet(x, arrays, blocks, groups):
    """Detectron2's ResNet with STRIDE_IN_1X1 False, by its keys alone; every array is used once."""
    left = {key: torch.from_numpy(array) for key, array in arrays.items()}

    def conv(x, key, **options):
        norm = [left.pop(f"{key}.norm.{part}") for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(F.conv2d(x, left.pop(f"{key}.weight"), **options), *norm, eps=1e-5)

    x = F.max_pool2d(F.relu(conv(x, "stem.conv1", stride=2, padding=3)), 3, stride=2, padding=1)
    for stage, count in enumerate(blocks, 2):
        for block in range(count):
            key, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            bottleneck = f"{key}.conv3.weight" in left
            if bottleneck:
                y = F.relu(conv(x, f"{key}.conv1"))
                y = F.relu(conv(y, f"{key}.conv2", stride=stride, padding=1, groups=groups))
                y = conv(y, f"{key}.conv3")
            else:
                y = F.relu(conv(x, f"{key}.conv1", stride=stride, padding=1))
                y = conv(y, f"{key}.conv2", padding=1)
            # It has a shortcut where the number of channels changes, and nowhere else.
            assert (f"{key}.shortcut.weight" in left) == (x.shape[1] != y.shape[1])
            x = F.relu(y + (conv(x, f"{key}.shortcut", stride=stride) if x.shape[1] != y.shape[1] else x))
    assert not left
    return x.mean((2, 3))


@pytest.mark.parametrize(
    "name, blocks, settings",
    [
        ("resnet50", (3, 4, 6, 3), ("50", "1", "64", "256")),
        ("resnet18", (2, 2, 2, 2), ("18", "1", "64", "64")),
        pytest.param("resnext50_32x4d", (3, 4, 6, 3), ("50", "32", "4", "256"), marks=pytest.mark.slow),
    ],
)
def test_detectron2_by_its_keys(place, capsys, name, blocks, settings):
    folder, wanted = a_run(place, name, 80)
    target = export(run=str(folder), format="detectron2")
    assert target == folder / "export" / "detectron2.pkl"
    content = pickle.loads(target.read_bytes())
    assert content["matching_heuristics"] is True and content["__author__"] == "BSIM"
    x = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(3))
    assert same(detectron2_resnet(x, content["model"], blocks, int(settings[1])), wanted)
    assert b"numpy._core" not in target.read_bytes()  # which a Detectron2 with NumPy 1 could not read
    said = capsys.readouterr().out
    for key, value in zip(("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS"), settings):
        assert f"MODEL.RESNETS.{key} {value} " in said
    assert "INPUT.FORMAT RGB" in said and "MODEL.RESNETS.STRIDE_IN_1X1 False" in said
    for key, values in (("MEAN", ViewRecipe(80).mean), ("STD", ViewRecipe(80).std)):
        listed = json.loads(re.search(rf'MODEL.PIXEL_{key} "(.*?)"', said)[1])
        assert listed == pytest.approx([255 * value for value in values], abs=1e-3)


@pytest.mark.parametrize("name, size", [("test_resnet", 80), ("vit_tiny_patch16_224", 48)])
def test_a_folder_for_the_hub(place, capsys, name, size):
    folder, wanted = a_run(place, name, size)
    write_result(folder, "knn", "my/pictures", {"seed": 5}, {"top1": 61.237, "k": 20, "each": {"cat": 1.0}})
    write_result(folder, "voc07", "VOCdevkit", {"seed": 0}, {"map": 80.125})
    (folder / "export" / ".hub.part").mkdir(parents=True)
    (folder / "export" / ".hub.part" / "half").write_text("of an export that was killed")
    target = export(run=str(folder), format="hub")
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in target.parent.iterdir()] == ["hub"]
    made = json.loads((target / "config.json").read_text())
    assert made["architecture"] == name and made["model_args"] == (
        {"img_size": size, "patch_size": 6} if "vit" in name else {}
    )
    network = loaded_as_said(capsys.readouterr().out)
    assert same(features(network, size), wanted)
    shown = timm.data.resolve_model_data_config(network)
    assert tuple(shown["mean"]) == ViewRecipe(size).mean and tuple(shown["std"]) == ViewRecipe(size).std
    assert tuple(shown["input_size"]) == (3, size, size)
    network = timm.create_model(f"local-dir:{target}", pretrained=True, num_classes=3)  # to be fine-tuned
    assert features(network, size).shape == (2, 3)
    network.reset_classifier(0)
    assert same(features(network, size), wanted)

    card = ModelCard((target / "README.md").read_text())
    assert card.data.library_name == "timm" and {"moco", "bsim"} < set(card.data.tags) and card.data.license is None
    rows = [[word.strip() for word in row.strip("|").split("|")] for row in card.text.splitlines() if row[:1] == "|"]
    for key, value in CONFIG.items():
        assert [key, str(value) if not isinstance(value, float) else f"{value:.2f}"] in rows
    assert ["versions", "torch 9.8.7"] in rows and "MOCO-BSIM" in card.text
    assert ["knn", "my/pictures", "top1 61.24, k 20", "5"] in rows
    assert ["voc07", "VOCdevkit", "map 80.12", "0"] in rows


def test_the_card_of_a_plain_run_does_not_say_bsim(place):
    folder, _ = a_run(place, "test_resnet", 80)
    run_folder.write_json(folder / "config.json", {**run_folder.config_of(folder), "sim_weight": 1.0})
    card = ModelCard((export(run=str(folder), format="hub") / "README.md").read_text())
    assert "bsim" not in card.data.tags and "by MOCO;" in card.text and "None was run." in card.text


def test_a_file_alone_and_a_name(place):
    folder, wanted = a_run(place, "test_resnet", 96)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="say --backbone NAME and --image_size PIXELS"):
        export(run=str(folder / "backbone.safetensors"))
    target = export(run=str(folder / "backbone.safetensors"), backbone="test_resnet", image_size=96)
    assert safetensors.torch.load_file(target).keys() == trained("test_resnet", 96).state_dict().keys()
    first, second = (export(run="test_resnet", out=f"{i}.safetensors").read_bytes() for i in "12")
    assert first == second


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(run="resnet_tiny"), r'timm has no resnet_tiny.*methods.networks.backbone\("resnet_tiny", 32\)'),
        (dict(run="resnet_tiny", format="hub"), "timm has no resnet_tiny"),
        (dict(run="resnet18", image_size=32, format="torchvision"), "3x3 .* torchvision's with 7x7.*--format timm"),
        (dict(run="resnet18", image_size=64, format="detectron2"), "3x3 .* Detectron2's with 7x7.*--image_size 65"),
        (dict(run="resnet18", image_size=32, format="hub"), "3x3 .* timm's with 7x7"),
        (dict(run="seresnet50", format="torchvision"), "torchvision has no seresnet50; possible are ResNets"),
        (
            dict(run="seresnet50", format="detectron2"),
            "Detectron2 has no seresnet50; possible are torchvision's ResNets",
        ),
        (dict(run="efficientnet_b0", format="torchvision"), "torchvision's efficientnet_b0 .*names them otherwise"),
        (dict(run="densenet121", format="detectron2"), "Detectron2 has no densenet121"),
        (dict(run="resnet18", format="onnx"), "--format onnx: want timm, torchvision, detectron2, hub"),
        (dict(run="resnet18", format="detectron2", out="a.pth"), r"ends in \.pkl, as in a\.pkl"),
        (dict(run="nowhere"), "--run nowhere: no such folder or file"),
    ],
)
def test_what_is_refused_leaves_nothing(place, given, said):
    with pytest.raises(UserError, match=said):
        export(**given)
    assert not list(place.iterdir())


def test_nothing_is_overwritten(place):
    for form, name in (("timm", "timm.safetensors"), ("hub", "hub")):
        target = export(run="test_resnet", format=form)
        before = {path: path.stat().st_mtime_ns for path in (target, *target.rglob("*"))}
        with pytest.raises(UserError, match=rf"{name}: exists.*--out export/{Path(name).stem}-2{Path(name).suffix}$"):
            export(run="test_resnet", format=form)
        assert before == {path: path.stat().st_mtime_ns for path in (target, *target.rglob("*"))}


@pytest.mark.parametrize("wrong", ["unfinished", "unfit", "damaged"])
def test_a_run_that_cannot_be_exported_is_one_line_and_code_2(place, monkeypatch, capsys, wrong):
    folder, _ = a_run(place, "test_resnet", 96)
    weights = folder / "backbone.safetensors"
    if wrong == "unfinished":
        weights.unlink()
    elif wrong == "damaged":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        run_folder.save_backbone(folder, backbone("resnet10t", 96))
    monkeypatch.setattr(sys, "argv", ["eval.export", "--run", str(folder), "--format", "hub"])
    with pytest.raises(SystemExit) as stopped:
        flags.launch(export, "eval.export")
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(said.splitlines()) == 1
    wanted = {"unfinished": "is not finished", "unfit": "do not fit test_resnet at 96 pixels", "damaged": "is damaged"}
    assert said.startswith(f"eval.export: --run {folder}: ") and wanted[wrong] in said
    assert not (folder / "export").exists()


def test_results_that_are_damaged_are_one_line(place):
    folder, _ = a_run(place, "test_resnet", 96)
    (folder / "results.jsonl").write_text('{"protocol": "knn"}\n')
    with pytest.raises(UserError, match="results.jsonl: cannot be read"):
        export(run=str(folder), format="hub")


def test_a_checkpoint_is_exported_beside_its_run(place):
    folder, wanted = a_run(place, "resnet18", 96)
    step = folder / "checkpoints" / "step_000010"
    step.mkdir(parents=True)
    weights = {f"backbone.{k}": v for k, v in trained("resnet18", 96).state_dict().items()}
    safetensors.torch.save_file(weights, step / "method.safetensors")
    target = export(run=str(step), format="torchvision")
    assert target == folder / "export" / "torchvision.safetensors"
    assert same(features(load_backbone(str(target), architecture="resnet18", image_size=96).network, 96), wanted)
    for place_of, top1 in ((folder, 11.0), (step, 22.0), (folder / "checkpoints" / "step_000020", 33.0)):
        write_result(folder, "knn", "x", {"run": str(place_of), "seed": 5}, {"top1": top1})
    write_result(folder, "knn", "x", {"run": str(folder / "backbone.safetensors"), "seed": 5}, {"top1": 44.0})
    write_result(folder, "knn", "x", {"run": f"{step}/", "seed": 5}, {"top1": 55.0})
    steps = {}
    for run, figures in ((folder, ["11.00", "44.00"]), (step, ["22.00", "55.00"])):
        text = (export(run=str(run), format="hub", out=f"{run.name}-hub") / "README.md").read_text()
        assert re.findall(r"top1 (\d+.\d+)", text) == figures
        steps[run] = re.findall(r"\| steps +\| (\d+) ", text)
        assert (", at step 10, a checkpoint before its end" in text) == (run == step)
    assert steps == {folder: ["1234"], step: ["10"]}


def test_small_numbers_of_the_card_are_exact(place):
    folder, _ = a_run(place, "test_resnet", 80)
    changed = {"weight_decay": 1e-6, "lr": 0.0003, "alpha": 1.0, "epochs": 0.12345}
    run_folder.write_json(folder / "config.json", {**run_folder.config_of(folder), **changed})
    text = (export(run=str(folder), format="hub") / "README.md").read_text()
    found = dict(re.findall(r"^\| (\w+) +\| (\S+) ", text, re.M))
    assert {k: float(found[k]) for k in changed} == changed and found["weight_decay"] == "1e-06"
    assert found["alpha"] == "1.00"


def test_the_card_of_a_file_does_not_say_random(place):
    folder, _ = a_run(place, "test_resnet", 80)
    (folder / "config.json").unlink()
    given = dict(run=str(folder / "backbone.safetensors"), backbone="test_resnet", image_size=80)
    text = (export(**given, format="hub") / "README.md").read_text()
    assert "A backbone with the weights of backbone.safetensors; it has no classifier." in text
    text = (export(run="test_resnet", format="hub") / "README.md").read_text()
    assert "A backbone with random weights;" in text
    # The config.json of the Hub beside a file is not a run's.
    given = dict(run=str(folder / "export" / "hub" / "model.safetensors"), backbone="test_resnet", image_size=80)
    assert load_backbone(given["run"], architecture="test_resnet", image_size=80).config == {}
