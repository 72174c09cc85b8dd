"""A whole run, from the start of the program to features in a file: this project's commands against a lightly loop.

    python benchmarks/run_against_lightly.py --dataset path/to/cifar10 --threads 1
    python benchmarks/run_against_lightly.py --dataset path/to/cifar10 --threads 2 --workers 2

SimCLR (the plain method) on 5,000 images of CIFAR-10, `resnet_tiny`, 10 epochs, float32, with the same batch size,
learning rate, schedule and strength of views, and features of the training and test images. Ours are three commands:
bsim.py and eval.embed twice. lightly's is one program; --workers are those of its loader. Every run has an empty cache.
CPU time and peak memory (proportional set size, sampled) are of all processes of a run. k-NN is computed here, of both.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from turns import machine, spread  # noqa: E402

BATCH, LR, DECAY, TEMPERATURE = 64, 0.12 * 64 / 256, 5e-4, 0.2  # bsim.py's defaults for so few small images
SPLITS = {"bank": "train[:{images}]", "queries": "test"}


def peer(dataset: str, out: Path, images: int, epochs: int, workers: int, seed: int) -> None:
    """What a user of lightly writes: its transform, loader, head, loss and schedule around the same network."""
    import datasets
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from lightly.utils.scheduler import CosineWarmupScheduler
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    from methods.networks import backbone

    torch.manual_seed(seed)
    two = SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0.0, min_scale=0.2)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    clean = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    parts = {name: datasets.load_dataset(dataset, split=split.format(images=images)) for name, split in SPLITS.items()}
    order = dict(shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))

    def loader(part, transform, **options):
        shown = parts[part].with_transform(lambda rows: {"x": [transform(image) for image in rows["img"]]})
        return DataLoader(shown, BATCH, num_workers=workers, persistent_workers=workers > 0, **options)

    network = backbone("resnet_tiny", 32)
    width = network.num_features
    model = torch.nn.Sequential(network, SimCLRProjectionHead(width, width, 128)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    loss_of, pairs = NTXentLoss(temperature=TEMPERATURE), loader("bank", two, **order)
    schedule = CosineWarmupScheduler(optimizer, len(pairs), epochs * len(pairs))
    for _ in range(epochs):
        for batch in pairs:
            z = [model(x.to(memory_format=torch.channels_last)) for x in batch["x"]]
            loss_of(*z).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        for part in parts:
            np.save(out / f"{part}.npy", torch.cat([network(batch["x"]) for batch in loader(part, clean)]).numpy())


def commands(name: str, folder: Path, options, seed: int) -> list[list[str]]:
    """What a user types; leaves bank.npy and queries.npy in `folder`."""
    if name == "lightly":
        words = f"--images {options.images} --epochs {options.epochs} --workers {options.workers} --seed {seed}"
        return [[__file__, "--dataset", options.dataset, "--peer", str(folder), *words.split()]]
    run, of = str(folder / "run"), ["--dataset", options.dataset]
    words = f"--method simclr --sim_weight 1 --backbone resnet_tiny --mixed_precision no --batch_size {BATCH}"
    words += f" --epochs {options.epochs} --eval_every 0 --seed {seed}"
    splits = {part: split.format(images=options.images) for part, split in SPLITS.items()}
    train = [str(ROOT / "bsim.py"), *of, "--split", splits["bank"], "--out", run, *words.split()]
    embed = ["-m", "eval.embed", "--run", run, *of, "--split"]
    return [train, *([*embed, split, "--out", str(folder / f"{part}.npy")] for part, split in splits.items())]


def held(process) -> int:
    """Bytes of a process and all that it started; what several share is counted once."""
    found = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):  # it has ended
            found += one.memory_full_info().pss
    return found


def measured(name: str, folder: Path, options, seed: int) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, MB at the peak) of all that `commands` runs."""
    folder.mkdir()
    place = {"OMP_NUM_THREADS": str(options.threads), "HF_HOME": str(folder / "cache")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **place, "PYTHONPATH": path}
    environment.pop("HF_DATASETS_CACHE", None)
    peak, before, start = 0, resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for words in commands(name, folder, options, seed):
        with open(folder / "log", "a") as log:
            started = subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
        seen = psutil.Process(started.pid)
        while started.poll() is None:
            with suppress(psutil.Error):
                peak = max(peak, held(seen))
            time.sleep(0.25)
        if started.returncode:
            sys.exit(f"{' '.join(words)}: ended with {started.returncode}\n{(folder / 'log').read_text()[-3000:]}")
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak / 1e6


def accuracy(folder: Path, labels: dict) -> float:
    from eval.knn import knn_predict, neighbours

    bank, queries = (torch.from_numpy(np.load(folder / f"{part}.npy")) for part in SPLITS)
    found = knn_predict(queries, bank, labels["bank"], k=neighbours(labels["bank"]))
    return 100 * float((found == labels["queries"]).double().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="CIFAR-10: a folder with train.parquet and test.parquet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="of lightly's loader; ours has small images in memory")
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="turns, each with a seed of its own")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dataset = str(Path(options.dataset).resolve())
    if options.peer:
        peer(options.dataset, options.peer, options.images, options.epochs, options.workers, options.seed)
        return
    torch.set_num_threads(options.threads)
    print(machine("lightly", "timm", "datasets"))
    print(f"{options.images} images, {options.epochs} epochs, {options.workers} workers in lightly's loader\n")
    import datasets

    labels = {}
    for part, split in SPLITS.items():
        rows = datasets.load_dataset(options.dataset, split=split.format(images=options.images))
        labels[part] = torch.tensor(rows["label"])
    seen: dict[str, list] = {"ours": [], "lightly": []}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(options.repeats):
            for name in seen:
                folder = Path(place) / f"{name}-{seed}"
                figures = measured(name, folder, options, seed)
                seen[name].append((*figures, accuracy(folder, labels)))
                wall, cpu, peak, top1 = seen[name][-1]
                print(f"{name}, seed {seed}: {wall:.1f} s, CPU {cpu:.1f} s, {peak:.0f} MB, {top1:.2f}", flush=True)
    print("\n| | wall s | quartiles | CPU s | quartiles | peak MB | k-NN of each seed |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, turns in seen.items():
        (wall, *of_wall), (cpu, *of_cpu), (peak, *_), _ = (spread(list(figure)) for figure in zip(*turns))
        walls, cpus = ("{:.1f} to {:.1f}".format(*quartiles) for quartiles in (of_wall, of_cpu))
        tops = ", ".join(f"{turn[3]:.1f}" for turn in turns)
        print(f"| {name} | {wall:.1f} | {walls} | {cpu:.1f} | {cpus} | {peak:,.0f} | {tops} |")
    for i, figure in enumerate(("wall", "CPU")):
        ratio, low, high = spread([theirs[i] / own[i] for theirs, own in zip(seen["lightly"], seen["ours"])])
        print(f"\nlightly's {figure} time over ours: {ratio:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
