"""The PyTorch frontend: `run()`, `PyTorchBaseModel`, metrics, and the capture into a Program."""
