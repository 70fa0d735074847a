// Scores of index keys for index queries: for each query, or the largest of a tile's.
//
//   queries [B, HEADS, L, DIMS]    float, half or bfloat
//   weights [B, L, HEADS]          float; [B, N, L / N, HEADS + 1] for N tiles (TILES):
//                                  the last is added to all of a query's scores
//   keys    [B, 1, T, DIMS]        as queries, any strides
//   scores  [B, L, T] or [B, N, T] float: sum_h weights[h] * relu(queries[h] . key)
//
// A SIMD group keeps 8 * BLOCKS keys in registers. All queries pass through
// threadgroup memory, CHUNK of them with all their heads at a time. No product leaves
// the registers.

constexpr int STEPS = (DIMS + 7) / 8;
constexpr int PITCH = STEPS * 8 + PAD;
constexpr int ROWS = CHUNK * HEADS;
constexpr int WEIGHTS = HEADS + (TILES ? 1 : 0);  // of a query
threadgroup float stage[ROWS * PITCH];
threadgroup float stage_weights[CHUNK * WEIGHTS];

const int L = queries_shape[2];
const int n_keys = keys_shape[2];
const int thread_index = thread_index_in_threadgroup;
const int lane = thread_index % 32;
// Where a lane's two neighbouring elements of an 8 x 8 matrix lie.
const int row = lane / 16 * 4 + lane / 2 % 4;
const int column = lane / 8 % 2 * 4 + lane % 2 * 2;
const int batch = threadgroup_position_in_grid.z;
const int first_key =
    (threadgroup_position_in_grid.x * WARPS + thread_index / 32) * 8 * BLOCKS;

simdgroup_matrix<float, 8, 8> block[BLOCKS][STEPS];
#pragma unroll
for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int key = first_key + m * 8 + row;
      const int dim = s * 8 + column + e;
      block[m][s].thread_elements()[e] = key < n_keys && dim < DIMS
          ? float(keys[batch * keys_strides[0] + key * keys_strides[2] +
                       dim * keys_strides[3]])
          : 0.0f;
    }
  }
}

const int size = TILES ? weights_shape[2] : CHUNK;  // queries a tile
const int n_tiles = (L + size - 1) / size;
const int per_tile = (size + CHUNK - 1) / CHUNK;
const int group = threadgroup_position_in_grid.y;
const int n_groups = threadgroups_per_grid.y;
const int begin = n_tiles * group / n_groups * per_tile;
const int end = n_tiles * (group + 1) / n_groups * per_tile;

float best[BLOCKS];
for (int step = begin; step < end; step++) {
  const int tile = step / per_tile;
  const int first = tile * size + step % per_tile * CHUNK;
  // The last query again beyond a tile's end: it does not change a maximum.
  const int newest = ((tile + 1) * size < L ? (tile + 1) * size : L) - 1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < ROWS * STEPS * 8; i += WARPS * 32) {
    const int r = i / (STEPS * 8);
    const int dim = i % (STEPS * 8);
    const int query = first + r % CHUNK < newest ? first + r % CHUNK : newest;
    stage[r * PITCH + dim] = dim < DIMS
        ? float(queries[(size_t(batch * HEADS + r / CHUNK) * L + query) * DIMS + dim])
        : 0.0f;
  }
  for (int r = thread_index; r < CHUNK * WEIGHTS; r += WARPS * 32) {
    const int query = first + r % CHUNK < newest ? first + r % CHUNK : newest;
    stage_weights[r] = weights[(size_t(batch) * L + query) * WEIGHTS + r / CHUNK];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (step % per_tile == 0) {
    for (int m = 0; m < BLOCKS; m++) best[m] = -INFINITY;
  }
  for (int n = 0; n < CHUNK; n += 8) {
    float total[BLOCKS][2];
    for (int m = 0; m < BLOCKS; m++) {
      for (int e = 0; e < 2; e++) {
        total[m][e] = TILES ? stage_weights[(TILES ? ROWS : 0) + n + column + e] : 0.0f;
      }
    }
    for (int h = 0; h < HEADS; h++) {
      simdgroup_matrix<float, 8, 8> product[BLOCKS];
#pragma unroll
      for (int m = 0; m < BLOCKS; m++) {
        product[m] = simdgroup_matrix<float, 8, 8>(0.0f);
      }
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        simdgroup_matrix<float, 8, 8> part;  // depth x queries
#pragma unroll
        for (int e = 0; e < 2; e++) {
          part.thread_elements()[e] =
              stage[(h * CHUNK + n + column + e) * PITCH + s * 8 + row];
        }
#pragma unroll
        for (int m = 0; m < BLOCKS; m++) {
          simdgroup_multiply_accumulate(product[m], block[m][s], part, product[m]);
        }
      }
#pragma unroll
      for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float weight = stage_weights[h * CHUNK + n + column + e];
          const float x = product[m].thread_elements()[e];
          total[m][e] += weight * (x > 0 ? x : 0.0f);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
      const int key = first_key + m * 8 + row;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int query = step * CHUNK + n + column + e;
        if (TILES) {
          best[m] = best[m] > total[m][e] ? best[m] : total[m][e];
        } else if (query < L && key < n_keys) {
          scores[(size_t(batch) * L + query) * n_keys + key] = total[m][e];
        }
      }
    }
  }
  if (TILES && step % per_tile == per_tile - 1) {
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
      // Lanes that differ in bits 0 and 3 hold the same key for other queries.
      float x = best[m];
      float other = simd_shuffle_xor(x, 1);
      x = x > other ? x : other;
      other = simd_shuffle_xor(x, 8);
      x = x > other ? x : other;
      const int key = first_key + m * 8 + row;
      if (column == 0 && key < n_keys) {
        scores[(size_t(batch) * n_tiles + tile) * n_keys + key] = x;
      }
    }
  }
}
