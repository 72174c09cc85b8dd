"""Weights to begin from: whoever's file it is, the same features come out, or one line says why not."""

import json
import os

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import data
from eval.compare import results_of
from eval.export import export
from eval.knn import knn
from flags import UserError
from loading import channels
from methods import METHODS
from methods.networks import backbone
from train import pretrain
from training.weights import load_backbone

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def theirs():
    """torchvision's ResNet-18, with statistics that are not those of the start."""
    torch.manual_seed(3)
    network = torchvision.models.resnet18()
    network(torch.randn(8, 3, 32, 32))
    return network.eval()


@torch.no_grad()
def features(network):
    """Of torchvision's ResNet, without its classifier."""
    children = [module for name, module in network.named_children() if name != "fc"]
    return nn.Sequential(*children, nn.Flatten())(IMAGES)


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def other(state):
    """The same names with other values: a slow copy, a student."""
    return {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}


def body(state):
    return {k: v for k, v in state.items() if not k.startswith("fc.")}


def children(network):
    return nn.Sequential(*list(network.children())[:-1]).state_dict()


FORMATS = {
    "torchvision": lambda s, n: (s, 2),
    "state_dict, DataParallel": lambda s, n: ({"epoch": 3, "state_dict": prefixed(s, "module.")}, 2),
    "moco": lambda s, n: (
        {
            "arch": "resnet18",
            "state_dict": prefixed(s, "module.encoder_q.")
            | prefixed(other(s), "module.encoder_k.")
            | {"module.queue": torch.ones(2, 8)},
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        },
        len(s) + 2 + 1,
    ),
    "moco v3": lambda s, n: (
        {"state_dict": prefixed(other(s), "module.momentum_encoder.") | prefixed(s, "module.base_encoder.")},
        len(s) + 2,
    ),
    "simsiam": lambda s, n: (
        {"state_dict": prefixed(body(s) | {"fc.0.weight": torch.ones(4, 4)}, "module.encoder.")},
        1,
    ),
    "dino": lambda s, n: (
        {
            "student": prefixed(other(body(s)), "module.backbone."),
            "teacher": prefixed(body(s), "backbone.") | {"head.mlp.0.weight": torch.ones(2)},
        },
        len(body(s)) + 1,
    ),
    "byol": lambda s, n: (
        prefixed(s, "online_encoder.net.") | prefixed(other(s), "target_encoder.net."),
        len(s) + 2,
    ),
    "lightly": lambda s, n: (
        {"state_dict": prefixed(children(n), "backbone.") | {"projection_head.layers.0.weight": torch.ones(2)}},
        1,
    ),
    "lightly moco": lambda s, n: (
        prefixed(children(n), "backbone.") | prefixed(other(children(n)), "backbone_momentum."),
        len(body(s)),
    ),
    "solo-learn": lambda s, n: (
        {"state_dict": prefixed(body(s), "backbone.") | {"projector.0.weight": torch.ones(2)}},
        1,
    ),
    "lightning": lambda s, n: ({"state_dict": prefixed(s, "model.backbone."), "loops": {"fit_loop": {}}}, 2),
    "compiled": lambda s, n: (prefixed(s, "_orig_mod."), 2),
    "without counters": lambda s, n: ({k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}, 2),
    "half": lambda s, n: ({"model": {k: v.half() if v.is_floating_point() else v for k, v in s.items()}}, 2),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_peoples_files(place, theirs, name):
    """The network keeps their stem at 32 pixels, and gives their features."""
    content, left_out = FORMATS[name](theirs.state_dict(), theirs)
    torch.save(content, "weights.pth")
    loaded = load_backbone("weights.pth", architecture="resnet18", image_size=32, flag="--init")
    with torch.no_grad():
        found = loaded.network.eval()(IMAGES)
    torch.testing.assert_close(found, features(theirs), atol=3e-2 if name == "half" else 1e-5, rtol=1e-2)
    missing = 20 if name == "without counters" else 0
    assert f": {120 - missing} tensors loaded" in loaded.found
    assert f"{left_out:,} left out, {missing} missing" in loaded.found
    flat = content.get("state_dict", content)
    if all(isinstance(v, torch.Tensor) for v in flat.values()):
        save_file({k: v.clone().contiguous() for k, v in flat.items()}, "weights.safetensors")
        again = load_backbone("weights.safetensors", architecture="resnet18", image_size=32)
        assert torch.equal(again.network.conv1.weight, loaded.network.conv1.weight)


class Code:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_files_that_are_no_weights(place, theirs):
    state = theirs.state_dict()
    torch.save({"state_dict": state, "extra": Code()}, "code.pth")
    (place / "page.pth").write_text("\n<!DOCTYPE html><html><title>Sign in</title></html>")
    (place / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    torch.save({"epoch": 3}, "empty.pth")
    torch.save(state, "cut.pth")
    (place / "cut.pth").write_bytes((place / "cut.pth").read_bytes()[:4000])
    torch.save(torchvision.models.resnet34().state_dict(), "deeper.pth")
    torch.save(torchvision.models.wide_resnet50_2().state_dict(), "wide.pth")
    for name, said in (
        ("code.pth", r"code.pth is a pickle that wants to load posix.system, .* save its weights alone"),
        ("page.pth", "page.pth is a web page, not weights"),
        ("pointer.pth", "pointer.pth is a Git LFS pointer"),
        ("empty.pth", "empty.pth holds no weights; want a state dict"),
        ("cut.pth", "cut.pth is damaged"),
        ("deeper.pth", r"80 of its weights do not fit resnet18 at 32 pixels: layer1.2.conv1.weight is not in resnet18"),
        (
            "wide.pth",
            r"do not fit resnet18 .*layer1.0.conv1.weight is 128 x 64 x 1 x 1, want 64 x 64 x 3 x 3; ",
        ),
    ):
        with pytest.raises(UserError, match=said) as error:
            load_backbone(name, architecture="resnet18", image_size=32, flag="--init")
        assert str(error.value).startswith(f"--init {name}: ") and "\n" not in str(error.value)
    assert not (place / "was_run").exists()
    torch.save(state, "nameless.pth")
    with pytest.raises(UserError, match="say --backbone NAME"):
        load_backbone("nameless.pth", image_size=32)


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "resnet50.a1_in1k",
            r"could not be downloaded, and is not in the Hub's .*\(.*\). timm has resnet50.a1_in1k, ",
        ),
        ("resnet50.imagenet", "no such weights; timm has resnet50.a1_in1k, "),
        ("resnet50", "is a network without weights; timm has resnet50.a1_in1k, "),
        ("hf-hub:nobody/nothing", "could not be downloaded"),
        ("resnet5", "no such folder or file, and no timm model; did you mean resnet50"),
        ("resnet_tiny", "is a network without weights; timm has no weights for resnet_tiny"),
    ],
)
def test_names_without_weights_here(place, name, said):
    with pytest.raises(UserError, match=said) as error:
        load_backbone(name, image_size=32, flag="--init", may_be_random=False)
    assert "\n" not in str(error.value)


