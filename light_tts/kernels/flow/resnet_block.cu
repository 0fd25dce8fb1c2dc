// A residual block of the flow in one kernel, with the queries, keys and values of the transformer block that
// follows it. See resnet_block.py for its parameters and for how the weights are stored.
//
// A line is a row of the batch or of an edge: the HALO lines before the first row of each sequence, which a
// convolution reads as the frames before it, cached ones or zeros. A tile has consecutive lines, and so may have
// rows of several sequences.
//
// Eight thread blocks, a cluster, compute a tile. Block r of a cluster has the columns r * 32 to r * 32 + 31 of
// both convolutions and of the side path, and head r of the queries, keys and values. The blocks exchange rows
// through each other's shared memory:
//
//   1. each computes its columns of the first convolution and of the side path and sends them to all
//   2. each computes the norm and the activation of whole rows, then its columns of the second convolution,
//      and sends them to all
//   3. each computes whole rows of the result and their norm, then its head
//
// A convolution reads HALO earlier lines. A tile computes them again for the second convolution, so that of ROWS
// rows of the first one only NEW are new: row n of the result, row n + HALO of the first convolution and row
// n + 2 HALO of the input, and of the tile's lines, belong to the same frame.
//
// A warp has an eighth of the inputs of a product, so that each row is read by one warp only; the sums of the
// warps are added up in shared memory. Each weight is loaded straight into the registers of the warp that uses
// it, in the order in which the tensor cores want it, while the previous kernel still runs.
//
// Defined by the caller: TILES, of 16 rows; CACHED, 1 with cached state in pages; INPUTS, channels.

#include "fragments.cuh"

constexpr int BLOCKS = 8;  // of a cluster
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int TAPS = 3;
constexpr int HALO = TAPS - 1;
constexpr int ROWS = 16 * TILES;
constexpr int NEW = ROWS - HALO;
constexpr int WIDTH = 256;
constexpr int HEAD = 64;
constexpr int INNER = BLOCKS * HEAD;
constexpr int COLUMNS = WIDTH / BLOCKS;  // per block
constexpr int OWN = ROWS / WARPS;        // rows of a warp in a norm: warp, warp + 8, ...
constexpr int GROUP = OWN > 4 ? OWN / 2 : OWN;  // of these, computed at a time

// Of a product with `channels` inputs, warp w has the steps of 16 inputs w, w + 8, ...
constexpr int X_STEPS = (INPUTS / 16 + WARPS - 1) / WARPS;
constexpr int WIDE_STEPS = WIDTH / 16 / WARPS;
constexpr int FIRST_WEIGHTS = TAPS * X_STEPS * 8;  // registers
constexpr int SIDE_WEIGHTS = X_STEPS * 8;
constexpr int SECOND_WEIGHTS = TAPS * WIDE_STEPS * 8;
constexpr int QKV_WEIGHTS = 96;
constexpr bool EARLY = TILES <= 2;  // else registers are left only for the next product's weights

// Rows in shared memory end with padding, so that eight of them lie in different banks.
constexpr int X_ROW = INPUTS + 8;
constexpr int WIDE_ROW = WIDTH + 8;
constexpr int PART_ROW = COLUMNS + 8;  // float

// Vectors, in numbers. The first three and the last are only those of the block's columns.
constexpr int FIRST_BIAS = 0;
constexpr int SECOND_BIAS = FIRST_BIAS + COLUMNS;
constexpr int SIDE_BIAS = SECOND_BIAS + COLUMNS;
constexpr int FIRST_GAIN = SIDE_BIAS + COLUMNS;  // each gain is followed by the offset
constexpr int SECOND_GAIN = FIRST_GAIN + 2 * WIDTH;
constexpr int QKV_BIAS = SECOND_GAIN + 2 * WIDTH;
constexpr int NUMBERS = QKV_BIAS + 3 * HEAD;

