// Scores of index keys for index queries: for each query, or the largest of a tile's.
//
//   queries [B, HEADS, L, DEPTH]   bfloat16 or half, zeros after the head's own dims
//   weights [B, L, HEADS]          float; [B, N, L / N, HEADS + 1] for N tiles (TILES):
//                                  the last is added to all of a query's scores
//   keys    [B, 1, T, DIMS]        as queries, any strides
//   scores  [B, L, T] or [B, N, T] float: sum_h weights[h] * relu(queries[h] . key)
//
// A warp keeps 16 * BLOCKS keys in registers. All queries pass through shared memory,
// CHUNK of them with all their heads at a time, the next while the last are used. No
// product leaves the registers.

constexpr int STEPS = DEPTH / 16;
constexpr int PITCH = DEPTH + 8;  // so that 8 rows lie in different banks
constexpr int PARTS = DEPTH / 8;  // of 16 bytes a row
constexpr int ROWS = CHUNK * HEADS;
constexpr int WEIGHTS = HEADS + (TILES ? 1 : 0);  // of a query
constexpr int N_THREADS = WARPS * 32;
__shared__ __align__(16) T stage[2][ROWS * PITCH];
__shared__ float stage_weights[2][CHUNK * WEIGHTS];

const int L = queries_shape[2];
const int n_keys = keys_shape[2];
const int lane = threadIdx.x % 32;
const int row = lane / 4;
const int column = lane % 4 * 2;
const int batch = blockIdx.z;
const int first_key = (blockIdx.x * WARPS + threadIdx.x / 32) * 16 * BLOCKS;

unsigned block[BLOCKS][STEPS][4];
#pragma unroll
for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int key = first_key + m * 16 + row + r % 2 * 8;
      T pair[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int dim = s * 16 + column + r / 2 * 8 + e;
        pair[e] = key < n_keys && dim < DIMS
            ? keys[batch * keys_strides[0] + key * keys_strides[2] +
                   dim * keys_strides[3]]
            : T(0.0f);
      }
      memcpy(&block[m][s][r], pair, 4);
    }
  }
}

const int size = TILES ? weights_shape[2] : CHUNK;  // queries a tile
const int n_tiles = (L + size - 1) / size;
const int per_tile = (size + CHUNK - 1) / CHUNK;
const int begin = n_tiles * blockIdx.y / gridDim.y * per_tile;
const int end = n_tiles * (blockIdx.y + 1) / gridDim.y * per_tile;

const T* const query_base = queries + size_t(batch) * HEADS * L * DEPTH;
const float* const weight_base = weights + size_t(batch) * L * WEIGHTS;
auto fetch = [&](int step) {
  const int tile = step / per_tile;
  const int first = tile * size + step % per_tile * CHUNK;
  // The last query again beyond a tile's end: it does not change a maximum.
  const int newest = min((tile + 1) * size, L) - 1;
#pragma unroll
  for (int n = 0; n < ROWS * PARTS; n += N_THREADS) {
    const int r = (threadIdx.x + n) / PARTS;
    const int part = (threadIdx.x + n) % PARTS * 8;
    const int query = min(first + r % CHUNK, newest);
    if (r < ROWS) {
      copy_async<16>(
          &stage[step % 2][r * PITCH + part],
          query_base + ((r / CHUNK * L + query) * DEPTH + part));
    }
  }
  for (int r = threadIdx.x; r < CHUNK * WEIGHTS; r += N_THREADS) {
    const int query = min(first + r % CHUNK, newest);
    copy_async<4>(
        &stage_weights[step % 2][r], weight_base + (query * WEIGHTS + r / CHUNK));
  }
  commit_copies();
};

float best[BLOCKS][2];
if (begin < end) fetch(begin);
for (int step = begin; step < end; step++) {
  if (step + 1 < end) {
    fetch(step + 1);
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
  __syncthreads();
  if (step % per_tile == 0) {
    for (int m = 0; m < BLOCKS; m++) best[m][0] = best[m][1] = -INFINITY;
  }
  for (int n = 0; n < CHUNK; n += 8) {
    float total[BLOCKS][4] = {};
    if (TILES) {
#pragma unroll
      for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          total[m][e] = stage_weights[step % 2][(TILES ? ROWS : 0) + n + column + e % 2];
        }
      }
    }
#pragma unroll 1
    for (int h = 0; h < HEADS; h++) {
      const T* query = &stage[step % 2][(h * CHUNK + n + row) * PITCH + column];
      const float* weight = &stage_weights[step % 2][h * CHUNK + n + column];
      unsigned part[STEPS][2];
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        memcpy(&part[s][0], query + s * 16, 4);
        memcpy(&part[s][1], query + s * 16 + 8, 4);
      }
#pragma unroll
      for (int m = 0; m < BLOCKS; m++) {
        float product[4] = {};
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          multiply(product, block[m][s], part[s], T(0.0f));
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
          total[m][e] += weight[e % 2] * fmaxf(product[e], 0.0f);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (TILES) {
          best[m][e / 2] = fmaxf(best[m][e / 2], total[m][e]);
        } else {
          const int query = step * CHUNK + n + column + e % 2;
          const int key = first_key + m * 16 + row + e / 2 * 8;
          if (query < L && key < n_keys) {
            scores[(size_t(batch) * L + query) * n_keys + key] = total[m][e];
          }
        }
      }
    }
  }
  if (TILES && step % per_tile == per_tile - 1) {
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float x = best[m][e];
        x = fmaxf(x, from_other_lane(x, 1));
        x = fmaxf(x, from_other_lane(x, 2));
        const int key = first_key + m * 16 + row + e * 8;
        if (column == 0 && key < n_keys) {
          scores[(size_t(batch) * n_tiles + step / per_tile) * n_keys + key] = x;
        }
      }
    }
  }
  __syncthreads();
}
