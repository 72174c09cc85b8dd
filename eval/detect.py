"""Detection transfer: Faster R-CNN or Mask R-CNN, with an FPN, from a pretrained backbone (MoCo, section 4.2).

python -m eval.detect --run runs/moco-photos-001 --task voc --data VOCdevkit
"""

from eval.settings import Detection
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(Detection, "eval.detect")

import dataclasses
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from timm.models.resnet import ResNet
from torch import nn

import flags
from eval.boxes import Batches, Scenes, average_precision, open_scenes, picture
from eval.coco import run_lengths
from eval.command import backbone_of, finish, start
from eval.detector import detector
from eval.features import IMAGENET
from flags import Given, UserError, command, first_line, flags_of, progress
from loading.batches import VIEW, generator, made
from loading.reading import range_of
from methods.networks import average_statistics
from methods.networks import backbone as build_backbone
from training import folder as run_folder
from training import guards, lock
from training.devices import synchronised
from training.peers import Peers, agreement
from training.weights import Backbone

ON_RESUME = [field.name for field in flags_of(Detection) if field.metadata["on_resume"]]
KEEP = 2  # checkpoints


class Recipe(NamedTuple):
    """What MoCo's code trains with; it states sides for a test side of 800, which is 25 times 32."""

    steps: int
    drops: tuple[float, float]  # where the learning rate is divided by 10, as shares of the steps
    warmup: int
    sides: range  # of training images, in 25ths of the side of test images


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionRun(Detection):
    """The settings of a detection run: what the schedule and the sizes come to stands beside the flags."""

    steps: int
    max_size: int
    given: dict  # the flags
    milestones: list[int]
    warmup_steps: int
    peak_lr: float
    sides: list[int]

    def __post_init__(self) -> None:
        """Everything was checked when it was asked for."""


RECIPES = {
    ("voc", None): Recipe(24_000, (18 / 24, 22 / 24), 100, range(15, 26)),
    ("coco", "1x"): Recipe(90_000, (60 / 90, 80 / 90), 1000, range(20, 26)),
    ("coco", "2x"): Recipe(180_000, (120 / 180, 160 / 180), 1000, range(20, 26)),
}


@command(Detection)
@lock.releasing()
def detect(asked: Detection, given: Given) -> dict:
    s, folder, resumes, loaded = _settings(asked, given)
    accelerator, workers = start(s)
    if resumes:
        lock.take_for_all(folder)
    warnings.filterwarnings("ignore", ".*`broadcast_buffers` is deprecated", FutureWarning)  # its heir is private
    accelerator.ddp_handler = DistributedDataParallelKwargs(broadcast_buffers=False)  # they are averaged when saved
    say, rank, world = accelerator.print, accelerator.process_index, accelerator.num_processes
    peers = Peers()
    if s.batch_size % world:
        raise UserError(f"--batch_size {s.batch_size}: want a multiple of the {world} processes")
    loaded = loaded or backbone_of(s, say)
    torch.manual_seed(s.seed)  # random weights do not depend on whether a backbone was loaded before
    network = _initialised(loaded, s)
    train, test, note = open_scenes(s.task, s.data)
    pair, lines = range_of({"the training set": train.images, "the test set": test.images}, loaded.config)
    train, test = train._replace(pixel_range=pair), test._replace(pixel_range=pair)
    for line in lines:
        say(line)
    classes = [category["id"] for category in train.truth["categories"]]
    masks = s.task == "coco"
    batches = Batches(train, classes, masks, batch_size=s.batch_size, rank=rank, world=world, seed=s.seed)

    normal = (loaded.mean, loaded.std) if s.init == "run" else IMAGENET
    model = detector(network, len(classes), masks, s.sides, s.max_size, *normal)
    bare = synchronised(model, accelerator).to(accelerator.device)
    optimizer = _optimizer(bare, s)
    made_by = {"protocol": "detect", "task": s.task, "backbone": loaded.name, "classes": len(classes)}
    made_by["format"] = run_folder.FORMAT
    first, scaler = 0, None
    window: dict[str, list] = {}
    if resumes and run_folder.last_checkpoint(folder):
        optimizer_state, state = run_folder.load_checkpoint(folder, bare, made_by)
        optimizer.load_state_dict(optimizer_state)
        first, scaler = state["step"], state["scaler"]
        window = state["processes"][rank] if len(state["processes"]) == world else {}
    model, optimizer = accelerator.prepare(bare, optimizer)
    if scaler and accelerator.scaler:
        accelerator.scaler.load_state_dict(scaler)

    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not resumes:
            lock.take(folder, "--out")
        run_folder.cut_metrics(folder, first)
        kept = {**dataclasses.asdict(s), "out": str(folder), "protocol": "detect", "backbone": loaded.name}
        run_folder.write_json(folder / "config.json", kept | {"versions": run_folder.versions()})
    accelerator.wait_for_everyone()
    peers.folder = folder
    if note:
        say(note)
    say(
        f"detect, {s.task}: {loaded.name} from {s.init} on {s.data}, {len(batches.kept)} images to train on, "
        f"{len(test.images)} to evaluate on, {len(classes)} classes, {s.steps} steps of {s.batch_size} on "
        f"{world} x {accelerator.device.type} -> {folder}"
    )
    with peers, guards.leaves_nothing(folder, not resumes):
        if not _train(accelerator, model, bare, optimizer, batches, s, workers, folder, first, window, made_by):
            return {}
        found = predict(accelerator, bare, test, classes, workers)
        metrics = {}
        if accelerator.is_main_process:
            metrics = average_precision(test.truth, found)
            if masks:
                mask_metrics = average_precision(test.truth, found, "segm")
                metrics |= {f"mask_{name}": value for name, value in mask_metrics.items()}
        (metrics,) = broadcast_object_list([metrics])
        kept = {**dataclasses.asdict(s), "workers": workers, "backbone": loaded.name, "dataset": s.data}
        finish(accelerator, loaded.folder, "detect", kept, metrics)
        if accelerator.is_main_process:
            run_folder.write_json(folder / "result.json", metrics)
    accelerator.end_training()
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop.


