"""Reading YAML: values, places, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from openwafer.config.yaml_file import YamlFile, read_yaml
from openwafer.errors import ConfigError


def read(tmp_path: Path, text: str) -> YamlFile:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3E4", 3e4),
        ("-2.5e+2", -250.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5e1", -5.0),
        ("1_000.5", 1000.5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("17", 17),
        ("0x10", 16),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1.2.3", "1.2.3"),
        ("10.0.0.1:9000", "10.0.0.1:9000"),
        ("1:30.5", "1:30.5"),
        ("'1e-3'", "1e-3"),
        (".", "."),
        ("-", None),
        ("yes", True),
    ],
)
def test_a_scalar_is_what_it_looks_like(tmp_path: Path, text: str, value: object) -> None:
    if text == "-":
        assert read(tmp_path, "key:\n  -\n").values["key"] == [None]
        return
    seen = read(tmp_path, f"key: {text}\n").values["key"]
    assert seen == value
    assert type(seen) is type(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("floats")


SPELLINGS = st.sampled_from(
    [repr, "{:.17e}".format, "{:.17E}".format, lambda x: yaml.safe_dump(x).split("\n")[0]]
)


@given(number=st.floats(allow_nan=False, allow_infinity=False), spell=SPELLINGS)
def test_any_float_round_trips(folder: Path, number: float, spell: object) -> None:
    text = spell(number)  # type: ignore[operator]
    seen = read(folder, f"key: {text}\n").values["key"]
    assert type(seen) is float
    assert seen == number


def test_every_key_has_its_line(tmp_path: Path) -> None:
    text = (
        "a:\n  b: 1\n\n  c:\n    - x: 2\n    - y: 3\nbase: &base\n  k: 1\nd:\n  <<: *base\n  m: 2\n"
    )
    file = read(tmp_path, text)
    lines = {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 4,
        ("a", "c", 0): 5,
        ("a", "c", 1, "y"): 6,
        ("d", "k"): 8,
        ("d", "m"): 11,
        ("a", "c", 9): 4,
        ("a", "missing"): 1,
    }
    for path, line in lines.items():
        assert file.locate(path) == f"{file.path}:{line}"
    assert file.locate(("nothing",)) == str(file.path)
    assert file.values["d"] == {"k": 1, "m": 2}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "`a` stands twice"),
        ("a:\n  b: 1\n  c: {x: 1, x: 2}\n", 3, "`x` stands twice"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: *nowhere\n", 1, "undefined alias"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "could not determine a constructor"),
        ("- 1\n- 2\n", 1, "must be a mapping"),
        ("a: 1\n---\nb: 2\n", 2, "single document"),
        ("{[1]: 2}\n", 1, "unhashable key"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read(tmp_path, text)
    assert caught.value.where == f"{tmp_path / 'params.yaml'}:{line}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read(tmp_path, "a: \x00\n")
    with pytest.raises(ConfigError, match=r"not valid YAML|nested too deeply"):
        read(tmp_path, "a: " + "[" * 5000)


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing\n").values == {}


def test_an_alias_bomb_is_read_without_unfolding(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    file = read(tmp_path, "\n".join(lines))
    assert file.locate(("a29", 0, 0)).endswith(":28")
