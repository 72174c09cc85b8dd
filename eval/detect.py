"""Detection transfer: Faster R-CNN or Mask R-CNN, with an FPN, from a pretrained backbone (MoCo, section 4.2).

python -m eval.detect --run runs/moco-photos-001 --task voc --data VOCdevkit
"""

import math
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
from eval.boxes import Batches, Scenes, average_precision, open_scenes, picture, run_lengths
from eval.command import finish, start
from eval.detector import detector
from eval.weights import load_backbone
from flags import UserError, first_line, one_of, progress
from loading.batches import VIEW, generator, made
from methods.networks import SMALL, average_statistics
from methods.networks import backbone as build_backbone
from training import folder as run_folder
from training import guards
from training.peers import Peers, agreement

MAY_CHANGE = ("workers", "log_every", "checkpoint_every", "out", "resume")
KEEP = 2  # checkpoints


class Recipe(NamedTuple):
    """What MoCo's code trains with; it states sides for a test side of 800, which is 25 times 32."""

    steps: int
    drops: tuple[float, float]  # where the learning rate is divided by 10, as shares of the steps
    warmup: int
    sides: range  # of training images, in 25ths of the side of test images


RECIPES = {
    ("voc", None): Recipe(24_000, (18 / 24, 22 / 24), 100, range(15, 26)),
    ("coco", "1x"): Recipe(90_000, (60 / 90, 80 / 90), 1000, range(20, 26)),
    ("coco", "2x"): Recipe(180_000, (120 / 180, 160 / 180), 1000, range(20, 26)),
}


def detect(
    run: str = "",
    init: str = "run",
    task: str = "voc",
    data: str = "",
    schedule: str | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    lr: float = 0.02,
    min_size: int = 800,
    max_size: int | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    workers: int | None = None,
    mixed_precision: str | None = None,
    seed: int = 0,
    out: str | None = None,
    resume: bool | str = False,
    log_every: int = 20,
    checkpoint_every: int = 1000,
) -> dict:
    """Train a detector from a backbone, all layers and batch norm's statistics with it (MoCo, section 4.2): box AP,
    and mask AP on COCO. Many GPUs: accelerate launch -m eval.detect ...

    The backbone
      run: a run's folder, a checkpoint's folder, a backbone.safetensors, or a timm name
      init: run, its weights; random or imagenet, other weights in the same network
      backbone: the architecture, for a file without its config.json
      image_size: for such a file: what it was trained at, which decides its stem
    The task
      task: voc, Faster R-CNN R50-FPN on VOC07+12, judged by 2007's test set; or coco,
        Mask R-CNN R50-FPN on COCO 2017, judged by val2017
      data: the VOCdevkit folder; or the COCO folder, with annotations/instances_*.json,
        train2017/ and val2017/; or (voc) a dataset of the Hub or a folder of parquet
        files with the columns image and objects (bbox as x, y, width, height; category)
      schedule: coco: 1x, 90,000 steps, by itself; or 2x, 180,000
      steps: by itself the schedule's, for voc 24,000; the learning rate falls at the
        same shares of them
      batch_size: images a step, over all processes
      lr: for 16 images a step, and in proportion for more or fewer
      min_size: shorter side of test images; training draws from 60 % of it (coco 80 %) on
      max_size: of the longer side, at most; by itself 5/3 of min_size
    The run
      workers: processes that decode images; by itself up to 8
      mixed_precision: no, fp16 or bf16
      seed: of new weights, the data's order and what is drawn
      out: its folder; by itself detect-TASK or detect-TASK-INIT in the run's
      resume: go on with a run: --resume FOLDER; or --resume with the flags that began it,
        which starts it where there is none
      log_every: steps between lines of metrics.jsonl
      checkpoint_every: steps between checkpoints; there is always one at the end
    """
    given = dict(locals())
    s, folder, goes_on = _settings(given)
    accelerator = start(s)
    warnings.filterwarnings("ignore", ".*`broadcast_buffers` is deprecated", FutureWarning)  # its heir is private
    accelerator.ddp_handler = DistributedDataParallelKwargs(broadcast_buffers=False)  # they are averaged when saved
    say, rank, world = accelerator.print, accelerator.process_index, accelerator.num_processes
    peers = Peers()
    if s["batch_size"] % world:
        raise UserError(f"--batch_size {s['batch_size']}: want a multiple of the {world} processes")
    loaded = load_backbone(s["run"], architecture=s["backbone"], image_size=s["image_size"])
    network = _initialised(loaded, s)
    train, test, note = open_scenes(s["task"], s["data"])
    classes = [category["id"] for category in train.truth["categories"]]
    masks = s["task"] == "coco"
    batches = Batches(train, classes, masks, batch_size=s["batch_size"], rank=rank, world=world, seed=s["seed"])

    model = detector(network, len(classes), masks, s["sides"], s["max_size"])
    if world > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    bare = model.to(accelerator.device)
    optimizer = _optimizer(bare, s)
    made_by = {"protocol": "detect", "task": s["task"], "backbone": loaded.name, "classes": len(classes)}
    made_by["format"] = run_folder.FORMAT
    first, window, scaler = 0, {}, None
    if goes_on and run_folder.last_checkpoint(folder):
        optimizer_state, state = run_folder.load_checkpoint(folder, bare, made_by)
        optimizer.load_state_dict(optimizer_state)
        first, scaler = state["step"], state["scaler"]
        window = state["processes"][rank] if len(state["processes"]) == world else {}
    model, optimizer = accelerator.prepare(bare, optimizer)
    if scaler and accelerator.scaler:
        accelerator.scaler.load_state_dict(scaler)

    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.cut_metrics(folder, first)
        kept = {
            **s,
            "out": str(folder),
            "protocol": "detect",
            "backbone": loaded.name,
            "versions": run_folder.versions(),
        }
        run_folder.write_json(folder / "config.json", kept)
    accelerator.wait_for_everyone()
    peers.folder = folder
    if note:
        say(note)
    say(
        f"detect, {s['task']}: {loaded.name} from {s['init']} on {s['data']}, {len(batches.kept)} images to train on, "
        f"{len(test.images)} to be judged by, {len(classes)} classes, {s['steps']} steps of {s['batch_size']} on "
        f"{world} x {accelerator.device.type} -> {folder}"
    )
    with peers:
        if not _train(accelerator, model, bare, optimizer, batches, s, folder, first, window, made_by):
            return {}
        found = predict(accelerator, bare, test, classes, s["workers"])
        metrics = {}
        if accelerator.is_main_process:
            metrics = average_precision(test.truth, found)
            if masks:
                mask_metrics = average_precision(test.truth, found, "segm")
                metrics |= {f"mask_{name}": value for name, value in mask_metrics.items()}
        (metrics,) = broadcast_object_list([metrics])
        finish(accelerator, loaded.folder, "detect", {**s, "backbone": loaded.name, "dataset": s["data"]}, metrics)
        if accelerator.is_main_process:
            run_folder.write_json(folder / "result.json", metrics)
    accelerator.end_training()
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop.


