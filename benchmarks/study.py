"""Does BSIM help? A grid of runs of this project's own pretraining and evaluation, and what they say together.

    python benchmarks/study.py --dataset DIR --out runs/study --jobs 2 --grids methods passes
    python benchmarks/study.py --dataset DIR --out runs/study --jobs 2 --grids length mixtures siblings --best simclr
    python benchmarks/study.py --dataset DIR --out runs/curve --grids cost others candidates controls capacity
    python benchmarks/study.py --dataset DIR --out runs/few --grids few -- --split 'train[:1000]'

A finished cell is not run again and a broken one is resumed, so the same command ends what was interrupted.
Leaves the runs, results.jsonl with a line a cell, findings.md and uniformity.png (which findings.py makes again from
results.jsonl alone), and eval.compare's tables and charts in compare-NUMBER. What follows -- are flags of every run, in
the place of the study's own. A folder's cells are of one size, one dataset, the same flags and one commit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from findings import MORE_PASSES, NEAR, STEPS, draw, report  # noqa: E402
from search import SEARCH  # noqa: E402
from search import WEIGHTS as SEARCHED  # noqa: E402

import data  # noqa: E402
from eval.command import Task  # noqa: E402
from eval.compare import compare, results_of  # noqa: E402
from eval.linear import from_features  # noqa: E402
from eval.results import read_results, write_result  # noqa: E402
from methods import METHODS  # noqa: E402
from training.folder import config_of, write  # noqa: E402
from training.weights import Backbone  # noqa: E402

WEIGHTS = (1.0, 0.5, 0.0)
SIBLINGS = ("imix", "unmix", "mixco", "keymix")
PARTS = ("simclr_apart", "simclr_plain_end")
CONTROLS = ("simclr_third", "moco_third", "byol_third")
PLAIN_ENDS = ("moco_plain_end", "byol_plain_end", "simsiam_plain_end")
CANDIDATES = (*PARTS, "simclr_apart_plain_end", "simclr_sim_apart", *PLAIN_ENDS, *CONTROLS)
SIZES = {
    "small": {"split": "train[:5000]", "backbone": "resnet_tiny", "epochs": 30, "mixed_precision": "bf16"},
    "full": {"backbone": "resnet18", "epochs": 200, "mixed_precision": "bf16"},
}
WIDE = "resnet_tiny_wide"
PROTOCOLS = ("knn", "linear", "geometry")


def cells_of(grid: str, best: str, epochs: int) -> list[dict]:
    """The flags that each cell of a grid has beside the size's and the seed."""
    both = {"sim_weight": 0.5}
    if grid == "methods":
        return [{"method": m, "sim_weight": w} for m in METHODS for w in WEIGHTS]
    if grid == "passes":  # as many encoder passes as SIM has in `epochs`
        return [{"method": m, **both, "epochs": round(epochs / MORE_PASSES[m])} for m in METHODS]
    if grid == "length":
        methods = dict.fromkeys(("simclr", best))
        longer = [{"method": m, "sim_weight": w, "epochs": 4 * epochs} for m in methods for w in WEIGHTS]
        return longer + [{"method": m, **both, "epochs": round(4 * epochs / MORE_PASSES[m])} for m in methods]
    if grid == "mixtures":
        kinds = [{"alpha": 0.2}, {"alpha": 2.0}, {"mix": "mixup"}, {"mix": "either"}, {"per_sample": False}]
        kinds += [{"temperature": 0.1}, {"temperature": 0.4}] if best in ("simclr", "moco") else []
        plain = [{"temperature": k["temperature"], "sim_weight": 1.0} for k in kinds if "temperature" in k]
        mixed = [{"method": best, **both, **kind} for kind in ({}, *kinds)]
        return [{"method": best}, *mixed, *({"method": best, **kind} for kind in plain)]
    if grid == "siblings":
        # Each with the mixture that it published; i-Mix publishes its term alone. Ours with each mixture beside them.
        kinds = [("imix", "mixup"), ("unmix", "either"), ("mixco", "mixup"), ("keymix", "cutmix")]
        kinds += [("moco", "mixup"), ("moco", "either")]
        found = [
            {"method": "moco"},
            {"method": "moco", **both},
            *({"method": m, **both, "mix": mix} for m, mix in kinds),
        ]
        return [*found, {"method": "imix", "sim_weight": 0.0, "mix": "mixup"}]
    if grid == "candidates":  # what may pay at the cost of SIM, each part alone, with SIM as long and SIM apart
        names = [("simclr", 1.0), ("simclr", 0.0), ("simclr_sim_apart", 1.0), *((part, 0.0) for part in PARTS)]
        return [{"method": m, "sim_weight": w, "epochs": 4 * epochs} for m, w in names]
    if grid == "controls":  # a third plain view in the place of the mixture, as long as SIM and at its cost
        lengths = {m: (4 * epochs, round(4 * epochs / MORE_PASSES[m.removesuffix("_third")])) for m in CONTROLS}
        return [{"method": m, **both, "epochs": length} for m in CONTROLS for length in lengths[m]]
    if grid in ("cost", "few"):  # cost_curve.py: each kind at the cost of SIM's lengths; few: of 1,000 images
        kinds = [("simclr", 1.0, 1), ("simclr_third", 0.5, 3 / 2), ("simclr", 0.5, 3 / 2), ("simclr", 0.0, 1)]
        lengths = [length * epochs for length in ((1, 2, 4, 8) if grid == "cost" else (20, 40))]
        return [{"method": m, "sim_weight": w, "epochs": round(e / more)} for e in lengths for m, w, more in kinds]
    if grid == "others":  # cost_curve.py --method: by the measured cost of a step, as passes say less of these
        lengths = {"moco": (4, 8), "byol": (4,), "simsiam": (4,)}
        kinds = [(m, m, w) for m in lengths for w in WEIGHTS]
        kinds += [(name.split("_")[0], name, 0.0) for name in PLAIN_ENDS]
        kinds += [(name.split("_")[0], name, 0.5) for name in CONTROLS if not name.startswith("simclr")]
        return [
            {"method": m, "sim_weight": w, "epochs": of_cost(m, w, n * epochs)}
            for own, m, w in kinds
            for n in lengths[own]
        ]
    if grid == "search":  # at the cost of SIM, by cost_search.jsonl
        lengths = {key: round(4 * epochs / STEPS[key]["ratio"]) for key in SEARCHED.items()}
        return [{"method": m, "sim_weight": w, "epochs": length} for (m, w), length in lengths.items()]
    if grid == "capacity":  # larger networks, for as long as a CPU can
        sizes, weights = {WIDE: 4 * epochs, "resnet18": epochs // 2}, (1.0, 0.0)
        cell = {"method": "simclr"}
        return [{**cell, "sim_weight": w, "epochs": e, "backbone": b} for b, e in sizes.items() for w in weights]
    raise ValueError(grid)


def of_cost(method: str, weight: float, epochs: int) -> int:
    """The epochs that cost as much as `epochs` of SIM; a plain end has the steps of its method."""
    ratio = STEPS[method.removesuffix("_plain_end"), weight]["ratio"]
    return epochs if ratio - 1 < NEAR else round(epochs / ratio)


def commit() -> str:
    """The last one that changed what trains or judges, with a + where files differ from it."""
    if not shutil.which("git"):
        return "unknown"
    found = []
    for words in (["log", "-1", "--format=%h"], ["status", "--porcelain"]):
        words = ["git", *words, "--", ":(glob)*.py", "methods", "eval", "training", "loading"]
        found.append(subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip())
    return found[0] + "+" * bool(found[1]) or "unknown"


def begin(out: Path, options, more: dict) -> dict:
    """What all cells in `out` have in common, written down at the first start and held to at every later one."""
    here = {"commit": commit(), "size": options.size, "dataset": options.dataset, "flags": more}
    file = out / "study.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write(file, lambda path: path.write_text(json.dumps(here, indent=2)))
    before = json.loads(file.read_text())
    for key in here:
        if before[key] != here[key]:
            sys.exit(
                f"study.py: --out {out}: was begun with {key} {before[key]}, and this is {here[key]}; go back to that, "
                "or name another folder"
            )
    return here


def name_of(cell: dict) -> str:
    """Of the cell's folder: what it is, in words that sort."""
    short, words = {"method": "", "sim_weight": "w", "epochs": "e"}, []
    for key, value in cell.items():
        words.append(f"{short.get(key, key)}{value:g}" if isinstance(value, float) else f"{short.get(key, key)}{value}")
    return "-".join(words)


def run(words: list[str], log: Path, threads: int, gpu=None, place: Path = ROOT) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, *words], env=environment, stdout=file, stderr=file, cwd=place)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: ended with {done.returncode}; {log} says why")


