// A transformer block of the flow in one kernel, from its queries, keys and values to those of the next block.
// See transformer_block.py for its parameters and for how the weights are stored.
//
// Eight thread blocks, a cluster, compute a tile of ROWS rows, of any sequences. Block r of a cluster has head
// r, the columns r * 32 to r * 32 + 31 of x, 128 hidden channels of the feed-forward layer, and head r of the
// next queries, keys and values. The blocks exchange rows through each other's shared memory:
//
//   1. each attends with its head and sends to each block what the head adds to that block's columns
//   2. each adds up its columns of x and sends them to all
//   3. each computes the norm and its hidden channels, and sends to each block what they add to its columns
//   4. as 2
//   5. each computes the norm and its head of the next queries, keys and values
//
// What heads and hidden channels add is sent as float16 and added up in float32.
//
// Each weight is used by one warp only, so it is loaded straight into the registers of that warp, in the order
// in which the tensor cores want it. With RESIDENT 1, a multiprocessor has one block of threads, which loads the
// weights of a layer while it still waits for its input. With RESIDENT 2 it has two, which have fewer registers
// and load weights as they are used: one computes while the other waits.
//
// Defined by the caller: TILES, of 16 rows; RESIDENT; CACHED, 1 with cached state in pages; NEXT, 0 for the
// last block of a stage, which computes no queries, keys and values.

#include "fragments.cuh"

constexpr int BLOCKS = 8;  // of a cluster
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 16 * TILES;
constexpr int WIDTH = 256;
constexpr int HEAD = 64;
constexpr int INNER = BLOCKS * HEAD;
constexpr int COLUMNS = WIDTH / BLOCKS;  // of x, per block
constexpr int HIDDEN = 4 * WIDTH / BLOCKS;
constexpr int KEYS = 32;               // of a step of a warp's attention
constexpr int SPLITS = WARPS / TILES;  // warps that share the keys of a query
constexpr int SHARERS = 4 / TILES;     // threads that share eight columns of a row of x
constexpr bool EARLY = RESIDENT == 1;  // weights are loaded before they are needed

// Rows in shared memory end with padding, so that eight of them lie in different banks.
constexpr int WIDE_ROW = WIDTH + 8;
constexpr int HIDDEN_ROW = HIDDEN + 8;
constexpr int HEAD_ROW = HEAD + 8;
constexpr int SUMS_ROW = HEAD + 4;  // float

// Shared memory, in bytes. Other blocks write to `parts` and `gathered`, the latter only after all blocks have
// attended. No place is written again before all have read it, as each block sends only what it has received
// the previous rows for.
constexpr int PART = ROWS * COLUMNS * 2 + 128 / SHARERS;
constexpr int PARTS = 0;                         // (BLOCKS, ROWS, COLUMNS) float16
constexpr int BIASES = PARTS + BLOCKS * PART;    // float: see the order below
constexpr int RECEIPTS = BIASES + (2 * COLUMNS + HIDDEN + 3 * HEAD) * 4;  // of parts, x, parts and x
constexpr int HIDDENS = RECEIPTS + 32;          // (ROWS, HIDDEN) float16, or
constexpr int ATTENDED = HIDDENS;               // (ROWS, HEAD) float16
constexpr int VALUES = HIDDENS + ROWS * HIDDEN_ROW * 2;    // (WARPS, 2, KEYS, HEAD) float16, or
constexpr int SUMS = VALUES;                               // (WARPS, 16, HEAD) float, then (WARPS, 16) float2, or
constexpr int GATHERED = VALUES;                           // (ROWS, WIDTH) float16,
constexpr int NORMAL = GATHERED + ROWS * WIDE_ROW * 2;     // (ROWS, WIDTH) float16

constexpr int OUT_BIAS = 0, DOWN_BIAS = COLUMNS, UP_BIAS = 2 * COLUMNS, NEXT_BIAS = UP_BIAS + HIDDEN;
constexpr int PARTS_BYTES = BLOCKS * ROWS * COLUMNS * 2, X_BYTES = ROWS * WIDTH * 2;

