"""What a user may say of a pretraining run. A field is a flag; None means that the user left it open.

What is left open is filled in by `training/resolve.py`, whose `Run` has the same names and no None.
"""

from dataclasses import dataclass
from importlib.util import find_spec

from flags import (
    ABOVE_0,
    CHANNELS,
    CHANNELS_ABOVE_0,
    INTERVAL,
    NOT_NEGATIVE,
    PRECISIONS,
    SEED,
    SHARE,
    SHARE_ABOVE_0,
    Settings,
    UserError,
    at_least,
    flag,
    in_both_views,
    nearest,
)
from methods import METHODS

STRENGTH, SHARES = in_both_views("a number from 0 to 10", 10), in_both_views("a share from 0 to 1", 1)
OPTIMIZERS = ("sgd", "lars", "adamw")
TRACKERS = ("tensorboard", "wandb", "trackio")
MIXTURES = ("mix", "alpha", "mix_until", "per_sample")  # flags that say something of mixtures
DRY_RUN = 6  # steps of a dry run, at least: half of them are left out, and one alone says little


@dataclass(frozen=True, kw_only=True)
class Pretraining(Settings):
    """Pretrain a backbone with SIM, BSIM or both. Leaves a run folder. Defaults stand in parentheses; a flag without
    one takes the default of the method's paper (methods/*.py) or the one that its line names."""

    method: str = flag("byol", "simclr, moco, mocov3, byol or simsiam", choices=METHODS, heading="What is learned")
    recipe: str | None = flag(
        None, "a YAML file of flags, as in recipes/; flags on the command line win", on_resume=True
    )
    sim_weight: float = flag(
        0.0, "share of the plain loss: 1 the plain method, 0 pure BSIM, between: both", range=SHARE
    )
    mix: str = flag("cutmix", "cutmix, mixup, or either at random", choices=("cutmix", "mixup", "either"))
    alpha: float = flag(1.0, "shares of a mixture are drawn from Beta(alpha, alpha)", range=ABOVE_0)
    mix_until: float | None = flag(
        None,
        "share of the run with mixtures; then plain pairs. Default: 1, for pure BSIM on simclr 0.75",
        range=SHARE,
    )
    per_sample: bool = flag(True, "one share for each image; --noper_sample: one for the batch")

    dataset: str = flag(
        "digits", "digits, a Hub id, a folder, .parquet .arrow .tar files, a saved dataset", heading="Data"
    )
    subset: str | None = flag(None, "configuration of a Hub dataset that has several")
    split: str = flag("train", "training split; train[:5000] takes a part")
    eval_split: str | None = flag(None, "k-NN queries; default: validation or test, else a held-out tenth")
    image_column: str | None = flag(None, "for a dataset with several columns of images")
    label_column: str | None = flag(None, "for a dataset with several columns of classes; none: no evaluation")
    streaming: bool = flag(False, "read the data while training, where it does not fit the disk; needs --steps")
    skip_bad_images: bool = flag(False, "leave out and count images that cannot be read")
    pixel_range: str | None = flag(
        None,
        "LOW,HIGH: values that become black and white, of files of more than 8 bits; default: from a sample",
        range=INTERVAL,
    )
    max_pixels: int = flag(100_000_000, "of an image; one that claims more is a bad image", range=at_least(1))
    workers: int | None = flag(
        None, "processes that decode large images; default: up to 8", range=NOT_NEGATIVE, on_resume=True
    )

    backbone: str | None = flag(
        None,
        "any timm model, or resnet_tiny; default: resnet50, for 64 pixels or fewer resnet18, and there on a CPU "
        "resnet_tiny",
        heading="Network and schedule",
    )
    init: str | None = flag(
        None,
        "weights to begin from: a run's folder, a checkpoint's folder, a file, a timm name with its tag "
        "(resnet50.a1_in1k), or hf-hub:OWNER/NAME; default: random",
    )
    image_size: int | None = flag(
        None, "default: the size of the images up to 64 pixels, at least 16; else 224", range=at_least(8)
    )
    epochs: int | None = flag(None, "passes over the data; default: 50", range=at_least(1), on_resume=True)
    steps: int | None = flag(None, "optimizer steps, instead of epochs", range=at_least(1), on_resume=True)
    batch_size: int | None = flag(
        None,
        "images a step, over all processes and parts; default: 256, for under 16,384 images 128 or 64",
        range=at_least(1),
    )
    accumulate: int = flag(1, "parts into which a process cuts its share of a batch", range=at_least(1))
    mixed_precision: str | None = flag(
        None, "no, fp16 or bf16; default: as `accelerate config` says", choices=PRECISIONS
    )
    compile: bool = flag(False, "use torch.compile")

    min_crop: float | None = flag(
        None,
        "smallest share of an image that a view shows",
        range=SHARE_ABOVE_0,
        heading="Views. Default: the method's",
    )
    flip: float | None = flag(None, "share of views that are mirrored", range=SHARE)
    brightness: str | None = flag(
        None,
        "strength of the change; two values, as in 0.1,0.2, are for views a and b",
        range=STRENGTH,
    )
    contrast: str | None = flag(None, "likewise", range=STRENGTH)
    saturation: str | None = flag(None, "likewise", range=STRENGTH)
    hue: str | None = flag(None, "likewise, in turns of the colour circle", range=in_both_views("from 0 to 0.5", 0.5))
    jitter: str | None = flag(None, "share of views that are changed in these four", range=SHARES)
    grayscale: str | None = flag(None, "share of views without colour", range=SHARES)
    blur: str | None = flag(None, "share of views that are blurred", range=SHARES)
    solarize: str | None = flag(None, "share of views that are solarized", range=SHARES)
    vertical_flip: str | None = flag(None, "share of views turned upside down", range=SHARES)
    rotate90: str | None = flag(
        None, "share of views turned by 90, 180 or 270 degrees (satellites, microscopes)", range=SHARES
    )
    mean: str | None = flag(
        None,
        "of the channels: imagenet, data (measured), or R,G,B from 0 to 1; default: imagenet; with --init the weights'",
        range=CHANNELS,
    )
    std: str | None = flag(None, "their standard deviation, likewise", range=CHANNELS_ABOVE_0)

    optimizer: str | None = flag(
        None, "sgd, lars or adamw", choices=OPTIMIZERS, heading="Default: what the method's paper says"
    )
    lr: float | None = flag(
        None, "for 256 images a step, scaled linearly; warm-up, then cosine. With --init a tenth", range=ABOVE_0
    )
    weight_decay: float | None = flag(None, "LARS and AdamW leave out biases and norms", range=NOT_NEGATIVE)
    warmup_epochs: float | None = flag(
        None, "epochs of linear warm-up; in a stream a tenth of the steps", range=NOT_NEGATIVE
    )
    batch_norm: str | None = flag(
        None,
        "batch statistics over many GPUs: sync, of all; shuffle, each GPU's own, keys change GPUs (moco); local, each "
        "GPU's own. On CPUs sync means local",
        choices=("sync", "shuffle", "local"),
    )
    temperature: float | None = flag(None, "simclr, moco, mocov3", range=ABOVE_0)
    momentum: float | None = flag(None, "moco, mocov3, byol: of the momentum encoder", range=SHARE)
    queue: int | None = flag(None, "moco: length of the queue of keys", range=at_least(1))
    hidden_dim: int | None = flag(None, "width of the hidden layers of the heads", range=at_least(1))
    embedding_dim: int | None = flag(None, "width of the embedding", range=at_least(1))
    predictor_dim: int | None = flag(None, "simsiam: bottleneck of the predictor", range=at_least(1))

    out: str | None = flag(
        None, "run folder; default: the next free runs/METHOD-DATASET-NUMBER", on_resume=True, heading="The run"
    )
    resume: bool | str = flag(
        False,
        "resume a run: --resume FOLDER; or --resume --out FOLDER, which starts the run where there is none",
        on_resume=True,
    )
    seed: int = flag(0, "of the weights, the order of the data, the views and the mixtures", range=SEED)
    log_every: int = flag(10, "steps between lines of metrics.jsonl", range=at_least(1), on_resume=True)
    eval_every: int | None = flag(
        None,
        "steps between k-NN evaluations; default: ten a run; 0: none",
        range=NOT_NEGATIVE,
        on_resume=True,
    )
    checkpoint_every: int = flag(
        1000, "steps between checkpoints; the last step always has one", range=at_least(1), on_resume=True
    )
    keep: int = flag(2, "checkpoints to keep", range=at_least(1), on_resume=True)
    log_with: str | None = flag(
        None, "tensorboard, wandb or trackio, beside metrics.jsonl", choices=TRACKERS, on_resume=True
    )
    dry_run: int | None = flag(
        None,
        "take this many steps, time the second half of them, print memory, images/s and the hours of the whole run; "
        "leave no run",
        range=at_least(DRY_RUN),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.steps is not None:
            raise UserError("--epochs and --steps: give one of them")
        if self.resume == "" or self.resume is True and self.out is None:
            raise UserError("--resume: name the run's folder, as in --resume runs/byol-digits-001")
        named = isinstance(self.resume, str)  # what this run has besides is in its folder
        if (
            not named
            and self.batch_norm == "shuffle"
            and getattr(METHODS[self.method].Method, "batch_norm", "sync") != "shuffle"
        ):
            raise UserError(f"--batch_norm shuffle: only moco has keys to shuffle; {self.method} takes sync or local")
        if self.log_with is not None and not find_spec(self.log_with):
            raise UserError(f"--log_with {self.log_with}: is not installed; pip install {self.log_with}")
        if not named and self.streaming and self.steps is None:
            raise UserError(
                "--streaming: the length of a stream is not known; say how long to train, as in --steps 10000"
            )
        if self.backbone is not None:  # last: the names are timm's, which takes seconds to import
            check_backbone(self.backbone)


def check_backbone(name: str) -> None:
    from methods.networks import backbone_names

    if name not in backbone_names():
        raise UserError(f"--backbone {name}: no such timm model{nearest(name, backbone_names())}")