// Shared memory, in bytes. Other blocks write into `firsts`, `sides` and `seconds`, into each once; into the
// last one when all have sent `sides`, and so need x no more.
constexpr int XS = 0;       // (ROWS + 2 HALO, INPUTS) float16, or
constexpr int SECONDS = 0;  // (ROWS, WIDTH) float16
constexpr int FIRSTS = XS + (ROWS + 2 * HALO) * X_ROW * 2;    // (ROWS + HALO, WIDTH) float16
constexpr int SIDES = FIRSTS + (ROWS + HALO) * WIDE_ROW * 2;  // (ROWS, WIDTH) float16
constexpr int PARTS = SIDES + ROWS * WIDE_ROW * 2;            // (WARPS, ROWS, COLUMNS) float
constexpr int VECTORS = PARTS + WARPS * ROWS * PART_ROW * 4;  // (NUMBERS,) float
constexpr int RECEIPTS = VECTORS + NUMBERS * 4;               // of firsts, sides and seconds
constexpr int LINES = RECEIPTS + 3 * 8;                       // (ROWS + HALO,) int

// A line is given as the row in its copy of the batch; UNUSED; or, less than that, a line of an edge.
constexpr int UNUSED = -1;

// Return page * HALO + place, as in `keep`, of a line of an edge; negative: zeros, or no such line.
DEVICE int cached_row(int line) { return UNUSED - 1 - HALO - line; }

struct Params {
  const int* lines;    // (tiles * NEW + 2 * HALO,): see lines_of
  const half_bits* x;  // (copies * rows, INPUTS)
  half_bits* out;      // (copies * rows, WIDTH)
  half_bits* qkv;      // (copies * rows, 3 * INNER)
  const uint4* weights[4];  // both convolutions, side path, queries, keys and values
  const float* vectors;     // (BLOCKS, NUMBERS)
  const float* shift;       // (steps, WIDTH)
  const int* step;
  half_bits* edges[2];  // cached inputs of the convolutions: (pages, steps, copies, HALO, channels)
  const int* keep;      // see CachedEdges
  u32 x_stride;
  u32 out_stride;
  int copy_rows;
  int steps;
  int new_step;  // 1: the previous kernel may have written `step`
  float norm_eps[2];
  float eps;
};

// The weights of a warp, COUNT registers of each lane, of a layer.
template <int COUNT>
DEVICE void load_own(u32 (&to)[COUNT], const uint4* layer, int rank, int warp, int lane) {
  load_weights(to, layer, (rank * WARPS + warp) * (COUNT / 4), lane);
}

// This warp's part of a convolution of ROWS rows: `parts` receives its sums. `a` are the rows in shared memory,
// from the earliest one on, of CHANNELS float16 and padding.
template <int COUNT, int CHANNELS>
DEVICE void convolve(unsigned char* parts, u32 a, const u32 (&weights)[COUNT], int warp, int lane) {
  constexpr int STEPS = (CHANNELS / 16 + WARPS - 1) / WARPS, ROW = (CHANNELS + 8) * 2;
  float sums[TILES][4][4];
  clear(sums);
  a += ((lane & 7) + (lane & 8)) * ROW + (lane & 16) + warp * 32;
#pragma unroll
  for (int tap = 0; tap < COUNT / (STEPS * 8); tap++)
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if ((step + 1) * WARPS > CHANNELS / 16 && step * WARPS + warp >= CHANNELS / 16) continue;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        u32 rows[4];
        load_matrices(rows, a + (tile * 16 + tap) * ROW + step * WARPS * 32);
#pragma unroll
        for (int column = 0; column < 4; column++) {
          int at = ((tap * STEPS + step) * 4 + column) * 2;
          multiply_add(sums[tile][column], rows, weights[at], weights[at + 1]);
        }
      }
    }
  float* to = (float*)parts + (warp * ROWS + lane / 4) * PART_ROW + lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int column = 0; column < 4; column++) {
      const float(&own)[4] = sums[tile][column];
      *(float2*)(to + tile * 16 * PART_ROW + column * 8) = make_float2(own[0], own[1]);
      *(float2*)(to + (tile * 16 + 8) * PART_ROW + column * 8) = make_float2(own[2], own[3]);
    }
}

