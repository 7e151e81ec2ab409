"""Train and evaluate the fully connected network of this folder with TensorFlow.

python run.py --mode train   --params configs/params.yaml --validate_only
python run.py --mode train   --params configs/params.yaml --compile_only
python run.py --mode train   --params configs/params.yaml --cs_ip local
python run.py --mode eval    --params configs/params.yaml --cs_ip local
python run.py --mode predict --params configs/params.yaml --cs_ip local
"""

from data import eval_input_fn, predict_input_fn, set_defaults, train_input_fn
from model import model_fn

from openwafer.tf import run

if __name__ == "__main__":
    run(
        model_fn,
        train_input_fn,
        eval_input_fn,
        set_defaults,
        predict_input_fn=predict_input_fn,
    )
