"""Flags that have no effect beside the others: a line says so, or they are refused. None is ignored without a word."""

import shlex
from pathlib import Path

import pytest

import data
from eval.detect import detect
from eval.linear import linear
from eval.semi import semi
from flags import UserError
from tests.test_data import table
from train import pretrain
from training.weights import load_backbone

TINY = dict(method="simclr", backbone="resnet_tiny", image_size=16, batch_size=16, split="train[:40]", eval_every=0)


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            dict(sim_weight=1, alpha=0.2, mix="mixup", per_sample=False),
            "note: --mix mixup, --alpha 0.2, --per_sample False: not used, as the plain method, --sim_weight 1, has no "
            "mixtures",
        ),
        (dict(jitter="0", hue="0.1"), "note: --hue 0.1: not used, as --jitter 0 changes the colours of no view"),
        (dict(sim_weight=1, mix="cutmix", mix_until=1), None),
        (dict(alpha=0.2, mix="mixup", jitter="0,0.5", hue="0.1", warmup_epochs=1), None),
    ],
)
def test_a_flag_without_effect_is_said(place, capsys, flags, said):
    pretrain(steps=2, **TINY, **flags)
    out = capsys.readouterr().out
    assert said in out.splitlines() if said else "not used" not in out and "note: --warmup" not in out


def test_the_warm_up_of_a_stream_is_said(place, capsys):
    options = {k: v for k, v in TINY.items() if k != "split"}
    pretrain(steps=2, streaming=True, warmup_epochs=5, workers=0, **options)
    said = capsys.readouterr().out.splitlines()
    assert "note: --warmup_epochs 5: the warm-up of a stream is a tenth of the steps" in said
    run = pretrain(steps=2, streaming=True, workers=0, **options)  # of the method's own number nothing is said
    pretrain(resume=str(run), steps=3)
    assert "--warmup_epochs" not in capsys.readouterr().out


def test_the_command_that_a_run_proposes_is_taken(place, capsys):
    """The plain method has no mixtures, and refuses some of their flags."""
    pretrain(steps=2, mix_until=0.5, alpha=0.5, **TINY)
    words = shlex.split(capsys.readouterr().out.partition("next: accelerate launch bsim.py ")[2].partition("   (")[0])
    flags = {name[2:]: value for name, value in zip(words[::2], words[1::2])}
    assert flags["sim_weight"] == "1" and not {"mix_until", "alpha"} & flags.keys()
    numbers = {name: int(flags[name]) for name in ("steps", "batch_size", "image_size", "eval_every")}
    assert pretrain(**{**flags, **numbers, "sim_weight": 1.0})


def test_the_plain_method_of_a_recipe_with_mixtures(place, capsys):
    Path("mixed.yaml").write_text("mix_until: 0.5\nalpha: 0.5\n")
    pretrain(recipe="mixed.yaml", steps=2, sim_weight=1.0, **TINY)
    assert "note: --alpha 0.5, --mix_until 0.5: not used, as the plain method" in capsys.readouterr().out


def test_a_configuration_of_what_has_none_is_refused(place):
    table(40).to_parquet("rows.parquet")
    for dataset, what in (("digits", "digits, which has"), ("rows.parquet", "files, which have")):
        for streaming in (False, True):
            message = f"^--subset large: --dataset is {what} no configurations; drop --subset$"
            with pytest.raises(UserError, match=message):
                data.open_source(dataset, subset="large", streaming=streaming)


def test_flags_of_an_evaluation_that_exclude_each_other(place):
    for call, options, message in (
        (linear, dict(preset="simsiam"), "--preset simsiam: is of --protocol sgd"),
        (semi, dict(percent=1.0, files="list.txt"), "--percent 1: --files list.txt names the images; drop one of them"),
        (
            detect,
            dict(task="coco", schedule="2x", steps=10, data="data", out="out"),
            "--schedule 2x: --steps 10 says how long; drop one of them",
        ),
        (
            detect,
            dict(init="random", weights="momentum", data="data", out="out"),
            "--weights momentum: --init random takes other weights; drop one of them",
        ),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            call(run="runs/any", **options)
    with pytest.raises(UserError, match="^--backbone resnet50: --run resnet18 is another network; drop one of them$"):
        load_backbone("resnet18", architecture="resnet50")
    assert load_backbone("resnet18", architecture="resnet18").random
