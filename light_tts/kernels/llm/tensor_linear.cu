// A linear layer for up to 64 rows, fused with the surrounding operations. See tensor_linear.py for its
// parameters and for how the weight is stored.
//
// A thread block has TILES tiles of 16 outputs, GATED: of 8 gates and their 8 values. Its warps divide the
// inputs; with SPLITS > 1 the blocks of a cluster do so before, and each of them adds up all sums of every
// SPLITS-th row, which the others send to its shared memory. A warp multiplies its part of the weight, which it
// has loaded into registers before the rows are available, by eight rows at a time.
//
// Defined by the caller: BFLOAT16, 0 for float16; NORM, 1: divide the rows by their root mean squares; BIAS;
// GATED, 1 (with NORM): silu(gate) * up; ADD, 1: add to what `out` contains; ROW_TILES, of 8 rows; INPUTS;
// TILES; SPLITS; WARPS; PAIRS, of 16 inputs twice, per warp (the last warp may have fewer); STAGED, 1: all rows
// are copied to shared memory at once.

#include "../cuda/hopper.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 8 * ROW_TILES;
constexpr int OWN_ROWS = ROWS / SPLITS;            // whose sums a block adds up
constexpr int COLUMNS = 16 * TILES;
constexpr int OUTPUTS = COLUMNS / (1 + GATED);     // of a block
constexpr int STEPS = INPUTS / 16;
constexpr int BLOCK_PAIRS = INPUTS / 32 / SPLITS;
// Tiles of rows that a warp multiplies together: with few tiles of the weight, independent products are scarce.
constexpr int TOGETHER = STAGED && TILES * PAIRS <= 10 ? 2 : 1;
// Sums of each product, of every CHAINS-th step, so that a warp need not wait for its last product.
constexpr int CHAINS = TOGETHER * TILES == 1                                     ? 4
                       : TOGETHER * TILES == 2 && (PAIRS <= 5 || ROW_TILES == 1) ? 2
                                                                                 : 1;
constexpr bool UNEVEN = BLOCK_PAIRS % PAIRS != 0;  // the last warp has fewer

// Shared memory: a part for each warp, with its sums and before that its rows; the other blocks' sums; a
// receipt for these.
//
// A row of sums has COLUMNS products, the sum of squares of the inputs, and padding, so that the lanes of a
// warp write to different banks. STAGED: the copied rows are at the end of the part. The sums of a tile of rows
// take the place of these and earlier rows only.
constexpr int SUMS_ROW = COLUMNS + 4;  // float
constexpr int COPY_ROW = 64 * PAIRS;   // bytes
constexpr int PART_ROW = STAGED && COPY_ROW > 4 * SUMS_ROW ? COPY_ROW / 4 : SUMS_ROW;
constexpr int PART = ROWS * PART_ROW;               // float
constexpr int RECEIVED = WARPS * PART;              // float
constexpr int RECEIVED_PART = OWN_ROWS * SUMS_ROW;  // from a block, float
constexpr int RECEIPT = 4 * (RECEIVED + (SPLITS - 1) * RECEIVED_PART);  // byte

// Results of a thread: two outputs of a row each.
constexpr int ITEMS = (OWN_ROWS * OUTPUTS / 2 + THREADS - 1) / THREADS;
struct Place {
  int row;
  int column;  // of the sums
  int output;
  bool exists;
};

// Blocks that fit on a multiprocessor, which bounds their registers. A multiprocessor has four files of 512
// registers for each lane.
constexpr int REGISTERS = 8 * TILES * PAIRS + 4 * TOGETHER * PAIRS + 4 * CHAINS * TOGETHER * (TILES + NORM) +
                          2 * BIAS * ITEMS + 6;
constexpr int FITTING = 512 / ((WARPS + 3) / 4 * REGISTERS);
constexpr int RESIDENT = FITTING > 3 ? 3 : FITTING < 1 ? 1 : FITTING;

#if SPLITS > 1
#define CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTER
#endif

// half_bits: float16 or bfloat16.
struct Params {
  const half_bits* x;   // (rows, INPUTS)
  const uint4* weight;  // (tiles, STEPS, 32 lanes)
  const half_bits* bias;
  half_bits* out;  // (rows, outputs)
  int rows;
  int outputs;  // even
  float eps;
};

DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (BFLOAT16)
    multiply_add_bf16(c, a, b0, b1);
  else
    multiply_add(c, a, b0, b1);
}

DEVICE u32 pack(float first, float second) {
  if constexpr (BFLOAT16)
    return pack_bf16(first, second);
  else
    return pack_halves(first, second);
}

DEVICE float2 unpack(u32 both) {
  if constexpr (BFLOAT16)
    return unpack_bf16(both);
  else
    return unpack_halves(both);
}

