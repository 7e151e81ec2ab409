"""Images and masks: formats, shapes, augmentation, and what is said about broken ones."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openwafer.data import build_dataset
from openwafer.data.image_files import read_image, write_pgm
from openwafer.data.images import augmented, normalized
from openwafer.data.shapes import draw_shapes
from openwafer.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pairs in three formats; the mask is where the image is above 100."""
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number, ending in enumerate((".pgm", ".npy", ".png", ".pgm")):
        image = generator.integers(0, 255, (6, 8), dtype=np.uint8)
        mask = (image > 100).astype(np.uint8) * 255
        for name, array in (("images", image), ("masks", mask)):
            path = tmp_path / name / f"{number}{ending}"
            if ending == ".pgm":
                write_pgm(path, array)
            elif ending == ".npy":
                np.save(path, array)
            else:
                Image.fromarray(array).save(path)
    return tmp_path


def params_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"data_dir": str(folder), "image_shape": [6, 8, 1], "train_test_split": 1.0, **more}


def test_every_format_gives_the_pixels(folder: Path) -> None:
    params = params_of(folder, normalize_data_method="zero_one")
    batch = build_dataset("segmentation", params, "train").example_batch(4)
    assert batch["images"].shape == (4, 1, 6, 8)
    for row, ending in enumerate((".pgm", ".npy", ".png", ".pgm")):
        pixels = read_image(folder / "images" / f"{row}{ending}")
        np.testing.assert_allclose(batch["images"][row, 0].numpy() * 255, pixels, atol=1e-4)
        np.testing.assert_array_equal(batch["labels"][row].numpy(), pixels > 100)


@given(which=st.integers(0, 7), square=st.booleans())
def test_image_and_mask_turn_together(which: int, square: bool) -> None:
    image = np.arange(16).reshape(4, 4) if square else np.arange(12).reshape(3, 4)
    turned = augmented(image, which)
    assert sorted(turned.ravel()) == sorted(image.ravel())
    np.testing.assert_array_equal(augmented(image[None], which)[0], turned)
    # Neighbours stay neighbours.
    steps = {abs(int(a) - int(b)) for row in turned for a, b in pairwise(row)}
    assert steps in ({1}, {image.shape[1]})


def test_augmented_views_are_all_drawn() -> None:
    params: dict[str, Any] = {"image_shape": [8, 8, 1], "augment_data": True}
    dataset = build_dataset("segmentation", params, "train")
    plain = build_dataset("segmentation", {"image_shape": [8, 8, 1]}, "train")
    views = {dataset.batch([5], seed)["labels"].numpy().tobytes() for seed in range(60)}
    assert 4 <= len(views) <= 8
    assert plain.batch([5], 0)["labels"].numpy().tobytes() in views
    evaluation = build_dataset("segmentation", params, "eval")
    assert (evaluation.batch([5], 1)["images"] == evaluation.batch([5], 2)["images"]).all()


def test_scales() -> None:
    image = np.array([[0.0, 1.0, 0.5]], dtype=np.float32)
    assert normalized(image, "zero_centered").tolist() == [[-1, 1, 0]]
    assert normalized(image, "zero_one").tolist() == image.tolist()
    scored = normalized(image, "standard_score")
    assert (scored.mean(), scored.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1))


def test_colours_resizing_and_classes(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    colours = np.zeros((4, 4, 3), dtype=np.uint8)
    colours[..., 1] = 255
    np.save(tmp_path / "images" / "a.npy", colours)
    np.save(tmp_path / "masks" / "a.npy", np.repeat([[0, 1, 2, 3]], 4, axis=0))
    params = params_of(
        tmp_path, image_shape=[8, 8, 1], num_classes=4, normalize_data_method="zero_one"
    )
    item = build_dataset("segmentation", params, "train")[0]
    assert item["images"].shape == (1, 8, 8)
    assert float(item["images"][0, 3, 3]) == pytest.approx(0.587)
    assert item["labels"][0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    one = build_dataset("segmentation", {**params, "num_classes": 2, "class_id": 2}, "train")[0]
    assert one["labels"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    np.save(tmp_path / "images" / "b.npy", colours)
    np.save(tmp_path / "masks" / "b.npy", np.zeros((4, 4), dtype=np.uint8))
    assert len(build_dataset("segmentation", {**params, "num_classes": 2}, "train")) == 2
    marked = {**params, "num_classes": 2, "only_defective_images": True}
    assert len(build_dataset("segmentation", marked, "train")) == 1
    with pytest.raises(DataError, match="class 3"):
        build_dataset("segmentation", {**params, "num_classes": 3}, "train")[0]


def test_splits_are_apart(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for number in range(40):
            np.save(tmp_path / name / f"{number}.npy", np.full((2, 2), number, dtype=np.uint8))
    params = params_of(tmp_path, image_shape=[2, 2, 1], train_test_split=0.7)
    parts = [build_dataset("segmentation", params, split) for split in ("train", "eval")]
    values = [{float(d[i]["images"][0, 0, 0]) for i in range(len(d))} for d in parts]
    assert not values[0] & values[1]
    assert len(values[0]) + len(values[1]) == 40
    assert 4 < len(values[1]) < 20


def test_broken_images(folder: Path) -> None:
    path = folder / "images" / "0.pgm"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "cut short"),
        (b"P2\n1 1\n255\n0", "not a binary PGM"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            build_dataset("segmentation", params_of(folder), "train")[0]
        assert caught.value.where == str(path)
    path.write_bytes(whole)
    np.save(folder / "masks" / "1.npy", np.zeros((2, 2)))
    with pytest.raises(DataError, match="the mask is 2 × 2"):
        build_dataset("segmentation", params_of(folder), "train")[1]
    np.save(folder / "images" / "1.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not an image"):
        build_dataset("segmentation", params_of(folder), "train")[1]
    (folder / "images" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match="not an image"):
        build_dataset("segmentation", params_of(folder), "train")[2]
    (folder / "masks" / "3.pgm").unlink()
    with pytest.raises(DataError, match="no mask"):
        build_dataset("segmentation", params_of(folder, augment_data=True), "train")
    with pytest.raises(ConfigError, match="image_shape"):
        build_dataset("segmentation", {"image_shape": [8, 8]}, "train")


def test_shapes_can_be_told_from_their_background() -> None:
    """Inside is brighter on average, but a threshold on single pixels does not do it."""
    right = inside = 0.0
    for index in range(40):
        image, mask = draw_shapes(1, index, (1, 32, 32))
        assert 0 < mask.mean() < 0.7
        level = image[0][mask == 0].mean() + 0.125
        right += ((image[0] > level) == mask).mean() / 40
        inside += (image[0][mask == 1].mean() - image[0][mask == 0].mean()) / 40
    assert inside == pytest.approx(0.25, abs=0.05)
    assert right < 0.97
    again, _ = draw_shapes(1, 39, (1, 32, 32))
    np.testing.assert_array_equal(again, image)
