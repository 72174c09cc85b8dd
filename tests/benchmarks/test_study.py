"""benchmarks/study.py: which cells there are, that none is run twice, and what is concluded from their results."""

import json
import re
import sys
from pathlib import Path

import pytest
from scipy import stats

from eval.results import write_result
from methods import METHODS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cost_curve  # noqa: E402
import findings  # noqa: E402
import study  # noqa: E402
from candidates import CANDIDATES  # noqa: E402

KNN = {1.0: (40.0, 41.0, 45.0), 0.5: (42.0, 42.5, 48.0), 0.0: (39.0, 43.0, 44.0)}


def judged(folder: Path, config: dict, knn: float) -> None:
    folder.mkdir(parents=True)
    usual = {"mix": "cutmix", "alpha": 1.0, "per_sample": True, "temperature": 0.2}
    (folder / "config.json").write_text(json.dumps({**usual, **config, "given": {"x": 1}, "out": str(folder)}))
    (folder / "backbone.safetensors").write_bytes(b"")
    write_result(folder, "knn", "cifar", {"run": str(folder)}, {"top1": knn})
    write_result(folder, "linear", "cifar", {"run": str(folder), "protocol": "features"}, {"top1": knn + 5})
    geometry = {"uniformity": -knn / 10, "alignment": 0.3, "embedding_uniformity": knn / -20}
    write_result(folder, "geometry", "cifar", {"run": str(folder)}, geometry)


@pytest.fixture
def cells(place):
    out = place / "study"
    for seed in range(3):
        for weight, values in KNN.items():
            cell = {"method": "moco", "sim_weight": weight, "epochs": 30, "seed": seed}
            judged(out / study.name_of(cell), cell, values[seed])
        fewer = {"method": "moco", "sim_weight": 0.5, "epochs": 20, "seed": seed}
        judged(out / study.name_of(fewer), fewer, KNN[1.0][seed] + 2 + seed)
        sibling = {"method": "imix", "sim_weight": 0.5, "epochs": 30, "seed": seed, "mix": "mixup"}
        judged(out / study.name_of(sibling), sibling, KNN[1.0][seed] - 1 - seed)
    for seed in range(2):
        (out / f"random-seed{seed}").mkdir()
        write_result(out / f"random-seed{seed}", "knn", "cifar", {"run": "resnet_tiny"}, {"top1": 20.0 + seed})
    return out


def test_the_grids_are_those_that_the_claims_need():
    everything = {grid: study.cells_of(grid, "moco", 30) for grid in "methods passes length mixtures siblings".split()}
    methods = {(cell["method"], cell["sim_weight"]) for cell in everything["methods"]}
    assert methods == {(m, w) for m in METHODS for w in (1, 0.5, 0)}
    assert {cell["method"]: cell["epochs"] for cell in everything["passes"]} == {
        "simclr": 20, "moco": 20, "mocov3": 20, "byol": 20, "simsiam": 15,
    }  # fmt: skip
    assert {cell["epochs"] for cell in everything["length"]} == {120, 80}
    assert {cell["method"] for cell in everything["length"]} == {"simclr", "moco"}
    kinds = [{k: v for k, v in cell.items() if k not in ("method", "sim_weight")} for cell in everything["mixtures"]]
    for kind in ({"alpha": 0.2}, {"alpha": 2.0}, {"mix": "mixup"}, {"mix": "either"}, {"per_sample": False}):
        assert kind in kinds
    cost = {(cell["method"], cell["sim_weight"], cell["epochs"]) for cell in study.cells_of("cost", "moco", 30)}
    assert cost == {
        *((m, w, e) for m, w in (("simclr", 1.0), ("simclr", 0.0)) for e in (30, 60, 120, 240)),
        *((m, 0.5, e) for m in ("simclr", "simclr_third") for e in (20, 40, 80, 160)),
    }
    controls = {(cell["method"], cell["epochs"]) for cell in study.cells_of("controls", "moco", 30)}
    assert controls == {(f"{m}_third", e) for m in ("simclr", "moco", "byol") for e in (120, 80)}
    for cell in study.cells_of("search", "moco", 30):
        ratio = study.STEPS[cell["method"], cell["sim_weight"]]["ratio"]
        assert cell["epochs"] * ratio == pytest.approx(120, abs=ratio)
    few = {(cell["method"], cell["sim_weight"], cell["epochs"]) for cell in study.cells_of("few", "moco", 30)}
    assert few == {(m, w, 5 * e) for m, w, e in cost if e in (80, 120, 160, 240)}
    others = study.cells_of("others", "moco", 30)
    assert len(others) == 2 * 5 + 5 + 4  # MoCo twice as long too; SimSiam has no third view
    for cell in others:
        step = cell["method"].removesuffix("_plain_end"), cell["sim_weight"]
        cost = study.STEPS[step]["ratio"] * cell["epochs"]
        assert min(abs(cost / length - 1) for length in (120, 240)) < findings.NEAR
        assert cell["method"] in METHODS or cell["method"] in CANDIDATES
    assert {CANDIDATES[name].Method.mix_until for name in study.PLAIN_ENDS} == {0.75}
    capacity = {(c["backbone"], c["sim_weight"], c["epochs"]) for c in study.cells_of("capacity", "moco", 30)}
    assert capacity == {(b, w, e) for b, e in (("resnet_tiny_wide", 120), ("resnet18", 15)) for w in (1, 0)}
    for cells in everything.values():
        assert len({study.name_of(cell) for cell in cells}) == len(cells)