// What a row sees: see attention_of_rows.
struct __align__(16) Query {
  int start, end, stop, next, first, past, pages, kept;
};

struct Params {
  const Query* queries;  // (rows of all tiles of a copy)
  half_bits* x;          // (copies * rows, WIDTH), in place
  const half_bits* qkv;  // (copies * rows, 3 * INNER)
  half_bits* next_qkv;
  const uint4* weights[4];  // output projection, both feed-forward layers, queries, keys and values
  const float* biases[4];
  half_bits* store;  // cached keys and values: (pages, steps, copies, page_rows, 2 * INNER)
  const int* pages;
  const int* step;
  u64 strides[3];  // of pages, steps and copies, in numbers
  u32 x_stride;
  int copy_rows;
  u32 page_rows;
  float scale;  // of the scores, for a softmax with powers of two
  float eps;
};

DEVICE uint4 load(const half_bits* from) { return *(const uint4*)from; }

// even + odd += a b, where a are TILES * 16 rows in shared memory (`row` bytes each), from column 16 * FIRST on,
// and b are STEPS * 16 rows and COLUMN_TILES * 8 columns of weights in registers. `even` and `odd` receive the
// products of every second step, so that they wait less for one another; they may be the same.
template <int FIRST, int STEPS, int COLUMN_TILES>
DEVICE void multiply(float (&even)[TILES][COLUMN_TILES][4], float (&odd)[TILES][COLUMN_TILES][4], u32 a, int row,
                     const u32 (&weights)[STEPS * COLUMN_TILES * 2], int lane) {
  a += ((lane & 7) + (lane & 8)) * row + (lane & 16) + 32 * FIRST;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      u32 rows[4];
      load_matrices(rows, a + tile * 16 * row + step * 32);
#pragma unroll
      for (int column = 0; column < COLUMN_TILES; column++) {
        int at = (step * COLUMN_TILES + column) * 2;
        multiply_add(step % 2 ? odd[tile][column] : even[tile][column], rows, weights[at], weights[at + 1]);
      }
    }
  }
}

// The weights of a layer: all of them, loaded early; or a few at a time, as they are multiplied.
template <int STEPS, int COLUMN_TILES>
struct Weights {
  static constexpr int COUNT = STEPS * COLUMN_TILES * 2;  // registers
  static constexpr int PIECE = EARLY ? COUNT : COUNT / STEPS * 2;
  const uint4* from;
  u32 registers[PIECE];

  DEVICE Weights(const uint4* layer, int rank, int warp) : from(layer + (rank * WARPS + warp) * (COUNT * 8)) {}

  DEVICE void load(int lane) { load_weights(registers, from, 0, lane); }

