import torch

from loaders.collate import BufferPool


def test_memory_is_taken_up_again_only_when_no_tensor_holds_it() -> None:
    buffers = BufferPool()
    shape = torch.empty(4, 8, 8, dtype=torch.uint8)
    first = buffers.empty_like(shape).fill_(1)
    view = first[1:, None].permute(0, 2, 3, 1)  # as a batch is laid out
    second = buffers.empty_like(shape).fill_(2)
    place = first.data_ptr()
    del first
    third = buffers.empty_like(shape).fill_(3)
    assert bool((view == 1).all()) and bool((second == 2).all())
    assert len({place, second.data_ptr(), third.data_ptr()}) == 3
    del view
    assert buffers.empty_like(shape[:3]).data_ptr() == place


def test_a_consumer_that_keeps_every_batch_keeps_them_unchanged() -> None:
    buffers = BufferPool()
    shape = torch.empty(2, 3, 3, dtype=torch.uint8)
    kept = [buffers.empty_like(shape).fill_(number) for number in range(20)]
    assert all(bool((batch == number).all()) for number, batch in enumerate(kept))