def test_what_is_done_is_not_done_again(place, monkeypatch):
    commands = []

    def run(words, log, *_):
        commands.append(words)
        folder = Path(words[words.index("--out" if "--out" in words else "--run") + 1])
        if "--out" in words:
            folder.mkdir()
            (folder / "backbone.safetensors").write_bytes(b"")
        elif "eval.linear" in words:  # the one cell of bsim.py never ends
            raise SystemExit("interrupted")
        else:
            write_result(folder, words[1].removeprefix("eval."), "d", {}, {})

    monkeypatch.setattr(study, "run", run)
    options = type("Options", (), {"size": "small", "dataset": "d", "threads": 1})
    cell = {"method": "moco", "sim_weight": 0.5, "epochs": 30, "seed": 1}
    with pytest.raises(SystemExit, match="interrupted"):
        study.train_and_judge(cell, place / "cell", options, {"epochs": 2}, None)
    assert [words[:2] for words in commands] == [["bsim.py", "--resume"], ["-m", "eval.knn"], ["-m", "eval.linear"]]
    assert " ".join(commands[0]).endswith(
        "--split train[:5000] --backbone resnet_tiny --epochs 2 --mixed_precision bf16 "
        "--method moco --sim_weight 0.5 --seed 1 --dataset d --eval_every 0"
    )
    commands.clear()
    with pytest.raises(SystemExit, match="interrupted"):
        study.train_and_judge(cell, place / "cell", options, {}, None)
    assert [words[:2] for words in commands] == [["-m", "eval.linear"]]
    commands.clear()
    wide = {"method": "simclr", "sim_weight": 0.0, "epochs": 30, "backbone": "resnet_tiny_wide", "seed": 1}
    study.train_and_judge(wide, place / "wide", options, {}, None)  # known to search.py alone
    assert [words[:2] for words in commands] == [["benchmarks/search.py", w] for w in ("pretrain", *study.PROTOCOLS)]
    assert "--backbone resnet_tiny_wide" in " ".join(commands[0])


def test_a_folder_holds_cells_of_one_kind(place, monkeypatch):
    options = type("Options", (), {"size": "small", "dataset": "d"})
    monkeypatch.setattr(study, "commit", lambda: "abc1234")
    assert study.begin(place / "new", options, {}) == study.begin(place / "new", options, {})
    with pytest.raises(
        SystemExit, match=r"begun with flags \{\}, and this is \{'batch_size': '32'\}; .* another folder"
    ):
        study.begin(place / "new", options, {"batch_size": "32"})
    monkeypatch.setattr(study, "commit", lambda: "def5678")
    with pytest.raises(SystemExit, match="begun with commit abc1234, and this is def5678"):
        study.begin(place / "new", options, {})


