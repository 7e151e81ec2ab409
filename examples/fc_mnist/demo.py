"""The whole path on one page: validate, compile, train in both modes, evaluate, summary.

Runs what run.py runs, with the command lines that it prints, on the digits that scikit-learn ships.
"""

import json
import time
from pathlib import Path

from data import eval_input_dataloader, train_input_dataloader
from model import MNISTModel
from utils import set_defaults

from openwafer import run

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "runs" / "demo"


def step(title, *flags, model_dir):
    print(f"\n--- {title}")
    print(f"$ python run.py --params configs/params.yaml {' '.join(flags)}", flush=True)
    command = ["--params", str(HERE / "configs/params.yaml"), "--model_dir", str(model_dir)]
    command += ["--no_autoresume", *flags]
    run(MNISTModel, train_input_dataloader, eval_input_dataloader, set_defaults, argv=command)


def last_line(path):
    return json.loads(path.read_text().splitlines()[-1])


def main():
    pipelined, streamed = OUT / "layer_pipelined", OUT / "weight_streaming"
    train = ("--mode", "train", "--cs_ip", "local", "--execution_mode")
    began = time.perf_counter()
    step("validate", "--mode", "train", "--validate_only", model_dir=pipelined)
    step("compile", "--mode", "train", "--compile_only", model_dir=pipelined)
    step("train, layer pipelined", *train, "layer_pipelined", model_dir=pipelined)
    step("train, weight streaming", *train, "weight_streaming", model_dir=streamed)
    checkpoint = max(pipelined.glob("checkpoint_*.mdl"), key=lambda path: path.stat().st_mtime)
    evaluate = ("--mode", "eval", "--cs_ip", "local", "--checkpoint_path", str(checkpoint))
    step("evaluate on the held-out digits", *evaluate, model_dir=pipelined)

    losses = [last_line(folder / "train/metrics.jsonl")["loss"] for folder in (pipelined, streamed)]
    same = "the same" if losses[0] == losses[1] else "different"
    evaluation = last_line(pipelined / "eval/metrics.jsonl")
    figures = json.loads((pipelined / "performance/performance.json").read_text())
    plans = [json.loads(path.read_text()) for path in pipelined.glob("cs_*/plan.json")]
    trained = next(plan["plan"]["hash"] for plan in plans if plan["plan"]["training"])
    print("\n--- summary")
    print(f"loss, layer pipelined     {losses[0]:.6f}")
    print(f"loss, weight streaming    {losses[1]:.6f}   ({same})")
    print(f"accuracy, held-out digits {evaluation['accuracy']:.1%}")
    print(f"measured here             {figures['samples_per_sec']:,.0f} samples/s")
    print(f"predicted for the wafer   {figures['est_samples_per_sec']:,.0f} samples/s")
    print(f"time                      {time.perf_counter() - began:.0f} s")
    print(f"report                    {pipelined / f'cs_{trained}' / 'report.html'}")


if __name__ == "__main__":
    main()