// Add up the parts and the bias and send them as float16 to the place `to`, of ROWS rows, of all blocks.
DEVICE void send_sums(const unsigned char* parts, const float* bias, u32 to, u32 receipt, int rank) {
  constexpr int SHARERS = TILES == 1 ? 4 : TILES == 2 ? 2 : 1;  // lanes that share eight columns of a row
  constexpr int PAIRS = 4 / SHARERS;
  const int lane = threadIdx.x % 32, row = threadIdx.x / (4 * SHARERS);
  const int column = threadIdx.x % (4 * SHARERS) * (2 * PAIRS), share = threadIdx.x % SHARERS;
  if (row >= ROWS) return;
  u32 own[PAIRS];
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    float2 sum = *(const float2*)(bias + column + 2 * i);
#pragma unroll
    for (int part = 0; part < WARPS; part++) {
      float2 other = *((const float2*)((const float*)parts + (part * ROWS + row) * PART_ROW + column) + i);
      sum.x += other.x, sum.y += other.y;
    }
    own[i] = pack_halves(sum.x, sum.y);
  }
  u32 all[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    all[i] = SHARERS == 1 ? own[i % PAIRS] : (u32)shuffle_from(own[i % PAIRS], lane - share + i / PAIRS);
  const uint4 value = make_uint4(all[0], all[1], all[2], all[3]);
  to += (row * WIDE_ROW + rank * COLUMNS + column / 8 * 8) * 2;
#pragma unroll
  for (int i = 0; i < BLOCKS / SHARERS; i++) {
    const int block = share * (BLOCKS / SHARERS) + i;
    send_to_block(address_in_block(to, block), value, address_in_block(receipt, block));
  }
}

// Normalize rows, of which a lane has eight columns.
DEVICE void normalize(float (&rows)[GROUP][8], float eps) {
  float sum[GROUP], squares[GROUP];
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    sum[i] = squares[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum[i] += rows[i][j], squares[i] += rows[i][j] * rows[i][j];
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      sum[i] += shuffle_xor(sum[i], mask);
      squares[i] += shuffle_xor(squares[i], mask);
    }
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    const float mean = sum[i] * (1.0f / WIDTH), variance = squares[i] * (1.0f / WIDTH) - mean * mean;
    const float factor = inverse_root(fmaxf(variance, 0.0f) + eps);
#pragma unroll
    for (int j = 0; j < 8; j++) rows[i][j] = (rows[i][j] - mean) * factor;
  }
}

// As in row_tiles.py: mish(y) = y n / (n + 2) with n = e^y (e^y + 2); above 20 it is y.
DEVICE void mish(float& first, float& second) {
  constexpr float LOG2_E = 1.4426950408889634f;
  const float e = power_of_two(fminf(first, 20.0f) * LOG2_E), f = power_of_two(fminf(second, 20.0f) * LOG2_E);
  const float n = e * (e + 2.0f), m = f * (f + 2.0f);
  const float inverse = reciprocal((n + 2.0f) * (m + 2.0f));  // one for both
  first *= n * ((m + 2.0f) * inverse);
  second *= m * ((n + 2.0f) * inverse);
}

// `gain` is followed by the offset.
DEVICE void scale_and_activate(float (&rows)[GROUP][8], const float* gain, int lane) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const float2 scale = *(const float2*)(gain + lane * 8 + j);
    const float2 offset = *(const float2*)(gain + WIDTH + lane * 8 + j);
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      rows[i][j] = rows[i][j] * scale.x + offset.x;
      rows[i][j + 1] = rows[i][j + 1] * scale.y + offset.y;
      mish(rows[i][j], rows[i][j + 1]);
    }
  }
}

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
    resnet_block(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(shared_memory);
  const int rank = cluster_rank(), copy = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const u32* tile_lines = (const u32*)p.lines + blockIdx.x / BLOCKS * NEW;
  const int own_line = threadIdx.x < ROWS + HALO ? (int)load_early(tile_lines + threadIdx.x) : UNUSED;
  if ((int)load_early(tile_lines + 2 * HALO) == UNUSED) return;
  launch_next_kernel();

  const u32 shared = shared_address(shared_memory), receipts = shared + RECEIPTS;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 3; i++) expect_bytes(receipts + 8 * i, ROWS * WIDTH * 2);
    show_receipts();
  }
  cluster_arrive();

  const float* vectors = (const float*)(shared_memory + VECTORS);
  u32 first_weights[FIRST_WEIGHTS], side_weights[SIDE_WEIGHTS], second_weights[SECOND_WEIGHTS];
  load_own(first_weights, p.weights[0], rank, warp, lane);
  load_own(side_weights, p.weights[2], rank, warp, lane);
  if (EARLY) load_own(second_weights, p.weights[1], rank, warp, lane);
  if (blockIdx.x < BLOCKS && copy == 0 && lane == 0)  // one cluster for all
    prefetch_to_l2(p.weights[3] + (rank * WARPS + warp) * (QKV_WEIGHTS * 8), QKV_WEIGHTS * 128);
  for (int i = threadIdx.x; i < NUMBERS / 4; i += THREADS)
    copy_async(shared + VECTORS + i * 16, p.vectors + rank * NUMBERS + i * 4);

  int* lines = (int*)(shared_memory + LINES);
  if (threadIdx.x < ROWS + HALO) lines[threadIdx.x] = own_line;
  __syncthreads();
  // Rows of this batch that are cached are saved by warp r of block r: those of its norms.
  const u64 base = copy * p.copy_rows;
  int keep[OWN];
  if (CACHED) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int row = i * WARPS + warp, line = lines[row + HALO];
      keep[i] = warp == rank && row >= HALO && line >= 0 ? p.keep[line] : -1;
    }
  }
  int step = 0;
  if (!p.new_step) step = *p.step;
  wait_for_previous_kernel();

  if (p.new_step) step = *p.step;
  // A row of a convolution's cached inputs: page * HALO + place.
  const auto cached = [&](int convolution, int channels, int row) {
    u64 at = (((u64)(row / HALO) * p.steps + step) * gridDim.y + copy) * HALO + row % HALO;
    return p.edges[convolution] + at * channels;
  };
