"""`openwafer prepare records bert_ner/tiny`: the data of a model as TFRecords.

Decides that a model's own input sections say which data, and which layout they get. Does not decide
what is in a record (data/tfrecord_layouts.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openwafer.data.params import Split
from openwafer.data.registry import build_dataset, input_keys
from openwafer.data.tfrecord_writing import layout_names, write_records
from openwafer.data.token_shards import TokenShards
from openwafer.errors import ConfigError
from openwafer.zoo.catalog import Override, family_of, full_name, load

__all__ = ["write_model_records"]


def write_model_records(
    name: str,
    out_dir: str | Path,
    *,
    overrides: Iterable[str | Override] = (),
    processor: str | None = None,
    seed: int = 1,
) -> dict[Split, int]:
    """Write the training and evaluation data of a model to `train` and `eval` in `out_dir`.

    Args:
        overrides: as `--set` takes them, e.g. `train_input.data_dir=…`.
        processor: what will read them; None: the one that the inputs fit.
        seed: of masks that are drawn when they are written.

    Returns:
        How many records each folder has.

    Raises:
        ConfigError: an unknown model or key, or one whose data have no layout of TFRecords.
        DataError: the data are missing or broken.
    """
    task = family_of(full_name(name)).task
    names = layout_names(task)
    if not names or (processor is not None and processor not in names):
        raise ConfigError(
            f"the data of {name} are not made into the records of {processor}"
            if names
            else f"release 1.6 has no TFRecords of {name}'s data",
            allowed=", ".join(names),
        )
    raw = load(name, overrides).raw
    written: dict[Split, int] = {}
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        # Labels where they are masked, images as they are: what is drawn anew is not written.
        whole: dict[str, Any] = {"gather_mlm_labels": True, "augment_data": False}
        known = input_keys(task)
        section = dict(raw.get(f"{split}_input") or {})
        section.update({key: value for key, value in whole.items() if key in known})
        dataset = build_dataset(task, section, split)
        chosen = processor or _fitting(names, section)
        write_records(dataset, chosen, _own_folder(Path(out_dir).expanduser() / split), seed=seed)
        written[split] = len(dataset)
    return written


def _own_folder(folder: Path) -> Path:
    """Raises: ConfigError: it holds prepared text, whose tokenizer and counts would be replaced."""
    if TokenShards.is_one(folder):
        raise ConfigError(
            "the folder holds what `openwafer prepare text` wrote",
            where=str(folder),
            hint="another --out",
        )
    return folder


def _fitting(names: list[str], section: dict[str, Any]) -> str:
    if section.get("disable_nsp"):
        return "BertMlmOnlyTfRecordsStaticMaskProcessor"
    return names[0]
