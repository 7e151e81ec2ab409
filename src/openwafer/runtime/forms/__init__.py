"""Faster forms of parts of a layer: attention chosen by measuring, the loss head, TorchInductor."""
