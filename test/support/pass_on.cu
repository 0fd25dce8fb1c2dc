// Each block of a cluster adds ADD to its row and passes it on to the next block, which writes it.
#include "../../light_tts/kernels/cuda/hopper.cuh"

struct Parameters {
  const float* in;  // (blocks, THREADS)
  float* out;
  int add;
};

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(THREADS, 1)
    pass_on(const __grid_constant__ Parameters parameters) {
  extern __shared__ uint4 received[];  // the last THREADS are used, behind the receipt
  const int last = SHARED_BYTES / sizeof(uint4) - THREADS;
  const int element = blockIdx.x * THREADS + threadIdx.x;
  const u32 receipt = shared_address(received);
  launch_next_kernel();
  if (threadIdx.x == 0) {
    expect_bytes(receipt, THREADS * sizeof(uint4));
    show_receipts();
  }
  wait_for_previous_kernel();
  cluster_arrive();
  cluster_wait();  // all blocks of the cluster have started
  const u32 next = (cluster_rank() + 1) % 4;
  const float value = parameters.in[element] + parameters.add;
  send_to_block(address_in_block(shared_address(received + last + threadIdx.x), next),
                make_uint4(__float_as_uint(value), 0, 0, 0), address_in_block(receipt, next));
  wait_for_bytes(receipt);
  parameters.out[element] = __uint_as_float(received[last + threadIdx.x].x);
}
