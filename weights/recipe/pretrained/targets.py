"""What the dense attention says: the targets of indexers and of retention heads.

Each is a kernel on the GPU and a plain form for the CPU.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # on a CPU the plain form serves
    triton = None

_BLOCK = 1 << 30  # bytes of logits at once


def row_probabilities(view, lse, rows):
    """Yield heads' attention of the queries at `rows` (ascending) as (rows, `[Hq, r, L]`), float32.

    Args:
        view (View): of a layer.
        lse (Tensor): log-sum-exp of the queries at `rows`, `[Hq, R]`; what is added to it divides.
        rows (Tensor): positions `[R]`.
    """
    length = view.keys.shape[1]
    groups = view.queries.shape[0] // view.keys.shape[0]
    keys = view.keys.float().repeat_interleave(groups, dim=0).transpose(1, 2)
    step = max(1, _BLOCK // (4 * view.queries.shape[0] * length))
    places = torch.arange(length, device=rows.device)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        logits = (view.queries[:, part].float() * view.scale) @ keys
        logits = logits.sub_(lse[:, start : start + step, None]).exp_()
        yield part, logits.masked_fill_(places > part[:, None], 0)


def attention_target(view, lse, rows):
    """Return the mean over heads of attention `[R, L]`, float32, as mlx_dsa.train does.

    Args:
        view (View): of a layer.
        lse (Tensor): of all its queries `[Hq, L]`.
        rows (Tensor): positions `[R]`, ascending.
    """
    if triton is None or not view.queries.is_cuda:
        return torch.cat([p.mean(0) for _, p in row_probabilities(view, lse[:, rows], rows)])
    n_heads, length, dim = view.queries.shape
    queries, lse = view.queries[:, rows].contiguous(), lse[:, rows].contiguous()
    target = torch.empty(len(rows), length, device=rows.device, dtype=torch.float32)
    grid = (triton.cdiv(len(rows), 64), triton.cdiv(length, 128))
    _mean[grid](
        queries, view.keys.contiguous(), lse, rows, target, len(rows), length, view.scale,
        n_heads, n_heads // view.keys.shape[0], D=dim, K=128, Q=64, num_warps=4,
    )  # fmt: skip
    return target


def future_attention(view, lse, rows, min_distance, weights=None):
    """Return the largest attention `[L]` of queries at `rows` more than `min_distance` after a key.

    Args:
        view (View): of a layer.
        lse (Tensor): of the queries at `rows` `[Hq, R]`.
        rows (Tensor): positions `[R]`, ascending.
        min_distance (int): in tokens.
        weights (Tensor): what a head's attention to a key counts `[Hq, L]`, float32. Default: 1.
    """
    n_heads, length, dim = view.queries.shape
    largest = torch.zeros(length, device=rows.device)
    if triton is None or not view.queries.is_cuda:
        places = torch.arange(length, device=rows.device)
        for part, seen in row_probabilities(view, lse, rows):
            if weights is not None:
                seen = seen * weights[:, None]
            counts = places < part[:, None] - min_distance
            largest = torch.maximum(largest, seen.amax(0).mul_(counts).amax(0))
        return largest
    queries, keys = view.queries[:, rows].contiguous(), view.keys.contiguous()
    _largest[triton.cdiv(length, 128), n_heads](
        queries, keys, lse.contiguous(), rows, weights if weights is not None else lse, largest,
        len(rows), length, view.scale, min_distance, n_heads // keys.shape[0],
        WEIGHTED=weights is not None, D=dim, K=128, Q=64, num_warps=4,
    )  # fmt: skip
    return largest


if triton is not None:

    @triton.jit
    def _mean(
        q_ptr, k_ptr, lse_ptr, rows_ptr, out_ptr, n_rows, length, scale, n_heads, groups,
        D: tl.constexpr, K: tl.constexpr, Q: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0) * Q + tl.arange(0, Q)
        keys = tl.program_id(1) * K + tl.arange(0, K)
        dims = tl.arange(0, D)
        places = tl.load(rows_ptr + at, mask=at < n_rows, other=-1)
        total = tl.zeros((Q, K), tl.float32)
        if tl.max(places, axis=0) >= tl.program_id(1) * K:
            for head in range(n_heads):
                q = tl.load(
                    q_ptr + (head * n_rows + at[:, None]) * D + dims[None, :], mask=at[:, None] < n_rows, other=0.0
                )
                k = tl.load(
                    k_ptr + (head // groups * length + keys[None, :]) * D + dims[:, None],
                    mask=keys[None, :] < length, other=0.0,
                )  # fmt: skip
                lse = tl.load(lse_ptr + head * n_rows + at, mask=at < n_rows, other=float("inf"))
                total += tl.exp(tl.dot(q, k).to(tl.float32) * scale - lse[:, None])
        total = tl.where(keys[None, :] <= places[:, None], total / n_heads, 0.0)
        inside = (at[:, None] < n_rows) & (keys[None, :] < length)
        tl.store(out_ptr + at[:, None].to(tl.int64) * length + keys[None, :], total, mask=inside)

    @triton.jit
    def _largest(
        q_ptr, k_ptr, lse_ptr, rows_ptr, weights_ptr, out_ptr, n_rows, length, scale, distance, groups,
        WEIGHTED: tl.constexpr, D: tl.constexpr, K: tl.constexpr, Q: tl.constexpr,
    ):  # fmt: skip
        keys = tl.program_id(0) * K + tl.arange(0, K)
        head = tl.program_id(1)
        dims = tl.arange(0, D)
        k = tl.load(
            k_ptr + (head // groups * length + keys[None, :]) * D + dims[:, None],
            mask=keys[None, :] < length, other=0.0,
        )  # fmt: skip
        best = tl.zeros((K,), tl.float32)
        for start in range(0, n_rows, Q):
            at = start + tl.arange(0, Q)
            places = tl.load(rows_ptr + at, mask=at < n_rows, other=-1)
            if tl.max(places, axis=0) > tl.program_id(0) * K + distance:
                q = tl.load(
                    q_ptr + (head * n_rows + at[:, None]) * D + dims[None, :], mask=at[:, None] < n_rows, other=0.0
                )
                lse = tl.load(lse_ptr + head * n_rows + at, mask=at < n_rows, other=float("inf"))
                p = tl.exp(tl.dot(q, k).to(tl.float32) * scale - lse[:, None])
                counts = keys[None, :] < places[:, None] - distance
                best = tl.maximum(best, tl.max(tl.where(counts, p, 0.0), axis=0))
        if WEIGHTED:
            best *= tl.load(weights_ptr + head * length + keys, mask=keys < length, other=0.0)
        # What is compared is not negative, so its bits are in its order.
        tl.atomic_max(out_ptr + keys, best, mask=keys < length)
