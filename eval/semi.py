"""Fine-tuning with few labels (SimCLR, section 5 and appendix B.5; BYOL, section 4.1 and appendix C.1).

python -m eval.semi --run runs/byol-digits-001 --percent 10
"""

from eval.settings import Semi
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(Semi, "eval.semi")

from pathlib import Path, PurePosixPath

import pyarrow.compute as pc
import torch
from torch import nn

from eval.command import Task, protocol
from eval.features import labelled_features, topk_accuracy
from eval.supervised import check_batch, fit
from flags import UserError, reading
from loading import files
from loading.batches import SPLIT, generator
from methods.networks import average_statistics
from training.devices import synchronised


def balanced_part(labels, percent: float, seed: int) -> torch.Tensor:
    """Which of `labels` [N] belong to a part of so many per cent: as many of every class, drawn from the seed alone."""
    order = torch.randperm(len(labels), generator=generator(seed, SPLIT))
    classes = int(labels.max()) + 1
    each = max(1, round(len(labels) * percent / 100 / classes))
    kept = [order[labels[order] == number][:each] for number in range(classes)]
    return torch.cat(kept).sort().values


def listed_part(train, path: str, say=print) -> torch.Tensor:
    """Which rows of `train` the file's lines name: an image each, by its path in the dataset or the end of it.

    SimCLR's lists have the name alone (n01440764_10043.JPEG). A line with other folders than the split has is taken by
    its name where no other image has that name, and `say` is told. Raises UserError for a line that names no image of
    `train`, or several.
    """
    lines = _lines(path)
    if not train.images.in_workers:
        raise UserError(f"--files {path}: small images are cached without their names; use --percent")
    paths = pc.struct_field(train.images.table.with_format("arrow")[:]["image"], "path").to_pylist()
    parts = [_parts(path or "") for path in paths]
    named: dict[tuple, list[int]] = {}
    for row, of in enumerate(parts):
        named.setdefault(of[-1:], []).append(row)
    place = {row: i for i, row in enumerate(train.rows.tolist())}
    found, missing, renamed = set(), [], []
    for line in lines:
        asked = _parts(line)
        alike = named.get(asked[-1:], []) if asked else []
        matches = [row for row in alike if _same_end(asked, parts[row])]
        if not matches and len(alike) == 1:
            matches = alike
            renamed.append((line, paths[alike[0]]))
        if len(matches) > 1:
            raise UserError(
                f"--files {path}: {line} names {len(matches)} images, such as {paths[matches[0]]} and "
                f"{paths[matches[1]]}; write more of the path, as in {'/'.join(parts[matches[0]][-len(asked) - 1 :])}"
            )
        if matches and matches[0] in place:
            found.add(place[matches[0]])
        else:
            missing.append(line)
    if missing:
        more = f", nor {len(missing) - 1} more of its names" if len(missing) > 1 else ""
        raise UserError(f"--files {path}: the split has no image {min(missing)}{more}")
    if len(found) < 2:
        raise UserError(f"--files {path}: names one image; want two or more")
    if renamed:
        say(
            f"--files {path}: {len(renamed)} lines have other folders than the images, as {renamed[0][0]} has than "
            f"{renamed[0][1]}; these were found by their names alone"
        )
    return torch.tensor(sorted(found))


def _lines(path: str) -> list[str]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--files {path}: no such file; want a list of file names, one a line")
    with reading(f"--files {path}"):
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise UserError(f"--files {path}: is empty; want a list of file names, one a line")
    return [line for line in dict.fromkeys(lines) if line]


def _parts(path: str) -> tuple[str, ...]:
    """The folders and the name of an image's path; of one in an archive, those inside it."""
    inside = files.as_path(path).split("::")[0]
    return PurePosixPath(inside.partition("://")[2] or inside).parts


def _same_end(one: tuple, two: tuple) -> bool:
    """Whether the shorter path is the end of the longer: what both say is the same."""
    shared = min(len(one), len(two))
    return one[-shared:] == two[-shared:]


@protocol(Semi)
def semi(task: Task, s: Semi) -> dict:
    network, train, world = task.backbone.network, task.train, task.accelerator.num_processes
    kept = listed_part(train, s.files, task.say) if s.files else balanced_part(train.labels, s.percent, task.seed)
    batch_size = s.batch_size or max(2 * world, min(1024, len(kept) // 8) // world * world)
    check_batch(batch_size, len(kept), world, each=2)
    epochs = s.epochs or (60 if len(kept) <= 0.011 * len(train.rows) else 30)
    task.chosen.update(epochs=epochs, batch_size=batch_size, images=len(kept))
    each = torch.bincount(train.labels[kept], minlength=len(train.names))
    task.say(f"{len(kept)} labels, {int(each.min())} to {int(each.max())} of each class")
    classifier = nn.Linear(network.num_features, len(train.names))
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    model = synchronised(nn.Sequential(network, classifier).train(), task.accelerator)
    rate = s.lr * batch_size / 256
    descent = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=s.weight_decay)
    fit(task, model, train.rows[kept], descent, epochs=epochs, batch_size=batch_size)
    average_statistics(model)
    return topk_accuracy(*labelled_features(task, task.test, model.eval()))


if __name__ == "__main__":
    launch(semi, "eval.semi")