def _settings(asked: Detection, given: Given) -> tuple[DetectionRun, Path, bool, Backbone | None]:
    """The settings, checked as far as they can be without the data; the folder; whether a run there is resumed.

    The backbone too, where the folder is beside its results.
    """
    loaded = None
    if isinstance(asked.resume, str):
        if asked.out is not None and Path(asked.out) != Path(asked.resume):
            raise UserError(f"--out {asked.out}: a run is resumed in its own folder; drop --out, or drop --resume")
        folder = Path(asked.resume).expanduser()
        run_folder.config_of(folder)  # raises where there is none
    else:
        name = f"detect-{asked.task}" + f"-{asked.init}" * (asked.init != "run")
        if not asked.out:
            loaded = backbone_of(asked, print)
        folder = loaded.folder / name if loaded else Path(str(asked.out)).expanduser()
    if (folder / "result.json").exists():
        raise UserError(f"{folder}: holds a finished run; write to another folder: --out FOLDER")
    resumes = bool(asked.resume) and (folder / "config.json").exists()
    if resumes:
        asked = _resumed(folder, asked, given)
    else:
        run_folder.choose(str(folder), "", "")  # refuses a folder in use
        if asked.schedule is not None and asked.steps is not None:
            raise UserError(f"--schedule {asked.schedule}: --steps {asked.steps} says how long; drop one of them")
        if asked.init != "run" and asked.weights != "online":
            raise UserError(f"--weights {asked.weights}: --init {asked.init} takes other weights; drop one of them")
    recipe = RECIPES[asked.task, asked.schedule or ("1x" if asked.task == "coco" else None)]
    steps = asked.steps or recipe.steps
    resolved = dict(
        given=dataclasses.asdict(asked),
        steps=steps,
        milestones=[round(share * steps) for share in recipe.drops],
        warmup_steps=min(recipe.warmup, max(1, steps // 10)),
        peak_lr=asked.lr * asked.batch_size / 16,
        sides=[asked.min_size * part // 25 for part in recipe.sides],
        max_size=asked.max_size or asked.min_size * 5 // 3,
    )
    return DetectionRun(**{**vars(asked), **resolved}), folder, resumes, loaded


def _resumed(folder: Path, asked: Detection, given: Given) -> Detection:
    """The flags of the run in `folder`, with those given now that may change."""
    config = run_folder.config_of(folder)
    if config.get("protocol") != "detect":
        raise UserError(f"--resume {folder}: is no run of eval.detect")
    had, said = config["given"], flags.said(asked, given)
    for name in said.keys() - {*ON_RESUME}:
        if said[name] != had.get(name):
            raise UserError(
                f"--resume {folder}: that run has --{name} {had.get(name)}, not {said[name]}; drop the flag, "
                "or start another run: --out FOLDER"
            )
    return Detection(**had | {name: said[name] for name in said.keys() & {*ON_RESUME}})


def _initialised(loaded, s):
    """The network with the weights that --init names."""
    if not isinstance(loaded.network, ResNet):
        raise UserError(f"--run {s.run}: is a {loaded.name}; detection wants a ResNet, whose four stages it reads")
    if s.init == "random":
        return build_backbone(loaded.name, loaded.image_size)
    if s.init == "imagenet":
        if isinstance(loaded.network.maxpool, nn.Identity):
            raise UserError(f"--init imagenet: this {loaded.name} has the stem for small images; its weights have not")
        try:
            return timm.create_model(loaded.name, pretrained=True, num_classes=0)
        except Exception as error:  # the Hub's client raises what its transport raises
            raise UserError(
                f"--init imagenet: timm's weights of {loaded.name} cannot be had ({first_line(error)}); "
                "they are fetched from the Hub, once"
            ) from error
    if loaded.random:
        raise UserError(f"--run {s.run}: a timm name brings no weights; say --init random or --init imagenet")
    return loaded.network


def _optimizer(model, s):
    """Momentum SGD; batch norm's scales and shifts are not decayed (the default of MoCo's framework, detectron2)."""
    kinds = nn.BatchNorm2d | nn.SyncBatchNorm
    norms = {parameter for module in model.modules() if isinstance(module, kinds) for parameter in module.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if (p in norms) == normed], "weight_decay": 1e-4 * (not normed)}
        for normed in (False, True)
    ]
    return torch.optim.SGD(groups, lr=s.peak_lr, momentum=0.9)


def _lr(step, s):
    """Linear warm-up, then constant, divided by 10 at each milestone."""
    drops = sum(step >= milestone for milestone in s.milestones)
    return s.peak_lr * min(1, (step + 1) / s.warmup_steps) * 0.1**drops


# ---------------------------------------------------------------------------------------------------------------------
# The loop, and the judgement.


def _on_device(image, device):
    return torch.from_numpy(image).to(device).permute(2, 0, 1).float() / 255


def _train(accelerator, model, bare, optimizer, batches, s, workers, folder, first, window, made_by):
    """Train from step `first` on; False where it was asked to stop."""
    device, rank = accelerator.device, accelerator.process_index
    model.train()
    feed = made(batches, range(first, s.steps), workers)
    bar = progress(s.steps, start=first, shown=accelerator.is_main_process)
    clock, since = time.perf_counter(), first
    with guards.asked_to_stop() as asked, bar:
        stop_asked = agreement(asked)
        for step, (images, targets) in zip(range(first, s.steps), feed):
            for group in optimizer.param_groups:
                group["lr"] = _lr(step, s)
            # torchvision draws scales, anchors and proposals from torch's own generators.
            torch.manual_seed(generator(s.seed, VIEW, step, rank).initial_seed())
            targets = [{k: torch.from_numpy(v).to(device) for k, v in target.items()} for target in targets]
            losses = model([_on_device(image, device) for image in images], targets)
            loss = sum(losses.values())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            for name, value in {"loss": loss, **losses}.items():
                window.setdefault(name, []).append(value.detach().float())
            done = step + 1
            last, stops = done == s.steps, stop_asked()
            logs, saves = last or done % s.log_every == 0, last or stops or done % s.checkpoint_every == 0
            if logs or saves:
                guards.check_finite(accelerator, window["loss"], folder, done, 1, partial(_lr, s=s), batches)
            if logs:
                line = {"step": done, **_means(accelerator, window), "lr": _lr(step, s)}
                speed = (done - since) * s.batch_size / (time.perf_counter() - clock)
                if accelerator.is_main_process:
                    run_folder.append_metrics(folder, line | {"images_per_second": round(speed, 1)})
                bar.set_postfix({"loss": f"{line['loss']:.3f}", "img/s": f"{speed:.1f}"}, refresh=False)
                clock, since = time.perf_counter(), done
            bar.update()
            if saves:
                average_statistics(bare)
                own = {name: [float(value) for value in values] for name, values in window.items()}
                state = {"made_by": made_by, "processes": gather_object([own])}
                state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else {}
                if accelerator.is_main_process:
                    run_folder.save_checkpoint(folder, done, bare, optimizer.state_dict(), state, KEEP)
                accelerator.wait_for_everyone()
            if stops and not last:
                accelerator.print(f"stopped at step {done}; resume it: python -m eval.detect --resume {folder}")
                return False
    return True


def _means(accelerator, window):
    """The mean of each loss since the last line, over all processes; the window is emptied."""
    seen = [torch.stack([torch.as_tensor(v, device=accelerator.device) for v in values]) for values in window.values()]
    means = torch.stack([values.mean() for values in seen])
    found = dict(zip(window, accelerator.reduce(means, reduction="mean").tolist()))
    window.clear()
    return found


@torch.no_grad()
def predict(accelerator, model, scenes: Scenes, classes: list[int], workers: int = 0) -> list[dict]:
    """What the detector finds in all images, as COCO's evaluator takes it, on every process; each does its share."""
    model.eval()
    mine = range(accelerator.process_index, len(scenes.images), accelerator.num_processes)
    pictures = made(partial(picture, scenes), mine, workers)
    everything: list[dict] = []
    bar = progress(len(mine), shown=accelerator.is_main_process, unit="image")
    for row, image in zip(mine, pictures):
        bar.update()
        with accelerator.autocast():
            (found,) = model([_on_device(image, accelerator.device)])
        boxes = found["boxes"].float().cpu()
        boxes[:, 2:] -= boxes[:, :2]
        whole = {"image_id": scenes.truth["images"][row]["id"]}
        each = zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist())
        listed = [{**whole, "bbox": b, "category_id": classes[label - 1], "score": score} for b, label, score in each]
        if "masks" in found and listed:
            shapes = (found["masks"][:, 0] > 0.5).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
            for item, shape in zip(listed, run_lengths.encode(np.asfortranarray(shapes))):
                item["segmentation"] = shape
        everything += listed
    bar.close()
    return gather_object(everything)


if __name__ == "__main__":
    launch(detect, "eval.detect")
