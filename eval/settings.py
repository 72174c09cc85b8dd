"""The flags of the evaluations: what they share, and what each protocol has of its own. A field is a flag."""

from dataclasses import dataclass

from flags import (
    ABOVE_0,
    INTERVAL,
    NOT_NEGATIVE,
    PRECISIONS,
    SEED,
    Range,
    Settings,
    UserError,
    at_least,
    defaults_of,
    flag,
)


@dataclass(frozen=True, kw_only=True)
class Weights(Settings):
    run: str = flag(
        "",
        "a run's folder, a checkpoint's folder, a file of weights, a timm name with its tag, hf-hub:OWNER/NAME, or a "
        "timm name without a tag for random weights",
        heading="The backbone",
    )
    backbone: str | None = flag(None, "the architecture, for a file without its config.json")
    image_size: int | None = flag(None, "default: the run's", range=at_least(8))
    weights: str = flag(
        "online", "of a run: online, or momentum, the slow copy of moco, mocov3, byol", choices=("online", "momentum")
    )


@dataclass(frozen=True, kw_only=True)
class Computing(Weights):
    workers: int | None = flag(
        None, "processes that decode images; default: up to 8", range=SEED, heading="The computation"
    )
    mixed_precision: str | None = flag(None, "no, fp16 or bf16", choices=PRECISIONS)
    seed: int = flag(0, "of what is drawn, and of random weights", range=SEED)


