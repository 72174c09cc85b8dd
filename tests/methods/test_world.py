"""Two processes on halves of a batch are one process on the whole: losses, gradients, queues."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from bsim import Mixture, sample_mixture
from methods import METHODS
from methods.networks import backbone
from training.devices import synchronised

WORLD, N, D = 2, 12, 10
CASES = [(name, mode) for name in METHODS for mode in ("sim", "bsim", "both")]


class Plain(nn.Module):
    """A backbone without batch norm, whose statistics differ between processes by design."""

    num_features = D

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 6 * 6, D)

    def forward(self, x):
        return self.layer(x.flatten(1)).tanh()


def build(name):
    torch.manual_seed(0)
    defaults = METHODS[name].defaults(image_size=6, width=D, steps=100, images=80)
    heads = {k: v for k, v in defaults.items() if k not in ("optimizer", "lr", "weight_decay", "warmup_epochs")}
    method = METHODS[name].Method(Plain(), **heads)
    for module in list(method.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, nn.BatchNorm1d):
                setattr(module, child, nn.Identity())
    return method


def half(x, rank):
    return x.chunk(WORLD)[rank]


def batch(method, seed):
    """Views of the whole batch, and a mixture whose partners stay within each process's half."""
    draws = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, N, 3, 6, 6, generator=draws)
    views = torch.cat([a, b], 1) if method.both_views else a
    parts = [sample_mixture(half(views, rank), generator=draws) for rank in range(WORLD)]
    partner = torch.cat([part.partner + rank * (N // WORLD) for rank, part in enumerate(parts)])
    return a, b, parts, Mixture(torch.cat([p.images for p in parts]), torch.cat([p.weight for p in parts]), partner)


def run(method, model, mode, seed, rank=None):
    """The loss of the whole batch, or of a process's half."""
    a, b, parts, mixture = batch(method, seed)
    if rank is not None:
        a, b, mixture = half(a, rank), half(b, rank), parts[rank]
    return sum(part for part in model(a, b, mixture if mode != "sim" else None, mode != "bsim")[:2] if part is not None)


def gradients(method):
    return {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}


def moco_keys(batch_norm, rank):
    """The keys that a process's MoCo takes from its half, by a network whose batch norm tells the halves apart."""
    method = build("moco")
    method.key_encoder.append(nn.BatchNorm1d(method.queue.shape[1], affine=False))
    method.batch_norm = batch_norm
    a, b = images_with_a_trend()
    method(half(a, rank), half(b, rank))
    return method.fresh[0]


def images_with_a_trend():
    a, b = torch.randn(2, N, 3, 6, 6, generator=torch.Generator().manual_seed(7))
    return a, b + torch.linspace(0, 3, N).view(-1, 1, 1, 1)


def in_process(rank, place):
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=WORLD)
    found = {}
    for name, mode in CASES:
        method = build(name)
        model = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
        loss = run(method, model, mode, 1, rank)
        loss.backward()
        first = gradients(method)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
        for step in range(20):
            optimizer.zero_grad()
            run(method, model, mode, 2 + step, rank).backward()
            optimizer.step()
            method.after_step(0.5)
        found[f"{name} {mode}"] = dict(loss=loss.detach(), gradients=first, end=method.state_dict())
    found["keys"] = moco_keys("shuffle", rank)
    torch.save(found, f"{place}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    place = tmp_path_factory.mktemp("world")
    mp.spawn(in_process, (str(place),), nprocs=WORLD)
    return [torch.load(place / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name, mode", CASES)
def test_two_processes_equal_one(two_processes, name, mode):
    found = [process[f"{name} {mode}"] for process in two_processes]
    method = build(name)
    loss = run(method, method, mode, 1)
    loss.backward()
    mean = torch.stack([f["loss"] for f in found]).mean()
    torch.testing.assert_close(mean, loss.detach(), rtol=0, atol=1e-5)
    wanted = gradients(method)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3
    for process in found:
        assert process["gradients"].keys() == wanted.keys()
        for k, gradient in wanted.items():
            torch.testing.assert_close(process["gradients"][k], gradient, rtol=0, atol=1e-5, msg=k)
    for k, value in found[0]["end"].items():  # queue and slow encoder included, after 20 steps
        assert torch.equal(value, found[1]["end"][k]), k


def test_moco_shuffles_its_keys_across_processes(two_processes):
    """Batch statistics are those of a half that holds rows of both processes, and each key returns to its query."""
    method = build("moco")
    _, b = images_with_a_trend()
    with torch.no_grad():
        keys = method.key_encoder(b)
    wanted = torch.empty_like(keys)
    for rank in range(WORLD):
        rows = keys[rank::WORLD]
        wanted[rank::WORLD] = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    for rank, found in enumerate(two_processes):
        torch.testing.assert_close(found["keys"], half(F.normalize(wanted, dim=1), rank), rtol=0, atol=1e-5)
        assert (moco_keys("local", rank) - found["keys"]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_100", "regnety_002", "resnet18"])
def test_synchronised_batch_norm_keeps_the_activations_of_timm(name):
    """timm's batch norms hold an activation, which torch's own conversion leaves out without a word."""
    torch.manual_seed(0)
    network, images = backbone(name, 64).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = network(images)
        converted = synchronised(network, SimpleNamespace(num_processes=2, device=torch.device("cuda")))
        assert any(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules())
        torch.testing.assert_close(converted(images), before)


@pytest.mark.parametrize("file", ["train.py", "eval/semi.py", "eval/detect.py"])
def test_every_conversion_is_that_of_timm(file):
    text = (Path(__file__).parents[2] / file).read_text()
    assert "synchronised(" in text and "SyncBatchNorm.convert" not in text