def flags_of(settings: dict) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def train_and_judge(cell: dict, folder: Path, options, more: dict, gpu) -> None:
    """Pretrain or resume the cell, and evaluate it by each protocol that has not yet been run."""
    log, start = folder.with_name(f"{folder.name}.log"), time.time()
    # Methods of benchmarks are known to their own file alone, which takes the same commands.
    program = {name: ["-m", f"eval.{name}"] for name in PROTOCOLS} | {"pretrain": ["bsim.py"]}
    for file, names in (("siblings", SIBLINGS), ("candidates", CANDIDATES), ("search", (*SEARCH, WIDE))):
        if cell["method"] in names or cell.get("backbone") in names:
            program = {name: [f"benchmarks/{file}.py", name] for name in program}
    given = {**SIZES[options.size], **cell, "dataset": options.dataset, "eval_every": 0, **more}
    if not (folder / "backbone.safetensors").exists():
        words = [*program["pretrain"], "--resume", "--out", str(folder), *flags_of(given)]
        run(words, log, options.threads, gpu)
    judged = {line["protocol"] for line in read_results(folder)}
    for protocol in [p for p in PROTOCOLS if p not in judged]:
        run([*program[protocol], "--run", str(folder)], log, options.threads, gpu)
    if time.time() - start > 1:
        print(f"{folder.name}: {time.time() - start:.0f} s", flush=True)


