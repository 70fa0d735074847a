// Scores of index keys for index queries: for each query, or the largest of a tile's.
//
//   queries [B, N, M, HEADS, CHUNK, DEPTH + PAD]  bfloat16 or half: N tiles of M chunks,
//                                  zeros after a head's own dims
//   weights [B, L, HEADS]          float; [B, N * M * CHUNK, HEADS + 1] for tiles (TILES):
//                                  the last is added to all of a query's scores
//   keys    [B, 1, T, DIMS]        as queries, any strides
//   scores  [B, L, T] or [B, N, T] float: sum_h weights[h] * relu(queries[h] . key)
//
// A warp keeps 16 * BLOCKS keys in registers. All queries pass through shared memory,
// a chunk of them with all their heads at a time, the next while the last is used. No
// product leaves the registers.

constexpr int STEPS = DEPTH / 16;
constexpr int PITCH = DEPTH + PAD;
constexpr int SETS = CHUNK / 8;   // of queries that are one operand
constexpr int ELEMENTS = HEADS * CHUNK * PITCH;
constexpr int WEIGHTS = HEADS + (TILES ? 1 : 0);  // of a query
constexpr int N_THREADS = WARPS * 32;
__shared__ __align__(16) T stage[2][ELEMENTS];
__shared__ float stage_weights[2][WEIGHTS * CHUNK];

const int n_tiles = queries_shape[1];
const int per_tile = queries_shape[2];
const int L = weights_shape[1];
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

const int begin = n_tiles * blockIdx.y / gridDim.y * per_tile;
const int end = n_tiles * (blockIdx.y + 1) / gridDim.y * per_tile;

const T* const query_base = queries + size_t(batch) * n_tiles * per_tile * ELEMENTS;
const float* const weight_base = weights + size_t(batch) * L * WEIGHTS;
auto fetch = [&](int step) {
  const T* from = query_base + size_t(step) * ELEMENTS;
#pragma unroll
  for (int n = 0; n < ELEMENTS; n += N_THREADS * 8) {
    const int at = n + threadIdx.x * 8;
    if (at < ELEMENTS) copy_async<16>(&stage[step % 2][at], from + at);
  }
#pragma unroll
  for (int n = 0; n < WEIGHTS * CHUNK; n += N_THREADS) {
    const int at = n + threadIdx.x;
    const int query = min(step * CHUNK + at % CHUNK, L - 1);
    if (at < WEIGHTS * CHUNK) {
      copy_async<4>(
          &stage_weights[step % 2][at], weight_base + (query * WEIGHTS + at / CHUNK));
    }
  }
  commit_copies();
};

// Where a lane's row is, of the queries that it loads, and its weights.
const int own_row = (lane / 16 % SETS * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
float best[BLOCKS][2];
if (begin < end) fetch(begin);
for (int step = begin; step < end; step++) {
  wait_copies<0>();
  __syncthreads();
  // Not sooner: all have now read what this overwrites.
  if (step + 1 < end) fetch(step + 1);
  if (step % per_tile == 0) {
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) best[m][0] = best[m][1] = -INFINITY;
  }
  const T* query = &stage[step % 2][own_row];
  const float* weight = &stage_weights[step % 2][column];
  float total[BLOCKS][SETS][4];
#pragma unroll
  for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
    for (int i = 0; i < SETS; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        total[m][i][e] = TILES ? weight[(WEIGHTS - 1) * CHUNK + i * 8 + e % 2] : 0.0f;
      }
    }
  }
#pragma unroll 1
  for (int h = 0; h < HEADS; h++) {
    float product[BLOCKS][SETS][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      unsigned part[2][2];
      load_matrices(part[0], query + s * 16);
#pragma unroll
      for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
        for (int i = 0; i < SETS; i++) {
          multiply(product[m][i], block[m][s], part[i], T(0.0f));
        }
      }
    }
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
      for (int i = 0; i < SETS; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          total[m][i][e] += weight[i * 8 + e % 2] * fmaxf(product[m][i][e], 0.0f);
        }
      }
    }
    query += CHUNK * PITCH;
    weight += CHUNK;
  }
#pragma unroll
  for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
    for (int i = 0; i < SETS; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (TILES) {
          best[m][e / 2] = fmaxf(best[m][e / 2], total[m][i][e]);
        } else {
          const int at = step * CHUNK + i * 8 + column + e % 2;
          const int key = first_key + m * 16 + row + e / 2 * 8;
          if (at < L && key < n_keys) {
            scores[(size_t(batch) * L + at) * n_keys + key] = total[m][i][e];
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
}
