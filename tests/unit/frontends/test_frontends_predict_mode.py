"""`--mode predict` for a script of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from openwafer import PyTorchBaseModel, run
from openwafer.frontends.torch.metrics import PredictionWriter

FEATURES = torch.arange(24, dtype=torch.float32).reshape(6, 4)


class Scores(PyTorchBaseModel):
    """The sum of each sample's features, twice over; with or without a writer."""

    def __init__(self, params: dict[str, Any], device: torch.device | None = None) -> None:
        layer = nn.Linear(4, 1, bias=False)
        nn.init.constant_(layer.weight, 2.0)
        folder = Path(params["runconfig"]["model_dir"])
        self.writer = PredictionWriter(folder / "predict/scores.jsonl")
        self.writes = params["model"].get("writes", True)
        super().__init__(params, layer, device)

    def __call__(self, data: Any) -> torch.Tensor:
        scores = self.model(data["x"])[:, 0]
        if self.writes:
            self.writer(unique_ids=data["number"], score=scores)
        return scores.mean()


def batches(params: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    numbers = torch.tensor([0, 1, 2, 3, 4, -1])
    return [{"x": FEATURES[i : i + 3], "number": numbers[i : i + 3]} for i in (0, 3)]


def command(tmp_path: Path, *flags: str, **model: Any) -> list[str]:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"predict_input": {}, "model": model}))
    return ["-p", str(path), "-m", "predict", "-o", str(tmp_path / "out"), *flags]


@pytest.mark.parametrize("flags", [(), ("--cs_ip", "local")])
def test_what_the_model_writes_is_in_its_file(tmp_path: Path, flags: tuple[str, ...]) -> None:
    result = run(Scores, predict_data_fn=batches, argv=command(tmp_path, *flags))
    assert result is not None
    assert result.prediction is not None
    assert (result.prediction.num_batches, result.prediction.num_samples) == (2, 6)
    lines = (tmp_path / "out/predict/scores.jsonl").read_text().splitlines()
    expected = [
        {"unique_id": number, "score": 2 * float(FEATURES[number].sum())} for number in range(5)
    ]
    assert [json.loads(line) for line in lines] == expected


def test_a_model_that_writes_nothing_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Scores, predict_data_fn=batches, argv=command(tmp_path, writes=False))
    assert "called no PredictionWriter" in capsys.readouterr().out
    assert not (tmp_path / "out/predict/scores.jsonl").exists()


def test_a_script_without_data_to_predict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(Scores, eval_data_fn=batches, argv=command(tmp_path))
    assert caught.value.code == 2
    assert "predict_data_fn" in capsys.readouterr().out


def test_a_file_without_the_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(tmp_path)
    Path(argv[1]).write_text("eval_input: {}\nmodel: {}\n")
    with pytest.raises(SystemExit):
        run(Scores, predict_data_fn=batches, argv=argv)
    assert "`predict_input` is missing" in capsys.readouterr().out