def test_differences_are_from_sim_at_equal_steps_and_at_equal_passes(cells):
    text = findings.report([study.line_of(path.parent) for path in sorted(cells.glob("*/results.jsonl"))])
    sections = dict(part.split("\n\n", 1) for part in text.split("### ")[1:])
    rows = {title: [[w.strip() for w in r.split("|")[1:-1]] for r in body.splitlines() if r.startswith("|")]
            for title, body in sections.items()}  # fmt: skip

    def interval(values, plain=KNN[1.0]):
        gains = [a - b for a, b in zip(values, plain)]
        low, high = stats.t.interval(0.95, 2, loc=sum(gains) / 3, scale=stats.sem(gains))
        return f"{sum(gains) / 3:+.1f} ({low:+.1f} to {high:+.1f})"

    by_weight = {row[1]: row for row in rows["SIM, both and BSIM, at equal steps"][2:]}
    assert by_weight.keys() == {"1", "0.5", "0"}
    assert by_weight["0.5"][6] == f"{132.5 / 3:.1f} ± {stats.tstd(KNN[0.5]):.1f}" and by_weight["0.5"][11] == "3"
    assert by_weight["1"][12:] == [""] * 4 and by_weight["0.5"][12:14] == [interval(KNN[0.5])] * 2
    assert by_weight["0"][12] == interval(KNN[0.0])
    (passes,) = rows["Both, at as many encoder passes as SIM"][2:]
    fewer = [v + 2 + i for i, v in enumerate(KNN[1.0])]
    assert passes[:4] == ["moco", "0.5", "", "20"]
    assert passes[12] == interval(fewer) and passes[16] == interval(fewer, KNN[0.0])
    (sibling,) = rows["Siblings and candidates, against the SIM of their method"][2:]
    assert sibling[:4] == ["imix", "0.5", "mix mixup", "30"]
    theirs = [v - 1 - i for i, v in enumerate(KNN[1.0])]
    assert sibling[12] == interval(theirs) and sibling[16] == interval(theirs, KNN[0.5])
    assert rows["Without training"][-1][:2] == ["random", "20.5"] and rows["Without training"][-1][-1] == "2"
    ranks = next(
        row
        for row in rows[
            "Does accuracy follow uniformity? Spearman's rank correlation over the cells of the first table"
        ]
        if row[0] == "moco"
    )
    assert ranks[1] == "9" and ranks[2].startswith("-1.00 ")  # uniformity is -k-NN / 10 there
    assert by_weight["0.5"][14] == "-0.22 (-0.41 to -0.03)"


def test_a_method_without_temperature_is_compared_with_its_usual_mixture():
    lines = []
    for seed, (usual, other) in enumerate([(30.0, 32.0), (31.0, 34.0), (33.0, 35.0)]):
        for weight, mix, value in ((1.0, "cutmix", 20.0), (0.5, "cutmix", usual), (0.5, "mixup", other)):
            settings = {"method": "byol", "sim_weight": weight, "epochs": 30, "mix": mix, "seed": seed}
            settings |= {"alpha": 1.0, "per_sample": True}
            lines.append({"cell": f"{mix}{weight}", "settings": settings, "metrics": {"knn top1": value}})
    (row,) = [row for row in findings.report(lines).splitlines() if "mix mixup" in row]
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([2, 3, 2]))
    assert row.split("|")[-3].strip() == f"+2.3 ({low:+.1f} to {high:+.1f})"


