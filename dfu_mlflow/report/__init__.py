"""`report.html`: one file that opens without a network, for a run of training or of evaluation."""