def test_a_tag_brings_its_weights_and_its_normalisation(place, monkeypatch):
    """What timm would download is made here; mean and standard deviation are those of the tag."""
    made, real = timm.create_model("vit_tiny_patch16_224", num_classes=0), timm.create_model
    made.pretrained_cfg = made.pretrained_cfg | {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained=False, **k: made if pretrained else real(*a, **k))
    loaded = load_backbone("vit_tiny_patch16_224.augreg_in21k", image_size=64)
    assert (loaded.mean, loaded.std, loaded.name) == ((0.5, 0.4, 0.3), (0.5, 0.5, 0.5), "vit_tiny_patch16_224")
    assert torch.equal(loaded.network.blocks[3].attn.qkv.weight, made.blocks[3].attn.qkv.weight)
    # Positions by timm's own function, of which a constant stays one.
    assert loaded.network.pos_embed.shape == (1, 17, 192)
    wanted = timm.layers.resample_abs_pos_embed(made.pos_embed, [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(loaded.network.pos_embed, wanted)


# Pretraining from weights.


OPTIONS = dict(batch_size=32, steps=4, image_size=16, eval_every=4, log_every=1)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    return pretrain(method="byol", backbone="resnet_tiny", out=str(folder), mean="0.3,0.3,0.3", std="data", **OPTIONS)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_begins_from_a_runs_weights(place, first, method, monkeypatch, capsys):
    begun = []
    real = METHODS[method].Method.__init__
    monkeypatch.setattr(
        METHODS[method].Method, "__init__", lambda self, *a, **k: begun.append(self) or real(self, *a, **k)
    )
    queue = {"queue": 64} if method == "moco" else {}
    run = pretrain(method=method, init=str(first), out="run", lr=1e-9, **OPTIONS, **queue)
    wanted = load_file(first / "backbone.safetensors")
    found = load_file(run / "backbone.safetensors")
    for name in wanted:  # the steps are of length 0, almost; batch statistics move
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)
    prefix = getattr(METHODS[method].Method, "momentum_backbone", None)
    if prefix:
        copied = load_file(run / "checkpoints" / "step_000004" / "method.safetensors")
        torch.testing.assert_close(copied[f"{prefix}conv1.weight"], wanted["conv1.weight"], atol=1e-5, rtol=1e-4)
    config = json.loads((run / "config.json").read_text())
    assert config["backbone"] == "resnet_tiny" and config["init"] == str(first) and config["lr"] == 1e-9
    assert config["mean"] == [0.3, 0.3, 0.3] and config["std"] == json.loads((first / "config.json").read_text())["std"]
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["knn_initial"] == knn(run=str(first), k=16)["top1"] == pytest.approx(line["knn_initial"])
    assert "knn_random" not in line
    said = capsys.readouterr().out
    assert "78 tensors loaded, 0 left out, 0 missing" in said and "initial weights" in said


def test_the_stem_of_the_weights_is_kept_when_a_run_is_resumed_and_evaluated(place, theirs):
    torch.save(theirs.state_dict(), "theirs.pth")
    options = dict(OPTIONS, eval_every=0, checkpoint_every=2)
    whole = pretrain(method="simsiam", init="theirs.pth", backbone="resnet18", out="whole", **options)
    pretrain(method="simsiam", init="theirs.pth", backbone="resnet18", out="part", **dict(options, steps=2))
    (place / "theirs.pth").unlink()  # the checkpoint has what is needed
    part = pretrain(resume="part", steps=4)
    found, wanted = (load_file(run / "backbone.safetensors") for run in (part, whole))
    rates = [json.loads((run / "config.json").read_text())["lr"] for run in (whole, part)]
    assert rates == pytest.approx([0.04, 0.04])  # a tenth of SimSiam's
    assert found["conv1.weight"].shape == (64, 3, 7, 7) and backbone("resnet18", 16).conv1.kernel_size == (3, 3)
    assert load_backbone("whole").network.conv1.kernel_size == (7, 7)
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(init="unfinished"), "--init .*unfinished: is not finished; take its last checkpoint: --init "),
        (dict(init="run", backbone="resnet18"), "of its weights do not fit resnet18 at 16 pixels.*--backbone NAME"),
        (
            dict(init="nan.safetensors", backbone="resnet_tiny"),
            "1 of its tensors hold NaN or infinity, such as bn1.bias",
        ),
        (dict(init="run", resume="run", steps=8), "--init .*: a resumed run continues from its own weights"),
        (dict(init="gone"), "--init gone: no such folder or file"),
        (dict(mean="0.5,0.5"), "--mean 0.5,0.5: want imagenet, data, or three numbers"),
        (dict(std="0,0.5,0.5"), "--std 0,0.5,0.5: want imagenet, data, or three numbers"),
    ],
)
def test_bad_beginnings_leave_nothing(place, first, flags, said):
    os.symlink(first, "run")
    (place / "unfinished" / "checkpoints").mkdir(parents=True)
    (place / "unfinished" / "config.json").write_text((first / "config.json").read_text())
    os.symlink(first / "checkpoints" / "step_000004", "unfinished/checkpoints/step_000004")
    weights = load_file(first / "backbone.safetensors")
    save_file(weights | {"bn1.bias": torch.full_like(weights["bn1.bias"], torch.nan)}, "nan.safetensors")
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=said):
        pretrain(**{**OPTIONS, "out": None if "resume" in flags else "new", **flags})
    assert sorted(place.rglob("*")) == before