@pytest.mark.pictures
def test_the_study_leaves_its_results_findings_and_tables(cells, capsys):
    study.conclude(cells, type("Options", (), {"best": "moco"}), "abc1234")
    lines = [json.loads(line) for line in (cells / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 17 and all("given" not in line["settings"] for line in lines)
    assert {line["commit"] for line in lines} == {"abc1234"}
    assert (cells / "findings.md").read_text() == findings.report(lines)
    assert "moco" in (cells / "compare-001" / "compare.md").read_text()
    study.conclude(cells, type("Options", (), {"best": "moco"}), "abc1234")
    assert (cells / "compare-002").exists() and (cells / "uniformity.png").stat().st_size > 1000


def test_a_row_says_what_its_steps_cost(monkeypatch):
    steps = {("moco", 0.5): {"ratio": 1.5, "passes": [2, 1]}, ("moco", 1.0): {"ratio": 1.0, "passes": [1, 1]}}
    monkeypatch.setattr(findings, "STEPS", steps)
    lines = []
    for weight in (1.0, 0.5, 0.0):
        settings = {"method": "moco", "sim_weight": weight, "epochs": 30, "seed": 0, **findings.USUAL}
        lines.append({"cell": "x", "settings": settings, "metrics": {"knn top1": 40.0}})
    said = [[word.strip() for word in row.split("|")] for row in findings.report(lines).splitlines()]
    rows = [row for row in said if row[1:2] == ["moco"]]
    assert [row[5:7] for row in rows[:3]] == [["30", "1 + 1"], ["45", "2 + 1"], ["", ""]]  # the last was not measured


def test_a_candidate_is_compared_with_sim_of_as_many_epochs_or_of_its_cost(monkeypatch):
    ratios = {("simclr_near", 0.0): 1.11, ("simclr_apart", 0.0): 1.02, ("simclr_small_two", 0.5): 1.4}
    ratios |= {("simclr_sim_apart", 1.0): 1.01}
    monkeypatch.setattr(findings, "STEPS", {key: {"ratio": ratio, "passes": [2, 0]} for key, ratio in ratios.items()})
    cells = {("simclr", 1.0, 120): 50.0, ("simclr_near", 0.0, 108): 51.0, ("simclr_apart", 0.0, 120): 52.0}
    cells |= {("simclr_small_two", 0.5, 60): 53.0, ("simclr_unmeasured", 0.0, 108): 54.0}  # of cost 84, and of none
    cells |= {("simclr_sim_apart", 1.0, 120): 50.5}
    lines = []
    for (method, weight, epochs), value in cells.items():
        settings = {"method": method, "sim_weight": weight, "epochs": epochs, "seed": 0, **findings.USUAL}
        lines.append({"cell": method, "settings": settings, "metrics": {"knn top1": value}})
    said = {w[1].strip(): w for w in (row.split("|") for row in findings.report(lines).splitlines()) if len(w) > 12}
    columns = [[word.strip() for word in said["method"]].index(f"k-NN - {name}") for name in ("SIM", "SIM apart")]
    names = ("near", "apart", "small_two", "unmeasured", "sim_apart")
    assert {name: tuple(said[f"simclr_{name}"][i].strip() for i in columns) for name in names} == {
        "near": ("+1.0 (one seed)", "+0.5 (one seed)"),
        "apart": ("+2.0 (one seed)", "+1.5 (one seed)"),
        "small_two": ("", ""),
        "unmeasured": ("", ""),
        "sim_apart": ("+0.5 (one seed)", ""),
    }


def test_networks_are_kept_apart(tmp_path, monkeypatch):
    """Cells of a wider network are compared with SIM of that network; what their steps cost was not measured."""
    monkeypatch.setattr(findings, "STEPS", {("simclr", w): {"ratio": 1.0 + w, "passes": [2, 0]} for w in (0.0, 1.0)})
    lines = []
    for network, plain in ((None, 40.0), ("wide", 60.0)):
        for weight, value in ((1.0, plain), (0.0, plain + 3 + (network == "wide"))):
            settings = {"method": "simclr", "sim_weight": weight, "epochs": 9, "seed": 0, **findings.USUAL}
            settings |= {"backbone": network} if network else {}  # lines that name none are of resnet_tiny
            lines.append({"cell": "x", "settings": settings, "metrics": {"knn top1": value}})
    said = [[word.strip() for word in row.split("|")] for row in findings.report(lines).splitlines()]
    rows = [row for row in said if len(row) > 13 and row[1].startswith("simclr")]
    found = {(row[1], row[2]): (row[5], row[7], row[13]) for row in rows}
    assert found == {
        ("simclr", "1"): ("18", "40.0", ""),
        ("simclr", "0"): ("9", "43.0", "+3.0 (one seed)"),
        ("simclr, wide", "1"): ("", "60.0", ""),
        ("simclr, wide", "0"): ("", "64.0", "+4.0 (one seed)"),
    }
    results = tmp_path / "results.jsonl"
    lines[0]["settings"]["backbone"] = "resnet_tiny"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("sys.argv", ["cost_curve.py", str(results), "--out", str(tmp_path / "cost.png")])
    with pytest.raises(SystemExit, match="the results are of backbone resnet_tiny and wide; give those of one"):
        cost_curve.main()


@pytest.mark.parametrize(
    "key, first, second", [("mix_until", "1.0", "0.75"), ("split", "train[:5000]", "train[:1000]")]
)
def test_a_row_takes_no_other_setting(tmp_path, monkeypatch, key, first, second):
    """Two files hold the same cell with another share of mixtures, or of other images: not seeds of one row."""
    cell = {"method": "simclr", "sim_weight": 0.0, "epochs": 9, "backbone": "resnet_tiny", **findings.USUAL}
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for seed, (file, more) in enumerate(zip(files, (first, second))):
        more = float(more) if key == "mix_until" else more
        settings = {"split": "train[:5000]", **cell, "seed": seed, **({} if more == 1 else {key: more})}
        file.write_text(json.dumps({"cell": f"simclr-w0-e9-seed{seed}", "settings": settings, "metrics": {}}) + "\n")
    monkeypatch.setattr("sys.argv", ["findings.py", *map(str, files)])
    with pytest.raises(SystemExit, match=re.escape(f"simclr-w0-e9 stands there with {key} {first} and with {second}")):
        findings.main()
    if key == "split":
        monkeypatch.setattr("sys.argv", ["cost_curve.py", *map(str, files), "--out", str(tmp_path / "cost.png")])
        with pytest.raises(SystemExit, match=re.escape(f"the results are of split {second} and {first}")):
            cost_curve.main()


def test_cells_without_a_plain_run_beside_them_are_reported(monkeypatch):
    """A grid of candidates alone has no SIM: its table is made, without differences and without ranks."""
    settings = {"method": "simclr_near", "sim_weight": 0.0, "epochs": 9, "seed": 0, **findings.USUAL}
    text = findings.report([{"cell": "x", "settings": settings, "metrics": {"knn top1": 41.0}}])
    assert "| 41.0 " in text and "one seed" not in text and "Spearman" not in text


@pytest.mark.pictures
def test_the_curve_compares_at_equal_cost(monkeypatch, place):
    ratios = {("simclr", 1.0): 1.0, ("simclr", 0.5): 1.5, ("simclr_third", 0.5): 1.6, ("simclr", 0.0): 1.02}
    monkeypatch.setattr(findings, "STEPS", {key: {"ratio": ratio} for key, ratio in ratios.items()})

    def line(method, weight, epochs, seed, value, **more):
        settings = {"method": method, "sim_weight": weight, "epochs": epochs, "seed": seed, **more}
        return {"cell": method, "settings": settings, "metrics": {"knn top1": value}}

    lines = []
    for seed, value in enumerate((40.0, 41.0, 45.0)):
        lines += [line("simclr", 1.0, 120, seed, value), line("simclr", 1.0, 240, seed, value + 9)]
        lines += [line("simclr", 0.5, 80, seed, value + 2 + seed), line("simclr_third", 0.5, 75, seed, value + 1)]
        lines += [line("simclr", 0.0, 120, seed, value - 9)]  # BSIM as it was is no point
        old = "simclr_apart_plain_end" if seed else "simclr"
        lines += [line(old, 0.0, 120, seed, value + 3, **({} if seed else {"mix_until": 0.75}))]
    lines += [line("random", 1.0, 0, 0, 1.0), line("moco", 0.5, 80, 0, 1.0)]
    lines += [
        line(f"moco{kind}", 0.0 if kind != "_third" else 0.5, 120, 0, 2.0) for kind in ("", "_third", "_plain_end")
    ]
    found = cost_curve.points_of(lines)
    assert {kind: [(round(cost), epochs) for cost, epochs, _ in points] for kind, points in found.items()} == {
        "SIM": [(120, 120), (240, 240)],
        "SIM, third view": [(120, 75)],
        "half SIM, half BSIM": [(120, 80)],
        "BSIM": [(122, 120)],
    }
    rows = {tuple(w.strip() for w in row.split("|")[1:3]): row for row in cost_curve.rows_of(found).splitlines()}
    low, high = stats.t.interval(0.95, 2, loc=3, scale=stats.sem([2, 3, 4]))
    assert f"| 45.0 ± 3.6 (3) | +3.0 ({low:+.1f} to {high:+.1f}) |" in rows["half SIM, half BSIM", "80"]
    assert "| 45.0 ± 2.6 (3) | +3.0 (+3.0 to +3.0) | +2.0 (+2.0 to +2.0) |" in rows["BSIM", "120"]
    others = {kind: [epochs for _, epochs, _ in points] for kind, points in cost_curve.points_of(lines, "moco").items()}
    names = ("SIM, third view", "half SIM, half BSIM", "BSIM", "BSIM, plain end")
    assert others == dict(zip(names, ([120], [80], [120], [120])))
    cost_curve.draw(place / "cost.png", found)
    assert (place / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_the_passes_that_are_counted_are_those_of_the_methods():
    measured = {key: step["passes"] for key, step in findings.STEPS.items()}
    for name, more in findings.MORE_PASSES.items():
        assert sum(measured[name, 0.5]) / sum(measured[name, 1.0]) == more
    assert measured["simclr_third", 0.5] == measured["simclr", 0.5] == [3, 0]
    assert measured["moco", 1.0] == [1, 1] and measured["byol_third", 0.5] == [4, 2]
