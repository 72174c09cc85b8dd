"""left_out.txt in the run folder: a line for each image that is not used, with the reason."""

from pathlib import Path

from training import folder as run_folder


def add(folder: Path, lines) -> None:
    """Add those of `lines` that the file does not have."""
    path = folder / "left_out.txt"
    there = path.read_text().splitlines() if path.exists() else []
    listed = dict.fromkeys(line.replace("\n", "\\n") for line in lines)
    new = [line for line in listed if line not in set(there)]
    if new:
        run_folder.write(path, lambda file: file.write_text("\n".join([*there, *new]) + "\n"))