def without_training(out: Path, options, more: dict) -> None:
    """Judge random networks and raw pixels, each in a folder of its own, by the protocols that apply."""
    given = {"image_size": 32, **SIZES[options.size], **more}
    flags = {k: v for k, v in given.items() if k in ("split", "eval_split")}
    words = flags_of({"run": given["backbone"], "image_size": given["image_size"], "dataset": options.dataset, **flags})
    for seed in options.seeds:
        folder = out / f"random-seed{seed}"
        folder.mkdir(exist_ok=True)
        judged = {line["protocol"] for line in read_results(folder)}
        for protocol in [p for p in PROTOCOLS if p not in judged]:
            log = out / f"{folder.name}.log"
            run(["-m", f"eval.{protocol}", *words, "--seed", str(seed)], log, options.threads, None, folder)
    pixels = out / "pixels-seed0"
    pixels.mkdir(exist_ok=True)
    if not read_results(pixels):
        knn = next(line for line in read_results(folder) if line["protocol"] == "knn")
        settings = {"run": "pixels", "protocol": "features", "workers": 0, "seed": 0}
        parts = data.open_labelled(options.dataset, **flags, seed=0)
        network = Backbone(torch.nn.Flatten(), "pixels", int(given["image_size"]), pixels, {})
        metrics = from_features(Task(Accelerator(cpu=True), network, *parts, seed=0, workers=0, chosen={}))
        write_result(pixels, "linear", options.dataset, settings, metrics)
        write_result(pixels, "knn", options.dataset, settings, {"top1": knn["metrics"]["pixels_top1"]})


