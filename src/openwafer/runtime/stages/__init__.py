"""Layer pipelines over processes: where a model is cut, the schedule, the messages."""
