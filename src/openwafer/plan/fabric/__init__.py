"""The fabric compiler: sizes, places and routes kernels on the wafer, and predicts the rate."""