def line_of(folder: Path) -> dict:
    """What results.jsonl holds of a cell: its settings and every number that was measured of it."""
    metrics = {f"{label} {k}": v for label, (_, of) in results_of(folder).items() for k, v in of.items()}
    if not (folder / "config.json").exists():
        method, seed = folder.name.split("-seed")
        return {"cell": folder.name, "settings": {"method": method, "seed": int(seed)}, "metrics": metrics}
    settings = {k: v for k, v in config_of(folder).items() if k not in ("given", "out", "resume", "dataset")}
    return {"cell": folder.name, "settings": settings, "metrics": metrics}


def conclude(out: Path, options, commit: str) -> None:
    """results.jsonl of every finished cell there is; the findings; eval.compare's tables of the methods, by length."""
    folders = sorted(path.parent for path in out.glob("*-seed*/results.jsonl"))
    lines = [{**line_of(folder), "commit": commit} for folder in folders]
    write(out / "results.jsonl", lambda file: file.write_text("".join(json.dumps(x) + "\n" for x in lines)))
    text = report(lines)
    write(out / "findings.md", lambda file: file.write_text(text))
    write(out / "uniformity.png", lambda file: draw(file, lines))
    print(text)
    usual = {name_of(cell).rsplit("-e", 1)[0] for cell in cells_of("methods", options.best, 1)}
    for epochs in sorted({line["settings"]["epochs"] for line in lines if line["settings"].get("sim_weight") == 1}):
        names = [line["cell"] for line in lines if line["cell"].partition("-seed")[0].endswith(f"-e{epochs}")]
        names = [name for name in names if name.rsplit("-e", 1)[0] in usual]
        number = next(i for i in count(1) if not (out / f"compare-{i:03d}").exists())
        metrics = "knn top1,linear features top1,geometry uniformity,geometry embedding_uniformity"
        if names:
            compare(
                runs=",".join(str(out / name) for name in names),
                metrics=metrics,
                out=str(out / f"compare-{number:03d}"),
            )


def main():
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words = sys.argv[cut + 1 :]
    if len(words) % 2 or any(word.startswith("--") == i % 2 for i, word in enumerate(words)):
        sys.exit(
            f"study.py: after --: got {' '.join(words)}, want pairs of a flag and its value, as in --batch_size 128"
        )
    more = {name[2:]: value for name, value in zip(words[::2], words[1::2])}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="CIFAR-10: a folder with train.parquet and test.parquet")
    parser.add_argument("--out", required=True, help="the folder of the runs")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--epochs", type=int, help="in the place of the size's own")
    parser.add_argument(
        "--grids",
        nargs="+",
        default=["methods"],
        help="methods passes length mixtures siblings candidates controls cost few others search capacity",
    )
    parser.add_argument("--best", choices=METHODS, default="simclr", help="the method that gained most by `methods`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, help="runs at once; default: the GPUs, or the cores")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    options = parser.parse_args(sys.argv[1:cut])
    options.dataset, out = str(Path(options.dataset).resolve()), Path(options.out).resolve()
    here = begin(out, options, more)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible and torch.cuda.is_available() else range(torch.cuda.device_count())
    jobs, free = options.jobs or len(gpus) or os.cpu_count(), Queue()
    for job in range(jobs):
        free.put(gpus[job % len(gpus)] if gpus else None)
    epochs = options.epochs or SIZES[options.size]["epochs"]

    def one(cell):
        gpu = free.get()
        try:
            train_and_judge(cell, out / name_of(cell), options, more, gpu)
        finally:
            free.put(gpu)

    # Seed by seed: what is interrupted has whole tables of fewer seeds.
    base = {"method": None, "sim_weight": 1.0, "epochs": epochs}
    cells = [
        {**base, **cell, "seed": seed}
        for seed in options.seeds
        for grid in options.grids
        for cell in cells_of(grid, options.best, epochs)
    ]
    cells = {name_of(cell): cell for cell in cells}.values()  # two grids may share one
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, cells))
    without_training(out, options, more)
    conclude(out, options, here["commit"])


if __name__ == "__main__":
    main()
