"""The parts of a step: losses, optimizers, learning rates, precision, EMA, compilation."""
