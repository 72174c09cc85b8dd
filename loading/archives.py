"""WebDataset tars, indexed by their headers: nothing is unpacked or copied, and images are read where they lie."""

import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Value

from flags import UserError
from loading.files import as_text, member, shown
from loading.folders import Listing, ending, endings, is_hidden, key, remember

TEXT = 1024  # bytes of a label, at most


class Archive(NamedTuple):
    """The regular files in a tar."""

    names: list[str]
    starts: list[int]
    sizes: list[int]
    texts: list[bytes | None]  # what is in a short file that is no image
    problem: str | None  # why what is after these files cannot be read


def index(path: str) -> Archive:
    """The files of a tar, by its headers alone."""
    names: list[str] = []
    starts: list[int] = []
    sizes: list[int] = []
    texts: list[bytes | None] = []
    place: dict[str, int] = {}  # of a name in the lists, for links
    images, problem = endings(), None
    length = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            while entry := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if entry.offset_data + entry.size > length:
                    problem = f"ends inside {shown(entry.name)}"
                    break
                name = shown(os.path.normpath(entry.name))  # `tar c .` writes ./0001.jpg
                if entry.islnk() or entry.issym():  # a second name of what is in the archive already
                    base = os.path.dirname(entry.name) if entry.issym() else ""
                    target = shown(os.path.normpath(os.path.join(base, entry.linkname)))
                    if target not in place:
                        problem = f"has {name}, a link to {target}, which is not before it"
                        break
                    at = place[name] = place[target]
                    names.append(name)
                    starts.append(starts[at])
                    sizes.append(sizes[at])
                    texts.append(texts[at])
                elif entry.isreg() and not entry.issparse():
                    text = None
                    if entry.size <= TEXT and ending(entry.name) not in images:
                        file.seek(entry.offset_data)
                        text = file.read(entry.size)
                    place[name] = len(names)
                    names.append(name)
                    starts.append(entry.offset_data)
                    sizes.append(entry.size)
                    texts.append(text)
            end = tar.offset
            problem = problem or _after(file, end)
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = str(error)
    return Archive(names, starts, sizes, texts, problem)


def _after(file, end):
    """What is wrong with the end of a tar, which is blocks of zeros. tarfile takes anything there for the end."""
    file.seek(end)
    block = file.read(512)
    if len(block) < 512:
        return f"ends at byte {end + len(block):,} without the mark of its end"
    if any(block):
        return f"is damaged at byte {end:,}"
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return f"has more after its end at byte {end:,}: were two files joined?"
    return None


def remembered(path: str) -> Archive:
    """`index`, kept in the cache of `datasets` for the same file of the same size and times."""
    status = os.stat(path)
    times = np.array([[status.st_mtime_ns, status.st_ctime_ns]])
    listing = Listing("", [path], np.array([status.st_size]), times)
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "bsim" / f"tar-2-{key(listing)}"
    if kept.exists():
        with pa.memory_map(str(kept)) as file:
            names, starts, sizes, texts = (c.to_pylist() for c in pa.ipc.open_file(file).read_all().columns)
            return Archive(names, starts, sizes, texts, None)
    found = index(path)
    if found.problem is None:
        table = pa.table([*map(pa.array, found[:3]), pa.array(found.texts, pa.binary())], list(Archive._fields[:4]))
        remember(table, kept)
    return found


