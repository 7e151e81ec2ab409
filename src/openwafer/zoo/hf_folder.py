"""A Hugging Face checkpoint on disk: a folder with config.json and the tensors in some files.

Decides how such a folder is read one tensor at a time, whichever form it has, and written whole or
not at all. Does not decide what the tensors mean (convert.py, each family's weights.py).

Forms that are read: model.safetensors, several of them with an index, pytorch_model.bin, several of
them with an index. Written: safetensors, in several files above 1 GiB.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from openwafer.errors import CheckpointError, ConfigError
from openwafer.train.checkpoint_file import read_file

__all__ = ["HFFolder", "write_hf_folder"]

_log = logging.getLogger("openwafer")

MAX_FILE_BYTES = 1 << 30
"""What is held in memory at once while writing, and the size of one file."""

_OLD_ENDINGS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
"""Names of the first BERT checkpoints, which were converted from TensorFlow."""


class HFFolder:
    """The configuration and the tensors of a folder. Use it in a `with`.

    Raises:
        CheckpointError: a file is missing, damaged, or not of a form that is read here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_json(folder / "config.json")
        self._files = ExitStack()
        self._opened: dict[str, Any] = {}
        self._file_of = self._find_tensors()

    def __enter__(self) -> HFFolder:
        return self

    def __exit__(self, *failure: object) -> None:
        self._opened.clear()
        self._files.close()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    @property
    def architecture(self) -> str:
        """Class name of the model that was saved; empty where config.json does not say."""
        architectures = self.config.get("architectures") or [""]
        return str(architectures[0])

    def name_of(self, name: str) -> str | None:
        """The name under which the file has the tensor `name`: that name, an old spelling of it, or
        the name without its first part where the base model alone was saved."""
        for spelling in (name, name.partition(".")[2]):
            for ending, old in ((" ", " "), *_OLD_ENDINGS.items()):
                other = (
                    spelling.removesuffix(ending) + old if spelling.endswith(ending) else spelling
                )
                if other in self._file_of:
                    return other
        return None

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, by its name there; backed by the file where that can be."""
        file = self._file_of[name]
        if file.endswith(".safetensors"):
            return cast("Tensor", self._safetensors(file).get_tensor(name))
        return self._bin(file)[name]

    def _find_tensors(self) -> dict[str, str]:
        """File name by tensor name."""
        for base in ("model.safetensors", "pytorch_model.bin"):
            index = self.folder / f"{base}.index.json"
            if index.is_file():
                found = _read_json(index).get("weight_map")
                if not isinstance(found, dict):
                    raise CheckpointError("the index has no `weight_map`", where=str(index))
                return {str(k): _plain_name(v, index) for k, v in cast("Any", found).items()}
            if (self.folder / base).is_file():
                names = (
                    self._safetensors(base).keys()
                    if base.endswith(".safetensors")
                    else self._bin(base).keys()
                )
                return dict.fromkeys(names, base)
        raise CheckpointError(
            "the folder has no weights",
            where=str(self.folder),
            allowed="model.safetensors or pytorch_model.bin, or several of them with an index",
        )

    def _safetensors(self, file: str) -> Any:
        if file not in self._opened:
            safe_open, failure = _safetensors_library()
            try:
                opened = safe_open(str(self.folder / file), framework="pt")
            except (failure, OSError) as error:
                raise CheckpointError(
                    f"the file cannot be read: {error}", where=str(self.folder / file)
                ) from error
            self._opened[file] = self._files.enter_context(opened)
        return self._opened[file]

    def _bin(self, file: str) -> dict[str, Tensor]:
        if file not in self._opened:
            contents = read_file(self.folder / file)
            self._opened[file] = {k: v for k, v in contents.items() if isinstance(v, Tensor)}
        return self._opened[file]


def write_hf_folder(
    folder: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a folder that `transformers` loads; it appears when it is complete.

    Args:
        tensors: names and values, taken one at a time.

    Raises:
        CheckpointError: the folder is there and not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            "it is there already", where=str(folder), allowed="a folder that is new or empty"
        )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_tensors(partial, tensors)
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()
        partial.replace(folder)
    except OSError as error:
        raise CheckpointError(
            f"the folder cannot be written: {error.strerror or error}", where=str(folder)
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    groups: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        _save_safetensors(waiting, folder / f"part-{len(groups)}")
        groups.append(list(waiting))
        waiting.clear()
        size = 0

    for name, tensor in tensors:
        waiting[name] = tensor.contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        size, total = size + num_bytes, total + num_bytes
        if size >= MAX_FILE_BYTES:
            flush()
    if waiting or not groups:
        flush()
    if len(groups) == 1:
        (folder / "part-0").replace(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        (folder / f"part-{number}").replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    _safetensors_library()
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _safetensors_library() -> tuple[Any, type[Exception]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ConfigError(
            "the library `safetensors` is not installed", hint="pip install 'openwafer[zoo]'"
        ) from None
    return safe_open, cast("type[Exception]", SafetensorError)


def _plain_name(value: object, index: Path) -> str:
    """A file name in an index must stay inside its folder."""
    name = str(value)
    if Path(name).name != name:
        raise CheckpointError(f"the index names the file {name!r}", where=str(index))
    return name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path.name}", where=str(path), allowed="a Hugging Face checkpoint folder"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"it cannot be read: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError("it is not a JSON object", where=str(path))
    return cast("dict[str, Any]", value)