  // sums = a b
  DEVICE void multiply_with(float (&sums)[TILES][COLUMN_TILES][4], u32 a, int row, int lane) {
    clear(sums);
    if constexpr (EARLY && TILES == 1 && STEPS > 4) {
      float others[TILES][COLUMN_TILES][4];
      clear(others);
      multiply<0, STEPS, COLUMN_TILES>(sums, others, a, row, registers, lane);
#pragma unroll
      for (int column = 0; column < COLUMN_TILES; column++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[0][column][i] += others[0][column][i];
    } else if constexpr (EARLY) {
      multiply<0, STEPS, COLUMN_TILES>(sums, sums, a, row, registers, lane);
    } else {
      pieces<0>(sums, a, row, registers, lane);
    }
  }

 private:
  // The rest of the product, from step FIRST on, whose weights have been loaded.
  template <int FIRST>
  DEVICE void pieces(float (&sums)[TILES][COLUMN_TILES][4], u32 a, int row, const u32 (&now)[PIECE], int lane) {
    if constexpr (FIRST + 2 < STEPS) {
      u32 after[PIECE];
      load_weights(after, from, (FIRST + 2) * COLUMN_TILES / 2, lane);
      multiply<FIRST, 2, COLUMN_TILES>(sums, sums, a, row, now, lane);
      pieces<FIRST + 2>(sums, a, row, after, lane);
    } else {
      multiply<FIRST, 2, COLUMN_TILES>(sums, sums, a, row, now, lane);
    }
  }
};

// As in row_tiles.py: erf within 1.5e-7 (Abramowitz and Stegun 7.1.26).
DEVICE float gelu(float y) {
  float x = y * 0.7071067811865476f, size = fabsf(x);
  float t = reciprocal(1.0f + 0.3275911f * size);
  float series = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  float erf = 1.0f - series * power_of_two(-1.4426950408889634f * size * size);
  return 0.5f * y * (1.0f + (x < 0.0f ? -erf : erf));
}

// `normal` receives the norm of the rows of `gathered`; a warp computes ROWS / WARPS of them.
DEVICE void layer_norm(const unsigned char* shared_memory, float eps, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < ROWS / WARPS; i++) {
    int at = (i * WARPS + warp) * WIDE_ROW * 2 + lane * 16;
    uint4 own = *(const uint4*)(shared_memory + GATHERED + at);
    u32 pairs[4] = {own.x, own.y, own.z, own.w};
    float values[8], mean = 0.0f, square = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float2 pair = unpack_halves(pairs[j]);
      values[2 * j] = pair.x;
      values[2 * j + 1] = pair.y;
      mean += pair.x + pair.y;
      square += pair.x * pair.x + pair.y * pair.y;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      mean += shuffle_xor(mean, mask);
      square += shuffle_xor(square, mask);
    }
    mean *= 1.0f / WIDTH;
    float factor = inverse_root(fmaxf(square * (1.0f / WIDTH) - mean * mean, 0.0f) + eps);
#pragma unroll
    for (int j = 0; j < 4; j++) pairs[j] = pack_halves((values[2 * j] - mean) * factor, (values[2 * j + 1] - mean) * factor);
    *(uint4*)(shared_memory + NORMAL + at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

DEVICE void add(float (&x)[8], uint4 halves) {
  u32 pairs[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 pair = unpack_halves(pairs[i]);
    x[2 * i] += pair.x, x[2 * i + 1] += pair.y;
  }
}

// Add to x, eight columns of a row, a bias and what the blocks have sent. SHARERS threads, neighbours, call it
// with the same row and column; each reads its share, and all have the sum.
DEVICE void add_parts(float (&x)[8], const unsigned char* shared_memory, int bias, int row, int column, int share) {
  const float* from = (const float*)(shared_memory + BIASES) + bias + column;
  float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < BLOCKS / SHARERS; i++)
    add(sums, *(const uint4*)(shared_memory + PARTS + (i * SHARERS + share) * PART + (row * COLUMNS + column) * 2));
#pragma unroll
  for (int i = 0; i < 8; i++) {
#pragma unroll
    for (int mask = 1; mask < SHARERS; mask *= 2) sums[i] += shuffle_xor(sums[i], mask);
    x[i] += from[i] + sums[i];
  }
}

// Each of SHARERS threads sends it to its share of the blocks.
DEVICE void send_to_all(u32 address, uint4 value, u32 receipt, int share) {
#pragma unroll
  for (int i = 0; i < BLOCKS / SHARERS; i++)
    send_to_block(address_in_block(address, i * SHARERS + share), value,
                  address_in_block(receipt, i * SHARERS + share));
}

// Send to block `warp` what this block adds to its columns. The weights are stored such that a lane has eight
// columns in a row, 8 t to 8 t + 7, two of each tile.
DEVICE void send_parts(const float (&sums)[TILES][4][4], u32 shared, u32 receipt, int rank, int warp, int lane) {
  const u32 to = address_in_block(shared + PARTS + rank * PART + (lane / 4 * COLUMNS + lane % 4 * 8) * 2, warp);
  receipt = address_in_block(receipt, warp);
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 pairs[4];
#pragma unroll
      for (int j = 0; j < 4; j++) pairs[j] = pack_halves(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
      send_to_block(to + (16 * i + 8 * half) * COLUMNS * 2, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]),
                    receipt);
    }
}

// The list of the keys that a warp's 16 rows see, and what this thread's two rows see of it.
struct KeyList {
  Query now;  // of a row of the sequence that has been reached
  int starts[2], ends[2];
  const bool of_several;  // sequences

