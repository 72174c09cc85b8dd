"""Where the time of a training step goes: ours with BSIM, and a lightly loop on the same network.

    python benchmarks/steps.py --threads 1 --repeats 15
    python benchmarks/steps.py --methods simclr moco byol simsiam --backbone resnet50 --image_size 224 --batch_size 512

Data are images in memory: ours are uint8 batches, lightly's PIL images through its transform and DataLoader, without
workers, so that all of it is seen. `undisturbed` is a step without a clock inside, which on a GPU waits at each part.
"""

import argparse
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from cost import built  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from turns import machine, spread  # noqa: E402
from views import smooth  # noqa: E402

from bsim import make_view, sample_mixture  # noqa: E402
from data import Source  # noqa: E402
from loading.batches import VIEW, Batches, Feed, generator  # noqa: E402
from loading.images import Met  # noqa: E402
from methods import METHODS  # noqa: E402
from methods.networks import backbone  # noqa: E402
from train import objective  # noqa: E402

PARTS = ("data", "views", "mixture", "network", "loss", "optimiser", "logging")
LOSSES = {"simclr": "nt_xent", "moco": "info_nce", "byol": "negative_cosine", "simsiam": "negative_cosine"}


class Clock:
    """Seconds by part; a part inside another is not counted in that."""

    def __init__(self, device):
        self.seconds, self.device, self.open = dict.fromkeys(PARTS, 0.0), device, []

    @contextmanager
    def part(self, name):
        self._turn()
        self.open.append(name)
        yield
        self._turn()
        self.open.pop()

    def _turn(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now


class _Known(torch.autograd.Function):
    """A loss whose gradient was computed with it."""

    @staticmethod
    def forward(ctx, loss, gradients, *inputs):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, None, *(None if g is None else grad * g for g in ctx.gradients)


def apart(function, clock):
    """`function` with its forward and its backward pass in the clock's part `loss`."""

    def timed(*tensors, **options):
        with clock.part("loss"), torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in tensors]
            loss = function(*inputs, **options)
            wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
            gradients = [next(found) if torch.is_tensor(x) and x.requires_grad else None for x in inputs]
        return _Known.apply(loss.detach(), gradients, *tensors)

    return timed


class InMemory(torch.utils.data.Dataset):
    in_workers, bad = False, set()

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def pair(self, rows, recipes, generator, among=None):
        return self.images[rows], self.images[rows], Met([], rows.tolist(), [])


def ours(name, images, options, device):
    """step(clock, i): the loop of train.py, cut into its parts."""
    file, size = METHODS[name], options.image_size
    model, optimizer = built(file, options.backbone, size, device)
    if options.compile:
        model.compile()
    recipes, loss_function = file.views(size), getattr(file, LOSSES[name])
    share = dict(batch_size=options.batch_size, part_size=options.batch_size, rank=0, world=1, seed=0)
    batches = Batches(Source(InMemory(images), torch.arange(len(images)), None, None, 0, None), recipes, **share)
    feed = Feed(batches, 0, 1 << 30, 0, pin=device.type == "cuda")

    def step(clock, i):
        part = clock.part if clock else lambda name: nullcontext()
        setattr(file, LOSSES[name], apart(loss_function, clock) if clock else loss_function)
        with part("data"):
            pair = next(feed)
        draws = generator(0, VIEW, i)
        with part("views"):
            moved = (x.to(device, non_blocking=True) for x in pair)
            a, b = (make_view(x, recipe, generator=draws) for x, recipe in zip(moved, recipes))
        with part("mixture"):
            mixture = None
            if options.sim_weight < 1:
                mixture = sample_mixture(torch.cat([a, b], 1) if model.both_views else a, generator=draws)
        with part("network"):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                losses = model(a, b, mixture, options.sim_weight > 0)
            loss = objective(losses, options.sim_weight)
            loss.backward()
        with part("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
            model.after_step(0.5)
        with part("logging"):
            if i % 10 == 9:  # as often as train.py
                z = F.normalize(losses.embeddings.detach().float(), dim=1)
                float(z.std(0).mean()), float(loss.detach())

    return step


def lightlys(images, options, device):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    blur = 0.0 if options.image_size <= 64 else 0.5
    two = SimCLRTransform(options.image_size, cj_strength=0.5, gaussian_blur=blur, min_scale=0.2)
    pictures = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in images]

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 1 << 30

        def __getitem__(self, i):
            return two(pictures[i % len(pictures)])

    loader = iter(torch.utils.data.DataLoader(Pairs(), batch_size=options.batch_size))
    network = backbone(options.backbone, options.image_size)
    width = network.num_features
    model = nn.Sequential(network, SimCLRProjectionHead(width, width, 128))
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    criterion = NTXentLoss(temperature=0.2)

    def step(clock, i):
        part = clock.part if clock else lambda name: nullcontext()
        loss_function = apart(criterion, clock) if clock else criterion
        with part("data"):
            a, b = next(loader)
        with part("network"):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                z = [model(x.to(device, memory_format=torch.channels_last)) for x in (a, b)]
            loss = loss_function(*(x.float() for x in z))
            loss.backward()
        with part("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
        with part("logging"):
            if i % 10 == 9:
                float(loss.detach())

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--methods", nargs="+", default=["simclr"], choices=METHODS)
    parser.add_argument("--sim_weight", type=float, default=0.0)
    parser.add_argument("--backbone", default="resnet_tiny")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine("lightly", "timm"))
    print(f"{device}, {options.backbone}, {options.image_size} px, batch {options.batch_size}", end="")
    print(f", sim_weight {options.sim_weight:g}{', bf16' * options.bf16}{', compiled' * options.compile}\n")
    side = 256 if options.image_size > 64 else options.image_size
    images = smooth(4 * options.batch_size, side)
    steps = {name: ours(name, images, options, device) for name in options.methods}
    try:
        steps["lightly SimCLR"] = lightlys(images, options, device)
    except ImportError:
        print("lightly is not installed", file=sys.stderr)
    seen, whole, peak = {name: [] for name in steps}, {name: [] for name in steps}, {}
    for i in range(2 + options.repeats):
        for name, step in steps.items():
            clock = Clock(device)
            step(clock, i)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(None, i)
            if device.type == "cuda":
                torch.cuda.synchronize()
                peak[name] = torch.cuda.max_memory_allocated() / 2**30
            if i >= 2:  # the first steps pay for what is set up once
                seen[name].append(clock.seconds)
                whole[name].append(time.perf_counter() - start)
    print(f"| ms | {' | '.join(PARTS)} | not the network | quartiles | undisturbed | images/s | GiB |")
    print("| --- |" + " --- |" * (len(PARTS) + 5))
    for name in steps:
        middle = [1000 * statistics.median(seconds[part] for seconds in seen[name]) for part in PARTS]
        shares = [100 * (1 - seconds["network"] / sum(seconds.values())) for seconds in seen[name]]
        share, low, high = spread(shares)
        undisturbed = statistics.median(whole[name])
        memory = f"{peak[name]:.1f}" if peak else ""
        print(
            f"| {name} | {' | '.join(f'{ms:.0f}' for ms in middle)} | {share:.1f} % | {low:.1f} to {high:.1f} | "
            f"{1000 * undisturbed:.0f} | {options.batch_size / undisturbed:,.0f} | {memory} |"
        )


if __name__ == "__main__":
    main()
