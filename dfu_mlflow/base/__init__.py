"""The models that fine-tuning starts from, and the weights that learn."""
