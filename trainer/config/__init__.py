"""What can be set about a run, where each value comes from, and what is left to the program."""

from trainer.config.options import TrainConfig

__all__ = ["TrainConfig"]
