"""Losses and uniformity against lightly's, solo-learn's and plain ones: time in turns, memory beyond the inputs.

    python benchmarks/losses.py --threads 1 --sizes 256 2048 8192
    python benchmarks/losses.py --threads 2 --sizes 8192 --busy 1

--busy: so many other processes multiply matrices meanwhile, a core each. --before: a bsim.py of another commit, in
turns with this one's (git show COMMIT:bsim.py > before.py).

Peers: pip install --no-deps -r requirements-bench.txt (and pytorch_lightning, lightly_utils and torchmetrics without
theirs). solo-learn asks for a torch of 2021, but its loss does not need it; its package brings a folder `tests` along
that would hide ours, so it goes elsewhere: pip install --no-deps --target SOLO solo-learn==1.0.2, and PYTHONPATH=SOLO.
`plain` holds the whole matrix and takes torch's logsumexp; `product` is the matrix product alone.
"""

import argparse
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from turns import disturbed_by, in_turns, machine, spread  # noqa: E402

import bsim  # noqa: E402

D, TEMPERATURE = 128, 0.2
FORMS = {"ours": bsim}


def take_along(before: str) -> None:
    spec = spec_from_file_location("before", before)
    FORMS["before"] = module_from_spec(spec)
    spec.loader.exec_module(FORMS["before"])


def plain(a, b):
    z = F.normalize(torch.cat([a, b]), dim=1)
    scores = (z @ z.T / TEMPERATURE).fill_diagonal_(-float("inf"))
    n = len(a)
    own = torch.cat([scores.diagonal(n), scores.diagonal(-n)])
    return (scores.logsumexp(1) - own).mean()


def contenders(n: int) -> dict:
    draws = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, D, generator=draws).requires_grad_() for _ in range(2))
    mixture = dict(weight=torch.rand(n, generator=draws), partner=torch.randperm(n, generator=draws))

    def backward(loss):
        def step():
            a.grad = b.grad = None
            loss(a, b).backward()

        return step

    found = {}
    for name, form in FORMS.items():
        found[f"{name}, SIM"] = backward(lambda a, b, form=form: form.nt_xent(a, b, TEMPERATURE))
        found[f"{name}, BSIM"] = backward(lambda a, b, form=form: form.nt_xent(a, b, TEMPERATURE, **mixture))
    try:
        from lightly.loss import NTXentLoss

        found["lightly"] = backward(NTXentLoss(temperature=TEMPERATURE))
    except ImportError:
        print("lightly is not installed", file=sys.stderr)
    package = find_spec("solo")
    if package:  # the file alone: the package imports a lightning that no longer exists
        source = Path(package.submodule_search_locations[0], "losses", "simclr.py")
        spec = spec_from_file_location("solo_simclr", source)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        found["solo-learn"] = backward(lambda a, b: module.simclr_loss_func(a, b, TEMPERATURE))
    else:
        print("solo-learn is not installed", file=sys.stderr)
    z = torch.cat([a, b]).detach()
    return found | {"plain": backward(plain), "product": lambda: z @ z.T}


def queue_contenders(n: int, k: int) -> dict:
    draws = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, n, D, generator=draws)
    queue = F.normalize(torch.randn(k, D, generator=draws), dim=1)
    queries.requires_grad_()

    def concatenated():
        q, p = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
        logits = torch.cat([(q * p).sum(1, keepdim=True), q @ queue.T], 1) / TEMPERATURE
        F.cross_entropy(logits, torch.zeros(n, dtype=torch.int64)).backward()

    found = {}
    for name, form in FORMS.items():
        found[name] = lambda form=form: form.info_nce(queries, keys, queue, TEMPERATURE).backward()
    try:
        from lightly.loss import NTXentLoss

        bank = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(k, D))
        bank(queries, keys)  # the first call fills it
        found["lightly"] = lambda: bank(queries, keys).backward()  # which also puts the keys into the queue
    except ImportError:
        pass  # said above
    return found | {"concatenated": concatenated}


def sphere_contenders(n: int) -> dict:
    x = F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(0)), dim=1)
    found = {name: lambda form=form: form.uniformity(x) for name, form in FORMS.items()}
    # As Wang and Isola publish it.
    return found | {"published": lambda: torch.pdist(x).pow(2).mul(-2).exp().mean().log()}


def peak_of(kind: str, name: str, sizes: list[int], threads: int) -> float:
    """MB of one call beyond what stands before it, in a process of its own."""
    program = f"""
import sys, torch
sys.argv = ["losses"]
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads({threads})
import losses
for before in {[FORMS[k].__file__ for k in FORMS if k == "before"]!r}:
    losses.take_along(before)
losses.{kind}(*{[min(64, s) for s in sizes]})[{name!r}]()
call = losses.{kind}(*{sizes})[{name!r}]
def held(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = held("VmRSS")
call()
print((held("VmHWM") - before) / 1024)
"""
    return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument(
        "--ours_only", type=int, nargs="*", default=[], help="sizes at which the peers do not take part"
    )
    parser.add_argument("--busy", type=int, default=0, help="other processes that work meanwhile")
    parser.add_argument("--before", help="another bsim.py")
    options = parser.parse_args()
    if options.before:
        take_along(options.before)
    torch.set_num_threads(options.threads)
    with disturbed_by(options.busy):
        measure(options)


def measure(options):
    busy = f", {options.busy} other processes" if options.busy else ""
    print(
        machine("lightly")
        + f"{busy}, D = {D}\n\n| N | | ms | quartiles | MB beyond its inputs |\n| --- | --- | --- | --- | --- |"
    )
    for n in options.sizes + options.ours_only:
        found = contenders(n)
        if n in options.ours_only:
            found = {name: function for name, function in found.items() if name.startswith("ours")}
        for name, seconds in in_turns(found, options.repeats).items():
            middle, low, high = (1000 * x for x in spread(seconds))
            memory = peak_of("contenders", name, [n], options.threads)
            print(f"| {n:,} | {name} | {middle:.0f} | {low:.0f} to {high:.0f} | {memory:.0f} |", flush=True)
    for kind, sizes, said in (
        ("queue_contenders", [256, 65536], "256, queue of 65,536 | info_nce"),
        ("sphere_contenders", [8192], "8,192 | uniformity, forward"),
    ):
        for name, seconds in in_turns(globals()[kind](*sizes), options.repeats).items():
            middle, low, high = (1000 * x for x in spread(seconds))
            memory = peak_of(kind, name, sizes, options.threads)
            print(f"| {said}, {name} | {middle:.0f} | {low:.0f} to {high:.0f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
