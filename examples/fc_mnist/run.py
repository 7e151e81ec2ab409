"""Train and evaluate the fully connected network of this folder.

python run.py --mode train --params configs/params.yaml --validate_only
python run.py --mode train --params configs/params.yaml --compile_only
python run.py --mode train --params configs/params.yaml --cs_ip local
python run.py --mode eval  --params configs/params.yaml --cs_ip local
"""

from data import eval_input_dataloader, train_input_dataloader
from model import MNISTModel
from utils import set_defaults

from openwafer import run

if __name__ == "__main__":
    run(MNISTModel, train_input_dataloader, eval_input_dataloader, set_defaults)
