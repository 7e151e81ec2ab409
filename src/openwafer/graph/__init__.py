"""The model as a static graph: Program, its text form, and structural hashes."""

from openwafer.graph.program import (
    Buffer,
    GraphInput,
    MetricOutput,
    Parameter,
    Program,
    Site,
    TensorSpec,
)

__all__ = ["Buffer", "GraphInput", "MetricOutput", "Parameter", "Program", "Site", "TensorSpec"]
