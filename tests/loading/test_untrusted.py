"""Files from elsewhere: none is run, none chooses where is written. (Images: test_fuzz.py, the bomb: test_data.py.)"""

import os
import pickle
import re
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

import data
from flags import UserError
from tests.test_data import encoded, folder, picture
from train import pretrain
from training import folder as run_folder

ROOT = Path(__file__).parents[2]
RUN = dict(backbone="resnet_tiny", image_size=16, batch_size=8, steps=1, label_column="none", out="out")
OUTSIDE = ("../../evil.png", "/tmp/bsim-evil.png", "../out/backbone.safetensors", "a/../../../evil.png")


def files(place):
    return {path for path in place.rglob("*") if "out" not in path.relative_to(place).parts}


@pytest.mark.parametrize(
    "spec", ["../../x", "/etc/passwd", "..", "a/../../b", "x\n/../../y", "~/..", "c:\\x", "*.png", ""]
)
def test_a_dataset_name_does_not_choose_where_is_written(place, spec):
    folder = run_folder.choose(None, "byol", spec)
    assert folder.parent == Path("runs") and re.fullmatch(r"byol-[\w-]+-001", folder.name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_in_an_archive_do_not_choose_where_is_written(place, kind, streaming):
    work = place / "some" / "where"
    work.mkdir(parents=True)
    os.chdir(work)
    names = [*OUTSIDE, *(f"{i}.png" for i in range(16))]
    if kind == "tar":
        with tarfile.open("shard.tar", "w") as tar:
            for i, name in enumerate(names):
                entry, content = tarfile.TarInfo(name), encoded(picture(i))
                entry.size = len(content)
                tar.addfile(entry, BytesIO(content))
        spec = "shard.tar"
    else:
        Path("pets").mkdir()
        with zipfile.ZipFile("pets/a.zip", "w") as archive:
            for i, name in enumerate(names):
                archive.writestr(name, encoded(picture(i)))
        spec = "pets"
    before = files(place)
    try:
        pretrain(dataset=spec, streaming=streaming, **RUN)
    except UserError as error:  # refusing such an archive is as good
        assert "cannot be read" in str(error) or "not an image" in str(error)  # noqa: PT017
    assert files(place) == before and not Path("/tmp/bsim-evil.png").exists()


def test_code_beside_the_data_does_not_run(place):
    pets = folder(place, 40)
    code = f"open({str(place / 'ran')!r}, 'w')\n"
    (pets / "pets.py").write_text(code)
    (place / "alone").mkdir()
    (place / "alone" / "alone.py").write_text(code)
    for spec in (str(pets), str(place / "alone"), str(place / "alone" / "alone.py")):
        try:
            data.open_source(spec)
        except UserError as error:
            assert str(error).startswith(f"--dataset {spec}: ")  # noqa: PT017
    assert not (place / "ran").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_in_a_checkpoint_does_not_run(place):
    pretrain(dataset="digits", split="train[:100]", **{**RUN, "steps": 2})
    last = run_folder.last_checkpoint(Path("out"))
    (last / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="is damaged .*; without it --resume takes the one before"):
        pretrain(resume="out", steps=4)
    assert not Path("ran").exists()


def test_nothing_here_unpickles():
    for path in ROOT.rglob("*.py"):
        if "tests" in path.parts or "venv" in path.parts:
            continue
        text = path.read_text()
        assert not re.search(r"import pickle|pickle\.load|trust_remote_code|allow_pickle=True", text), path
        for call in re.findall(r"(?:torch|hub)\.load\w*\([^\n]*", text):
            assert "weights_only=True" in call, (path, call)