// The sum of COUNT parts of STRIDE floats at `from`.
template <int COUNT, int STRIDE>
DEVICE float4 add_up(const float* from) {
  float4 total = *(const float4*)from;
#pragma unroll
  for (int part = 1; part < COUNT; part++) {
    const float4 own = *(const float4*)(from + part * STRIDE);
    total.x += own.x, total.y += own.y, total.z += own.z, total.w += own.w;
  }
  return total;
}

// What all warps and blocks have summed for two columns of a row of this block.
DEVICE float2 total(const float* sums, int row, int column) {
  float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int part = 0; part < WARPS; part++) {
    const float2 own = *(const float2*)(sums + part * PART + row * SUMS_ROW + column);
    total.x += own.x, total.y += own.y;
  }
#pragma unroll
  for (int part = 0; part < SPLITS - 1; part++) {
    const float* const from = sums + RECEIVED + part * RECEIVED_PART + row / SPLITS * SUMS_ROW;
    const float2 own = *(const float2*)(from + column);
    total.x += own.x, total.y += own.y;
  }
  return total;
}

extern "C" __global__ CLUSTER __launch_bounds__(THREADS, RESIDENT) void tensor_linear(
    const __grid_constant__ Params p) {
  DYNAMIC_SHARED(shared_memory);
  float* const sums = (float*)shared_memory;
  const u32 shared = shared_address(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rank = SPLITS > 1 ? cluster_rank() : 0;
  const int tile = blockIdx.x / SPLITS * TILES, tiles = (p.outputs * (1 + GATED) + 15) / 16;
  const int pair = rank * BLOCK_PAIRS + warp * PAIRS;
  const int pairs = UNEVEN && warp == WARPS - 1 ? BLOCK_PAIRS % PAIRS : PAIRS;
  // Of a row, a block sends the products and, with NORM, the squares.
  constexpr int SENT = COLUMNS / 4 + NORM;
  launch_next_kernel();
  if (SPLITS > 1) {
    if (threadIdx.x == 0) {
      const int own_rows = (p.rows - rank + SPLITS - 1) / SPLITS;
      expect_bytes(shared + RECEIPT, own_rows * (SPLITS - 1) * SENT * 16);
      show_receipts();
    }
    cluster_arrive();
  }

  u32 weights[TILES][2 * PAIRS][4];
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    int own = tile + i;
    if (TILES > 1 && own >= tiles) own = tiles - 1;  // is not stored
    const uint4* from = p.weight + ((u64)own * STEPS + 2 * pair) * 32 + lane;
#pragma unroll
    for (int step = 0; step < 2 * PAIRS; step++) {
      if (step / 2 >= pairs) continue;
      uint4 value = load_early(from + step * 32);
      weights[i][step][0] = value.x, weights[i][step][1] = value.y;
      weights[i][step][2] = value.z, weights[i][step][3] = value.w;
    }
  }
  const auto place_of = [&](int i) {  // of this thread's i-th result
    const int item = i * THREADS + threadIdx.x, row = item / (OUTPUTS / 2) * SPLITS + rank;
    const int own = item % (OUTPUTS / 2) * 2, output = blockIdx.x / SPLITS * OUTPUTS + own;
    return Place{row, GATED ? own / 8 * 16 + own % 8 : own, output, row < p.rows && output < p.outputs};
  };
  u32 bias[ITEMS], before[ITEMS];
  if (BIAS) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const Place at = place_of(i);
      bias[i] = at.exists ? load_early((const u32*)(p.bias + at.output)) : 0;
    }
  }
  wait_for_previous_kernel();

  // A lane has inputs 8 t to 8 t + 7 of each pair of steps, of row g. The order of inputs within a product is
  // free, as long as it is the same for rows and weights.
  const half_bits* const x = p.x + pair * 32;
  const u32 copies = shared + 4 * (warp * PART + PART - ROWS * COPY_ROW / 4);
  // Of two rows one after the other, lanes read different halves of all banks.
  const auto copy_of = [&](int row, int chunk) {  // of 16 bytes
    return row * COPY_ROW + 16 * (PAIRS % 2 ? chunk : chunk ^ (row % 2 * 4));
  };
  uint4 rows[TOGETHER][PAIRS];
  const auto load_row = [&](int i, int j) {
    rows[0][j] = make_uint4(0, 0, 0, 0);
    if (8 * i + g < p.rows && j < pairs)
      rows[0][j] = *(const uint4*)(x + (u64)(8 * i + g) * INPUTS + j * 32 + 8 * t);
  };
  if constexpr (STAGED) {
#pragma unroll 1
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        const int item = j * 32 + lane, row = 8 * i + item / (4 * PAIRS), chunk = item % (4 * PAIRS);
        if (row < p.rows && chunk < 4 * pairs)
          copy_async(copies + copy_of(row, chunk), x + (u64)row * INPUTS + 8 * chunk);
      }
      if (TOGETHER == 1 || i % 2) commit_copies();
    }
  } else {
#pragma unroll
    for (int j = 0; j < PAIRS; j++) load_row(0, j);
  }

  if (ADD) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const Place at = place_of(i);
      before[i] = at.exists ? *(const u32*)(p.out + (u64)at.row * p.outputs + at.output) : 0;
    }
  }

  float* const own_sums = sums + warp * PART;
