"""Float32 that is float32, also on a GPU whose tensor cores would round it to TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply and convolve float32 with all its 24 bits while inside; then leave torch as it was.

    TF32 keeps 11 of them. cuDNN convolves in it unless told not to (`torch.backends.cudnn.allow_tf32` is
    True by default), and training allows it for products of matrices, too. The settings are the process's,
    so that no other thread should compute meanwhile.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
