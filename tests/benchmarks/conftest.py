"""Benchmarks change settings of their process; the tests of other folders may share it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _compiler_settings() -> Iterator[None]:
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()
