// Attention of tiles of queries to rows picked from a cache, the tile's own rows last.
//
//   queries      [B, Hq, L, D]     bfloat16 or half; rows in one piece, any other strides
//   keys, values [B, Hkv, T, D]    likewise
//   slots        [B, N, K]         int; after them come the tile's own L / N keys, of
//                                  which a query sees those up to its own
//   scale        [1]               float
//   output       [B, Hq, L, D]
//
// A thread group takes ROWS rows of one tile and key head: the queries of all heads that
// share the key head. Keys and values come straight from the cache, BLOCK of them at a
// time, the next while the last are used. A warp keeps 32 rows of output in registers,
// with the running maximum and sum of each row's softmax.

constexpr int BLOCK = 64;
constexpr int PITCH = D + PAD;
constexpr int PARTS = D / 8;  // of 16 bytes a row
constexpr int N_THREADS = WARPS * 32;
constexpr int ROWS = WARPS * 32;
constexpr int ROUNDS = BLOCK * PARTS / N_THREADS;
SHARED_BYTES(memory);
T* const query_rows = (T*)memory;
T* const key_rows = query_rows + ROWS * PITCH;
T* const value_rows = key_rows + 2 * BLOCK * PITCH;

const int n_tiles = slots_shape[1];
const int size = queries_shape[2] / n_tiles;
const int n_shared = slots_shape[2];  // keys that every query of the tile sees
const int n_keys = n_shared + size;
const int group = queries_shape[1] / keys_shape[1];
const int n_rows = group * size;
const int tile = blockIdx.z % n_tiles;
const int batch = blockIdx.z / n_tiles;
const int head = blockIdx.y;
const int first_row = blockIdx.x * ROWS;
const int warp = threadIdx.x / 32;
const int lane = threadIdx.x % 32;
const int part = threadIdx.x % PARTS * 8;
const int n_blocks = (n_keys + BLOCK - 1) / BLOCK;
const size_t first_slot = size_t(blockIdx.z) * n_shared;
const int first_own = keys_shape[2] - queries_shape[2] + tile * size;
const T* const key_base = keys + batch * keys_strides[0] + head * keys_strides[1];
const T* const value_base =
    values + batch * values_strides[0] + head * values_strides[1];

int next[ROUNDS];  // slots that this thread copies for the block after
auto look_up = [&](int block) {
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int row = threadIdx.x / PARTS + i * (N_THREADS / PARTS);
    const int key = min(block * BLOCK + row, n_keys - 1);
    next[i] =
        key < n_shared ? slots[first_slot + key] : first_own + key - n_shared;
  }
};
auto fetch = [&](int block) {
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int row = threadIdx.x / PARTS + i * (N_THREADS / PARTS);
    const int to = (block % 2 * BLOCK + row) * PITCH + part;
    copy_async<16>(&key_rows[to], key_base + next[i] * keys_strides[2] + part);
    copy_async<16>(&value_rows[to], value_base + next[i] * values_strides[2] + part);
  }
  commit_copies();
};

look_up(0);
for (int i = threadIdx.x; i < ROWS * PARTS; i += N_THREADS) {
  const int row = min(first_row + i / PARTS, n_rows - 1);
  const T* from = queries + batch * queries_strides[0] +
      (head * group + row / size) * queries_strides[1] +
      (tile * size + row % size) * queries_strides[2] + part;
  copy_async<16>(&query_rows[i / PARTS * PITCH + part], from);
}
fetch(0);
look_up(1);

const float factor = scale[0] * 1.44269504f;  // exponents of 2, not of e
float out[2][D / 8][4] = {};
float top[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
float sum[2][2] = {};

for (int block = 0; block < n_blocks; block++) {
  if (block + 1 < n_blocks) {
    fetch(block + 1);
    look_up(block + 2);
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
  __syncthreads();

  const T* const block_keys = key_rows + block % 2 * BLOCK * PITCH;
  const T* const block_values = value_rows + block % 2 * BLOCK * PITCH;
  float score[2][BLOCK / 8][4] = {};
#pragma unroll
  for (int s = 0; s < D; s += 16) {
    unsigned a[2][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const int row = warp * 32 + m * 16 + lane % 16;
      load_matrices(a[m], &query_rows[row * PITCH + s + lane / 16 * 8]);
    }
#pragma unroll
    for (int n = 0; n < BLOCK / 8; n += 2) {
      unsigned b[2][2];
      const int row = n * 8 + lane / 16 * 8 + lane % 8;
      load_matrices(b[0], &block_keys[row * PITCH + s + lane / 8 % 2 * 8]);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        multiply(score[m][n], a[m], b[0], T(0.0f));
        multiply(score[m][n + 1], a[m], b[1], T(0.0f));
      }
    }
  }

  if ((block + 1) * BLOCK > n_shared) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int n = 0; n < BLOCK / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int row = first_row + warp * 32 + m * 16 + lane / 4 + e / 2 * 8;
          const int key = block * BLOCK + n * 8 + lane % 4 * 2 + e % 2;
          if (key - n_shared > row % size) score[m][n][e] = -INFINITY;
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float best = top[m][r];
#pragma unroll
      for (int n = 0; n < BLOCK / 8; n++) {
        best = fmaxf(best, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
      }
      best = fmaxf(best, from_other_lane(best, 1));
      best = fmaxf(best, from_other_lane(best, 2));
      if (lanes_with(best > top[m][r])) {
        const float fade = power_of_2((top[m][r] - best) * factor);
        sum[m][r] *= fade;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
          out[m][d][2 * r] *= fade;
          out[m][d][2 * r + 1] *= fade;
        }
        top[m][r] = best;
      }
#pragma unroll
      for (int n = 0; n < BLOCK / 8; n++) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; e++) {
          score[m][n][e] = power_of_2(score[m][n][e] * factor - best * factor);
          sum[m][r] += score[m][n][e];
        }
      }
    }
  }

#pragma unroll
  for (int s = 0; s < BLOCK / 16; s++) {
    unsigned a[2][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float* pair = &score[m][2 * s + r / 2][r % 2 * 2];
        a[m][r] = pack(pair[0], pair[1], T(0.0f));
      }
    }
#pragma unroll
    for (int d = 0; d < D / 8; d += 2) {
      unsigned b[2][2];
      const int row = s * 16 + lane % 16;
      load_turned_matrices(b[0], &block_values[row * PITCH + d * 8 + lane / 16 * 8]);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        multiply(out[m][d], a[m], b[0], T(0.0f));
        multiply(out[m][d + 1], a[m], b[1], T(0.0f));
      }
    }
  }
  __syncthreads();
}

#pragma unroll
for (int m = 0; m < 2; m++) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float total = sum[m][r];
    total += from_other_lane(total, 1);
    total += from_other_lane(total, 2);
    const int row = first_row + warp * 32 + m * 16 + lane / 4 + r * 8;
    if (row < n_rows) {
      const size_t n_heads = queries_shape[1];
      T* to = output +
          ((batch * n_heads + head * group + row / size) * queries_shape[2] +
           tile * size + row % size) * D + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < D / 8; d++) {
        const unsigned pair = pack(
            out[m][d][2 * r] / total, out[m][d][2 * r + 1] / total, T(0.0f));
        memcpy(to + d * 8, &pair, 4);
      }
    }
  }
}
