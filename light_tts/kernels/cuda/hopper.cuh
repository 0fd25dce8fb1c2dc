// Instructions of an H100 or H200 (compute capability 9.0) under plain names. Kernels use only these, so
// that a test can replace them (see test/support/cuda_on_cpu.h).
//
// Fragments of a 16 x 8 product with 16 inputs, for lane = 4 * g + t of a warp:
//   a: rows g, g + 8, g, g + 8; inputs 2t, 2t + 1 (the last two: + 8)
//   b: inputs 2t, 2t + 1 (the second: + 8); column g
//   c: row g columns 2t, 2t + 1; row g + 8 columns 2t, 2t + 1
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short half_bits;  // a float16

#ifndef CUDA_ON_CPU

#define DEVICE __device__ __forceinline__

// The shared memory of a block, of the size given at the launch.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Four 8 x 8 matrices of float16; lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i.
DEVICE void load_matrices(u32 (&to)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

DEVICE void load_matrices_transposed(u32 (&to)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// c += a b
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with bfloat16.
DEVICE void multiply_add_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two float16, the first in the lower half.
DEVICE u32 pack_halves(float first, float second) {
  u32 both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

DEVICE float2 unpack_halves(u32 both) {
  float2 values;
  asm("{ .reg .f16 first, second; mov.b32 {first, second}, %2; cvt.f32.f16 %0, first; cvt.f32.f16 %1, second; }"
      : "=f"(values.x), "=f"(values.y)
      : "r"(both));
  return values;
}

// Two float16, with finite numbers in the place of others.
DEVICE u32 finite_halves(u32 both) {
  asm("{ .reg .b32 low; min.f16x2 low, %0, %1; max.f16x2 %0, low, %2; }" : "+r"(both) : "r"(0x7bff7bffu), "r"(0xfbfffbffu));
  return both;
}

// Two bfloat16, the first in the lower half.
DEVICE u32 pack_bf16(float first, float second) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

DEVICE float2 unpack_bf16(u32 both) {
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}

DEVICE float power_of_two(float exponent) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(exponent));
  return value;
}

DEVICE float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// 16 bytes that the previous kernel does not write. Not `ld.global.nc`, which ptxas moves behind the wait for
// that kernel.
DEVICE uint4 load_early(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

DEVICE u32 load_early(const u32* from) {
  u32 value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// 16 bytes from global to shared memory.
DEVICE void copy_async(u32 shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for this thread's copies, except for the last LEFT groups.
template <int LEFT>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

DEVICE u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Barrier of all threads of a cluster, in two parts. Does not order what they write.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address, for send_to_block, of the same place in the shared memory of another block of the cluster.
DEVICE u32 address_in_block(u32 shared, u32 rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// A receipt: eight bytes of shared memory that count the bytes which other blocks store.

// By one thread, which then calls show_receipts.
DEVICE void expect_bytes(u32 receipt, u32 bytes) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(receipt),
      "r"(bytes)
      : "memory");
}

// Other blocks may send after a barrier of the cluster at which this thread arrives afterwards.
DEVICE void show_receipts() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Both addresses from address_in_block.
DEVICE void send_to_block(u32 address, uint4 value, u32 receipt) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(receipt)
      : "memory");
}

// Wait until all expected bytes have been stored.
DEVICE void wait_for_bytes(u32 receipt) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], 0;\n"
      "@!complete bra again;\n"
      "}" ::"r"(receipt)
      : "memory");
}

// Programmatic dependent launch (see overlap.py).
DEVICE void launch_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Read `bytes`, a multiple of 16, into the L2 cache.
DEVICE void prefetch_to_l2(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE u64 shuffle_from(u64 value, int lane) { return __shfl_sync(~0u, value, lane); }

DEVICE float inverse_root(float value) { return rsqrtf(value); }
DEVICE float exponential(float value) { return __expf(value); }

#endif