#pragma unroll
  for (int row = warp; row < ROWS + HALO; row += WARPS) {
    const int line = lines[row];
    const half_bits* from = p.x + (base + line) * p.x_stride;
#pragma unroll
    for (int column = lane * 8; column < INPUTS; column += 256) {
      const int to = XS + (row * X_ROW + column) * 2;
      if (line >= 0)
        copy_async(shared + to, from + column);
      else if (!CACHED || cached_row(line) < 0)
        *(uint4*)(shared_memory + to) = make_uint4(0, 0, 0, 0);
    }
  }
  if (CACHED) {  // last, because this may wait for `step`
    for (int row = warp; row < ROWS + HALO; row += WARPS) {
      const int from = cached_row(lines[row]);
      if (from < 0) continue;
      for (int column = lane * 8; column < INPUTS; column += 256)
        copy_async(shared + XS + (row * X_ROW + column) * 2, cached(0, INPUTS, from) + column);
      if (warp == rank && lane == 0) prefetch_to_l2(cached(1, WIDTH, from), WIDTH * 2);
    }
  }
  commit_copies();
  const float4* shift_at = (const float4*)(p.shift + step * WIDTH + lane * 8);
  const float4 low = shift_at[0], high = shift_at[1];
  const float shift[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  wait_for_copies<0>();
  __syncthreads();

  convolve<FIRST_WEIGHTS, INPUTS>(shared_memory + PARTS, shared + XS, first_weights, warp, lane);
  if (!EARLY) load_own(second_weights, p.weights[1], rank, warp, lane);
  __syncthreads();
  cluster_wait();  // until all blocks have started
  send_sums(shared_memory + PARTS, vectors + FIRST_BIAS, shared + FIRSTS, receipts, rank);
  u32 qkv_weights[QKV_WEIGHTS];
  if (EARLY) load_own(qkv_weights, p.weights[3], rank, warp, lane);
  if (CACHED) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
      if (keep[i] >= 0)
        for (int column = lane * 8; column < INPUTS; column += 256)
          save(cached(0, INPUTS, keep[i]) + column,
               *(const uint4*)(shared_memory + XS + ((i * WARPS + warp + HALO) * X_ROW + column) * 2));
  }
  __syncthreads();  // before `parts` are written again
  convolve<SIDE_WEIGHTS, INPUTS>(shared_memory + PARTS, shared + XS + 2 * HALO * X_ROW * 2, side_weights, warp,
                                 lane);
  __syncthreads();
  send_sums(shared_memory + PARTS, vectors + SIDE_BIAS, shared + SIDES, receipts + 8, rank);

  wait_for_bytes(receipts);
