"""Why is it not learning? A case is read, checks examine it, findings are ranked. Start at `diagnose.diagnose`."""
