"""What a step is made of: losses, optimizers, rates, number types, compilation."""
