import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are small, and two processes share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Tests leave the user's `datasets` cache alone."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = (
        0.1  # a stream waits so long at each end of its data; the default is 5
    )


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Pictures of one pixel, as drawing takes longer than a short run; a test marked `pictures` draws."""
    from PIL import Image

    if not request.node.get_closest_marker("pictures"):
        blank = Image.new("RGB", (1, 1))
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: blank.save(file, "PNG"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
