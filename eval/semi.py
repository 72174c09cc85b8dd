"""Fine-tuning with few labels (SimCLR, section 5 and appendix B.5; BYOL, section 4.1 and appendix C.1).

python -m eval.semi --run runs/byol-digits-001 --percent 10
"""

from eval.settings import Semi
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(Semi, "eval.semi")

from pathlib import Path

import pyarrow.compute as pc
import torch
from torch import nn

from eval.command import Task, protocol
from eval.features import labelled_features, topk_accuracy
from eval.supervised import check_batch, fit
from flags import UserError
from loading.batches import SPLIT, generator
from methods.networks import average_statistics


def balanced_part(labels, percent: float, seed: int) -> torch.Tensor:
    """Which of `labels` [N] belong to a part of so many per cent: as many of every class, drawn from the seed alone."""
    order = torch.randperm(len(labels), generator=generator(seed, SPLIT))
    classes = int(labels.max()) + 1
    each = max(1, round(len(labels) * percent / 100 / classes))
    kept = [order[labels[order] == number][:each] for number in range(classes)]
    return torch.cat(kept).sort().values


def listed_part(train, path: str) -> torch.Tensor:
    """Which rows of `train` the file's lines name, without folders (SimCLR's lists: n01440764_10043.JPEG)."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--files {path}: no such file; want a list of file names, one a line")
    wanted = {Path(line.strip()).name for line in file.read_text().splitlines() if line.strip()}
    if not train.images.in_workers:
        raise UserError(f"--files {path}: small images are cached without their names; use --percent")
    paths = pc.struct_field(train.images.table.with_format("arrow")[:]["image"], "path").to_pylist()
    names = [Path(paths[row] or "").name for row in train.rows.tolist()]
    missing = sorted(wanted - set(names))
    if missing:
        raise UserError(
            f"--files {path}: the split has no image {missing[0]}, nor {len(missing) - 1} more of its names"
        )
    return torch.tensor([i for i, name in enumerate(names) if name in wanted])


@protocol(Semi)
def semi(task: Task, s: Semi) -> dict:
    network, train, world = task.backbone.network, task.train, task.accelerator.num_processes
    kept = listed_part(train, s.files) if s.files else balanced_part(train.labels, s.percent, task.seed)
    batch_size = s.batch_size or max(2 * world, min(1024, len(kept) // 8) // world * world)
    check_batch(batch_size, len(kept), world)
    epochs = s.epochs or (60 if len(kept) <= 0.011 * len(train.rows) else 30)
    task.chosen.update(epochs=epochs, batch_size=batch_size, images=len(kept))
    each = torch.bincount(train.labels[kept], minlength=len(train.names))
    task.say(f"{len(kept)} labels, {int(each.min())} to {int(each.max())} of each class")
    model = nn.Sequential(network, nn.Linear(network.num_features, len(train.names))).train()
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    if world > 1 and task.accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    rule = dict(momentum=0.9, nesterov=True, weight_decay=s.weight_decay)
    descent = torch.optim.SGD(model.parameters(), lr=s.lr * batch_size / 256, **rule)
    fit(task, model, train.rows[kept], descent, epochs=epochs, batch_size=batch_size)
    average_statistics(model)
    return topk_accuracy(*labelled_features(task, task.test, model.eval()))


if __name__ == "__main__":
    launch(semi, "eval.semi")
