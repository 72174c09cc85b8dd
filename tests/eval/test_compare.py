"""Many runs in, one table out: means, paired intervals, and the refusal to average what differs."""

import json
from pathlib import Path

import pytest
from scipy import stats

from eval.compare import against_sim, compare, paired, values_of
from eval.results import write_result
from flags import UserError


def run(name, seed, sim_weight, top1, method="moco", results=None, **changed):
    folder = Path("study") / name
    folder.mkdir(parents=True)
    config = dict(method=method, sim_weight=sim_weight, seed=seed, mix="cutmix", alpha=1.0, per_sample=True, lr=0.1)
    (folder / "config.json").write_text(json.dumps(config | dict(out=str(folder), workers=seed) | changed))
    (folder / "backbone.safetensors").write_bytes(b"")
    for k in (5, 20):  # the last line counts
        settings = dict(run=str(folder), k=20, seed=0, workers=1) | (results or {})
        write_result(folder, "knn", "cifar", settings, {"top1": top1 if k == 20 else 0.0, "list": [1]})
    write_result(folder, "linear", "cifar", dict(protocol="features", C=10.0**seed), {"top1": top1 + 5})
    return folder


SIM, BSIM = (40.0, 41.0, 45.0), (42.0, 42.5, 48.0)


@pytest.fixture
def study(place):
    for seed in range(3):
        run(f"sim{seed}", seed, 1.0, SIM[seed])
        run(f"bsim{seed}", seed, 0.0, BSIM[seed])
    return place


def test_means_spreads_and_paired_intervals(study, capsys):
    compare(runs="study/*", out="found")
    found = json.loads(Path("found/compare.json").read_text())
    row = next(row for row in found["rows"] if row["sim_weight"] == 0)
    assert row["knn top1"] == {"mean": pytest.approx(132.5 / 3), "std": pytest.approx(stats.tstd(BSIM)), "seeds": 3}
    difference = next(row for row in found["against_sim"] if row["metric"] == "knn top1")
    gains = [b - a for a, b in zip(SIM, BSIM)]
    low, high = stats.t.interval(0.95, 2, loc=sum(gains) / 3, scale=stats.sem(gains))
    assert difference["difference"] == pytest.approx(sum(gains) / 3)
    assert (difference["low"], difference["high"]) == (pytest.approx(low), pytest.approx(high))
    assert difference["row"] == {"method": "moco", "sim_weight": 0.0} and difference["seeds"] == 3
    # The same interval, by the test that it belongs to.
    interval = stats.ttest_rel(BSIM, SIM).confidence_interval()
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))
    text = Path("found/compare.md").read_text()
    assert "44.17 ± 3.33" in text and f"+2.17 ({low:+.2f} to {high:+.2f})" in text and text in capsys.readouterr().out
    assert "knn list" not in text
    with pytest.raises(UserError, match="--out found: exists; name a folder that does not"):
        compare(runs="study/*", out="found")


def test_order_and_seeds_do_not_matter_only_pairs_count():
    assert paired({0: 1.0, 1: 5.0}, {1: 7.0, 0: 2.0}) == paired({1: 5.0, 0: 1.0}, {0: 2.0, 1: 7.0, 9: 100.0})
    assert paired({0: 1.0}, {0: 3.0}) == {"difference": 2.0, "low": None, "high": None, "seeds": 1}
    assert paired({0: 1.0}, {1: 3.0}) is None


def test_runs_that_differ_in_more_than_the_seed_are_refused_by_name(study):
    run("other", 3, 0.0, 50.0, lr=0.3)
    with pytest.raises(
        UserError, match=r"differ in more than the seed \(lr 0.1 and 0.3\); .* --by method,sim_weight,lr"
    ):
        compare(runs="study/*", out="found")
    compare(runs="study/*", by="sim_weight,lr", out="found")
    assert len(json.loads(Path("found/compare.json").read_text())["rows"]) == 3


def test_results_that_were_measured_otherwise_are_refused_by_name(study):
    run("other", 3, 0.0, 50.0, results=dict(k=200))
    with pytest.raises(UserError, match=r"differ in more than the seed \(knn: k 20 and 200\)"):
        compare(runs="study/*")