@dataclass(frozen=True, kw_only=True)
class Images(Computing):
    """Images of a dataset, as pretraining takes them."""

    dataset: str | None = flag(None, "as in pretraining; default: the run's", heading="The images")
    subset: str | None = flag(None, "configuration of a Hub dataset that has several")
    split: str | None = flag(None, "training split; default: the run's")
    image_column: str | None = flag(None, "for a dataset with several columns of images")
    label_column: str | None = flag(None, "for a dataset with several columns of classes")
    skip_bad_images: bool = flag(False, "leave out images that cannot be read")
    pixel_range: str | None = flag(
        None,
        "LOW,HIGH: values that become black and white, of files of more than 8 bits; default: the run's",
        range=INTERVAL,
    )
    max_pixels: int | None = flag(
        None, "of an image; one that claims more is a bad image; default: the run's", range=at_least(1)
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation(Images):
    """What the protocols on labelled images share."""

    eval_split: str | None = flag(None, "evaluation set; default: validation or test, else a held-out tenth")


@dataclass(frozen=True, kw_only=True)
class Embed(Images):
    """Features of images in a file, a row an image, in the dataset's order; labels are not needed.

    .parquet: columns `file` (or `row`, where images have no names), `label` where there is one, `feature`. .npy: the
    features, with the other columns in a .csv beside it. Many processes: accelerate launch -m eval.embed ...
    """

    out: str = flag("", "a new file that ends in .parquet or .npy", heading="What is written")
    normalize: bool = flag(False, "features of length 1")
    half: bool = flag(False, "float16 in the place of float32")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out.endswith((".parquet", ".npy")):
            raise UserError(
                f"--out {self.out}: want a file that ends in .parquet or .npy, as in --out features.parquet"
            )


@dataclass(frozen=True, kw_only=True)
class KNN(Evaluation):
    """Accuracy with one and with five labels a class: nearest class mean, the mean of 100 draws, its standard error.
    Then weighted k-NN of all labels (Wu et al., 2018): top-1, top-5. Raw pixels beside them."""

    k: int | None = flag(
        None,
        "neighbours; default: 200, but at most a tenth of a class",
        range=at_least(1),
        heading="The protocol",
    )
    temperature: float = flag(0.1, "of the votes", range=ABOVE_0)


@dataclass(frozen=True, kw_only=True)
class Linear(Evaluation):
    """A linear classifier on frozen features: top-1 and top-5.

    features: each image once, uncropped; then logistic regression. The strength of its regularisation is chosen on a
    fifth of the training set, and below 5,000 images on more fifths in turn, so that it is not chosen by a few images.
    It takes minutes, has no learning rate to tune, and is usually a little below sgd on large data, which sees many
    crops of each image. sgd: what the papers report. Say which one a figure is from.
    """

    protocol: str = flag(
        "features",
        "features, or sgd: crop and flip, 100 epochs, cosine, batch statistics frozen",
        choices=("features", "sgd"),
        heading="The protocol",
    )
    preset: str = flag(
        "moco", "of sgd: moco (SGD, 30 for 256 images) or simsiam (LARS, 1.6 for 4,096)", choices=("moco", "simsiam")
    )
    epochs: int = flag(100, "of sgd", range=at_least(1))
    batch_size: int | None = flag(
        None, "of sgd; default: the preset's, but at most an eighth of the images", range=at_least(1)
    )
    lr: float | None = flag(None, "of sgd, for 256 images a step; default: the preset's", range=ABOVE_0)
    weight_decay: float | None = flag(None, "of sgd; default: the preset's", range=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        of_sgd, usual = ("batch_size", "lr", "weight_decay", "epochs", "preset"), defaults_of(Linear)
        chosen = [name for name in of_sgd if getattr(self, name) != usual[name]]
        if self.protocol == "features" and chosen:
            raise UserError(f"--{chosen[0]} {getattr(self, chosen[0])}: is of --protocol sgd")


@dataclass(frozen=True, kw_only=True)
class Semi(Evaluation):
    """Fine-tuning of the whole network with few labels: top-1 and top-5.

    SGD with Nesterov momentum 0.9, crop and flip, a linear classifier on top, no warm-up, a cosine to zero; no weight
    decay, as published.
    """

    percent: float = flag(
        10.0,
        "share of the labels, in per cent: as many of every class, drawn from the seed",
        range=Range("above 0, up to 100", lambda v: 0 < v <= 100),
        heading="The protocol",
    )
    files: str | None = flag(None, "instead: a list of file names, such as those that SimCLR published")
    epochs: int | None = flag(None, "default: 60 for up to 1 per cent, else 30", range=at_least(1))
    batch_size: int | None = flag(
        None, "images a step; default: 1024, but at most an eighth of the images", range=at_least(1)
    )
    lr: float = flag(0.05, "for 256 images a step", range=ABOVE_0)
    weight_decay: float = flag(0.0, "none is published", range=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.files is not None and self.percent != defaults_of(Semi)["percent"]:
            raise UserError(f"--percent {self.percent:g}: --files {self.files} names the images; drop one of them")


@dataclass(frozen=True, kw_only=True)
class Geometry(Evaluation):
    """Alignment, uniformity, effective rank and spectrum of the features of held-out images, and a picture.

    Alignment is the mean squared distance of two views' features (lower: closer). Uniformity is the log of the mean
    Gaussian potential (lower: more even; Wang and Isola, 2020). Both are on the unit sphere. Those of the projector,
    where the run has a checkpoint, are called embedding_...
    """

    beside: str | None = flag(
        None,
        "runs to show beside it in the picture, with commas between them; their weights are the online ones",
        heading="The protocol",
    )
    images: int = flag(2000, "held-out images", range=at_least(100))
    out: str | None = flag(None, "the picture; default: the next free geometry.png in the run's folder")


@dataclass(frozen=True, kw_only=True)
class VOC07(Computing):
    """VOC 2007 classification by linear SVMs on frozen features: mAP in per cent, with difficult boxes ignored.

    Features have length 1. Each class's cost, of 2^-19 to 2^-4 and 10^-7 to 10^2, is chosen by cross-validation.
    """

    data: str = flag(
        "",
        "a VOCdevkit folder, or a dataset (a folder of .parquet files, or OWNER/NAME of the Hub) with splits trainval, "
        "or train and validation, and test, and a column objects, labels or classes that lists the classes of each "
        "image",
        heading="The images",
    )
    low_shot: bool = flag(
        False,
        "also with 1, 2, 4, 8, 16, 32, 64 and 96 positive images a class and 19 times as many negative ones: the mean "
        "of five draws. It takes many times as long",
        heading="The protocol",
    )
    folds: int = flag(3, "of the cross-validation", range=at_least(2))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise UserError("--data: want a VOCdevkit folder, or a Hub dataset OWNER/NAME")


@dataclass(frozen=True, kw_only=True)
class Export(Weights):
    """Write the backbone for timm, torchvision or Detectron2, or as a folder for the Hub; nothing is overwritten."""

    format: str = flag(
        "timm",
        "timm or torchvision (safetensors with their names), detectron2 (the .pkl that MODEL.WEIGHTS of its R50-C4 "
        "takes), or hub (a folder with a model card)",
        choices=("timm", "torchvision", "detectron2", "hub"),
        heading="What is written",
    )
    out: str | None = flag(None, "the file, or the folder of hub; default: in RUN/export")


@dataclass(frozen=True, kw_only=True)
class Compare(Settings):
    """Means, spreads and seeds of many runs' results; BSIM minus SIM with its interval; a chart.

    Runs of a method that differ in more than the seed and --by are refused. Leaves compare.md, .json and .png.
    """

    runs: str = flag("", "run folders, with commas between them or as a pattern: 'runs/study/*'")
    by: str = flag("method,sim_weight", "settings that make rows, with commas between them; sim_weight is one of them")
    metrics: str | None = flag(None, "metrics to show, as in 'knn top1,linear features top1'; default: all top1")
    out: str | None = flag(None, "a folder for the three files; default: the next free runs/compare-NUMBER")


@dataclass(frozen=True, kw_only=True)
class Detection(Computing):
    """Train a detector from a backbone, all layers and batch norm's statistics with it (MoCo, section 4.2): box AP,
    and mask AP on COCO. Many GPUs: accelerate launch -m eval.detect ..."""

    init: str = flag(
        "run",
        "run, its weights; random or imagenet, other weights in the same network",
        choices=("run", "random", "imagenet"),
        heading="The task",
    )
    task: str = flag(
        "voc",
        "voc, Faster R-CNN R50-FPN on VOC07+12, evaluated on the test set of 2007; or coco, Mask R-CNN R50-FPN on COCO "
        "2017, evaluated on val2017",
        choices=("voc", "coco"),
    )
    data: str = flag(
        "",
        "the VOCdevkit folder; or the COCO folder, with annotations/instances_*.json, train2017/ and val2017/; or "
        "(voc) a dataset of the Hub or a folder of parquet files with the columns image and objects (bbox as x, y, "
        "width, height; category)",
    )
    schedule: str | None = flag(None, "of coco: 1x, 90,000 steps, the default; or 2x, 180,000", choices=("1x", "2x"))
    steps: int | None = flag(
        None,
        "default: the schedule's, for voc 24,000; the learning rate falls at the same shares of them",
        range=at_least(1),
    )
    batch_size: int = flag(16, "images a step, over all processes", range=at_least(1))
    lr: float = flag(0.02, "for 16 images a step, scaled linearly", range=ABOVE_0)
    min_size: int = flag(
        800, "shorter side of test images; training draws from 60 % of it (coco 80 %) on", range=at_least(32)
    )
    max_size: int | None = flag(None, "of the longer side, at most; default: 5/3 of min_size")
    workers: int | None = flag(
        None, "processes that decode images; default: up to 8", range=SEED, on_resume=True, heading="The run"
    )
    out: str | None = flag(None, "run folder; default: detect-TASK or detect-TASK-INIT in the run's", on_resume=True)
    resume: bool | str = flag(
        False,
        "resume a run: --resume FOLDER; or --resume with the flags that began it, which starts it where there is none",
        on_resume=True,
    )
    log_every: int = flag(20, "steps between lines of metrics.jsonl", range=at_least(1), on_resume=True)
    checkpoint_every: int = flag(
        1000, "steps between checkpoints; the last step always has one", range=at_least(1), on_resume=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None and self.task != "coco":
            raise UserError(f"--schedule {self.schedule}: only coco has schedules; for {self.task} say --steps")
        if self.max_size is not None and self.max_size < self.min_size:
            raise UserError(f"--max_size {self.max_size}: want at least --min_size, {self.min_size}")
