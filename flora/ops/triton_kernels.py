"""The GPU kernels: scale, sum, add, and multiply by a W0 that is modulated on its way.

Tables are those of `table.py`; all sums are taken in fp32. Letters as in `ops/__init__.py`; M and K
are O and I, or I and O where W0 is transposed. Rows of all tensors are contiguous but those of W0.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _configs(*configs: triton.Config) -> list[triton.Config]:
    """The interpreter takes the first: it has no clock to choose by."""
    return list(configs[:1] if INTERPRETED.value else configs)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # which would multiply the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _tokens(copies, first_copy, token, inside, N):
    """Where a segment's tokens stand in `[S, N]`."""
    row = tl.load(copies + 2 * (first_copy + token // N), mask=inside, other=0)
    return row.to(tl.int64) * N + token % N


@triton.jit(do_not_specialize=["N"])
def expand(x, pages, copies, out, N, I, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """[S, N, I] -> [T, N, I]: tokens of one copy, scaled by its page."""
    blocks = tl.cdiv(N, TOKENS)
    copy = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (n < N)[:, None] & (i < I)[None, :]
    row = tl.load(copies + 2 * copy).to(tl.int64)
    page = tl.load(copies + 2 * copy + 1).to(tl.int64)
    tile = tl.load(x + (row * N + n)[:, None] * I + i[None, :], mask=inside)
    if page >= 0:
        b = tl.load(pages + page * I + i, mask=i < I)
        tile = (tile.to(tl.float32) * b[None, :]).to(tile.dtype)
    tl.store(out + (copy * N + n)[:, None] * I + i[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=["N", "ranks"])
def shrink(
    x,
    down,
    hidden,
    rows,
    N,
    I,
    ranks,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[S, N, I] -> [S, N, ranks]: V x for tokens of one row and some of its pages."""
    blocks = tl.cdiv(N, TOKENS)
    row = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    rank = tl.load(rows + 6 * row + 4)
    if tl.program_id(1) * RANKS >= rank:
        return
    token = row.to(tl.int64) * N + n
    page = tl.load(rows + 6 * row + 3).to(tl.int64) + r
    i = tl.arange(0, BLOCK)
    if TOKENS >= 16:
        total = tl.zeros([TOKENS, RANKS], tl.float32)
        for first in range(0, I, BLOCK):
            within = first + i < I
            tile = tl.load(
                x + token[:, None] * I + first + i[None, :],
                mask=(n < N)[:, None] & within[None, :],
                other=0,
            )
            v = tl.load(
                down + page[None, :] * I + first + i[:, None],
                mask=within[:, None] & (r < rank)[None, :],
                other=0,
            )
            total = _dot(tile, v, total, "ieee")
    else:  # one page a program, as there are few tokens and many processors
        terms = tl.zeros([TOKENS, BLOCK], tl.float32)
        for first in range(0, I, BLOCK):
            within = (first + i < I)[None, :]
            tile = tl.load(
                x + token[:, None] * I + first + i[None, :],
                mask=(n < N)[:, None] & within,
                other=0,
            )
            v = tl.load(down + page[:, None] * I + first + i[None, :], mask=within, other=0)
            terms += tile.to(tl.float32) * v.to(tl.float32)
        total = tl.sum(terms, 1)[:, None]
    tl.store(
        hidden + token[:, None] * ranks + r[None, :],
        total,
        mask=(n < N)[:, None] & (r < rank)[None, :],
    )


@triton.jit(do_not_specialize=["N", "active", "ranks"])
def contract(
    y,
    product,
    pages,
    hidden,
    up,
    biases,
    bias,
    rows,
    N,
    O,
    active,
    ranks,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[T, N, O] -> [S, N, O]: tokens of one row, their copies scaled and summed, + U (V x) + bias.

    The product of a row whose W0 was modulated stands in y already.
    """
    blocks = tl.cdiv(N, TOKENS)
    row = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first_copy = tl.load(rows + 6 * row)
    count = tl.load(rows + 6 * row + 1)
    first_page = tl.load(rows + 6 * row + 2)
    first_rank = tl.load(rows + 6 * row + 3).to(tl.int64)
    rank = tl.load(rows + 6 * row + 4)
    bias_page = tl.load(rows + 6 * row + 5).to(tl.int64)
    if bias is None and (first_copy >= active) & (rank == 0) & (bias_page < 0):
        return

    token = row.to(tl.int64) * N + n
    inside = (n < N)[:, None] & (o < O)[None, :]
    to = y + token[:, None] * O + o[None, :]
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    if first_copy >= active:
        total += tl.load(to, mask=inside, other=0).to(tl.float32)
    else:
        for j in tl.range(0, count, loop_unroll_factor=4):
            copy = (first_copy + j).to(tl.int64) * N + n
            part = tl.load(product + copy[:, None] * O + o[None, :], mask=inside, other=0)
            part = part.to(tl.float32)
            if pages is not None:
                if first_page >= 0:
                    page = (first_page + j).to(tl.int64)
                    part *= tl.load(pages + page * O + o, mask=o < O, other=0)[None, :]
            total += part

    if hidden is not None:
        if TOKENS >= 16:
            for first in range(0, rank, 16):
                r = first + tl.arange(0, 16)
                h = tl.load(
                    hidden + token[:, None] * ranks + r[None, :],
                    mask=(n < N)[:, None] & (r < rank)[None, :],
                    other=0,
                )
                u = tl.load(
                    up + (first_rank + r)[:, None] * O + o[None, :],
                    mask=(r < rank)[:, None] & (o < O)[None, :],
                    other=0,
                )
                total = _dot(h, u.to(tl.float32), total, PRECISION)
        else:
            for r in tl.range(0, rank, loop_unroll_factor=8):
                h = tl.load(hidden + token * ranks + r, mask=n < N, other=0)
                u = tl.load(up + (first_rank + r) * O + o, mask=o < O, other=0)
                total += h[:, None] * u.to(tl.float32)[None, :]

    if biases is not None:
        if bias_page >= 0:
            own = tl.load(biases + bias_page * O + o, mask=o < O, other=0)
            total += own.to(tl.float32)[None, :]
    if bias is not None:
        if bias_page < 0:
            total += tl.load(bias + o, mask=o < O, other=0).to(tl.float32)[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def split_pages(
    pages, out, segments, X, LANES: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr
):
    """[P, X] -> [W, LANES, X]: a segment's pages as terms of out's type, three lanes a page.

    With a = high + low, lanes of a (LOW 2: high, high, low) times lanes of b (LOW 1: high, low,
    high) add up to a b but for low times low. In bf16 that is a relative 2^-16, far below the step
    of a 16-bit W0; in fp32 low is 0.
    """
    lane = tl.program_id(0) % LANES
    segment = segments + 4 * (tl.program_id(0) // LANES)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    page = (tl.load(segment + 2) + lane // 3).to(tl.int64)
    end = tl.where(lane // 3 < tl.load(segment + 3), X, 0)
    tile = tl.load(pages + page * X + x, mask=x < end, other=0)
    high = tile.to(out.dtype.element_ty)
    if lane % 3 == LOW:
        high = (tile - high.to(tl.float32)).to(high.dtype)
    tl.store(out + tl.program_id(0).to(tl.int64) * X + x, high, mask=x < X)


@triton.autotune(
    _configs(
        triton.Config({"BLOCK_M": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_M": 128, "BLOCK_K": 32}, num_warps=8, num_stages=4),
        triton.Config({"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_M": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    ),
    key=["M", "K", "LANES", "BLOCK_T"],
)
@triton.jit(do_not_specialize=["N", "count"])
def modulated_product(
    x,
    weight,
    left,
    right,
    y,
    segments,
    copies,
    count,
    N,
    M,
    K,
    stride_m,
    stride_k,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[S, N, K] -> [S, N, M]: x (W0 ∘ Σ leftᵀ right)ᵀ for tokens of one segment.

    Computed as yᵀ = W xᵀ: so the modulated tile is the first operand of the product, which the
    tensor cores take from the registers that it is made in. GROUP blocks of tokens, of all segments
    alike, go through the same rows of W0 together, as both then stay in the cache.
    """
    number = tl.arange(0, SEGMENTS)
    length = tl.load(segments + 4 * number + 1, mask=number < count, other=0) * N
    blocks = tl.cdiv(length, BLOCK_T)
    ends = tl.cumsum(blocks)
    block = tl.program_id(2) * GROUP + tl.program_id(0)
    if block >= tl.max(ends):
        return
    segment = tl.sum((ends <= block).to(tl.int32))
    t = (block - tl.sum(tl.where(number < segment, blocks, 0))) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tl.load(segments + 4 * segment + 1) * N
    token = _tokens(copies, tl.load(segments + 4 * segment), t, inside, N)

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    row = weight + m.to(tl.int64)[:, None] * stride_m
    lane = (segment * LANES + tl.arange(0, LANES)).to(tl.int64)
    a = tl.load(left + lane[None, :] * M + m[:, None], mask=(m < M)[:, None], other=0)
    total = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for first in range(0, K, BLOCK_K):
        within = first + k < K
        b = tl.load(right + lane[:, None] * K + first + k[None, :], mask=within[None, :], other=0)
        w = tl.load(
            row + (first + k).to(tl.int64)[None, :] * stride_k,
            mask=(m < M)[:, None] & within[None, :],
            other=0,
        )
        tile = tl.load(
            x + token[None, :] * K + first + k[:, None],
            mask=inside[None, :] & within[:, None],
            other=0,
        )
        modulation = _dot(a, b, tl.zeros([BLOCK_M, BLOCK_K], tl.float32), "ieee")
        total = _dot((modulation * w.to(tl.float32)).to(w.dtype), tile, total, "ieee")
    tl.store(
        y + token[None, :] * M + m[:, None],
        total.to(y.dtype.element_ty),
        mask=inside[None, :] & (m < M)[:, None],
    )


@triton.autotune(
    _configs(
        triton.Config({"BLOCK_T": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_T": 32}, num_warps=8, num_stages=4),
        triton.Config({"BLOCK_T": 64}, num_warps=4, num_stages=3),
    ),
    key=["I", "O"],
)
@triton.jit(do_not_specialize=["N", "pages"])
def hadamard_gradients(
    dy,
    x,
    weight,
    in_pages,
    out_pages,
    in_parts,
    out_parts,
    segments,
    copies,
    N,
    I,
    O,
    stride_o,
    stride_i,
    pages,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile's part of da_j = (G ∘ W0) b_j and db_j = (G ∘ W0)ᵀ a_j, G = dYᵀ X, for one segment.

    in_parts `[tiles of O, pages, I]` and out_parts `[tiles of I, pages, O]` are to be summed: in
    this order each time, which atomic additions would not be.
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    segment = segments + 4 * tl.program_id(2)
    first_copy = tl.load(segment)
    length = tl.load(segment + 1) * N
    first_page = tl.load(segment + 2)
    count = tl.load(segment + 3)
    g = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for first in range(0, length, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = t < length
        token = _tokens(copies, first_copy, t, inside, N)
        d = tl.load(
            dy + token[None, :] * O + o[:, None],
            mask=inside[None, :] & (o < O)[:, None],
            other=0,
        )
        tile = tl.load(
            x + token[:, None] * I + i[None, :],
            mask=inside[:, None] & (i < I)[None, :],
            other=0,
        )
        g = _dot(d, tile, g, "ieee")
    w = tl.load(
        weight + o.to(tl.int64)[:, None] * stride_o + i.to(tl.int64)[None, :] * stride_i,
        mask=(o < O)[:, None] & (i < I)[None, :],
        other=0,
    )
    g *= w.to(tl.float32)
    for first in range(0, count, 16):
        j = first + tl.arange(0, 16)
        page = (first_page + j).to(tl.int64)
        of_i = (j < count)[None, :] & (i < I)[:, None]
        of_o = (j < count)[:, None] & (o < O)[None, :]
        b = tl.load(in_pages + page[None, :] * I + i[:, None], mask=of_i, other=0)
        a = tl.load(out_pages + page[:, None] * O + o[None, :], mask=of_o, other=0)
        da = _dot(g, b, tl.zeros([BLOCK_O, 16], tl.float32), PRECISION)
        db = _dot(a, g, tl.zeros([16, BLOCK_I], tl.float32), PRECISION)
        out_part = out_parts + (tl.program_id(1).to(tl.int64) * pages + page)[None, :] * O
        in_part = in_parts + (tl.program_id(0).to(tl.int64) * pages + page)[:, None] * I
        tl.store(out_part + o[:, None], da, mask=(j < count)[None, :] & (o < O)[:, None])
        tl.store(in_part + i[None, :], db, mask=(j < count)[:, None] & (i < I)[None, :])