  DEVICE KeyList(const Query* queries, int row) : now(queries[row]), of_several(now.next != 0) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const Query& own = queries[row + threadIdx.x % 32 / 4 + 8 * i];
      starts[i] = own.start, ends[i] = own.end;
    }
  }

  // Go on to the sequence that has the keys from `at` on, a multiple of KEYS. Returns false at the end.
  DEVICE bool reach(const Query* queries, int at) {
    while (at >= now.stop) {
      if (now.next == 0) return false;
      now = queries[now.next];
    }
    return true;
  }
};

// The attention of one head to the warp's keys, written to `sums`. list: has reached the first ones, if `some`.
DEVICE void attend(const Params& p, KeyList& list, bool some, int first_row, unsigned char* shared_memory, int head,
                   int copy) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const half_bits* own = p.qkv + (u64)(copy * p.copy_rows) * (3 * INNER) + head * HEAD;
  const int step = CACHED ? *p.step : 0;

  // A lane has 16 features of a query or key, 16 t to 16 t + 15. The order of features within a product is
  // free, as long as it is the same for queries and keys.
  u32 queries[2][8];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint4 first = make_uint4(0, 0, 0, 0), second = first;
    if (list.ends[i] > 0) {
      const half_bits* from = own + (u64)(first_row + warp % TILES * 16 + g + 8 * i) * (3 * INNER) + 16 * t;
      first = load(from);
      second = load(from + 8);
    }
    queries[i][0] = first.x, queries[i][1] = first.y, queries[i][2] = first.z, queries[i][3] = first.w;
    queries[i][4] = second.x, queries[i][5] = second.y, queries[i][6] = second.z, queries[i][7] = second.w;
  }

  float highest[2] = {-1.0e30f, -1.0e30f}, mass[2] = {0.0f, 0.0f}, total[8][4];
