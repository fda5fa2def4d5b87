"""What comes after pretraining: reinforcement learning from checkable tasks, and distillation."""
