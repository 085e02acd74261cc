"""Does a classifier gain from synthetic images? Start at `experiment.measure_utility`."""
