"""The options of a run, and the files they can come from."""

from trainer.config.options import TrainConfig

__all__ = ["TrainConfig"]
