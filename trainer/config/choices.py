"""The names that options take, without an import of torch, which takes seconds.

tests/trainer/config/test_choices.py holds each to the registry it is of.
"""

ARCHS = ("custom_cnn", "resnet50", "vit_b_16")
FREEZES = ("none", "partial", "backbone")
LOADERS = ("auto", "dali", "resident", "webdataset", "dataloader", "synthetic")
FLIPS = ("none", "random", "both")
AUGMENTS = ("none", "light", "strong")
CACHES = ("auto", "on", "off")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "onecycle")
LOSSES = ("bce", "focal", "asymmetric")
POS_WEIGHTS = ("none", "log", "sqrt", "ratio", "effective")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COMPILE = ("auto", "on", "off")
