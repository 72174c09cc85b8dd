"""What a step of pure BSIM, and of half SIM, half BSIM, costs beside a step of the plain method.

Views, mixture, network, loss and optimiser are timed.

    python benchmarks/cost.py [--threads 2] [--repeats 9] [--batch_size 256] [--backbone resnet_tiny] [--image_size 32]

The three take turns in one process; a ratio is the median over the turns, its spread their quartiles.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from turns import in_turns, spread  # noqa: E402

from bsim import make_view, sample_mixture  # noqa: E402
from methods import METHODS  # noqa: E402
from methods.networks import backbone  # noqa: E402
from train import objective  # noqa: E402
from training.optimize import optimizer_of  # noqa: E402
from training.resolve import LOOP  # noqa: E402

WEIGHTS = {"SIM": 1.0, "BSIM": 0.0, "both": 0.5}
ALLOWED = {"simclr": 1.10, "moco": 1.10, "byol": 1.10, "simsiam": 1.45}


def built(file, name, size, device):
    """(the method of `file` around the backbone `name`, its optimiser), as a long run would have them."""
    network = backbone(name, size)
    s = file.defaults(image_size=size, width=network.num_features, steps=10_000, images=50_000)
    model = file.Method(network, **{k: v for k, v in s.items() if k not in LOOP})
    model = model.to(device, memory_format=torch.channels_last)
    return model, optimizer_of(model, SimpleNamespace(**s, peak_lr=0.01, mixed_precision="no"))


def stepper(name, sim_weight, options, device):
    """A function that takes one training step on random bytes."""
    file, size = METHODS[name], options.image_size
    model, optimizer = built(file, options.backbone, size, device)
    recipes, draws = file.views(size), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.batch_size, 3, size, size), dtype=torch.uint8, device=device)

    def step():
        a, b = (make_view(images, recipe, generator=draws) for recipe in recipes)
        mixture = None
        if sim_weight < 1:
            mixture = sample_mixture(torch.cat([a, b], 1) if model.both_views else a, generator=draws)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            losses = model(a, b, mixture, sim_weight > 0)
        objective(losses, sim_weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(0.5)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--backbone", default="resnet_tiny")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"torch {torch.__version__}, {device}, {options.threads} threads, {options.backbone}, {options.image_size} px,"
    )
    print(f"batch {options.batch_size}, {options.repeats} turns\n")
    print("| method | SIM ms | BSIM / SIM | quartiles | allowed | both / SIM | quartiles |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, allowed in ALLOWED.items():
        steps = {term: stepper(name, weight, options, device) for term, weight in WEIGHTS.items()}
        seconds = in_turns(steps, options.repeats)
        pure, both = (spread([s / sim for s, sim in zip(seconds[term], seconds["SIM"])]) for term in ("BSIM", "both"))
        row = f"{1000 * spread(seconds['SIM'])[0]:.0f} | {pure[0]:.2f} | {pure[1]:.2f} to {pure[2]:.2f}"
        print(f"| {name} | {row} | {allowed:.2f} | {both[0]:.2f} | {both[1]:.2f} to {both[2]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
