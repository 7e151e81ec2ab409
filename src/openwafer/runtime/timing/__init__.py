"""Where the time of a step goes: the timeline, its trace file and summary, the predicted step."""
