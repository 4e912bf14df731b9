"""Training: recipes' options, the loop, distillation, evaluation, checkpoints, many processes."""