#pragma unroll 1
  for (int i = 0; i < ROW_TILES && 8 * i < p.rows; i += TOGETHER) {
    if constexpr (STAGED) {
      wait_for_copies<ROW_TILES / TOGETHER - 1>();  // a group is added for each that is done
      __syncwarp();
#pragma unroll
      for (int r = 0; r < TOGETHER; r++)
#pragma unroll
        for (int j = 0; j < PAIRS; j++)
          rows[r][j] =
              *(const uint4*)(shared_memory + (copies - shared) + copy_of(8 * (i + r) + g, 4 * j + t));
      commit_copies();
    }
    float products[CHAINS][TOGETHER][TILES][4] = {}, squares[CHAINS][TOGETHER][4] = {};
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
      if (j < pairs) {
#pragma unroll
        for (int step = 0; step < 2; step++) {
          const int chain = (2 * j + step) % CHAINS;
#pragma unroll
          for (int k = 0; k < TILES; k++)
#pragma unroll
            for (int r = 0; r < TOGETHER; r++)
              multiply(products[chain][r][k], weights[k][2 * j + step], step ? rows[r][j].z : rows[r][j].x,
                       step ? rows[r][j].w : rows[r][j].y);
          if (NORM) {  // the diagonal of the products of rows with rows
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
              const u32 b0 = step ? rows[r][j].z : rows[r][j].x, b1 = step ? rows[r][j].w : rows[r][j].y;
              const u32 a[4] = {b0, 0, b1, 0};
              multiply(squares[chain][r], a, b0, b1);
            }
          }
        }
      }
      if (ROW_TILES > 1 && !STAGED) load_row(i + 1, j);
    }
    if (STAGED) __syncwarp();  // all lanes have read the rows
#pragma unroll
    for (int r = 0; r < TOGETHER; r++) {
#pragma unroll
      for (int chain = 1; chain < CHAINS; chain++) {
#pragma unroll
        for (int item = 0; item < 4; item++) {
#pragma unroll
          for (int k = 0; k < TILES; k++) products[0][r][k][item] += products[chain][r][k][item];
          squares[0][r][item] += squares[chain][r][item];
        }
      }
      const int first = 8 * (i + r);
      float* const to = own_sums + (first + 2 * t) * SUMS_ROW + g;
#pragma unroll
      for (int k = 0; k < TILES; k++) {
        to[16 * k] = products[0][r][k][0];
        to[16 * k + SUMS_ROW] = products[0][r][k][1];
        to[16 * k + 8] = products[0][r][k][2];
        to[16 * k + 8 + SUMS_ROW] = products[0][r][k][3];
      }
      if (NORM && g / 2 == t)
        own_sums[(first + g) * SUMS_ROW + COLUMNS] = g % 2 ? squares[0][r][1] : squares[0][r][0];
    }
  }
  __syncthreads();

  if (SPLITS > 1) {
    cluster_wait();  // until all blocks have started
    for (int item = threadIdx.x; item < p.rows * SENT; item += THREADS) {
      const int row = item / SENT, to = row % SPLITS;
      if (to == rank) continue;
      const int at = row * SUMS_ROW + item % SENT * 4, part = rank < to ? rank : rank - 1;
      const int place = RECEIVED + part * RECEIVED_PART + row / SPLITS * SUMS_ROW + item % SENT * 4;
      const float4 value = add_up<WARPS, PART>(sums + at);
      send_to_block(address_in_block(shared + 4 * place, to), *(const uint4*)&value,
                    address_in_block(shared + RECEIPT, to));
    }
    wait_for_bytes(shared + RECEIPT);
  }
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const Place at = place_of(i);
    if (!at.exists) continue;
    float2 value = total(sums, at.row, at.column);
    if (NORM) {
      const float square = total(sums, at.row, COLUMNS).x;
      const float factor = inverse_root(square * (1.0f / INPUTS) + p.eps);
      value.x *= factor, value.y *= factor;
      if (GATED) {
        const float2 up = total(sums, at.row, at.column + 8);
        value.x *= up.x * factor * reciprocal(1.0f + exponential(-value.x));
        value.y *= up.y * factor * reciprocal(1.0f + exponential(-value.y));
      }
    }
    if (BIAS) {
      const float2 own = unpack(bias[i]);
      value.x += own.x, value.y += own.y;
    }
    if (ADD) {
      const float2 old = unpack(before[i]);
      value.x += old.x, value.y += old.y;
    }
    *(u32*)(p.out + (u64)at.row * p.outputs + at.output) = pack(value.x, value.y);
  }
}
