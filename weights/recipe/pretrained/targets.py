"""What the dense attention says: the targets of indexers and of retention heads."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # on a CPU the plain form serves
    triton = None

_BLOCK = 1 << 30  # bytes of logits at once


def row_probabilities(view, lse, rows, end=None):
    """Yield heads' attention of the queries at `rows` (ascending) as (slice, `[Hq, r, end]`), float32."""
    end = end or view.keys.shape[1]
    groups = view.queries.shape[0] // view.keys.shape[0]
    keys = view.keys[:, :end].float().repeat_interleave(groups, dim=0).transpose(1, 2)
    step = max(1, _BLOCK // (4 * view.queries.shape[0] * end))
    places = torch.arange(end, device=rows.device)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        logits = (view.queries[:, part].float() * view.scale) @ keys
        logits = logits.sub_(lse[:, part, None]).exp_()
        yield part, logits.masked_fill_(places > part[:, None], 0)


def attention_target(view, lse, rows):
    """Return the mean over heads of attention `[R, L]`, float32, as mlx_dsa.train does."""
    return torch.cat([p.mean(0) for _, p in row_probabilities(view, lse, rows)])


def future_attention(view, lse, rows, min_distance):
    """Return the largest attention `[L]` of queries at `rows` more than `min_distance` after a key."""
    length = view.keys.shape[1]
    largest = torch.zeros(length, device=rows.device)
    places = torch.arange(length, device=rows.device)
    for part, seen in row_probabilities(view, lse, rows):
        counts = places < part[:, None] - min_distance
        largest = torch.maximum(largest, seen.amax(0).mul_(counts).amax(0))
    return largest


def all_future_attention(view, lse, min_distance, first=0):
    """Return what `future_attention` does of every query from `first` on."""
    if triton is None or not view.queries.is_cuda:
        rows = torch.arange(first, view.keys.shape[1], device=view.keys.device)
        return future_attention(view, lse, rows, min_distance)
    n_heads, length, dim = view.queries.shape
    queries, keys = view.queries.contiguous(), view.keys.contiguous()
    largest = torch.zeros(length, device=keys.device, dtype=torch.float32)
    grid = (triton.cdiv(length, 128), n_heads)
    _largest[grid](
        queries, keys, lse.contiguous(), largest, length, view.scale, min_distance, first,
        n_heads // keys.shape[0], D=dim, K=128, Q=64, num_warps=4,
    )  # fmt: skip
    return largest


if triton is not None:

    @triton.jit
    def _largest(
        q_ptr, k_ptr, lse_ptr, out_ptr, length, scale, distance, first, groups,
        D: tl.constexpr, K: tl.constexpr, Q: tl.constexpr,
    ):  # fmt: skip
        keys = tl.program_id(0) * K + tl.arange(0, K)
        head = tl.program_id(1)
        dims = tl.arange(0, D)
        kv = head // groups
        k = tl.load(
            k_ptr + (kv * length + keys[None, :]) * D + dims[:, None], mask=keys[None, :] < length, other=0.0
        )
        best = tl.zeros((K,), tl.float32)
        start = tl.maximum(first, tl.program_id(0) * K + distance + 1) // Q * Q
        for block in range(start, length, Q):
            rows = block + tl.arange(0, Q)
            q = tl.load(
                q_ptr + (head * length + rows[:, None]) * D + dims[None, :],
                mask=rows[:, None] < length, other=0.0,
            )  # fmt: skip
            lse = tl.load(lse_ptr + head * length + rows, mask=rows < length, other=float("inf"))
            p = tl.exp(tl.dot(q, k).to(tl.float32) * scale - lse[:, None])
            counts = (keys[None, :] < rows[:, None] - distance) & (rows[:, None] >= first)
            counts = counts & (rows[:, None] < length)
            best = tl.maximum(best, tl.max(tl.where(counts, p, 0.0), axis=0))
        # Probabilities are not negative, so their bits are in their order.
        tl.atomic_max(out_ptr + keys, best, mask=keys < length)
