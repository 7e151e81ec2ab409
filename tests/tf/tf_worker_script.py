"""A script as users of 2021 had it: run as each of the tasks of a step, with the same arguments.

tf_worker_script.py MODEL_DIR CS_IP EXECUTION_MODE DATA

DATA: `all`, every task reads all; `shard`, each reads its part by TF_CONFIG, as the documented
input functions do; `parts N`, what one process has to read for the same order as N such tasks.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from tf_models import classifier_of_2021, images

from openwafer.frontends.tf.library import tf
from openwafer.tf import CerebrasEstimator, CSRunConfig

model_dir, cs_ip, execution_mode, data, *number = sys.argv[1:]


def part(count: int, index: int) -> Any:
    whole = images({}, batched=False)
    return whole.shard(count, index).repeat().batch(16, drop_remainder=True).prefetch(2)


def input_fn(params: dict[str, Any], input_context: Any) -> Any:
    assert input_context is None, "only TensorFlow's own strategies have one"
    if data == "all":
        return images(params)
    cluster = json.loads(os.environ.get("TF_CONFIG", "{}"))
    if data == "shard" and cluster:
        # The chief reads no data, and only looks at their form.
        workers, task = cluster["cluster"]["worker"], cluster["task"]
        return part(len(workers), task["index"])
    count = int(number[0])
    parts = [part(count, index) for index in range(count)]
    return tf.data.Dataset.choose_from_datasets(parts, tf.data.Dataset.range(count).repeat())


config = CSRunConfig(
    cs_ip=cs_ip,
    execution_mode=execution_mode,
    tf_random_seed=1,
    log_step_count_steps=1,
    save_checkpoints_steps=20,
)
estimator = CerebrasEstimator(classifier_of_2021, model_dir=model_dir, config=config, params={})
estimator.train(input_fn, max_steps=20)
