"""What a step of pure BSIM, of half SIM, half BSIM, and of their controls costs beside a step of the plain method.

    python benchmarks/cost.py --threads 1 --batch_size 64 --bf16 --out benchmarks/results/cost.jsonl
    python benchmarks/cost.py --threads 1 --batch_size 64 --bf16 --search --out benchmarks/results/cost_search.jsonl
    python benchmarks/cost.py --threads 1 --methods simclr moco byol simsiam

The first two are the study's own setting (docs/study.md). Views, mixture, network, loss and optimiser are timed. The
steps of a method take turns in one process; a ratio is the median over the turns, its spread their quartiles. Passes
are images through the backbone in a step, for each image of the batch, with a gradient and without; a small view counts
by its pixels.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from candidates import CANDIDATES, THIRD  # noqa: E402
from search import SEARCH, STEP, WEIGHTS  # noqa: E402
from siblings import SIBLINGS  # noqa: E402
from turns import in_turns, machine, spread  # noqa: E402

from bsim import sample_mixture  # noqa: E402
from methods import METHODS  # noqa: E402
from methods.networks import backbone  # noqa: E402
from train import objective  # noqa: E402
from training.folder import write  # noqa: E402
from training.optimize import optimizer_of  # noqa: E402
from training.resolve import LOOP  # noqa: E402

ALLOWED = {"simclr": 1.10, "moco": 1.10, "mocov3": 1.10, "byol": 1.10, "simsiam": 1.45}  # of pure BSIM over SIM
MORE = {  # what the study compares beside SIM, BSIM and both
    "simclr": [
        ("simclr_third", 0.5),
        ("simclr_apart_plain_end", 0.0),
        ("simclr_apart", 0.0),
        ("simclr_plain_end", 0.0),
        ("simclr_sim_apart", 1.0),
    ],
    "moco": [("moco_third", 0.5), *((name, 0.5) for name in SIBLINGS), ("imix", 0.0)],
    "byol": [("byol_third", 0.5)],
}


def built(file, name, size, device):
    """(the method of `file` around the backbone `name`, its optimiser), as a long run would have them."""
    network = backbone(name, size)
    s = file.defaults(image_size=size, width=network.num_features, steps=10_000, images=50_000)
    model = file.Method(network, **{k: v for k, v in s.items() if k not in LOOP})
    model = model.to(device, memory_format=torch.channels_last)
    return model, optimizer_of(model, SimpleNamespace(**s, peak_lr=0.01, mixed_precision="no"))


def stepper(name, sim_weight, options, device):
    """(the method, a function that takes one training step of it on random bytes)."""
    file, size = {**METHODS, **SIBLINGS, **CANDIDATES, **SEARCH}[name], options.image_size
    make_view = (STEP if name in SEARCH else THIRD).make_view
    model, optimizer = built(file, options.backbone, size, device)
    recipes, draws = file.views(size), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.batch_size, 3, size, size), dtype=torch.uint8, device=device)
    sample, kind = getattr(file, "sample_mixture", sample_mixture), dict(kind="cutmix", alpha=1.0, per_sample=True)

    def step():
        a, b = (make_view(images, recipe, generator=draws) for recipe in recipes)
        mixture = None
        if sim_weight < 1:
            mixture = sample(torch.cat([a, b], 1) if model.both_views else a, **kind, generator=draws)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            losses = model(a, b, mixture, sim_weight > 0)
        objective(losses, sim_weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(0.5)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return model, step


def passes_of(model, step, numbers: int) -> list[float]:
    """Passes through the backbone, and through copies of it, of a batch's `numbers`: [with a gradient, without]."""
    seen = [0, 0]

    def count(module, inputs, output):
        seen[not torch.is_grad_enabled()] += inputs[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if type(m) is type(model.backbone)]
    step()
    for handle in handles:
        handle.remove()
    return [number / numbers for number in seen]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--backbone", default="resnet_tiny")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--search", action="store_true", help="SIM and the candidates of search.py instead")
    parser.add_argument("--out", type=Path, help="a file for a line of each row, which findings.py reads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine("timm"))
    print(f"{device}, {options.backbone}, {options.image_size} px", end="")
    print(f", batch {options.batch_size}{', bf16' * options.bf16}, {options.repeats} turns\n")
    print("| method | `sim_weight` | ms | over SIM's | quartiles | allowed | passes with a gradient | without |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    lines = []
    for base in ["simclr"] if options.search else options.methods:
        steps, passes = {}, {}
        usual = [(base, 1.0), (base, 0.0), (base, 0.5), *MORE.get(base, [])]
        for key in [(base, 1.0), *WEIGHTS.items()] if options.search else usual:
            model, steps[key] = stepper(*key, options, device)
            passes[key] = passes_of(model, steps[key], options.batch_size * 3 * options.image_size**2)
        seconds = in_turns(steps, options.repeats)
        for (name, weight), seen in seconds.items():
            ratio, low, high = spread([own / sim for own, sim in zip(seen, seconds[base, 1.0])])
            middle, (some, others) = 1000 * spread(seen)[0], passes[name, weight]
            quartiles = "" if weight == 1 else f"{low:.2f} to {high:.2f}"
            allowed = f"{ALLOWED[base]:.2f}" if (name, weight) == (base, 0.0) else ""
            row = f"{name} | {weight:g} | {middle:.0f} | {ratio:.2f} | {quartiles} | {allowed} | {some:g} | {others:g}"
            print(f"| {row} |", flush=True)
            lines.append({"method": name, "sim_weight": weight, "ms": middle, "ratio": ratio, "low": low, "high": high})
            lines[-1] |= {"passes": passes[name, weight], "batch_size": options.batch_size, "bf16": options.bf16}
    if options.out:
        write(options.out, lambda file: file.write_text("".join(json.dumps(line) + "\n" for line in lines)))


if __name__ == "__main__":
    main()
