"""Features in, numbers out: one file a metric, everything in float64."""