#pragma unroll
  for (int i = 0; i < 8; i++) total[i][0] = total[i][1] = total[i][2] = total[i][3] = 0.0f;

  const u32 values = shared_address(shared_memory + VALUES) + warp * 2 * KEYS * HEAD_ROW * 2;
  uint4 keys[KEYS / 8][2], next_keys[KEYS / 8][2];

  // Start to load the KEYS keys and values from `at` on; the values go to half `half` of the buffer.
  const auto fetch = [&](int at, int half, uint4(&to)[KEYS / 8][2]) {
    const Query& now = list.now;
    int key = (at + lane < now.stop ? at + lane : now.stop - 1) - now.start;
    const half_bits* from = own + (i64)(now.first + key) * (3 * INNER) + INNER;
    if (CACHED && key < now.past) {
      const half_bits* cached = p.store + step * p.strides[1] + copy * p.strides[2] + head * HEAD;
      u64 page = p.pages[now.pages + key / p.page_rows];
      from = cached + page * p.strides[0] + (u64)(key % p.page_rows) * (2 * INNER);
    }
    const u64 pointer = (u64)from;
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) {
      const half_bits* row = (const half_bits*)shuffle_from(pointer, 8 * i + g) + 16 * t;
      to[i][0] = load(row);
      to[i][1] = load(row + 8);
    }
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
      int row = 4 * i + lane / 8, feature = lane % 8 * 8;
      const half_bits* value = (const half_bits*)shuffle_from(pointer, row) + INNER + feature;
      copy_async(values + ((half * KEYS + row) * HEAD_ROW + feature) * 2, value);
    }
    commit_copies();
  };

  int half = 0, at = warp / TILES * KEYS;
  if (EARLY && some) fetch(at, 0, keys);
  while (some) {
    const int next = at + SPLITS * KEYS;
    if (!EARLY) fetch(at, 0, keys);
    some = list.reach(p.queries, next);
    if (EARLY && some) {
      fetch(next, half ^ 1, next_keys);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncwarp();
    float scores[KEYS / 8][4];
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) {
      u32 key[8] = {keys[i][0].x, keys[i][0].y, keys[i][0].z, keys[i][0].w,
                    keys[i][1].x, keys[i][1].y, keys[i][1].z, keys[i][1].w};
      scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0.0f;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        u32 query[4] = {queries[0][2 * k], queries[1][2 * k], queries[0][2 * k + 1], queries[1][2 * k + 1]};
        multiply_add(scores[i], query, key[2 * k], key[2 * k + 1]);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {  // rows g and g + 8
      const int left = at >= list.starts[row] ? list.ends[row] - at : 0;
      float top = highest[row];
#pragma unroll
      for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& score = scores[i][2 * row + j];
          score = 8 * i + 2 * t + j < left ? score * p.scale : -1.0e30f;
          top = fmaxf(top, score);
        }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float fade = power_of_two(highest[row] - top);
      highest[row] = top;
      mass[row] *= fade;
#pragma unroll
      for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& score = scores[i][2 * row + j];
          score = score > -1.0e29f ? power_of_two(score - top) : 0.0f;
          mass[row] += score;
        }
#pragma unroll
      for (int i = 0; i < 8; i++) total[i][2 * row] *= fade, total[i][2 * row + 1] *= fade;
    }
    const u32 from = values + (half * KEYS + (lane & 7) + (lane & 8)) * HEAD_ROW * 2 + (lane & 16);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      u32 weights[4] = {pack_halves(scores[2 * k][0], scores[2 * k][1]),
                        pack_halves(scores[2 * k][2], scores[2 * k][3]),
                        pack_halves(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                        pack_halves(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 value[4];
        load_matrices_transposed(value, from + k * 16 * HEAD_ROW * 2 + i * 32);
        if (list.of_several) {  // rows of other sequences have weight 0, and 0 * NaN is NaN
#pragma unroll
          for (int j = 0; j < 4; j++) value[j] = finite_halves(value[j]);
        }
        multiply_add(total[2 * i], weights, value[0], value[1]);
        multiply_add(total[2 * i + 1], weights, value[2], value[3]);
      }
    }
    __syncwarp();
    at = next;
    if (EARLY) {
      half ^= 1;
#pragma unroll
      for (int i = 0; i < KEYS / 8; i++) keys[i][0] = next_keys[i][0], keys[i][1] = next_keys[i][1];
    }
  }

  __syncthreads();
  float* sums = (float*)(shared_memory + SUMS);
  float2* scales = (float2*)(sums + WARPS * 16 * SUMS_ROW);
#pragma unroll
  for (int row = 0; row < 2; row++) {
    mass[row] += shuffle_xor(mass[row], 1);
    mass[row] += shuffle_xor(mass[row], 2);
    int at = warp * 16 + g + 8 * row;
    if (t == 0) scales[at] = make_float2(highest[row], mass[row]);
#pragma unroll
    for (int i = 0; i < 8; i++)
      *(float2*)(sums + at * SUMS_ROW + 8 * i + 2 * t) = make_float2(total[i][2 * row], total[i][2 * row + 1]);
  }
}

// Add up what the warps have attended to, into `attended`.
DEVICE void add_splits(unsigned char* shared_memory) {
  const float* sums = (const float*)(shared_memory + SUMS);
  const float2* scales = (const float2*)(sums + WARPS * 16 * SUMS_ROW);
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * HEAD / 4; i += THREADS) {
    const int row = i / 16, feature = i % 16 * 4;
    float top = -1.0e30f, all = 0.0f, result[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < SPLITS; k++) top = fmaxf(top, scales[k * ROWS + row].x);
#pragma unroll
    for (int k = 0; k < SPLITS; k++) {
      float2 scale = scales[k * ROWS + row];
      float share = power_of_two(scale.x - top);
      all += share * scale.y;
      float4 part = *(const float4*)(sums + (k * ROWS + row) * SUMS_ROW + feature);
      result[0] += share * part.x, result[1] += share * part.y;
      result[2] += share * part.z, result[3] += share * part.w;
    }
    all = reciprocal(all);
    *(uint2*)(shared_memory + ATTENDED + (row * HEAD_ROW + feature) * 2) =
        make_uint2(pack_halves(result[0] * all, result[1] * all), pack_halves(result[2] * all, result[3] * all));
  }
  __syncthreads();
}

