"""The siblings: their losses against their papers' formulas, term by term, and their command line."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import siblings
from benchmarks.siblings import SIBLINGS, imix, keymix, mixco, reversed_mixture, unmix
from bsim import info_nce, mixup, sample_mixture
from methods import METHODS
from methods.networks import SMALL_STEM
from tests.methods.test_methods import SCALE, Counting, N
from train import pretrain
from training.folder import read_metrics


def inputs(seed=0, n=5, d=4, k=3):
    draws = torch.Generator().manual_seed(seed)
    q, b, negatives = (torch.randn(rows, d, generator=draws, dtype=torch.float64) for rows in (n, n, k))
    weight, partner = torch.rand(n, generator=draws, dtype=torch.float64), torch.randperm(n, generator=draws)
    return q, b, negatives, weight, partner


def similarity(x, y):
    dot = sum(p * q for p, q in zip(x, y))
    return dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y))


def log_share(query, key, candidates, t):
    """log of the softmax of one key among the candidates."""
    return similarity(query, key) / t - math.log(sum(math.exp(similarity(query, c) / t) for c in candidates))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("t", [0.05, 0.2, 1.0])
def test_imix_and_mixco_are_soft_targets_over_the_batch_and_the_queue(seed, t):
    q, b, negatives, weight, partner = inputs(seed)
    wanted = 0.0
    for n in range(5):
        target = [0.0] * 8  # of the candidates, the keys first
        target[n] += float(weight[n])
        target[int(partner[n])] += 1 - float(weight[n])
        candidates = b.tolist() + negatives.tolist()
        wanted -= sum(share * log_share(q[n].tolist(), c, candidates, t) for share, c in zip(target, candidates)) / 5
    for loss in (imix, mixco):
        assert float(loss(q, b, negatives, t, weight=weight, partner=partner)) == pytest.approx(wanted, rel=1e-10)


def test_mixtures_of_mixco_have_their_own_temperature():
    q, b, negatives, weight, partner = inputs()
    pairing = dict(weight=weight, partner=partner)
    assert torch.equal(mixco(q, b, negatives, **pairing), imix(q, b, negatives, 0.05, **pairing))
    small, large = (SIBLINGS["mixco"].defaults(**SCALE | {"image_size": size}) for size in (SMALL_STEM, 224))
    assert (small["mix_temperature"], large["mix_temperature"], small["temperature"]) == (0.05, 1.0, 0.2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 4, 5])
def test_unmix_is_the_weighted_sum_of_the_two_orders(seed, n):
    q, b, negatives, weight, _ = inputs(seed, n)
    w, found = float(weight[0]), unmix(q, b, negatives, 0.2, weight=weight[0])

    def moco(queries):
        terms = [log_share(x, k, [k, *negatives.tolist()], 0.2) for x, k in zip(queries, b.tolist())]
        return -sum(terms) / n

    queries = q.tolist()
    assert float(found) == pytest.approx(w * moco(queries) + (1 - w) * moco(queries[::-1]), rel=1e-10)
    torch.testing.assert_close(unmix(q.flip(0), b, negatives, 0.2, weight=1 - weight[0]), found)


@pytest.mark.parametrize("seed", range(5))
def test_keymix_compares_each_mixture_with_the_queries_of_its_two_sources(seed):
    q, m, negatives, weight, partner = inputs(seed)
    wanted = 0.0
    for n in range(5):
        for source, share in ((n, float(weight[n])), (int(partner[n]), 1 - float(weight[n]))):
            key = m[n].tolist()
            wanted -= share * log_share(q[source].tolist(), key, [key, *negatives.tolist()], 0.2) / 5
    assert float(keymix(q, m, negatives, 0.2, weight=weight, partner=partner)) == pytest.approx(wanted, rel=1e-10)
    # One share for the batch, and the batch reversed: Un-Mix with the two sides exchanged.
    reverse, share = torch.arange(4, -1, -1), weight[:1].expand(5)
    wanted = weight[0] * info_nce(q, m, negatives, 0.2) + (1 - weight[0]) * info_nce(q.flip(0), m, negatives, 0.2)
    torch.testing.assert_close(keymix(q, m, negatives, 0.2, weight=share, partner=reverse), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_one_is_the_plain_term_bit_for_bit(dtype):
    q, b, negatives, _, partner = (x.to(dtype) if x.is_floating_point() else x for x in inputs())
    whole = dict(weight=torch.ones(5, dtype=dtype), partner=partner)
    plain = info_nce(q, b, negatives, 0.2)
    assert torch.equal(keymix(q, b, negatives, 0.2, **whole), plain)
    assert torch.equal(unmix(q, b, negatives, 0.2, weight=torch.ones((), dtype=dtype)), plain)
    plain = info_nce(q, b, negatives, 0.2, in_batch=True)
    assert torch.equal(imix(q, b, negatives, 0.2, **whole), plain)
    assert torch.equal(mixco(q, b, negatives, 0.2, **whole), plain)


def test_gradients_reach_the_queries_alone():
    q, b, negatives, weight, partner = inputs()
    for x in (q, b, negatives):
        x.requires_grad_()
    pairing = dict(weight=weight, partner=partner)
    assert torch.autograd.gradcheck(lambda q: keymix(q, b, negatives, 0.3, **pairing), (q,))
    (keymix(q, b, negatives, **pairing) + imix(q, b, negatives, **pairing)).backward()
    assert q.grad.abs().sum() > 0 and b.grad is None and negatives.grad is None


def test_refusals_name_the_argument():
    q, b, negatives, weight, partner = inputs()
    with pytest.raises(ValueError, match=r"weight: got shape \[5\], want \[\], one share for the batch"):
        unmix(q, b, negatives, weight=weight)
    with pytest.raises(ValueError, match=r"weight: got values from 1.5 to 1.5"):
        unmix(q, b, negatives, weight=torch.tensor(1.5))
    with pytest.raises(ValueError, match=r"keys: got shape \[4, 4\], want \[5, 4\]"):
        keymix(q, b[:4], negatives, weight=weight, partner=partner)


@pytest.mark.parametrize("kind", ["cutmix", "mixup", "either"])
def test_unmix_mixes_the_batch_with_itself_reversed_by_one_share(kind):
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    mixture = reversed_mixture(images, kind=kind, alpha=1.0, per_sample=True, generator=draws)
    assert mixture.partner.tolist() == [4, 3, 2, 1, 0] and len(mixture.weight.unique()) == 1
    torch.testing.assert_close(mixture.images[2], images[2])
    if kind == "mixup":  # as w and 1 - w: the same mixtures, named the other way round
        again = mixup(images, 1 - mixture.weight, mixture.partner)
        torch.testing.assert_close(again.images, mixture.images.flip(0))


def build(name):
    torch.manual_seed(0)
    defaults = SIBLINGS[name].defaults(**SCALE)
    heads = {k: v for k, v in defaults.items() if k not in ("optimizer", "lr", "weight_decay", "warmup_epochs")}
    return SIBLINGS[name].Method(Counting(), **heads)


@pytest.mark.parametrize("name", SIBLINGS)
def test_methods_are_moco_with_another_term_for_the_mixtures(name):
    method, draws = build(name), torch.Generator().manual_seed(1)
    a, b = torch.randn(2, N, 3, 8, 8, generator=draws)
    sample = getattr(SIBLINGS[name], "sample_mixture", sample_mixture)
    views = torch.cat([a, b], 1) if method.both_views else a
    mixture = sample(views, kind="cutmix", alpha=1.0, per_sample=True, generator=draws)
    with torch.no_grad():
        method.key_encoder[0].layer.weight.mul_(1.5)
        q, k = method.projector(method.backbone(a)), F.normalize(method.key_encoder(b), dim=1)
        pairing = dict(weight=mixture.weight, partner=mixture.partner)
        if name == "keymix":
            m = method.key_encoder(mixture.images[:, 3:])
            wanted = keymix(q, m, method.queue, 0.2, **pairing)
        else:
            m = method.projector(method.backbone(mixture.images))
            keywords = dict(weight=mixture.weight[0]) if name == "unmix" else pairing
            temperature = 0.05 if name == "mixco" else 0.2
            wanted = dict(imix=imix, unmix=unmix, mixco=mixco)[name](m, k, method.queue, temperature, **keywords)
    both, pure, plain = method(a, b, mixture), method(a, b, mixture, sim=False), method(a, b)
    assert pure.sim is None and plain.bsim is None
    for losses in (both, plain):
        torch.testing.assert_close(losses.sim.detach(), info_nce(q, k, method.queue, 0.2))
    for losses in (both, pure):
        torch.testing.assert_close(losses.bsim.detach(), wanted)
    pure.bsim.backward()
    for path, parameter in method.named_parameters():
        assert (parameter.grad is None) == path.startswith("key_encoder"), path
    method.fresh = method.fresh[:1]
    method.after_step(0)
    torch.testing.assert_close(method.queue[:N], k)  # clean keys


def test_the_loop_trains_one_and_goes_on_with_it(place, monkeypatch):
    sampled = []
    sibling = SimpleNamespace(**vars(SIBLINGS["mixco"]))
    sibling.sample_mixture = lambda views, **rule: sampled.append(rule) or reversed_mixture(views, **rule)
    monkeypatch.setitem(METHODS, "mixco", sibling)
    short = dict(method="mixco", sim_weight=0.5, split="train[:64]", batch_size=32, log_every=1, eval_every=0)
    pretrain(**short, steps=2, out="run")
    pretrain(resume="run", steps=3)
    lines = read_metrics(Path("run"))
    assert [line["step"] for line in lines] == [1, 2, 3] and len(sampled) == 3
    for line in lines:
        assert line["loss"] == pytest.approx((line["sim"] + line["bsim"]) / 2, abs=1e-5)


@pytest.fixture
def forgotten(monkeypatch):
    """What main registers is forgotten after the test."""
    for name, sibling in SIBLINGS.items():
        monkeypatch.setitem(METHODS, name, sibling)
        del METHODS[name]


@pytest.mark.slow
def test_its_command_line_trains_and_judges(place, monkeypatch, forgotten):
    words = "--method unmix --resume --out run --split train[:200] --steps 2 --batch_size 32 --eval_every 0"
    line = [sys.executable, siblings.__file__, "pretrain", *words.split(), "--sim_weight", "0.5"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", "siblings.py geometry --run run --images 100".split())
    siblings.main()  # in this process, since to start another takes seconds
    found = json.loads(Path("run/results.jsonl").read_text())
    assert found["protocol"] == "geometry" and "embedding_uniformity" in found["metrics"]


@pytest.mark.parametrize(
    "words, wanted",
    [
        ([], "got nothing, want pretrain, knn, linear, geometry"),
        (["train"], "got train, want pretrain, knn, linear, geometry"),
        (
            ["pretrain", "--method", "inmix"],
            "--method inmix: want simclr, moco, mocov3, byol, simsiam, imix, unmix, mixco, keymix",
        ),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, forgotten, words, wanted):
    monkeypatch.setattr(sys, "argv", ["siblings.py", *words])
    with pytest.raises(SystemExit) as stop:
        siblings.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and wanted in said


def test_the_main_program_does_not_know_them():
    assert list(METHODS) == ["simclr", "moco", "mocov3", "byol", "simsiam"]
