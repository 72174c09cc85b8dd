"""What evaluation costs: k-NN at full size, and features against the bare network.

    python benchmarks/evaluate.py --threads 2
    python benchmarks/evaluate.py --threads 2 --busy 3

k-NN: 10,000 queries, a bank of 50,000, 512 dimensions, in seconds and in memory beyond its inputs; lightly's in turns,
in batches of 256 queries. Features: images a second of `eval.features` over those of the network alone on batches that
lie ready, in turns. --busy: so many other processes multiply matrices meanwhile, a core each.
"""

import argparse
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from turns import disturbed_by, in_turns, machine, spread  # noqa: E402

import data  # noqa: E402
from eval.features import features  # noqa: E402
from eval.knn import knn_votes  # noqa: E402
from methods.networks import backbone  # noqa: E402


def peak() -> float:
    """The most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--busy", type=int, default=0, help="other processes that work meanwhile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine('lightly')}, {options.busy} other processes")
    with disturbed_by(options.busy):
        of_knn(options)
        of_features(options)


def of_knn(options):
    draws = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50_000, 512, generator=draws), torch.randn(10_000, 512, generator=draws)
    labels = torch.randint(0, 100, (50_000,), generator=draws)
    before = peak()
    knn_votes(queries, bank, labels)
    memory = peak() - before
    found = {"ours": lambda: knn_votes(queries, bank, labels)}
    try:
        from lightly.utils.benchmarking import knn_predict

        columns = bank.T.contiguous()
        found["lightly"] = lambda: [knn_predict(part, columns, labels, 100, 200) for part in queries.split(256)]
    except ImportError:
        print("lightly is not installed", file=sys.stderr)
    found["the product alone"] = lambda: [part @ bank.T for part in queries.split(256)]
    for name, seconds in in_turns(found, options.repeats).items():
        middle, low, high = spread(seconds)
        said = f", {memory:.2f} GiB beyond its inputs" if name == "ours" else ""
        print(f"k-NN, 10,000 x 50,000 at 512, {name}: {middle:.1f} s ({low:.1f} to {high:.1f}){said}")


def of_features(options):
    draws = torch.Generator().manual_seed(0)
    size = 32
    source = data.open_source("digits")
    part = (source.train, source.rows)
    network, accelerator = backbone(options.network, size).eval(), Accelerator(cpu=True)
    network = network.to(memory_format=torch.channels_last)
    ready = [torch.randn(len(rows), 3, size, size, generator=draws) for rows in source.rows.split(256)]
    ready = [batch.to(memory_format=torch.channels_last) for batch in ready]

    @torch.no_grad()
    def bare():
        for batch in ready:
            network(batch)

    def ours():
        features(accelerator, network, part, image_size=size)

    seconds = in_turns({"bare": bare, "ours": ours}, options.repeats)
    middle, low, high = spread([bare / own for bare, own in zip(seconds["bare"], seconds["ours"])])
    print(
        f"features, {options.network}, {size} pixels: {100 * middle:.1f} % of its bare speed "
        f"(quartiles {100 * low:.1f} to {100 * high:.1f}, {options.repeats} turns, {options.threads} threads)"
    )


if __name__ == "__main__":
    main()
