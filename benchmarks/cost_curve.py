"""Accuracy against what it costs: SIM, SIM with a third plain view, half SIM, half BSIM, and pure BSIM.

    python benchmarks/cost_curve.py [RESULTS.jsonl ...] [--method moco] --out docs/cost.png

Reads the lines that study.py leaves (default: those in benchmarks/results), prints a table, and draws k-NN, linear and
five labels a class: means over the seeds, and a band of one standard deviation. A cost is in epochs of SIM, as
findings.py has it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from findings import MORE_PASSES, NEAR, RESULTS, cost_of, difference, digits_of, lines_of  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import NullLocator, ScalarFormatter  # noqa: E402

from eval.compare import spread  # noqa: E402
from eval.results import table  # noqa: E402
from training.folder import write  # noqa: E402
from training.pictures import BOTH, BSIM, OTHER, SIM  # noqa: E402

# Of a cell in two files the later is shown.
FILES = ("small.jsonl", "length.jsonl", "candidates.jsonl", "cost_curve.jsonl")
DEFAULT = [RESULTS / name for name in FILES if (RESULTS / name).exists()]
METRICS = {"knn top1": "k-NN", "linear features top1": "linear", "knn five_labels": "five labels a class"}
COLOURS = {"SIM": SIM, "SIM, third view": OTHER, "half SIM, half BSIM": BOTH, "BSIM": BSIM, "BSIM, plain end": BSIM}


def kind_of(settings: dict, method: str) -> str | None:
    """The kind of a cell of `method`; None for other cells."""
    name, weight = settings["method"], settings.get("sim_weight")
    if name == f"{method}_third":
        return "SIM, third view"
    if method == "simclr":  # its default has a plain end and passes apart; the candidate became it
        if name == "simclr_apart_plain_end":
            return "BSIM"
        if name == "simclr" and weight == 0 and settings.get("mix_until", 1) == 1:
            return None
    if name == f"{method}_plain_end" and method != "simclr":
        return "BSIM, plain end"
    return {1.0: "SIM", 0.5: "half SIM, half BSIM", 0.0: "BSIM"}.get(weight) if name == method else None


def points_of(lines: list[dict], method: str = "simclr") -> dict:
    """{kind: [(cost, epochs, {metric: {seed: value}}), ...] by epochs}."""
    cells = {}
    for line in lines:
        kind = kind_of(line["settings"], method)
        if kind:
            cells[kind, line["settings"]["epochs"], line["settings"]["seed"]] = line["metrics"]
    found: dict[str, dict] = {kind: {} for kind in COLOURS}
    for (kind, epochs, seed), metrics in cells.items():
        values = found[kind].setdefault(epochs, {})
        for metric, value in metrics.items():
            values.setdefault(metric, {})[seed] = value
    # A step of a plain end is one of its method.
    steps = {"SIM": (method, 1.0), "SIM, third view": (f"{method}_third", 0.5), "half SIM, half BSIM": (method, 0.5)}
    heads = {kind: dict(zip(("method", "sim_weight"), steps.get(kind, (method, 0.0)))) for kind in COLOURS}
    return {
        kind: [(cost_of({**heads[kind], "epochs": epochs}), epochs, values) for epochs, values in sorted(of.items())]
        for kind, of in found.items()
        if of
    }


def at_cost(points: list, cost: float) -> dict:
    """The metrics of the point of this cost; nothing where there is none."""
    near = [(abs(own / cost - 1), values) for own, _, values in points]
    best = min(near, key=lambda pair: pair[0], default=(1, {}))
    return best[1] if best[0] < NEAR else {}


def rows_of(found: dict) -> str:
    rows, plain, third = [], found.get("SIM", []), found.get("SIM, third view", [])
    for kind, points in found.items():
        for cost, epochs, values in points:
            row = [kind, str(epochs), f"{cost:.0f}"]
            for metric in METRICS:
                of = spread(values[metric].values()) if metric in values else None
                deviation = f" ± {of['std']:.1f} ({of['seeds']})" if of and of["std"] is not None else ""
                row.append(f"{of['mean']:.{digits_of(metric)}f}{deviation}" if of else "")
                for name, others in (("SIM", plain), ("SIM, third view", third)):
                    row.append("" if kind in ("SIM", name) else difference(at_cost(others, cost), values, metric))
            rows.append(row)
    head = [word for metric in METRICS.values() for word in (f"{metric} (seeds)", "- SIM", "- third view")]
    return table(rows, ["", "epochs", "cost", *head])


def draw(path: Path, found: dict) -> None:
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, len(METRICS))
    for axis, (metric, name) in zip(axes, METRICS.items()):
        for kind, points in found.items():
            shown = [(cost, spread(values[metric].values())) for cost, _, values in points if metric in values]
            costs, middle = [cost for cost, _ in shown], [of["mean"] for _, of in shown]
            wide, colour = [of["std"] or 0 for _, of in shown], COLOURS[kind]
            axis.plot(costs, middle, "o:" if "end" in kind else "o-", color=colour, markersize=4, label=kind)
            low, high = ([m + sign * w for m, w in zip(middle, wide)] for sign in (-1, 1))
            axis.fill_between(costs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        axis.set_xticks([cost for cost, _, _ in found.get("SIM", [])])
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("cost, in epochs of SIM")
        axis.set_title(name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("top-1 (%)")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, default=DEFAULT)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", choices=MORE_PASSES, default="simclr")
    options = parser.parse_args()
    lines = [line for file in options.results for line in lines_of(file)]
    for key in ("backbone", "split"):
        values = sorted({line["settings"][key] for line in lines if key in line["settings"]})
        if len(values) > 1:
            sys.exit(f"cost_curve.py: the results are of {key} {' and '.join(values)}; give those of one {key}")
    found = points_of(lines, options.method)
    print(rows_of(found))
    draw(options.out, found)


if __name__ == "__main__":
    main()