def test_mean_and_deviation_of_the_data(place):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 12, 12, 3)) // [1, 2, 4]
    from PIL import Image

    for i, image in enumerate(pixels.astype(np.uint8)):
        path = place / "d" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    source = data.open_source("d", label_column="none")
    found, count = channels.measured(source.train, torch.arange(40), source.side)
    assert count == 40
    np.testing.assert_allclose(found["mean"], pixels.mean((0, 1, 2)) / 255, atol=1e-5)
    np.testing.assert_allclose(found["std"], pixels.std((0, 1, 2)) / 255, atol=1e-5)


def test_momentum_weights_are_the_slow_copys(place, first):
    weights = load_file(first / "checkpoints" / "step_000004" / "method.safetensors")
    loaded = load_backbone(str(first), weights="momentum")
    assert torch.equal(loaded.network.conv1.weight, weights["target.0.conv1.weight"])
    assert not torch.equal(loaded.network.conv1.weight, weights["backbone.conv1.weight"])
    plain = pretrain(method="simclr", backbone="resnet_tiny", out="plain", **dict(OPTIONS, eval_every=0))
    with pytest.raises(UserError, match="--weights momentum: simclr has none; moco, mocov3, byol have"):
        load_backbone(str(plain), weights="momentum")
    with pytest.raises(UserError, match="--weights momentum: is for a run's folder"):
        load_backbone("resnet18", weights="momentum")


def test_momentum_weights_are_evaluated_and_exported_under_their_own_name(place, capsys):
    run = pretrain(method="mocov3", backbone="test_resnet", out="run", **dict(OPTIONS, steps=2, eval_every=0))
    weights = load_file(run / "checkpoints" / "step_000002" / "method.safetensors")
    target = export(run="run", weights="momentum")
    assert target.name == "timm-momentum.safetensors"
    assert torch.equal(load_file(target)["conv1.weight"], weights["key_encoder.0.conv1.weight"])
    plain = load_file(export(run="run"))
    assert torch.equal(plain["conv1.weight"], weights["backbone.conv1.weight"])
    knn(run="run", weights="momentum")
    knn(run="run")
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [line["settings"]["weights"] for line in lines] == ["momentum", "online"]
    assert lines[0]["metrics"] != lines[1]["metrics"]
    (settings, _) = results_of(run)["knn"]  # eval.compare is of the final weights
    assert settings["weights"] == "online"
