"""The configurations of a clone of a Hub dataset: README.md says which files are which split."""

import fnmatch
import os
from pathlib import Path

import yaml

from flags import UserError, first_line, nearest
from loading.folders import SPLIT_OF


def front_matter(folder: Path) -> tuple[dict, str | None]:
    """(what stands between the lines --- of README.md, a note where it cannot be read)."""
    file = folder / "README.md"
    if not file.is_file():
        return {}, None
    try:
        head, mark, rest = file.read_text(encoding="utf-8").partition("---\n")
        if head.strip() or not mark:
            return {}, None
        found = yaml.safe_load(rest.partition("\n---")[0])
        return (found, None) if isinstance(found, dict) else ({}, None)
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {}, f"the front matter of README.md cannot be read and is ignored ({first_line(error)})"


def configured(head: dict, names: list[str], subset: str | None, spec: str) -> dict[str, list[int]] | None:
    """{split: rows of `names`} of the configuration `subset`; None where README.md names no files."""
    configs = head.get("configs")
    configs = {c["config_name"]: c for c in configs if isinstance(c, dict) and "config_name" in c} if configs else {}
    if not configs:
        if subset is not None:
            raise UserError(f"--subset {subset}: {spec} is a folder without configurations (no README.md names any)")
        return None
    if subset is None:
        chosen = [name for name, c in configs.items() if c.get("default") or name == "default"] or list(configs)
        if len(chosen) > 1:
            raise UserError(f"--dataset {spec}: has configurations {', '.join(configs)}; choose: --subset {chosen[0]}")
        subset = chosen[0]
    if subset not in configs:
        raise UserError(
            f"--subset {subset}: {spec} has {', '.join(map(str, configs))}{nearest(subset, map(str, configs))}"
        )
    config: dict = configs[subset]
    splits: dict[str, list[int]] = {}
    within = f"{config['data_dir'].strip('/')}/" if isinstance(config.get("data_dir"), str) else ""
    files = config.get("data_files")
    if files is None:
        rows = [i for i, name in enumerate(names) if name.startswith(within)]
        return {"": rows} if rows else _nothing(spec, subset, within)
    if isinstance(files, dict):  # {split: pattern}, or one of {split:, path:}
        files = [files] if "path" in files else [{"split": k, "path": v} for k, v in files.items()]
    files = [files] if isinstance(files, str) else files
    files = [{"split": "train", **part} if isinstance(part, dict) else part for part in files]
    for part in files:
        split, patterns = (part["split"], part["path"]) if isinstance(part, dict) else ("", part)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            rows = [i for i, name in enumerate(names) if _fits(name, within + pattern)]
            splits.setdefault(SPLIT_OF.get(split, split), []).extend(rows or _nothing(spec, subset, pattern))
    return {split: sorted(set(rows)) for split, rows in splits.items()}


def _nothing(spec, subset, pattern):
    raise UserError(f"--dataset {spec}: configuration {subset} of README.md wants {pattern}, and no such file is there")


def _fits(name, pattern):
    pattern = os.path.normpath(pattern)
    if fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/"):
        return True
    return "**" in pattern and fnmatch.fnmatchcase(name, pattern.replace("**/", "*").replace("**", "*"))
