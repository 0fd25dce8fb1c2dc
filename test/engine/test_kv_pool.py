import random

import numpy as np
import pytest
import torch

from light_tts.common.kv_pool import KVPool, SlotTable
from light_tts.engine.llm.attention import RowSpan, TorchAttention

CPU = torch.device("cpu")


def pool(int8: bool) -> KVPool:
    return KVPool(layers=2, slots=16, kv_heads=2, head_dim=8, dtype=torch.float32, device=CPU, int8=int8)


@pytest.mark.parametrize("int8", [False, True])
def test_what_is_written_is_read(int8):
    kv = pool(int8)
    k, v = torch.randn(3, 2, 8), 100 * torch.randn(3, 2, 8)
    slots = torch.tensor([5, 1, 9])
    kv.write(1, slots, k, v)
    kv.write(0, slots, -k, -v)
    got_k, got_v = kv.read(1, slots[[2, 0, 1]])
    for got, written in ((got_k, k), (got_v, v)):
        written = written[[2, 0, 1]]
        limit = written.abs().amax(-1, keepdim=True) / 127 / 2 * 1.001 if int8 else torch.zeros(())
        assert ((got - written).abs() <= limit).all()


def test_int8_keeps_zeros_and_tiny_values_finite():
    kv = pool(int8=True)
    k = torch.zeros(2, 2, 8)
    k[1] = 1e-38
    kv.write(0, torch.tensor([0, 1]), k, k)
    got, _ = kv.read(0, torch.tensor([0, 1]))
    assert torch.isfinite(got).all() and (got[0] == 0).all()


def test_int8_takes_little_more_than_a_quarter_of_float32():
    small, large = pool(int8=True), pool(int8=False)
    assert small.k.nbytes + small.k_scale.nbytes <= large.k.nbytes * 3 / 8


def test_no_slot_is_ever_held_twice_or_lost():
    rng = random.Random(0)
    table = SlotTable(slots=60, rows=6, max_len=20, device=CPU)
    lengths: dict[int, int] = {}
    for _ in range(3000):
        action = rng.choice(["open", "extend", "extend", "close", "truncate"])
        if action == "open" and table.free_rows:
            lengths[table.open()] = 0
        elif lengths:
            row = rng.choice(list(lengths))
            if action == "extend":
                n = rng.randint(1, 12)
                if n <= table.free and lengths[row] + n <= 20:
                    before = table.slots_of(row).copy()
                    table.extend(row, n)
                    assert np.array_equal(table.slots_of(row)[: len(before)], before)
                    lengths[row] += n
                else:
                    with pytest.raises(IndexError):
                        table.extend(row, n)
            elif action == "truncate":
                lengths[row] = rng.randint(0, lengths[row])
                table.truncate(row, lengths[row])
            else:
                table.close(row)
                del lengths[row]
        held = np.concatenate([table.slots_of(row) for row in lengths] or [np.zeros(0, int)])
        assert len(set(held.tolist())) == len(held) == sum(lengths.values()) == 60 - table.free
        assert all(table.length(row) == n for row, n in lengths.items())


def test_a_request_alone_has_consecutive_slots_which_are_read_without_a_copy():
    table, kv = SlotTable(slots=16, rows=3, max_len=10, device=CPU), pool(int8=False)
    first, second = table.open(), table.open()
    for _ in range(2):
        table.extend(first, 3)
        table.extend(second, 2)
    assert torch.equal(table.index(first, 0, 6), torch.tensor([0, 1, 2, 5, 6, 7]))
    assert table.index(first, 3, 6) == slice(5, 8) and table.index(second, 3, 4) == slice(9, 10)
    for row in (first, second):
        table.close(row)
    row = table.open()
    table.extend(row, 10)
    assert table.index(row, 0, 10) == slice(0, 10)
    kv.write(0, slice(2, 5), torch.randn(3, 2, 8), torch.randn(3, 2, 8))
    views, copies = kv.read(0, slice(2, 5)), kv.read(0, torch.arange(2, 5))
    assert all(map(torch.equal, views, copies))
    assert [x.data_ptr() for x in views] == [kv.k[0, 2].data_ptr(), kv.v[0, 2].data_ptr()]


@pytest.mark.parametrize("int8", [False, True])
def test_attention_does_not_depend_on_where_the_slots_are(int8):
    """Three pieces of a request, of 5, 1 and 4 tokens, alone and between those of another one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(10, heads, 32, generator=generator) for heads in (4, 2, 2))

    def attend(beside: bool) -> torch.Tensor:
        table = SlotTable(slots=40, rows=2, max_len=20, device=CPU)
        kv = KVPool(1, 40, kv_heads=2, head_dim=32, dtype=torch.float32, device=CPU, int8=int8)
        context, row, other = TorchAttention(kv, table), table.open(), table.open()
        found, start = [], 0
        for length in (5, 1, 4):
            table.extend(row, length)
            spans = [RowSpan(row, start, length)]
            if beside:
                spans.append(RowSpan(other, table.length(other), 3))
                table.extend(other, 3)
            new = [torch.cat([x[start : start + length], x[:3]])[: length + 3 * beside] for x in (q, k, v)]
            found.append(context(spans)(0, *new)[:length])
            start += length
        return torch.cat(found)

    assert torch.equal(attend(beside=False), attend(beside=True))


def test_the_device_sees_the_same_slots():
    table = SlotTable(slots=30, rows=3, max_len=10, device=CPU)
    rows = [table.open(), table.open()]
    for row in rows * 2:
        table.extend(row, 4)
    for row in rows:
        assert table.device_slots[row, :8].tolist() == table.slots_of(row).tolist()


def test_the_device_sees_what_is_uploaded():
    table = SlotTable(slots=30, rows=3, max_len=10, device=CPU)
    table.device_slots, table._mirrored = table.device_slots.clone(), True  # as on a GPU
    first, second = table.open(), table.open()
    for row, tokens in ((first, 4), (second, 3), (first, 2)):
        table.extend(row, tokens)
    table.truncate(first, 1)
    table.extend(second, 3)
    table.extend(first, 6)
    assert not table.device_slots.any()
    table.upload([(first, 0, 7), (second, 2, 5)])
    assert table.device_slots[first, :7].tolist() == table.slots_of(first).tolist()
    assert table.device_slots[second, :7].tolist() == [0, 0, *table.slots_of(second)[2:5], 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_has_the_table_of_the_host():
    table = SlotTable(slots=30, rows=3, max_len=10, device=torch.device("cuda"))
    row = table.open()
    table.extend(row, 7)
    table.upload([(row, 0, 7)])
    assert table.device_slots[row, :7].tolist() == table.slots_of(row).tolist()
