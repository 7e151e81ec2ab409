"""Defaults of the parameter file."""

from data import image_pixels


def set_defaults(params):
    """Complete the sections that are there; `run` reports those that are missing."""
    for section, shuffle in (("train_input", True), ("eval_input", False)):
        if section in params:
            input_params = params[section]
            input_params.setdefault("batch_size", 128)
            input_params.setdefault("shuffle", shuffle)
            input_params.setdefault("num_workers", 0)
            input_params.setdefault("drop_last_batch", True)
    if "model" in params:
        model = params["model"]
        model.setdefault("dropout", 0.0)
        model.setdefault("activation_fn", "relu")
        model.setdefault("hidden_sizes", [model.get("hidden_size", 50)] * model.get("depth", 10))
        if "input_size" not in model:
            model["input_size"] = image_pixels(params)
    return params
