"""What the study's cells say: means over seeds, differences from SIM with their intervals, uniformity against accuracy.

    python benchmarks/findings.py runs/study/results.jsonl --out runs/findings

A file is what benchmarks/study.py leaves: a line a cell; several are read as one. A cost is what results/cost.jsonl and
cost_search.jsonl hold of a step, over SIM's, times the epochs: 120 is SIM of 120 epochs.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

from eval.compare import paired, spread  # noqa: E402
from eval.results import table  # noqa: E402
from training.pictures import colour_of, marks  # noqa: E402

METRICS = {
    "knn top1": "k-NN",
    "linear features top1": "linear",
    "geometry uniformity": "uniformity",
    "geometry embedding_uniformity": "of embeddings",
    "geometry alignment": "alignment",
}
JUDGED = ("knn top1", "linear features top1")
EVENNESS = ("geometry uniformity", "geometry embedding_uniformity")
COMPARED = (*JUDGED, *EVENNESS)
COLUMNS = {
    "SIM": COMPARED,
    "usual": JUDGED,
    "BSIM": JUDGED,
    "SIM apart": JUDGED,
}  # metrics whose differences from these cells are shown
SETTINGS = ("method", "sim_weight", "epochs", "backbone", "mix", "alpha", "per_sample", "temperature")
FIXED = ("split", "image_size", "batch_size", "mixed_precision", "mix_until")  # one value in a row
BEFORE = {"mix_until": 1.0}  # of lines from before the flag
USUAL = {"mix": "cutmix", "alpha": 1.0, "per_sample": True, "temperature": 0.2}  # the defaults for small images
# Encoder passes of an image in a step: what half SIM, half BSIM pays more than SIM (methods/*.py).
MORE_PASSES = {"simclr": 3 / 2, "moco": 3 / 2, "mocov3": 6 / 4, "byol": 6 / 4, "simsiam": 4 / 2}
RESULTS = Path(__file__).parent / "results"
COSTS = [RESULTS / "cost_search.jsonl", RESULTS / "cost.jsonl"]  # of a step in both the later is shown
SMALL = "resnet_tiny"  # the network that steps were measured of, and of lines that name none
NEAR = 0.06  # costs that differ by less are equal
MARKS = {"simclr": "o", "moco": "s", "mocov3": "v", "byol": "^", "simsiam": "D"}


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# {(method, sim_weight): a line of cost.py}, measured in the study's own setting.
STEPS = {(line["method"], line["sim_weight"]): line for file in COSTS if file.exists() for line in lines_of(file)}


def group_of(line: dict) -> tuple:
    settings = {"backbone": SMALL, **line["settings"]}
    return tuple(settings.get(k) for k in SETTINGS)


def groups_of(lines: list[dict]) -> dict:
    """{settings: {metric: {seed: value}}}: cells that differ in the seed alone."""
    groups = {}
    for line in lines:
        group = groups.setdefault(group_of(line), {})
        for metric, value in line["metrics"].items():
            group.setdefault(metric, {})[line["settings"]["seed"]] = value
    return groups


def refuse_mixed(lines: list[dict]) -> None:
    """Exit where cells would be read as seeds of one row but differ in more than the seed."""
    seen = {}
    for line in lines:
        group = group_of(line)
        for key in FIXED:
            value = line["settings"].get(key, BEFORE.get(key))
            first = seen.setdefault((group, key), value)
            if value != first:
                cell = line["cell"].partition("-seed")[0]
                sys.exit(f"findings.py: {cell} stands there with {key} {first} and with {value}; give files of one")


def base_of(settings: dict) -> str:
    """The method to compare with: its own, and MoCo for a sibling."""
    own = settings["method"].partition("_")[0]  # a candidate is called after its method, simclr_apart
    return own if own in MORE_PASSES else "moco"


def plain_of(settings: dict, groups: dict, long_enough) -> tuple | None:
    """The group of plain SIM to compare `settings` with. long_enough(epochs): which length."""
    for other in groups:
        found = dict(zip(SETTINGS, other))
        alike = all(found[k] == settings[k] for k in ("backbone", "temperature"))
        if alike and found["method"] == base_of(settings) and found["sim_weight"] == 1 and long_enough(found["epochs"]):
            return other
    return None


def cost_of(settings: dict) -> float | None:
    """In epochs of SIM; None for a step that was not measured."""
    if settings.get("backbone", SMALL) != SMALL:
        return None
    step = STEPS.get((settings["method"], settings["sim_weight"]))
    return step and step["ratio"] * settings["epochs"]


def words_of(settings: dict) -> list[str]:
    """A row's head: method and network, sim_weight, what is not the default, epochs, cost, passes."""
    shown = [k for k in USUAL if settings[k] not in (USUAL[k], None)]
    shown = [k for k in shown if settings["sim_weight"] < 1 or k == "temperature"]  # SIM has no mixture
    other = ", ".join(f"{k} {settings[k]}" for k in shown)
    step, cost = STEPS.get((settings["method"], settings["sim_weight"])), cost_of(settings)
    passes = "{:g} + {:g}".format(*step["passes"]) if step else ""
    own = settings["method"] + (f", {settings['backbone']}" if settings["backbone"] != SMALL else "")
    head = [own, f"{settings['sim_weight']:g}", other, str(settings["epochs"])]
    return [*head, "" if cost is None else f"{cost:.0f}", passes]


