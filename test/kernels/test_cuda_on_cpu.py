"""The CPU emulator of CUDA (support/cuda_on_cpu.py) does what the instructions are specified to do."""

import ctypes

import numpy as np
import pytest
from support import cuda_on_cpu
from support.cuda_on_cpu import KernelError, launch

pytestmark = pytest.mark.skipif(not cuda_on_cpu.AVAILABLE, reason="needs g++ on Linux, x86-64")
SEEDS = range(8)
BLOCKS, THREADS = 8, 256

SOURCE = r"""
#include "hopper.cuh"

struct Params {
  const void* a;
  const void* b;
  void* to;
  int mode;
};

#define KERNEL extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(256, 1)

// to[16][8] = a[16][16] b[16][8], by warp 0; mode 1: b is given transposed, as [8][16].
KERNEL product(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(shared);
  if (threadIdx.x >= 32) return;
  u32 lane = threadIdx.x, at = shared_address(shared);
  copy_async(at + lane * 16, (const char*)p.a + lane * 16);
  copy_async(at + 512 + lane % 16 * 16, (const char*)p.b + lane % 16 * 16);
  commit_copies();
  wait_for_copies<0>();
  __syncwarp();
  u32 a[4], b[4];
  float c[4] = {0, 0, 0, 0};
  load_matrices(a, at + lane % 16 * 32 + lane / 16 * 16);
  if (p.mode)
    load_matrices(b, at + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
  else
    load_matrices_transposed(b, at + 512 + lane % 16 * 16);
  multiply_add(c, a, b[0], b[1]);
  float2* to = (float2*)p.to;
  u32 g = lane / 4, t = lane % 4;
  to[g * 4 + t] = make_float2(c[0], c[1]);
  to[(g + 8) * 4 + t] = make_float2(c[2], c[3]);
}

// to[lane][4]: the registers of each lane; mode 1: transposed.
KERNEL fragments(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(shared);
  if (threadIdx.x >= 32) return;
  ((uint4*)shared)[threadIdx.x] = load_early((const uint4*)p.a + threadIdx.x);
  __syncwarp();
  u32 registers[4], address = shared_address(shared + threadIdx.x * 16);
  if (p.mode)
    load_matrices_transposed(registers, address);
  else
    load_matrices(registers, address);
  ((uint4*)p.to)[threadIdx.x] = make_uint4(registers[0], registers[1], registers[2], registers[3]);
}

// Each thread gives its number to the same thread of every block; to[block][thread]: the sum of those that
// it got, 20 times. mode 1: without the barrier before the next round; 2: without the one before the first;
// 3: without waiting for what is sent.
KERNEL exchange(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(shared);
  u32 rank = cluster_rank(), i = threadIdx.x;
  uint4* slots = (uint4*)(shared + 256);
  u32 sum = 0;
  if (i == 0) {
    for (u32 round = 0; round < 20; ++round)
      expect_bytes(shared_address(shared) + 8 * round, 8 * blockDim.x * 16);
    show_receipts();
  }
  if (p.mode != 2) {
    cluster_arrive();
    cluster_wait();
  }
  for (u32 round = 0; round < 20; ++round) {
    u32 receipt = shared_address(shared) + 8 * round;
    for (u32 to = 0; to < 8; ++to) {
      u32 address = address_in_block(shared_address(slots + rank * blockDim.x + i), to);
      send_to_block(address, make_uint4(blockIdx.x * 1000 + i, round, 0, 0), address_in_block(receipt, to));
    }
    if (p.mode != 3) wait_for_bytes(receipt);
    for (u32 from = 0; from < 8; ++from) {
      uint4 got = slots[from * blockDim.x + i];
      sum += got.x + got.y;
    }
    if (p.mode != 1) {
      cluster_arrive();
      cluster_wait();
    }
  }
  ((float*)p.to)[(blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + i] = sum;
}

// to[block][thread]: the number of the thread that is a step of 33 further in the block. mode 1: without a
// barrier.
KERNEL neighbours(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(shared);
  float* numbers = (float*)shared;
  numbers[threadIdx.x] = threadIdx.x;
  if (!p.mode) __syncthreads();
  ((float*)p.to)[blockIdx.x * blockDim.x + threadIdx.x] = numbers[(threadIdx.x + 33) % blockDim.x];
}

KERNEL shuffles(const __grid_constant__ Params p) {
  float sum = threadIdx.x;
  for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
  u64 far = shuffle_from((u64(threadIdx.x) << 40) + 5, threadIdx.x / 32);
  float2* to = (float2*)p.to + blockIdx.x * blockDim.x + threadIdx.x;
  *to = make_float2(sum, float(far >> 40) + float(far & 7));
}

// Three groups of copies; to[thread]: the first value of each. mode: groups that are not waited for.
KERNEL copies(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(shared);
  float* mine = (float*)shared + threadIdx.x * 12;
  for (int group = 0; group < 3; ++group) {
    copy_async(shared_address(mine + group * 4), (const float*)p.a + threadIdx.x * 12 + group * 4);
    commit_copies();
  }
  if (p.mode == 0) wait_for_copies<0>();
  if (p.mode == 1) wait_for_copies<1>();
  for (int group = 0; group < 3; ++group) ((float*)p.to)[threadIdx.x * 3 + group] = mine[group * 4];
}

// to[thread]: a[thread][2] as float16 and back, and three functions of them.
KERNEL numbers(const __grid_constant__ Params p) {
  float2 in = ((const float2*)p.a)[threadIdx.x];
  u32 packed = pack_halves(in.x, in.y);
  float2 out = unpack_halves(packed);
  float* to = (float*)p.to + threadIdx.x * 6;
  to[0] = out.x, to[1] = out.y, to[2] = power_of_two(in.x), to[3] = inverse_root(fabsf(in.x) + 1);
  to[4] = exponential(in.x);
  ((u32*)to)[5] = packed;
}

KERNEL mistakes(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(shared);
  u32 lane = threadIdx.x % 32, registers[4];
  u32 at = shared_address(shared);
  if (threadIdx.x != 37 && p.mode < 6) return;
  if (p.mode == 0) copy_async(at + 1024, p.a);
  if (p.mode == 1) shared[1024] = 1;
  if (p.mode == 2) copy_async(at + 8, p.a);
  if (p.mode == 3) load_matrices(registers, at);
  if (p.mode == 4) *(volatile int*)16 = 1;
  if (p.mode == 5) address_in_block(at, 8);
  if (p.mode == 6 && lane == 3) __syncwarp();
  if (p.mode == 6) shuffle_xor(1, 1);
  if (p.mode == 7 && threadIdx.x < 128) __syncthreads();
  if (p.mode == 7) cluster_arrive();
  if (p.mode == 7) cluster_wait();
  if (p.mode == 7 && threadIdx.x < 96) cluster_arrive();
  if (p.mode == 7) __syncthreads();
  if (p.mode == 7 && threadIdx.x < 96) cluster_wait();
  if (p.mode == 8) cluster_arrive();
  if (p.mode == 8) cluster_arrive();
  if (p.mode == 9) *(float2*)(shared + 4 * threadIdx.x) = make_float2(1, 2);
  if (p.mode == 10) ((u32*)p.to)[0] = registers[lane];
}
"""
KERNELS = ["product", "fragments", "exchange", "neighbours", "shuffles", "copies", "numbers", "mistakes"]