def _settings(given):
    """The settings, checked as far as they can be without the data; the folder; and whether a run there goes on."""
    defaults = dict(zip(given, detect.__defaults__))
    folder, resume = None, given["resume"]
    if isinstance(resume, str):
        if given["out"] is not None and Path(given["out"]) != Path(resume):
            raise UserError(f"--out {given['out']}: a run goes on in its own folder; drop --out, or drop --resume")
        folder = Path(resume).expanduser()
        run_folder.config_of(folder)  # raises where there is none
    else:
        _check(given)
        name = f"detect-{given['task']}" + f"-{given['init']}" * (given["init"] != "run")
        folder = Path(given["out"]).expanduser() if given["out"] else _run_folder(given) / name
    if (folder / "result.json").exists():
        raise UserError(f"{folder}: holds a finished run; write to another folder: --out FOLDER")
    goes_on = bool(resume) and (folder / "config.json").exists()
    if goes_on:
        given = _gone_on(folder, given, {k for k, v in given.items() if v != defaults[k] or k in flags.given})
        _check(given)
    else:
        run_folder.choose(str(folder), "", "")  # refuses a folder in use
    recipe = RECIPES[given["task"], given["schedule"] or ("1x" if given["task"] == "coco" else None)]
    s = {**given, "given": given}
    s["steps"] = given["steps"] or recipe.steps
    s["milestones"] = [round(share * s["steps"]) for share in recipe.drops]
    s["warmup_steps"] = min(recipe.warmup, max(1, s["steps"] // 10))
    s["peak_lr"] = given["lr"] * given["batch_size"] / 16
    s["sides"] = [given["min_size"] * part // 25 for part in recipe.sides]
    s["max_size"] = given["max_size"] or given["min_size"] * 5 // 3
    return s, folder, goes_on


def _run_folder(given):
    return load_backbone(given["run"], architecture=given["backbone"], image_size=given["image_size"]).folder


def _gone_on(folder, given, said):
    """The flags of the run in `folder`, with those of `said`, given now, that may change."""
    config = run_folder.config_of(folder)
    if config.get("protocol") != "detect":
        raise UserError(f"--resume {folder}: is no run of eval.detect")
    had = config["given"]
    for name in said - {*MAY_CHANGE}:
        if given[name] != had.get(name):
            raise UserError(
                f"--resume {folder}: that run has --{name} {had.get(name)}, not {given[name]}; drop the flag, "
                "or start another run: --out FOLDER"
            )
    return had | {name: given[name] for name in said & {*MAY_CHANGE}}


def _check(s):
    one_of("init", s["init"], ("run", "random", "imagenet"))
    one_of("task", s["task"], ("voc", "coco"))
    if s["schedule"] is not None:
        one_of("schedule", s["schedule"], ("1x", "2x"))
        if s["task"] != "coco":
            raise UserError(f"--schedule {s['schedule']}: only coco has schedules; for {s['task']} say --steps")
    ranges = {
        "1 or more": (lambda v: v >= 1, "steps batch_size log_every checkpoint_every"),
        "a number above 0": (lambda v: 0 < v < math.inf, "lr"),
        "32 or more": (lambda v: v >= 32, "min_size"),
    }
    flags.in_range(s, ranges)
    if s["max_size"] is not None and s["max_size"] < s["min_size"]:
        raise UserError(f"--max_size {s['max_size']}: want at least --min_size, {s['min_size']}")


def _initialised(loaded, s):
    """The network with the weights that --init names."""
    if not isinstance(loaded.network, ResNet):
        raise UserError(f"--run {s['run']}: is a {loaded.name}; detection wants a ResNet, whose four stages it reads")
    if s["init"] == "random":
        return build_backbone(loaded.name, loaded.image_size)
    if s["init"] == "imagenet":
        if loaded.image_size <= SMALL:
            raise UserError(
                f"--init imagenet: this {loaded.name} has the stem for {SMALL} pixels or fewer; those weights have not"
            )
        try:
            return timm.create_model(loaded.name, pretrained=True, num_classes=0)
        except Exception as error:  # the Hub's client raises what its transport raises
            raise UserError(
                f"--init imagenet: timm's weights of {loaded.name} cannot be had ({first_line(error)}); "
                "they are fetched from the Hub, once"
            ) from error
    if not Path(s["run"]).expanduser().exists():
        raise UserError(f"--run {s['run']}: a timm name brings no weights; say --init random or --init imagenet")
    return loaded.network


def _optimizer(model, s):
    """Momentum SGD; batch norm's scales and shifts are not decayed (the default of MoCo's framework, detectron2)."""
    kinds = nn.BatchNorm2d | nn.SyncBatchNorm
    norms = {parameter for module in model.modules() if isinstance(module, kinds) for parameter in module.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if (p in norms) == normed], "weight_decay": 1e-4 * (not normed)}
        for normed in (False, True)
    ]
    return torch.optim.SGD(groups, lr=s["peak_lr"], momentum=0.9)


def _lr(step, s):
    """Linear warm-up, then constant, divided by 10 at each milestone."""
    drops = sum(step >= milestone for milestone in s["milestones"])
    return s["peak_lr"] * min(1, (step + 1) / s["warmup_steps"]) * 0.1**drops


# ---------------------------------------------------------------------------------------------------------------------
# The loop, and the judgement.


def _on_device(image, device):
    return torch.from_numpy(image).to(device).permute(2, 0, 1).float() / 255


def _train(accelerator, model, bare, optimizer, batches, s, folder, first, window, made_by):
    """Train from step `first` on; False where it was asked to stop."""
    device, rank = accelerator.device, accelerator.process_index
    model.train()
    feed = made(batches, range(first, s["steps"]), s["workers"])
    bar = progress(s["steps"], start=first, shown=accelerator.is_main_process)
    clock, since = time.perf_counter(), first
    with guards.asked_to_stop() as asked, guards.leaves_nothing(folder, first), bar:
        stop_asked = agreement(asked)
        for step, (images, targets) in zip(range(first, s["steps"]), feed):
            for group in optimizer.param_groups:
                group["lr"] = _lr(step, s)
            # torchvision draws scales, anchors and proposals from torch's own generators.
            torch.manual_seed(generator(s["seed"], VIEW, step, rank).initial_seed())
            targets = [{k: torch.from_numpy(v).to(device) for k, v in target.items()} for target in targets]
            losses = model([_on_device(image, device) for image in images], targets)
            loss = sum(losses.values())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            for name, value in {"loss": loss, **losses}.items():
                window.setdefault(name, []).append(value.detach().float())
            done = step + 1
            last, stops = done == s["steps"], stop_asked()
            logs, saves = last or done % s["log_every"] == 0, last or stops or done % s["checkpoint_every"] == 0
            if logs or saves:
                guards.check_finite(accelerator, window["loss"], folder, done, {**s, "accumulate": 1}, _lr, batches)
            if logs:
                line = {"step": done, **_means(accelerator, window), "lr": _lr(step, s)}
                speed = (done - since) * s["batch_size"] / (time.perf_counter() - clock)
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
                accelerator.print(f"stopped at step {done}; go on with: python -m eval.detect --resume {folder}")
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
    everything, bar = [], progress(len(mine), shown=accelerator.is_main_process, unit="image")
    for row, image in zip(mine, pictures):
        bar.update()
        with accelerator.autocast():
            (found,) = model([_on_device(image, accelerator.device)])
        boxes = found["boxes"].float().cpu()
        boxes[:, 2:] -= boxes[:, :2]
        whole = {"image_id": scenes.truth["images"][row]["id"]}
        listed = zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist())
        listed = [{**whole, "bbox": b, "category_id": classes[label - 1], "score": score} for b, label, score in listed]
        if "masks" in found and listed:
            shapes = (found["masks"][:, 0] > 0.5).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
            for each, shape in zip(listed, run_lengths.encode(np.asfortranarray(shapes))):
                each["segmentation"] = shape
        everything += listed
    bar.close()
    return gather_object(everything)


if __name__ == "__main__":
    flags.launch(detect, "eval.detect")
