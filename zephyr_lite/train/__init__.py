"""Training: one loop, its objectives, optimizer, checkpoints and metrics."""