class Params(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("a", "b", "to")), ("mode", ctypes.c_int))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    source = folder / "kernels.cu"
    source.write_text(SOURCE)
    return cuda_on_cpu.build(source, KERNELS, {"UNUSED": 1}, folder)


@pytest.fixture
def run(library):
    def of(kernel, to, a=None, b=None, mode=0, seed=0, shared_bytes=(1 << 15) + 256, grid=(BLOCKS, 1)):
        pointers = (None if each is None else each.ctypes.data for each in (a, b, to))
        launch(library, kernel, grid, shared_bytes, Params(*pointers, mode), threads=THREADS, seed=seed)
        return to

    return of


def halves(seed, *shape):
    return aligned(np.random.default_rng(seed).normal(size=shape).astype(np.float16))


def aligned(values):
    """A copy at a multiple of 16 bytes."""
    room = np.empty(values.nbytes + 16, np.uint8)
    copy = room[-room.ctypes.data % 16 :][: values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", [0, 1])
def test_product(run, mode, seed):
    a, b = halves(1, 16, 16), halves(2, 16, 8)
    to = run("product", aligned(np.zeros((16, 8), np.float32)), a, aligned(b.T) if mode else b, mode, seed)
    np.testing.assert_allclose(to, a.astype(np.float32) @ b.astype(np.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [0, 1])
def test_fragments(run, mode):
    matrices = aligned(np.arange(256, dtype=np.uint16).reshape(4, 8, 8))
    registers = run("fragments", aligned(np.zeros((32, 4, 2), np.uint16)), matrices, mode=mode)
    for lane in range(32):
        for i in range(4):
            matrix = matrices[i].T if mode else matrices[i]
            start = 2 * (lane % 4)
            assert registers[lane, i].tolist() == matrix[lane // 4, start : start + 2].tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_exchange(run, seed):
    to = run("exchange", np.zeros((2, 2, 8, THREADS), np.float32), seed=seed, grid=(16, 2))
    for cluster in range(2):
        first = 8000 * cluster * 8 + 1000 * 28 + 8 * np.arange(THREADS)
        np.testing.assert_array_equal(to[:, cluster], np.broadcast_to(20 * first + 8 * 190, (2, 8, THREADS)))


def outcomes(run, *arguments, **options):
    """What a kernel computes with each seed, or its error."""
    found = set()
    for seed in SEEDS:
        try:
            found.add(run(*arguments, **options, seed=seed).tobytes())
        except KernelError as error:
            found.add(str(error).split(": ")[2])
    return found


def test_missing_barriers_show(run):
    to = np.zeros((8, THREADS), np.float32)
    assert len(outcomes(run, "exchange", to)) == 1
    assert len(outcomes(run, "exchange", to, mode=1)) > 2
    assert "send_to_block" in outcomes(run, "exchange", to, mode=2)
    assert len(outcomes(run, "exchange", to, mode=3)) > 2
    assert len(outcomes(run, "neighbours", to)) == 1
    assert len(outcomes(run, "neighbours", to, mode=1)) > 2


def test_neighbours_are_those_behind_the_barrier(run):
    to = run("neighbours", np.zeros((8, THREADS), np.float32), seed=3)
    np.testing.assert_array_equal(to, np.broadcast_to((np.arange(THREADS) + 33) % THREADS, (8, THREADS)))


def test_shuffles(run):
    to = run("shuffles", aligned(np.zeros((8, THREADS, 2), np.float32)))
    first = np.arange(THREADS) // 32 * 32
    np.testing.assert_array_equal(to[..., 0], np.broadcast_to(32 * first + 496, (8, THREADS)))
    np.testing.assert_array_equal(to[..., 1], np.broadcast_to(first + first // 32 + 5, (8, THREADS)))


def test_copies_are_done_when_they_are_waited_for(run):
    a = aligned(np.arange(THREADS * 12, dtype=np.float32))
    copied = a.reshape(THREADS, 3, 4)[..., 0]
    to = np.zeros((THREADS, 3), np.float32)
    np.testing.assert_array_equal(run("copies", to, a), copied)
    run("copies", to, a, mode=1)
    np.testing.assert_array_equal(to[:, :2], copied[:, :2])
    assert np.isnan(to[:, 2]).all()
    run("copies", to, a, mode=1, seed=5)
    assert 0 < np.isnan(to[:, 2]).sum() < THREADS  # some are early


def test_numbers(run):
    rng = np.random.default_rng(4)
    scale = 10.0 ** rng.integers(-6, 2, (THREADS, 2))
    a = aligned((rng.normal(size=scale.shape) * scale).astype(np.float32))
    a[:3, 0] = 1 + 2**-11, 1 + 3 * 2**-11, -140  # ties go to even
    to = run("numbers", np.zeros((THREADS, 6), np.float32), a)
    rounded = a.astype(np.float16)
    np.testing.assert_array_equal(to[:, :2], rounded.astype(np.float32))
    np.testing.assert_array_equal(to[:, 5].view(np.uint32), aligned(rounded).view(np.uint32)[:, 0])
    np.testing.assert_allclose(to[3:, 2], np.exp2(a[3:, 0]), rtol=1e-6)
    assert to[2, 2] == 0  # a subnormal number
    np.testing.assert_allclose(to[:, 3], 1 / np.sqrt(np.abs(a[:, 0]) + 1), rtol=1e-6)
    np.testing.assert_allclose(to[3:, 4], np.exp(a[3:, 0]), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (0, r"thread 37: copy_async: 16 bytes at 1024 of 1024"),
        (1, r"thread 37: uses byte 1024 of 1024 bytes of shared memory(\n.*)*kernels.cu:\d+"),
        (2, r"thread 37: copy_async: 16 bytes at 8 of 1024"),
        (3, r"exited.*waits at load_matrices|waits at load_matrices.*exited|exits while others"),
        (4, r"thread 37: uses the invalid address 0x10"),
        (5, r"thread 37: address_in_block: no block 8"),
        (6, r"the warp is not together: .*(__syncwarp|shuffle_xor), line \d+, .*(__syncwarp|shuffle_xor)"),
        (7, r"deadlock:\n  block \(0, 0\), threads 0 to 127: waits at __syncthreads.*\n.*cluster_wait"),
        (8, r"cluster_arrive, line \d+: a second time"),
        (9, r"uses a misaligned address, .*kernels.cu:\d+"),
        (10, r"uses an index outside of an array, .*kernels.cu:\d+"),
    ],
)
def test_mistakes_are_reported(run, mode, message, seed):
    a = aligned(np.zeros(64, np.float32))
    with pytest.raises(KernelError, match=message):
        run("mistakes", a, a, mode=mode, seed=seed, shared_bytes=1024)
    run("neighbours", np.zeros((8, THREADS), np.float32))  # the next launch begins anew


def test_parameters_of_the_wrong_size(library):
    with pytest.raises(KernelError, match="the parameters take 32 bytes, not 8"):
        launch(library, "numbers", (8, 1), 0, ctypes.c_uint64())
