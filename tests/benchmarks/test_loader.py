"""What `python -m benchmarks.loader` measures, in small, and how results are named."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.contenders import DECODERS, usable_decoders
from benchmarks.harness import result_path
from benchmarks.loader import fastest_limit, main
from shards.folder import ShardFolder, SplitReader


def measured(folder: ShardFolder, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    given = ["--shards", str(folder.path), "--json", str(out), "--runs", "1", "--batch-size", "8", "--threads", "1"]
    done = CliRunner().invoke(main, [*given, *options])
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.output


def test_the_limit_is_the_fastest_decoder_and_the_side_questions_can_be_left_out(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    options = ("--loaders", "limit", "--no-cold", "--no-scaling", "--device", "cpu")
    record, output = measured(phantom_shards, tmp_path / "loader.json", *options)
    assert list(record["loaders"]) == ["limit"]
    assert not {"cold_page_cache", "threads_of_dali"} & set(record)
    decoders = record["limit_decoders"]
    fastest = max(decoders, key=lambda name: decoders[name]["median"])
    assert record["limit_decoder"] == fastest
    assert record["loaders"]["limit"]["images_per_second"] == decoders[fastest]
    installed = importlib.util.find_spec("simplejpeg") is not None
    assert list(decoders) == ["torchvision", *["simplejpeg"] * installed]
    assert ("simplejpeg, which may be faster, is not installed" in output) != installed
    # Only dali chooses a decoder, and only on a GPU.
    assert {one["decoder_sweep_seconds"] for one in record["loaders"].values()} == {0}


def test_the_faster_of_two_decoders_is_the_limit() -> None:
    raced = {
        name: {"images_per_second": {"median": rate}} for name, rate in (("torchvision", 5.0), ("simplejpeg", 7.0))
    }
    assert fastest_limit(raced)["limit_decoder"] == "simplejpeg"


# torchvision 0.29 announces that its decoders will go; loaders.worker_pool is prepared for it.
@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_the_decoders_of_the_limit_decode_to_the_same_pixels(phantom_shards: ShardFolder) -> None:
    pytest.importorskip("simplejpeg")
    assert usable_decoders("jpg") == ["torchvision", "simplejpeg"]
    assert usable_decoders("png") == ["torchvision"]
    for image in SplitReader(phantom_shards, "train").read(range(8)).images:
        one, other = (np.asarray(decode(image, 64)).squeeze() for decode in DECODERS.values())
        assert np.array_equal(one, other)


def test_a_result_is_named_after_the_device_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert result_path("loader", "cpu", tmp_path).name.startswith("loader_cpu")
    assert result_path("loader", "cuda:0", tmp_path).name.startswith("loader_gpu_")
