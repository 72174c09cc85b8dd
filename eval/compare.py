"""Many runs in, one table out: means and spreads over seeds, and BSIM against SIM with its confidence interval.

python -m eval.compare --runs 'runs/study/*' --out runs/study-compared
"""

from eval.settings import Compare
from flags import answer, launch

if __name__ == "__main__":  # before what is slow to import
    answer(Compare, "eval.compare")

import glob
import math
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from eval.results import read_results, table, weights_of
from flags import Given, UserError, command
from training.folder import config_of, write, write_json, writing
from training.pictures import colour_of, marks
from training.settings import MIXTURES

# Of a run's settings and a result's, those that say nothing of what was trained or measured.
BESIDES = (
    "seed out resume given normal versions run log_with log_every checkpoint_every eval_every keep workers".split()
)
CHOSEN = "C accuracy_by_C costs".split()  # what a protocol chose itself
FEW = 3  # rows of settings that a refusal lists


def label(line: dict) -> str:
    """What a result is called: the protocol, and the variant where it has several."""
    settings, name = line["settings"], line["protocol"]
    if name == "semi":
        return f"semi {settings['percent']:g} %" if not settings.get("files") else "semi list"
    variant = {"linear": "protocol", "detect": "task"}.get(name)
    return f"{name} {settings[variant]}" if variant else name


def results_of(folder: Path) -> dict:
    """{label: (settings, metrics)} of the finished run in `folder`: of each, its last line."""
    found = {}
    for line in read_results(folder):
        settings, metrics = line.get("settings"), line.get("metrics")
        if not (isinstance(settings, dict) and isinstance(metrics, dict) and isinstance(line.get("protocol"), str)):
            raise UserError(
                f"--runs {folder}: a line of its results.jsonl has no protocol, settings or metrics "
                f"({str(line)[:60]}); delete it"
            )
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
        if wrong:
            raise UserError(
                f"--runs {folder}: {line['protocol']} {wrong[0]} is {numbers[wrong[0]]} in its results.jsonl; delete "
                "the line and evaluate again"
            )
        if not weights_of(settings.get("run"), settings.get("weights")):  # else a checkpoint, or another file
            found[label(line)] = {k: v for k, v in settings.items() if k not in (*BESIDES, *CHOSEN)}, numbers
    return found


def read_run(path: str) -> dict:
    """The run's settings, and what was measured of it."""
    folder = Path(path)
    config = config_of(folder, "--runs")
    if not (folder / "backbone.safetensors").exists():
        raise UserError(f"--runs {folder}: is not finished; resume it, or leave it out")
    if not {"method", "seed"} <= config.keys():
        raise UserError(f"--runs {folder}: its config.json has no method or no seed: this is no run of pretraining")
    return {"folder": folder, "config": config, "results": results_of(folder)}


def refuse_mixed(found: list[dict], by: list[str]) -> None:
    """Raise UserError where runs of one method differ in a setting that is neither in `by` nor the seed."""
    for one, two in combinations(found, 2):
        if one["config"]["method"] != two["config"]["method"]:
            continue
        pairs = [("", one["config"], two["config"])]
        for name in one["results"].keys() & two["results"].keys():
            pairs.append((f"{name}: ", one["results"][name][0], two["results"][name][0]))
        for where, a, b in pairs:
            # Its default follows sim_weight.
            beside = [*BESIDES, *by, *(["mix_until"] if a.get("sim_weight") != b.get("sim_weight") else [])]
            differ = [k for k in {**a, **b} if a.get(k) != b.get(k) and k not in beside]
            if differ:
                said = "; ".join(f"{where}{k} {a.get(k)} and {b.get(k)}" for k in differ[:FEW])
                raise UserError(
                    f"--runs: {one['folder']} and {two['folder']} differ in more than the seed ({said}); "
                    f"leave one out, or make rows of it: --by {','.join([*by, differ[0]])}"
                )
        if row_of(one, by) == row_of(two, by) and one["config"]["seed"] == two["config"]["seed"]:
            raise UserError(
                f"--runs: {one['folder']} and {two['folder']} have the same settings and seed; leave one out"
            )


def row_of(run: dict, by: list[str]) -> tuple:
    return tuple(run["config"].get(k) for k in by)


def values_of(found: list[dict], by: list[str]) -> dict:
    """{row: {metric: {seed: value}}}."""
    values: dict[tuple, dict] = {}
    for run in found:
        row = values.setdefault(row_of(run, by), {})
        for name, (_, metrics) in run["results"].items():
            for metric, value in metrics.items():
                row.setdefault(f"{name} {metric}", {})[run["config"]["seed"]] = value
    return values


def spread(values) -> dict:
    """Mean, standard deviation (None for one value), number."""
    values = np.array(list(values), dtype=float)
    return {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else None,
        "seeds": len(values),
    }


def paired(one: dict, two: dict) -> dict | None:
    """Two minus one over the seeds that both have, with its 95 % interval (Student's t, paired); None without seeds."""
    shared = sorted(one.keys() & two.keys())
    if not shared:
        return None
    found = spread(two[seed] - one[seed] for seed in shared)
    low, high = None, None
    if len(shared) > 1:
        half = student.ppf(0.975, len(shared) - 1) * found["std"] / len(shared) ** 0.5
        low, high = found["mean"] - half, found["mean"] + half
    return {"difference": found["mean"], "low": low, "high": high, "seeds": len(shared)}