def digits_of(metric: str) -> int:
    return 1 if metric.startswith(("knn ", "linear ")) else 2


def difference(one: dict, two: dict, metric: str) -> str:
    found, digits = paired(one.get(metric, {}), two.get(metric, {})), digits_of(metric)
    if found is None:
        return ""
    if found["low"] is None:
        return f"{found['difference']:+.{digits}f} (one seed)"
    return f"{found['difference']:+.{digits}f} ({found['low']:+.{digits}f} to {found['high']:+.{digits}f})"


def means(groups: dict, chosen, **versus) -> str:
    """A row a group of `chosen`: mean ± standard deviation, and its differences from the groups that `versus` name."""
    rows = []
    for group in chosen:
        settings, values = dict(zip(SETTINGS, group)), groups[group]
        row = words_of(settings)
        for metric in METRICS:
            found = spread(values[metric].values()) if metric in values else None
            digits = digits_of(metric)
            deviation = f" ± {found['std']:.{digits}f}" if found and found["std"] is not None else ""
            row.append(f"{found['mean']:.{digits}f}{deviation}" if found else "")
        row.append(str(max(len(of) for of in values.values())))
        for name, found in versus.items():
            other = found(settings)
            row += [difference(groups[other], values, m) if other not in (None, group) else "" for m in COLUMNS[name]]
        rows.append(row)
    compared = [f"{METRICS[metric]} - {name}" for name in versus for metric in COLUMNS[name]]
    return table(
        rows, ["method", "sim_weight", "else", "epochs", "cost", "passes", *METRICS.values(), "seeds", *compared]
    )


def ranks(lines: list[dict]) -> str:
    """Spearman's rank correlation of uniformity with accuracy over cells: of each method, and of all together.

    The mean of each method, length and network is taken away first, so that none of them counts.
    """
    rows, methods = [], {line["settings"]["method"] for line in lines}
    for name in [*(m for m in MORE_PASSES if m in methods), "all"]:
        parts = {}
        for line in lines:
            if name in ("all", line["settings"]["method"]):
                found = dict(zip(SETTINGS, group_of(line)))
                part = parts.setdefault(tuple(found[k] for k in ("method", "epochs", "backbone")), [])
                part.append([line["metrics"].get(k, np.nan) for k in COMPARED])
        values = np.concatenate([np.array(part) - np.mean(part, 0) for part in parts.values()])
        row = [name, str(len(values))]
        for uniformity in EVENNESS:
            for metric in JUDGED:
                pair = values[:, [COMPARED.index(uniformity), COMPARED.index(metric)]]
                found = spearmanr(*pair.T) if len(values) > 3 and np.isfinite(pair).all() else None
                row.append(f"{found.statistic:+.2f} (p {found.pvalue:.2g})" if found else "")
        rows.append(row)
    of = [f"{METRICS[m]}, {u}" for u in ("of features", "of embeddings") for m in JUDGED]
    return table(rows, ["method", "cells", *of])


