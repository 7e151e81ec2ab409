"""The example on files in MNIST's format: those of Fashion-MNIST, and small ones made here."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fc_mnist_runs import Outcome, run_here, write_params

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""

Images = np.ndarray[Any, np.dtype[np.uint8]]


def idx(array: Images) -> bytes:
    """The IDX format: two zero bytes, type 8 (unsigned byte), the rank, big-endian sizes, data."""
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def small_images(count: int, seed: int) -> tuple[Images, Images]:
    """Images of 6 × 5 pixels whose class is the row that is bright, of the first four."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, count).astype(np.uint8)
    images = generator.integers(0, 60, (count, 6, 5)).astype(np.uint8)
    images[np.arange(count), labels] += 190
    return images, labels


def write_set(folder: Path, *, zipped: bool) -> None:
    folder.mkdir()
    for name, (images, labels) in {
        "train": small_images(64, 1),
        "t10k": small_images(32, 2),
    }.items():
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{name}-{kind}-ubyte"
            content = idx(array)
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


def train_on(folder: Path, tmp_path: Path, mode: str = "train_and_eval", **changes: Any) -> Outcome:
    merged = {
        "train_input.data_dir": str(folder),
        "eval_input.data_dir": str(folder),
        "train_input.batch_size": 16,
        "eval_input.batch_size": 16,
        "model.hidden_size": 16,
        "model.depth": 1,
        "runconfig.max_steps": 60,
        "runconfig.log_steps": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    params = write_params(tmp_path / f"{folder.name}.yaml", merged)
    return run_here(mode, params, tmp_path / f"model_{folder.name}", "--cs_ip", "local")


def test_plain_and_zipped_files_are_read_alike(tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    for zipped in (False, True):
        folder = tmp_path / f"zipped_{zipped}"
        write_set(folder, zipped=zipped)
        outcomes.append(train_on(folder, tmp_path).succeeded())
    plain, zipped_outcome = outcomes
    assert plain.losses() == zipped_outcome.losses()
    assert plain.metrics("eval")[-1]["accuracy"] == 1.0, "the classes are plain to see"
    assert plain.plan()["num_parameters"] == 30 * 16 + 16 + 16 * 10 + 10


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-images-idx3-ubyte", lambda whole: whole[:-7], "is cut short"),
        ("train-images-idx3-ubyte", lambda whole: whole[:9], ""),
        ("train-images-idx3-ubyte", lambda whole: b"\x1f\x8b" + whole, "is not an IDX file"),
        ("train-labels-idx1-ubyte", lambda whole: b"", "is not an IDX file"),
        ("train-labels-idx1-ubyte", lambda whole: idx(np.zeros(63, np.uint8)), ""),
        ("t10k-images-idx3-ubyte", lambda whole: whole[:-1], "is cut short"),
    ],
)
def test_a_damaged_file_is_an_error(name: str, content: Any, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_set(folder, zipped=False)
    path = folder / name
    path.write_bytes(content(path.read_bytes()))
    outcome = train_on(folder, tmp_path)
    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.output
    assert "/data.py:" in outcome.output or "user" in outcome.output
    if said:
        assert f"{path} {said}" in outcome.output
    assert not outcome.model_dir.exists()


def test_a_zipped_file_cut_short_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_set(folder, zipped=True)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-200])
    outcome = train_on(folder, tmp_path)
    assert outcome.exit_code == 2
    assert f"{path} is cut short" in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.skipif(
    not FASHION.is_dir(),
    reason=f"no {FASHION}: apt-get install dataset-fashion-mnist puts Fashion-MNIST there",
)
def test_fashion_mnist(tmp_path: Path) -> None:
    outcome = train_on(
        FASHION,
        tmp_path,
        train_input__batch_size=256,
        eval_input__batch_size=1000,
        model__hidden_size=64,
        model__depth=2,
        runconfig__max_steps=120,
        runconfig__log_steps=50,
    ).succeeded()
    (row,) = outcome.metrics("eval")
    assert row["step"] == 120
    assert row["accuracy"] > 0.7
    assert outcome.plan()["num_parameters"] == 784 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
