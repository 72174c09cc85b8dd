"""The command line: nothing runs before every flag is right, and a mistake is one line and exit code 2."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import flags
from training.settings import Pretraining

ROOT = Path(__file__).parent.parent


def command(*words, cwd, timeout=120):
    return subprocess.run(
        [sys.executable, str(ROOT / "bsim.py"), *words], capture_output=True, text=True, cwd=cwd, timeout=timeout
    )


def test_a_misspelled_flag_ends_the_command_before_anything_runs(place):
    done = command("--epohcs", "100", cwd=place)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["bsim.py: --epohcs: no such flag; did you mean --epochs? --help lists them"]
    assert list(place.iterdir()) == []


def test_a_wrong_value_ends_the_command_before_anything_runs(place):
    done = command("--method", "byole", cwd=place)
    assert done.returncode == 2
    wanted = "bsim.py: --method byole: want simclr, moco, mocov3, byol, simsiam; did you mean byol?"
    assert done.stderr.splitlines() == [wanted] and list(place.iterdir()) == []


def test_help_fits_two_screens_and_shows_every_flag(place):
    done = command("--help", cwd=place)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 84 and max(map(len, lines)) <= 110
    for name in flags.kinds_of(Pretraining):
        assert sum(line.startswith(f"  --{name} ") for line in lines) == 1, name
    groups = [line for line in lines if line and not line.startswith(" ")]
    assert {"What is learned", "Data", "Network and schedule", "The run"} <= set(groups)
    assert "  --method            simclr, moco, mocov3, byol or simsiam (byol)" in lines
    assert any(line.startswith("  --sim_weight ") and line.endswith("(0.0)") for line in lines)
    assert any(line.startswith("  --seed ") and line.endswith("(0)") for line in lines)


@dataclass(frozen=True, kw_only=True)
class Example(flags.Settings):
    """An example."""

    method: str = flags.flag("byol", "which")
    lr: float | None = flags.flag(None, "a rate")
    epochs: int = flags.flag(1, "how long", range=flags.at_least(1))
    compile: bool = flags.flag(False, "whether")
    resume: bool | str = flags.flag(False, "what")
    recipe: str | None = flags.flag(None, "a file")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lrr", "1"], "--lrr: no such flag; did you mean --lr?"),
        (["--zzz"], "--zzz: no such flag; --help lists them"),
        (["byol"], "'byol': every setting is a flag with a name, as in --method byol"),
        (["--method", "byol", "extra"], "'extra': every setting is a flag"),
        (["--", "--help"], "'--': every setting"),
        (["--lr", "fast"], "--lr fast: want a number"),
        (["--epochs", "1.5"], "--epochs 1.5: want a whole number"),
        (["--epochs"], "--epochs: want a value after it"),
        (["--compile", "maybe"], "--compile maybe: want true or false"),
        (["--lr", "1", "--lr", "2"], "--lr: given twice"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(flags.UserError) as caught:
        flags.check(Example, words)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--lr", "-0.1"], dict(lr=-0.1)),
        (["--lr=1e-3", "--epochs", "2e2"], dict(lr=1e-3, epochs=200)),
        (["--lr", "none"], dict(lr=None)),
        (["--compile", "--method", "123"], dict(compile=True, method="123")),
        (["--nocompile"], dict(compile=False)),
        (["--compile=false", "--resume"], dict(compile=False, resume=True)),
        (["--resume", "runs/x,y[1]"], dict(resume="runs/x,y[1]")),
        (["--method", "a=b c"], dict(method="a=b c")),
    ],
)
def test_values_arrive_with_their_types(words, wanted, monkeypatch):
    seen = {}

    @flags.command(Example)
    def called(s, given):
        seen.update(vars(s))

    monkeypatch.setattr(sys, "argv", ["x", *words])
    flags.launch(called, "x")
    assert {k: seen[k] for k in wanted} == wanted
    assert all(type(seen[k]) is type(v) for k, v in wanted.items())


def test_only_the_first_process_of_a_machine_speaks(monkeypatch, capsys):
    @flags.command(Example)
    def refuses(s, given):
        raise flags.UserError("no")

    for rank, local, said in (("0", "0", "x: no\n"), ("1", "1", ""), ("8", "0", "x: no\n"), ("9", "1", "")):
        monkeypatch.setenv("RANK", rank)  # 8: the first of the second machine, which may lack the data
        monkeypatch.setenv("LOCAL_RANK", local)
        monkeypatch.setattr(sys, "argv", ["x"])
        with pytest.raises(SystemExit) as caught:
            flags.launch(refuses, "x")
        assert caught.value.code == 2 and capsys.readouterr().err == said


def test_a_recipe_gives_flags_and_the_command_line_wins(place):
    Path("mine.yaml").write_text("method: moco  # why\nlr: 1e-3\nepochs: 2e2\ncompile: true\nresume: false\n")
    s, given = flags.read(Example, {"recipe": "mine.yaml", "lr": 0.5})
    assert (s.method, s.lr, s.epochs, s.compile, s.resume) == ("moco", 0.5, 200, True, False)
    assert given.typed == {"recipe": "mine.yaml", "lr": 0.5}
    assert given.recipe == {"method": "moco", "epochs": 200, "compile": True, "resume": False}
    assert type(s.epochs) is int


@pytest.mark.parametrize(
    "text, message",
    [
        ("epohcs: 3", "--recipe mine.yaml, line 1: epohcs: no such flag; did you mean epochs? --help lists them"),
        ("lr: 1\nlr: 2", "--recipe mine.yaml, line 2: lr: given twice"),
        ("lr: fast", "--recipe mine.yaml, line 1: lr fast: want a number"),
        ("lr:\n- 1\n- 2", "--recipe mine.yaml, line 1: lr: want one value"),
        ("epochs: 1.5", "--recipe mine.yaml, line 1: epochs 1.5: want a whole number"),
        ("epochs: 0", "--recipe mine.yaml: epochs 0: want 1 or more"),
        ("epochs:", "--recipe mine.yaml, line 1: epochs: want a value after it"),
        ("recipe: other.yaml", "--recipe mine.yaml, line 1: recipe: no such flag"),
        ("- lr", "--recipe mine.yaml: want a flag and its value on each line"),
        ("", "--recipe mine.yaml: want a flag and its value on each line"),
        ("lr: [1", "--recipe mine.yaml: is no YAML file"),
        ("lr: !!python/object:os.system 1", "--recipe mine.yaml, line 1: lr"),
        (None, "--recipe mine.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_recipe_ends_like_a_wrong_flag(place, text, message):
    if text is not None:
        Path("mine.yaml").write_text(text)
    with pytest.raises(flags.UserError) as caught:
        flags.read(Example, {"recipe": "mine.yaml"})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value) and caught.value.code == 2


def test_a_recipe_is_read_before_anything_runs(place):
    Path("mine.yaml").write_text("method: byole\n")
    done = command("--recipe", "mine.yaml", cwd=place)
    wanted = "bsim.py: --recipe mine.yaml: method byole: want simclr, moco, mocov3, byol, simsiam; did you mean byol?"
    assert done.returncode == 2 and done.stderr.splitlines() == [wanted]