// Cache the keys and values of the tile's rows that are to be kept.
DEVICE void keep(const Params& p, int first_row, int head, int copy) {
  const half_bits* own = p.qkv + (u64)(copy * p.copy_rows) * (3 * INNER) + head * HEAD;
  half_bits* to = p.store + *p.step * p.strides[1] + copy * p.strides[2] + head * HEAD;
  for (int i = threadIdx.x; i < ROWS * HEAD / 4; i += THREADS) {
    const int row = first_row + i / 16, feature = i % 16 / 8 * INNER + i % 8 * 8;  // keys first
    const Query query = p.queries[row];
    const int frame = row - query.first;
    if (frame < query.kept) {
      u64 page = p.pages[query.pages + frame / p.page_rows];
      save(to + page * p.strides[0] + (u64)(frame % p.page_rows) * (2 * INNER) + feature,
           load(own + (u64)row * (3 * INNER) + INNER + feature));
    }
  }
}

#pragma nv_diag_suppress 128  // "loop is not reachable": without NEXT the kernel returns before its last part
extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, RESIDENT)
    transformer_block(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(shared_memory);
  const int rank = cluster_rank(), copy = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x / BLOCKS * ROWS;  // of the tile, in a copy
  KeyList list(p.queries, first_row + warp % TILES * 16);
  const auto used = [&](int row) { return p.queries[first_row + row].end > 0; };
  const bool some_used = used(0);

  // This thread's part of x: eight columns of a row.
  const int share = threadIdx.x % SHARERS, row = threadIdx.x / (4 * SHARERS);
  const int column = threadIdx.x / SHARERS % 4 * 8;
  const bool row_used = used(row);
  launch_next_kernel();

  // Everything that this kernel waits for in global memory is requested before the first of it is used.
  Weights<4, 4> out(p.weights[0], rank, warp);
  Weights<16, 2> up(p.weights[1], rank, warp);
  Weights<8, 4> down(p.weights[2], rank, warp);
  Weights<16, 3> next(p.weights[3], rank, warp);
  if (EARLY) out.load(lane);
  const int thread = threadIdx.x;
  float out_bias = 0.0f, down_bias = 0.0f, up_bias = 0.0f, next_bias = 0.0f;
  if (thread < COLUMNS) out_bias = p.biases[0][rank * COLUMNS + thread];
  if (thread < COLUMNS) down_bias = p.biases[2][rank * COLUMNS + thread];
  if (thread < HIDDEN) up_bias = p.biases[1][rank * HIDDEN + thread];
  if (NEXT && thread < 3 * HEAD) next_bias = p.biases[3][thread / HEAD * INNER + rank * HEAD + thread % HEAD];
  if (!some_used) return;

  const u32 shared = shared_address(shared_memory), receipts = shared + RECEIPTS;
  if (thread == 0) {
#pragma unroll
    for (int i = 0; i < 4; i++) expect_bytes(receipts + 8 * i, i % 2 ? X_BYTES : PARTS_BYTES);
    show_receipts();
  }
  cluster_arrive();
  if (blockIdx.x < BLOCKS && copy == 0) {  // one cluster for all
    if (lane == 0) prefetch_to_l2(up.from, up.COUNT * 128);
    if (lane == 1) prefetch_to_l2(down.from, down.COUNT * 128);
    if (NEXT && lane == 2) prefetch_to_l2(next.from, next.COUNT * 128);
  }
  const bool some = list.reach(p.queries, warp / TILES * KEYS);
  float* biases = (float*)(shared_memory + BIASES);
  if (thread < COLUMNS) biases[OUT_BIAS + thread] = out_bias, biases[DOWN_BIAS + thread] = down_bias;
  if (thread < HIDDEN) biases[UP_BIAS + thread] = up_bias;
  if (NEXT && thread < 3 * HEAD) biases[NEXT_BIAS + thread] = next_bias;
  wait_for_previous_kernel();

  const auto x_at = [&] {  // not kept during the attention, which needs the registers
    return p.x + (u64)(copy * p.copy_rows + first_row + row) * p.x_stride + rank * COLUMNS + column;
  };
  uint4 old_x = make_uint4(0, 0, 0, 0);
  if (EARLY && row_used) old_x = load(x_at());
  const u32 gathered = shared + GATHERED + (row * WIDE_ROW + rank * COLUMNS + column) * 2;

  attend(p, list, some, first_row, shared_memory, rank, copy);
  if (!EARLY) out.load(lane);
  if (!EARLY && used(row)) old_x = load(x_at());
  add_splits(shared_memory);

  // What the head adds to x: a warp has the columns of one block.
  {
    float sums[TILES][4][4];
    out.multiply_with(sums, shared + ATTENDED, HEAD_ROW * 2, lane);
    cluster_wait();  // until all blocks have started
    send_parts(sums, shared, receipts, rank, warp, lane);
  }
  up.load(lane);
  if (CACHED) keep(p, first_row, rank, copy);
  wait_for_bytes(receipts);
  float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  add(x, old_x);
  add_parts(x, shared_memory, OUT_BIAS, row, column, share);
  send_to_all(gathered, pack(x), receipts + 8, share);
  if (EARLY) down.load(lane);
  wait_for_bytes(receipts + 8);
  layer_norm(shared_memory, p.eps, warp, lane);
  __syncthreads();

  // Feed-forward layer: a warp has 16 hidden channels, then the columns of one block.
  {
    float sums[TILES][2][4];
    up.multiply_with(sums, shared + NORMAL, WIDE_ROW * 2, lane);
    if (!EARLY) down.load(lane);
    half_bits* to = (half_bits*)(shared_memory + HIDDENS) + warp * 16 + 2 * t;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float2 bias = *(const float2*)(biases + UP_BIAS + warp * 16 + 8 * j + 2 * t);
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        *(u32*)(to + (16 * i + g) * HIDDEN_ROW + 8 * j) =
            pack_halves(gelu(sums[i][j][0] + bias.x), gelu(sums[i][j][1] + bias.y));
        *(u32*)(to + (16 * i + g + 8) * HIDDEN_ROW + 8 * j) =
            pack_halves(gelu(sums[i][j][2] + bias.x), gelu(sums[i][j][3] + bias.y));
      }
    }
  }
  __syncthreads();
  {
    float sums[TILES][4][4];
    down.multiply_with(sums, shared + HIDDENS, HIDDEN_ROW * 2, lane);
    send_parts(sums, shared, receipts + 16, rank, warp, lane);
  }
  if (NEXT) next.load(lane);
  wait_for_bytes(receipts + 16);
  add_parts(x, shared_memory, DOWN_BIAS, row, column, share);
  if (NEXT) send_to_all(gathered, pack(x), receipts + 24, share);
  if (share == 0 && used(row)) save(x_at(), pack(x));
  if (!NEXT) return;

  // Queries, keys and values of the next block: a warp has 24 of a head's 192 columns.
  bool stores[TILES][2];
#pragma unroll
  for (int i = 0; i < TILES; i++) stores[i][0] = used(16 * i + g), stores[i][1] = used(16 * i + g + 8);
  wait_for_bytes(receipts + 24);
  layer_norm(shared_memory, p.eps, warp, lane);
  __syncthreads();
  float sums[TILES][3][4];
  next.multiply_with(sums, shared + NORMAL, WIDE_ROW * 2, lane);
#pragma unroll
  for (int j = 0; j < 3; j++) {
    const int own_tile = warp * 3 + j;
    const float2 bias = *(const float2*)(biases + NEXT_BIAS + own_tile * 8 + 2 * t);
    half_bits* to = p.next_qkv + (u64)(copy * p.copy_rows + first_row) * (3 * INNER) +
                    own_tile / 8 * INNER + rank * HEAD + own_tile % 8 * 8 + 2 * t;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (stores[i][half])
          *(u32*)(to + (u64)(16 * i + g + 8 * half) * (3 * INNER)) =
              pack_halves(sums[i][j][2 * half] + bias.x, sums[i][j][2 * half + 1] + bias.y);
      }
  }
}
