"""What changes weights: one loop for pretraining and fine-tuning."""