def against_sim(values: dict, by: list[str]) -> list[dict]:
    """BSIM, and SIM with BSIM, minus SIM: each row whose sim_weight is below 1, with the row that is else the same."""
    at, found = by.index("sim_weight"), []
    for row, metrics in values.items():
        plain = (*row[:at], 1.0, *row[at + 1 :])
        others = [r for r in values if r[at] == 1 and all(a == b or k in MIXTURES for a, b, k in zip(r, plain, by))]
        if row[at] == 1 or not others:
            continue
        for metric, of_seeds in metrics.items():
            difference = paired(values[others[0]].get(metric, {}), of_seeds)
            if difference:
                found.append({"row": dict(zip(by, row)), "metric": metric, **difference})
    return found


def draw(path: Path, values: dict, by: list[str], metrics: list[str]) -> None:
    """A panel a metric, a line a row of the table: a dot a seed, a bar at the mean."""
    rows = sorted(values, key=str)
    figure = Figure(figsize=(1.8 + 3.0 * len(metrics), 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axis, metric in zip(axes, metrics):
        for i, row in enumerate(rows):
            colour = colour_of(row[by.index("sim_weight")])
            seen = list(values[row].get(metric, {}).values())
            axis.plot(seen, [i] * len(seen), "o", color=colour, markersize=5, alpha=0.6, markeredgewidth=0)
            if seen:
                axis.plot([np.mean(seen)] * 2, [i - 0.3, i + 0.3], color=colour, linewidth=2)
        axis.set_title(metric, fontsize=10)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x", linewidth=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    names = [", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in row) for row in rows]
    axes[0].set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.4, -0.6))
    axes[0].set_ylabel(", ".join(by))
    figure.legend(handles=marks(axes[0]), loc="outside lower center", ncols=3, frameon=False)
    write(path, lambda file: figure.savefig(file, format="png", dpi=110))


@command(Compare)
def compare(s: Compare, given: Given) -> Path:
    patterns = [word.strip() for word in s.runs.split(",") if word.strip()]
    folders = sorted({path for word in patterns for path in glob.glob(word)}, key=str)
    folders = [path for path in folders if Path(path, "config.json").exists() or "*" not in s.runs]
    if not folders:
        raise UserError(f"--runs {s.runs or '(nothing)'}: no run there; want folders of finished runs")
    rows = [word.strip() for word in s.by.split(",") if word.strip()]
    if "sim_weight" not in rows:
        raise UserError(f"--by {s.by}: want sim_weight among them, or SIM and BSIM would be averaged")
    found = [read_run(path) for path in folders]
    for name in rows:
        if not all(name in run["config"] for run in found):
            raise UserError(f"--by {name}: is no setting of {found[0]['folder']}")
    rows = (["method"] if "method" not in rows else []) + rows
    refuse_mixed(found, rows)
    values = values_of(found, rows)
    every = list(dict.fromkeys(metric for row in values.values() for metric in row))
    if not every:
        raise UserError(
            f"--runs {s.runs}: no results there; evaluate them first, as in python -m eval.knn --run {folders[0]}"
        )
    shown = (
        [word.strip() for word in s.metrics.split(",")]
        if s.metrics
        else [m for m in every if m.endswith("top1")] or every
    )
    for metric in shown:
        if metric not in every:
            raise UserError(f"--metrics {metric}: was not measured; there are {', '.join(every)}")
    place = _free_place(s.out)
    differences = against_sim(values, rows)
    text = f"{_means(values, rows, shown)}\n\n{_differences(differences, rows, shown)}"
    listed = [{**dict(zip(rows, row)), **{m: spread(v.values()) for m, v in of.items()}} for row, of in values.items()]
    with writing(place):
        place.mkdir(parents=True)
    write(place / "compare.md", lambda file: file.write_text(text + "\n"))
    write_json(place / "compare.json", {"runs": folders, "rows": listed, "against_sim": differences})
    draw(place / "compare.png", values, rows, shown)
    print(f"{text}\n\nwritten to {place}: compare.md, compare.json, compare.png")
    return place


def _free_place(out) -> Path:
    if out is None:
        number = 1
        while Path("runs", f"compare-{number:03d}").exists():
            number += 1
        return Path("runs", f"compare-{number:03d}")
    if Path(out).exists():
        raise UserError(f"--out {out}: exists; name a folder that does not")
    return Path(out)


def _means(values, by, metrics) -> str:
    """Mean and standard deviation over the seeds, whose number is the last column."""
    rows = []
    for row in sorted(values, key=str):
        found = [spread(values[row][m].values()) if m in values[row] else None for m in metrics]
        counts = sorted({x["seeds"] for x in found if x})
        shown = [
            f"{x['mean']:.2f}" + (f" ± {x['std']:.2f}" if x["std"] is not None else "") if x else "" for x in found
        ]
        rows.append([*map(str, row), *shown, " to ".join(map(str, counts[:1] + counts[1:][-1:]))])
    return table(rows, [*by, *metrics, "seeds"])


def _differences(differences, by, metrics) -> str:
    """Each minus SIM with the same seeds: mean, and its 95 % interval."""
    rows: dict[tuple, dict] = {}
    for found in differences:
        interval = f"({found['low']:+.2f} to {found['high']:+.2f})" if found["low"] is not None else "(one seed)"
        rows.setdefault(tuple(found["row"].values()), {})[found["metric"]] = f"{found['difference']:+.2f} {interval}"
    head = "Minus plain SIM, paired by seed, with the 95 % interval of the mean:\n\n"
    listed = [[*map(str, row), *(rows[row].get(m, "") for m in metrics)] for row in sorted(rows, key=str)]
    return head + table(listed, [*by, *metrics]) if rows else "No SIM run (sim_weight 1) to compare with."


if __name__ == "__main__":
    launch(compare, "eval.compare")
