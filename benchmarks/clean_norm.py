"""Is it batch norm? Runs judged again with the running statistics of clean images in the place of the training's own.

    python benchmarks/clean_norm.py runs/study/*-e30-seed* --out runs/clean_norm.jsonl

A network that saw mixtures has their statistics in its batch norms, and is judged on images that are not mixed. Here
one pass over the training images, whole, makes them anew; every weight stays. Leaves a line a run, which
benchmarks/findings.py reads; a run that has its line is not judged again.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from study import line_of  # noqa: E402

import data  # noqa: E402
from eval.command import DATA, Task  # noqa: E402
from eval.features import labelled_features, topk_accuracy  # noqa: E402
from eval.knn import knn_log_votes, neighbours  # noqa: E402
from eval.linear import from_features  # noqa: E402
from training.weights import load_backbone  # noqa: E402


def renew_statistics(task: Task) -> None:
    """Give every batch norm of the backbone the mean and variance that it meets over the training images."""
    network = task.backbone.network
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the average of all batches
    labelled_features(task, task.train, network.train())
    network.eval()


def judge(run: str) -> dict:
    """The run's line: its settings, and what k-NN and linear (`features`) say with the new statistics."""
    loaded = load_backbone(run)
    config = loaded.config
    parts = data.open_labelled(config["dataset"], **{k: config[k] for k in DATA}, seed=config["seed"])
    task = Task(Accelerator(cpu=not torch.accelerator.is_available()), loaded, *parts, seed=0, workers=0, chosen={})
    loaded.network.to(task.accelerator.device, memory_format=torch.channels_last)
    renew_statistics(task)
    bank, classes = labelled_features(task, task.train)
    queries, truth = labelled_features(task, task.test)
    votes = knn_log_votes(queries, bank, classes, k=neighbours(classes))
    metrics = {"knn top1": topk_accuracy(votes, truth)["top1"], "linear features top1": from_features(task)["top1"]}
    return {**line_of(Path(run)), "metrics": metrics}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of finished runs")
    parser.add_argument("--out", required=True, help="the file of the lines")
    options = parser.parse_args()
    out = Path(options.out)
    done = {json.loads(line)["cell"] for line in out.read_text().splitlines()} if out.exists() else set()
    for run in options.runs:
        if Path(run).name not in done and (Path(run) / "backbone.safetensors").exists():
            line = judge(run)
            with open(out, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(line["cell"], *(f"{v:.1f}" for v in line["metrics"].values()), flush=True)


if __name__ == "__main__":
    main()