def test_a_plain_run_has_no_mixture_to_differ_in(study):
    for seed in range(3):
        run(f"mixup{seed}", seed, 0.0, 43.0, mix="mixup")
    place = compare(runs="study/*", by="method,sim_weight,mix", out="found")
    found = json.loads((place / "compare.json").read_text())["against_sim"]
    gains = {row["row"]["mix"]: row["difference"] for row in found if row["metric"] == "knn top1"}
    assert gains == {"cutmix": pytest.approx(6.5 / 3), "mixup": pytest.approx(1.0)}


def test_methods_may_differ_and_are_told_apart(study):
    run("simclr", 0, 1.0, 60.0, method="simclr", lr=0.3, temperature=0.1)
    rows = json.loads((compare(runs="study/*", out="found") / "compare.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"moco", "simclr"}


def test_refusals(study):
    for options, message in (
        (dict(runs=""), r"--runs \(nothing\): no run there"),
        (dict(runs="nowhere/*"), r"--runs nowhere/\*: no run there"),
        (dict(runs="study/*", by="method"), "--by method: want sim_weight among them"),
        (dict(runs="study/*", by="sim_weight,colour"), "--by colour: is no setting of study/bsim0"),
        (dict(runs="study/*", metrics="knn top9"), "--metrics knn top9: was not measured; there are knn top1"),
    ):
        with pytest.raises(UserError, match=message):
            compare(**options)
    run("twice", 0, 0.0, 42.0)
    with pytest.raises(UserError, match="have the same settings and seed; leave one out"):
        compare(runs="study/*")
    (Path("study/twice") / "backbone.safetensors").unlink()
    with pytest.raises(UserError, match="--runs study/twice: is not finished"):
        compare(runs="study/*")


def test_against_sim_wants_a_plain_run():
    found = [{"config": dict(method="a", sim_weight=0.0, seed=0), "results": {"knn": ({}, {"top1": 1.0})}}]
    by = ["method", "sim_weight"]
    assert against_sim(values_of(found, by), by) == []


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1, 2]", r"study/sim0/results.jsonl: line 4 is \[1, 2\], no result; want an object"),
        ("3", "results.jsonl: line 4 is 3, no result"),
        ("null", None),
        ('{"protocol": "knn"}', "--runs study/sim0: a line of its results.jsonl has no protocol, settings or metrics"),
        ('{"protocol": "knn", "settings": [], "metrics": {}}', "has no protocol, settings or metrics"),
        ('{"protocol": "knn", "settings": {}, "metrics": {"top1": NaN}}', "--runs study/sim0: knn top1 is nan in its"),
        ('{"cut', "cut off and is left out"),
    ],
)
def test_lines_that_are_no_results_are_named(study, capsys, line, message):
    with open("study/sim0/results.jsonl", "a") as file:
        file.write(line + "\n")
    if line[:5] == '{"cut':
        compare(runs="study/*", out="found")
        assert message in capsys.readouterr().err
        return
    with pytest.raises(UserError, match=message or "line 4 is null, no result"):
        compare(runs="study/*", out="found")
    assert not Path("found").exists()


def test_only_the_final_weights_are_compared(study):
    for run_name in ("study/sim0/checkpoints/step_000010", "study/sim0/early.safetensors"):
        write_result(Path("study/sim0"), "knn", "cifar", dict(run=run_name, k=20, seed=0), {"top1": 0.0})
    rows = json.loads((compare(runs="study/*", out="found") / "compare.json").read_text())["rows"]
    assert next(r for r in rows if r["sim_weight"] == 1)["knn top1"]["mean"] == pytest.approx(sum(SIM) / 3)


@pytest.mark.parametrize("config, message", [("[1]", "config.json is damaged"), ('{"seed": 1}', "has no method")])
def test_a_config_of_something_else_is_named(study, config, message):
    Path("study/sim0/config.json").write_text(config)
    with pytest.raises(UserError, match=f"--runs study/sim0: .*{message}"):
        compare(runs="study/*")