def draw(path: Path, lines: list[dict]) -> None:
    """Accuracy against uniformity: of the backbone's features and of the projector's embeddings, a mark a cell."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric in zip(axes, EVENNESS):
        for line in lines:
            method, weight, values = line["settings"]["method"], line["settings"].get("sim_weight"), line["metrics"]
            if method in MARKS and metric in values:
                look = dict(color=colour_of(weight), markersize=5, alpha=0.7)
                axis.plot(values[metric], values["knn top1"], MARKS[method], **look)
        axis.set_xlabel(f"uniformity {METRICS[metric] if 'embedding' in metric else 'of features'} (lower: more even)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("k-NN top-1 (%)")
    shown = marks(axes[1])
    shown += [axes[1].plot([], [], mark, color="gray", label=name)[0] for name, mark in MARKS.items()]
    figure.legend(handles=shown, loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, format="png", dpi=110)


def report(lines: list[dict]) -> str:
    """Every table, as Markdown."""
    baselines = [line for line in lines if line["settings"]["method"] in ("pixels", "random")]
    lines = [line for line in lines if line not in baselines]
    groups = groups_of(lines)
    as_settings = {group: dict(zip(SETTINGS, group)) for group in groups}
    order = list(MORE_PASSES)

    def usual(s):
        return s["method"] in order and not words_of(s)[2]

    def sort(chosen):
        def key(group):
            s = as_settings[group]
            place = order.index(s["method"]) if s["method"] in order else 9
            return place, s["method"], s["epochs"], -s["sim_weight"], str(group)

        return sorted(chosen, key=key)

    def same_steps(s):
        return plain_of(s, groups, lambda epochs: epochs == s["epochs"])

    def same_cost(s):
        """SIM of as many epochs, or else of the same cost."""
        cost = cost_of(s)
        return same_steps(s) or cost and plain_of(s, groups, lambda epochs: abs(cost / epochs - 1) < NEAR)

    def sim_apart(s):
        """The control of mixtures that go through the network apart."""
        cost, wanted = cost_of(s), f"{base_of(s)}_sim_apart"
        costs = {g: cost_of(o) for g, o in as_settings.items() if cost and o["method"] == wanted}
        return next((g for g, own in costs.items() if own and abs(cost / own - 1) < NEAR), None)

    def same_passes(s):
        return plain_of(s, groups, lambda epochs: round(epochs / MORE_PASSES[s["method"]]) == s["epochs"])

    def as_usual(s):
        wanted = (base_of(s), s["sim_weight"], s["epochs"], s["backbone"])
        return next((g for g in plain if g[: len(wanted)] == wanted), None)  # SETTINGS begins with these

    def pure_beside(s):
        """Pure BSIM of as many epochs as the SIM of as many passes."""
        return as_usual({**s, "sim_weight": 0, "epochs": as_settings[same_passes(s)]["epochs"]})

    lengths = {as_settings[g]["epochs"] for g in groups if as_settings[g]["sim_weight"] == 1}
    plain = [g for g, s in as_settings.items() if usual(s) and s["epochs"] in lengths]
    halves = [g for g, s in as_settings.items() if usual(s) and 0 < s["sim_weight"] < 1 and same_passes(s)]
    text = ["### SIM, both and BSIM, at equal steps", means(groups, sort(plain), SIM=same_steps)] if plain else []
    if baselines:
        rows = []
        for name in ("pixels", "random"):
            seen = [line["metrics"] for line in baselines if line["settings"]["method"] == name]
            columns = {metric: [c[metric] for c in seen if metric in c] for metric in METRICS}
            shown = [f"{sum(v) / len(v):.{digits_of(k)}f}" if v else "" for k, v in columns.items()]
            rows.append([name, *shown, str(len(seen))])
        text += ["### Without training", table(rows, ["", *METRICS.values(), "seeds"])]
    if halves:
        shown = means(groups, sort(halves), SIM=same_passes, BSIM=pure_beside)
        text += ["### Both, at as many encoder passes as SIM", shown]
    others = [g for g, s in as_settings.items() if not usual(s) and s["method"] in order]
    if others:
        text += ["### Other mixtures and temperatures", means(groups, sort(others), SIM=same_steps, usual=as_usual)]
    siblings = [g for g, s in as_settings.items() if s["method"] not in order]
    if siblings:
        text += [
            "### Siblings and candidates, against the SIM of their method",
            means(groups, sort(siblings), SIM=same_cost, usual=as_usual, **{"SIM apart": sim_apart}),
        ]
    compared = [line for line in lines if group_of(line) in plain]
    if compared:
        text += ["### Does accuracy follow uniformity? Spearman's rank correlation over the cells of the first table"]
        text += ["Within methods and lengths: the mean of each is taken away first.", ranks(compared)]
    return "\n\n".join(text) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", help="a folder for findings.md and uniformity.png")
    options = parser.parse_args()
    lines = [line for file in options.results for line in lines_of(file)]
    refuse_mixed(lines)
    text = report(lines)
    print(text)
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "findings.md").write_text(text)
        draw(out / "uniformity.png", lines)


if __name__ == "__main__":
    main()