def rows_of(paths: list[str], skip_bad: bool, mark: str) -> tuple[Dataset, list, list[str], list[str]]:
    """(rows, [(file, why it is left out)], damages, notes) of the samples in tars.

    A sample is the members that share a name but its ending.

    Columns are named by ending: images, and short files as integers or strings. Raises UserError for a tar that is cut
    or damaged, unless `skip_bad`, and where there is no image.
    """
    archives, damages = [], []
    for path in paths:
        archive = remembered(path)
        if archive.problem:
            said = f"{shown(path)} {archive.problem}; {len(archive.names)} files before that can be read"
            if not skip_bad:
                raise UserError(
                    f"--dataset: {said}. Copy it anew, or take what can be read and count it: --skip_bad_images"
                )
            damages.append(said)
        archives.append(archive)
    samples, left_out = _samples(paths, archives)
    if not any(images for _, images, _ in samples):
        found = Counter(ending(name) or "none" for archive in archives for name in archive.names)
        has = ", ".join(f"{end} ({count})" for end, count in found.most_common(6)) or "nothing"
        raise UserError(
            f"--dataset: {shown(paths[0])} has files that end in {has}, and no image; "
            "want samples such as 0001.jpg with 0001.cls"
        )
    left_out += [(where, "without an image") for where, images, _ in samples if not images]
    samples = [(images, texts) for _, images, texts in samples if images]
    columns, features = {}, {}
    used = Counter(field for images, _ in samples for field in images)
    if all(len(images) == 1 for images, _ in samples):  # JPEG and PNG in one archive
        columns[used.most_common(1)[0][0]] = [next(iter(images.values())) for images, _ in samples]
    else:
        columns = {field: [images.get(field) for images, _ in samples] for field in used}
    for field, paths_of in columns.items():
        columns[field] = _images(paths_of)
        features[field] = datasets.Image()
    for field in sorted({field for _, texts in samples for field in texts}):
        column = _values([texts.get(field) for _, texts in samples])
        if column is not None and field not in columns:
            columns[field], features[field] = column, Value(str(column.type))
    rows = Dataset(pa.table(columns), info=DatasetInfo(features=Features(features)), fingerprint=mark)
    labelled = any(not isinstance(feature, datasets.Image) for feature in features.values())
    return rows, left_out, damages, [] if labelled else _on_folders(archives)


def _on_folders(archives):
    """A note where images without classes lie in folders, which may have been meant for classes."""
    parts = [name.partition("/") for archive in archives for name in archive.names]
    tops = sorted({top for top, slash, _ in parts if slash})
    named = ", ".join(tops[:4]) + ", ..." * (len(tops) > 4)
    said = f"folders in an archive ({named}) are no classes; a file such as 0001.cls beside 0001.jpg names one"
    return [said] if len(tops) > 1 else []


def _samples(paths, archives):
    """[(where, {ending: path of an image}, {ending: text})], in the order of the archives."""
    images, samples, left_out = endings(), [], []
    at_first = _cut_at_first_dot([name for archive in archives for name in archive.names])
    for path, archive in zip(paths, archives):
        own = {}
        for name, start, size, text in zip(*archive[:4]):
            where = member(name, start, size, path)
            if is_hidden(name.replace("../", "")):
                left_out += [(where, "hidden")] if ending(name) in images else []
                continue
            stem, field = _parts(name, at_first)
            if not field:
                continue
            taken = own.setdefault(stem, [])
            if not taken or field in taken[-1][1] or field in taken[-1][2]:  # a second 0001.jpg is another sample
                taken.append((f"{name} in {shown(path)}", {}, {}))
                samples.append(taken[-1])
            if ending(name) in images:
                taken[-1][1][field] = where
            elif text is not None and field != "json":
                taken[-1][2][field] = text
    return samples, left_out


def _parts(name, at_first):
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".") if at_first else base.rpartition(".")
    return folder + slash + stem, field.lower()


def _cut_at_first_dot(names):
    """Whether a sample's name ends at its first dot, as is the convention (0001.seg.png); else img.0001.jpg."""
    first, last = zip(*(_parts(name, True) for name in names)) if names else ((), ())
    fields = len(set(last))
    shorter = len({_parts(name, False)[1] for name in names})
    return not (fields > 2 * shorter and fields > len(set(first)))


def _images(paths):
    paths = pa.array([path and as_text(path) for path in paths], pa.string())
    none = pa.nulls(len(paths), pa.binary())
    return pa.StructArray.from_arrays([none, paths], ["bytes", "path"], mask=paths.is_null())


def _values(texts):
    """Texts as integers where all are, as strings where they are text, else None."""
    try:
        words = [None if text is None else text.decode().strip() for text in texts]
    except UnicodeDecodeError:
        return None
    try:
        return pa.array([None if word is None else int(word) for word in words], pa.int64())
    except (ValueError, OverflowError, pa.ArrowInvalid):
        return pa.array(words, pa.string())
