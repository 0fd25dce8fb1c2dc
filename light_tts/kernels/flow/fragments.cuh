// What the kernels of whole blocks share: weights and sums in registers, and eight columns of a row.
#pragma once

#include "../cuda/hopper.cuh"

// COUNT registers of each lane, from the `first`-th four of them on (see packed_fragments).
template <int COUNT>
DEVICE void load_weights(u32 (&to)[COUNT], const uint4* from, int first, int lane) {
#pragma unroll
  for (int i = 0; i < COUNT / 4; i++) {
    uint4 value = load_early(from + (first + i) * 32 + lane);
    to[4 * i] = value.x;
    to[4 * i + 1] = value.y;
    to[4 * i + 2] = value.z;
    to[4 * i + 3] = value.w;
  }
}

template <int ROW_TILES, int COLUMN_TILES>
DEVICE void clear(float (&sums)[ROW_TILES][COLUMN_TILES][4]) {
#pragma unroll
  for (int tile = 0; tile < ROW_TILES; tile++)
#pragma unroll
    for (int column = 0; column < COLUMN_TILES; column++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[tile][column][i] = 0.0f;
}

DEVICE void unpack(float (&to)[8], uint4 from) {
  u32 pairs[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 pair = unpack_halves(pairs[i]);
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}

DEVICE uint4 pack(const float (&x)[8]) {
  return make_uint4(pack_halves(x[0], x[1]), pack_halves(x[2], x[3]), pack_halves(x[4], x[5]),
                    pack_halves(x[6], x[7]));
}

DEVICE void save(half_bits* to, uint4 value) { *(uint4*)to = value; }