#pragma unroll
  for (int first = 0; first < OWN; first += GROUP) {
    float rows[GROUP][8];
    int own_lines[GROUP];
    const int at = FIRSTS + ((first * WARPS + warp) * WIDE_ROW + lane * 8) * 2;
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      const int to = at + i * WARPS * WIDE_ROW * 2;
      unpack(rows[i], *(const uint4*)(shared_memory + to));
      own_lines[i] = lines[(first + i) * WARPS + warp + HALO];
      const int from = cached_row(own_lines[i]);
      if (CACHED && from >= 0) copy_async(shared + to, cached(1, WIDTH, from) + lane * 8);
    }
    normalize(rows, p.norm_eps[0]);
    scale_and_activate(rows, vectors + FIRST_GAIN, lane);
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
#pragma unroll
      for (int j = 0; j < 8; j++) rows[i][j] += shift[j];
      uint4 value = pack(rows[i]);
      const int kept = CACHED ? keep[first + i] : -1;
      if (kept >= 0) save(cached(1, WIDTH, kept) + lane * 8, value);
      if (own_lines[i] < UNUSED) value = make_uint4(0, 0, 0, 0);
      if (!CACHED || cached_row(own_lines[i]) < 0)
        *(uint4*)(shared_memory + at + i * WARPS * WIDE_ROW * 2) = value;
    }
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  convolve<SECOND_WEIGHTS, WIDTH>(shared_memory + PARTS, shared + FIRSTS, second_weights, warp, lane);
  if (!EARLY) load_own(qkv_weights, p.weights[3], rank, warp, lane);
  __syncthreads();
  wait_for_bytes(receipts + 8);
  send_sums(shared_memory + PARTS, vectors + SECOND_BIAS, shared + SECONDS, receipts + 16, rank);
  wait_for_bytes(receipts + 16);
#pragma unroll
  for (int first = 0; first < OWN; first += GROUP) {
    float rows[GROUP][8];
    const int at = ((first * WARPS + warp) * WIDE_ROW + lane * 8) * 2;
#pragma unroll
    for (int i = 0; i < GROUP; i++)
      unpack(rows[i], *(const uint4*)(shared_memory + SECONDS + at + i * WARPS * WIDE_ROW * 2));
    normalize(rows, p.norm_eps[1]);
    scale_and_activate(rows, vectors + SECOND_GAIN, lane);
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      const int row = (first + i) * WARPS + warp;
      float side[8];
      unpack(side, *(const uint4*)(shared_memory + SIDES + at + i * WARPS * WIDE_ROW * 2));
#pragma unroll
      for (int j = 0; j < 8; j++) rows[i][j] += side[j];
      const int line = row < NEW ? lines[row + 2 * HALO] : UNUSED;
      if (warp == rank && line >= 0) save(p.out + (base + line) * p.out_stride + lane * 8, pack(rows[i]));
    }
    normalize(rows, p.eps);
#pragma unroll
    for (int i = 0; i < GROUP; i++)
      *(uint4*)(shared_memory + SECONDS + at + i * WARPS * WIDE_ROW * 2) = pack(rows[i]);
  }
  __syncthreads();

  // Queries, keys and values: a warp has 24 of a head's 192 columns.
  constexpr int TOGETHER = TILES == 4 ? 2 : TILES;  // tiles: more need more registers than there are
#pragma unroll
  for (int first = 0; first < TILES; first += TOGETHER) {
    float sums[TOGETHER][3][4];
    clear(sums);
    const u32 normal =
        shared + SECONDS + ((lane & 7) + (lane & 8) + first * 16) * WIDE_ROW * 2 + (lane & 16);
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++)
#pragma unroll
      for (int tile = 0; tile < TOGETHER; tile++) {
        u32 a[4];
        load_matrices(a, normal + tile * 16 * WIDE_ROW * 2 + step * 32);
#pragma unroll
        for (int j = 0; j < 3; j++)
          multiply_add(sums[tile][j], a, qkv_weights[(step * 3 + j) * 2], qkv_weights[(step * 3 + j) * 2 + 1]);
      }
    int own_lines[TOGETHER][2];
#pragma unroll
    for (int tile = 0; tile < TOGETHER; tile++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = 16 * (first + tile) + g + 8 * half;
        own_lines[tile][half] = row < NEW ? lines[row + 2 * HALO] : UNUSED;
      }
#pragma unroll
    for (int j = 0; j < 3; j++) {
      const int own = (warp * 3 + j) * 8 + 2 * t, at = own / HEAD * INNER + rank * HEAD + own % HEAD;
      const float2 bias = *(const float2*)(vectors + QKV_BIAS + own);
#pragma unroll
      for (int tile = 0; tile < TOGETHER; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int line = own_lines[tile][half];
          if (line >= 0)
            *(u32*)(p.qkv + (base + line) * (3 * INNER) + at) =
                pack_halves(sums[tile][j][2 * half] + bias.x, sums[tile][j][2 * half + 1] + bias.y);
        }
    }
  }
}
