"""The run in a tracker: under the run folder's name, with its pictures, and gone on with when the run is resumed."""

import json
import uuid
from pathlib import Path
from typing import Any

from training import folder as run_folder
from training.state import Training

PROJECT = "bsim"


def begin(t: Training) -> None:
    """Open the tracker's run, or that which the run had before it was resumed."""
    kind, folder, resumed = t.s.log_with, t.folder, t.start > 0
    assert folder is not None
    name, options = folder.absolute().name, {}
    if kind == "wandb":
        options = {"name": name, "dir": str(folder), "id": _identity(t, folder), "resume": "allow"}
    if kind == "trackio":
        options = {"name": name, "resume": "allow" if resumed else "never"}
    # TensorBoard calls a run by its folder, so the events lie in the run folder itself.
    t.accelerator.project_configuration.logging_dir = str(folder.absolute().parent)
    settings = {k: v for k, v in t.s.config().items() if isinstance(v, (int, float, str, bool))}
    with run_folder.writing(folder / str(kind)):
        t.accelerator.init_trackers(
            name if kind == "tensorboard" else PROJECT, None if resumed else settings, init_kwargs={str(kind): options}
        )


def _identity(t: Training, folder: Path) -> str:
    """wandb knows a run by an id; names may be there twice."""
    file = folder / "tracker.json"
    if t.accelerator.is_main_process and not file.exists():
        run_folder.write_json(file, {"wandb": uuid.uuid4().hex[:12]})
    return json.loads(file.read_text())["wandb"] if file.exists() else ""


def log(t: Training, values: dict[str, Any], step: int) -> None:
    assert t.folder is not None
    with run_folder.writing(t.folder / str(t.s.log_with)):
        t.accelerator.log(values, step=step)


def log_picture(t: Training, name: str, step: int) -> None:
    """Show the picture `name` of the run folder in the tracker, if there are both."""
    if not t.s.log_with or not t.accelerator.is_main_process or t.folder is None or not (t.folder / name).exists():
        return
    path, tracker = t.folder / name, t.accelerator.get_tracker(t.s.log_with, unwrap=True)
    word = path.stem
    with run_folder.writing(t.folder / t.s.log_with):
        if t.s.log_with == "tensorboard":
            import numpy as np
            from PIL import Image

            tracker.add_image(word, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        elif t.s.log_with == "wandb":
            import wandb

            tracker.log({word: wandb.Image(str(path))}, step=step)
        else:
            import trackio

            tracker.log({word: trackio.Image(str(path))}, step=step)
