"""Training on any number of ranks: settings, loss, optimizers, checkpoints, the loop."""
