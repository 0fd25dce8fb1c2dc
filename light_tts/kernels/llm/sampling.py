"""The sampler of light_tts/common/sampling.py for each request of a batch, including the update of its state,
as one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.common import sampling
from light_tts.common.random import Purpose
from light_tts.common.row_state import BANNED, HELD, RowState
from light_tts.common.sampling_rule import MAX_TOP_K
from light_tts.kernels import overlap
from light_tts.kernels.random import gumbel, gumbel_estimate

_WARPS = 16
_SEGMENTS = 64  # of the vocabulary; their best scores bound which ids are likely
_CANDIDATES = 64  # number of likely ids that are sorted; random scores have 25 to 50
_BANNED, _HELD = tl.constexpr(BANNED), tl.constexpr(HELD)
_NONE = tl.constexpr(0x7F800000_7FFFFFFF)  # greater than the keys of all likely ids


def sample(
    logits: Tensor,
    state: RowState,
    rows: Tensor,
    out: Tensor,
    lines: Tensor | None,
    text_vocab: int,
    speech_tokens: int,
    max_top_k: int = MAX_TOP_K,
) -> None:
    """Sample the next speech id of the requests in `rows`, write it to `out`, and update next_id, step and
    history. Each request uses its own `SamplingRule` from the state and excludes the special ids that the
    state bans.

    logits: (batch, speech ids) of any float dtype, contiguous within each row; rows: (batch,) int32, all
    different; negative: write only -1 to `out`; out: (any, batch) int32; lines: (batch,) int64, the line of
    `out` for each request, incremented here; None: the first; text_vocab, speech_tokens: see `SpeechIds`;
    max_top_k: of any request
    """
    batch, vocabulary = logits.shape
    block = triton.next_power_of_2(vocabulary)
    columns = min(32 * _WARPS, block)
    candidates = max(_CANDIDATES, triton.next_power_of_2(max_top_k))
    _sample_kernel[(batch,)](
        logits,
        state.next_id,
        state.seed,
        state.part,
        state.step,
        state.min_outputs,
        state.bans,
        state.history,
        state.top_p,
        state.top_k,
        state.win_size,
        state.repeats,
        state.inverse_temperature,
        rows,
        out,
        lines,
        logits.new_empty(batch, candidates, dtype=torch.int64),
        logits.stride(0),
        vocabulary,
        text_vocab,
        speech_tokens,
        SPECIAL_IDS=state.bans.shape[1],
        WINDOW=state.history.shape[1],
        WINDOW_BLOCK=triton.next_power_of_2(state.history.shape[1]),
        BLOCK=block,
        COLUMNS=columns,
        SEGMENTS=min(_SEGMENTS, columns),
        CANDIDATES=candidates,
        NUCLEUS_STREAM=int(Purpose.NUCLEUS) << 32,
        FALLBACK_STREAM=int(Purpose.FALLBACK) << 32,
        num_warps=_WARPS,
        **overlap.options(logits.device, "llm", batch),
    )


def sample_reference(
    logits: Tensor,
    state: RowState,
    rows: Tensor,
    out: Tensor,
    lines: Tensor | None,
    text_vocab: int,
    speech_tokens: int,
    max_top_k: int = MAX_TOP_K,
) -> None:
    live = rows >= 0
    index = rows[live].long()
    scores = sampling.ban(logits[live].float(), speech_tokens, state.banned(index))
    history, steps = state.history[index].long(), state.step[index].long()
    drawn = sampling.draw(scores, state.rules(index), history, state.seed[index], state.part[index], steps)
    tokens = torch.full_like(rows, sampling.NO_TOKEN)
    tokens[live] = drawn.int()
    if lines is None:
        out[0] = tokens
    else:
        out.scatter_(0, lines[None], tokens[None])
        lines += 1
    state.next_id[index] = (text_vocab + drawn).int()
    state.step[index] += 1
    state.history[index] = torch.cat([history[:, 1:], drawn[:, None]], 1).to(state.history.dtype)


@triton.jit
def _sample_kernel(
    logits_ptr,
    next_id_ptr,
    seed_ptr,
    part_ptr,
    step_ptr,
    min_outputs_ptr,
    bans_ptr,
    history_ptr,
    top_p_ptr,
    top_k_ptr,
    win_size_ptr,
    repeats_ptr,
    inverse_temperature_ptr,
    rows_ptr,
    out_ptr,
    lines_ptr,
    scratch_ptr,
    stride,
    vocabulary,
    text_vocab,
    speech_tokens,
    SPECIAL_IDS: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    NUCLEUS_STREAM: tl.constexpr,
    FALLBACK_STREAM: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """One program per request. `scratch_ptr`: (requests, CANDIDATES); `stride`: from row to row of the
    logits; `BLOCK`: the vocabulary rounded up; COLUMNS and the following: see `_likely`."""
    request = tl.program_id(0)
    # May be read before the wait: written by the host, `advance` or the previous step. .cg: see
    # decode_attention.
    if lines_ptr is not None:
        line = tl.load(lines_ptr + request, cache_modifier=".cg")
    row = tl.load(rows_ptr + request, cache_modifier=".cg")
    at = tl.maximum(row, 0).to(tl.int64)
    step = tl.load(step_ptr + at, cache_modifier=".cg")
    seed = tl.load(seed_ptr + at, cache_modifier=".cg")
    part = tl.load(part_ptr + at, cache_modifier=".cg")
    top_p = tl.load(top_p_ptr + at, cache_modifier=".cg")
    top_k = tl.minimum(tl.load(top_k_ptr + at, cache_modifier=".cg"), vocabulary)
    top_k = tl.minimum(top_k, CANDIDATES)
    win_size = tl.load(win_size_ptr + at, cache_modifier=".cg")
    repeats = tl.load(repeats_ptr + at, cache_modifier=".cg")
    inverse_temperature = tl.load(inverse_temperature_ptr + at, cache_modifier=".cg")
    latest_ptr = history_ptr + at * WINDOW + tl.arange(0, WINDOW_BLOCK)
    age = WINDOW - 1 - tl.arange(0, WINDOW_BLOCK)  # 0 is the newest
    latest = tl.load(latest_ptr, mask=age >= 0, other=-1, cache_modifier=".cg")
    later = tl.load(latest_ptr + 1, mask=age >= 1, other=-1, cache_modifier=".cg")
    early = step < tl.load(min_outputs_ptr + at, cache_modifier=".cg")
    bans_ptr += at * SPECIAL_IDS
    if OVERLAP:
        overlap.begin()

    tl.debug_barrier()  # all threads have read what is written below
    if lines_ptr is not None:
        out_ptr += line * tl.num_programs(0)
        tl.store(lines_ptr + request, line + 1)
    if row >= 0:
        logits_ptr += request.to(tl.int64) * stride
        ids = tl.arange(0, BLOCK)
        scores = _scores(
            logits_ptr, ids, vocabulary, speech_tokens, bans_ptr, early, inverse_temperature, SPECIAL_IDS
        )
        counter = step.to(tl.int64) * vocabulary
        scratch_ptr += request.to(tl.int64) * CANDIDATES
        keys = _likely(scores, top_k, scratch_ptr, BLOCK, COLUMNS, SEGMENTS, CANDIDATES)
        drawn = _draw_from_nucleus(keys, top_p, top_k, seed, part + NUCLEUS_STREAM, counter)
        seen = (latest == drawn) & (age < win_size)
        if tl.sum(seen.to(tl.int32), 0) >= repeats:
            stream = part + FALLBACK_STREAM
            others = tl.where(ids == drawn, float("-inf"), scores)
            estimate = others + gumbel_estimate(seed, stream, counter + ids)
            most = tl.max(estimate, 0)
            near = estimate >= most - (1e-3 + 1e-6 * tl.abs(most))
            first = tl.min(tl.where(near, ids, BLOCK), 0)
            if first == tl.max(tl.where(near, ids, -1), 0):
                drawn = first
            else:
                drawn = _draw_other(
                    logits_ptr,
                    vocabulary,
                    speech_tokens,
                    bans_ptr,
                    early,
                    inverse_temperature,
                    drawn,
                    seed,
                    stream,
                    counter,
                    SPECIAL_IDS,
                    COLUMNS,
                )
        drawn = tl.minimum(drawn, vocabulary - 1)  # with NaN, stay inside the embedding
        tl.store(out_ptr + request, drawn)
        tl.store(next_id_ptr + row, text_vocab + drawn)
        tl.store(step_ptr + row, step + 1)
        tl.store(latest_ptr, tl.where(age == 0, drawn, later), mask=age >= 0)
    else:
        tl.store(out_ptr + request, -1)


@triton.jit
def _scores(
    logits_ptr,
    ids,
    vocabulary,
    speech_tokens,
    bans_ptr,
    early,
    inverse_temperature,
    SPECIAL_IDS: tl.constexpr,
):
    """Return the logits of `ids` in float32, divided by the temperature; -inf for banned ids and outside the
    vocabulary. `bans_ptr`: (SPECIAL_IDS,) of the request; `early`: HELD ids are banned as well"""
    scores = tl.load(logits_ptr + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    scores *= inverse_temperature
    special = ids - speech_tokens
    known = (special >= 0) & (special < SPECIAL_IDS)
    ban = tl.load(bans_ptr + special, mask=known, other=0, cache_modifier=".cg")
    banned = (ban == _BANNED) | ((ban == _HELD) & early)
    return tl.where(banned, float("-inf"), scores)


@triton.jit
def _likely(
    scores,
    top_k,
    scratch_ptr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """scores: (BLOCK,) -> (CANDIDATES,) int64: the keys of the top_k most probable ids and a few others, in
    any order, padded with _NONE. A key is the bits of -log(probability) followed by the id: smaller is
    better.

    `COLUMNS`: number of threads, so that reductions along them stay within a thread; `SEGMENTS`: divides
    COLUMNS; scratch_ptr: (CANDIDATES,) int64; CANDIDATES: at least top_k
    """
    ROWS: tl.constexpr = BLOCK // COLUMNS
    # At least top_k ids reach the top_k-th highest of the segments' best scores, and few others do.
    best = tl.max(tl.reshape(scores, [ROWS, COLUMNS]), 0)
    best = tl.max(tl.reshape(best, [COLUMNS // SEGMENTS, SEGMENTS]), 0)
    reached = tl.sum((best[:, None] >= best[None, :]).to(tl.int32), 0)
    bound = tl.max(tl.where(reached >= top_k, best, float("-inf")), 0)

    most = tl.max(best, 0)
    shifted = scores - most
    log_total = tl.log(tl.sum(tl.exp(shifted), 0).to(tl.float64)).to(tl.float32)
    surprisal = log_total - shifted
    # Non-negative, so that its bits sort correctly; a fused product with the temperature could make it
    # negative.
    surprisal = tl.where(surprisal < 0, 0.0, surprisal)
    likely = surprisal <= tl.minimum(log_total - (bound - most), 3.4028234663852886e38)  # finite, no NaN
    keys = (surprisal.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tl.arange(0, BLOCK)

    in_column = tl.cumsum(tl.reshape(likely.to(tl.int32), [ROWS, COLUMNS]), 0)
    counts = tl.max(in_column, 0)
    count = tl.sum(counts, 0)
    if count <= CANDIDATES:
        place = (tl.cumsum(counts, 0) - counts)[None, :] + in_column - 1
        tl.store(scratch_ptr + tl.reshape(place, [BLOCK]), keys, mask=likely)
    else:  # if most of them are in few segments, or are equal
        last = tl.full([], -1, tl.int64)
        for i in range(top_k):
            last = tl.min(tl.where(keys > last, keys, _NONE), 0)
            tl.store(scratch_ptr + i, last)
    found = tl.where(count <= CANDIDATES, count, top_k)
    tl.debug_barrier()  # threads load what others have stored
    place = tl.arange(0, CANDIDATES)
    return tl.load(scratch_ptr + place, mask=place < found, other=_NONE)


@triton.jit
def _draw_from_nucleus(keys, top_p, top_k, seed, stream, counter):
    """keys: see `_likely` -> an id"""
    surprisal = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    before = keys[:, None] < keys[None, :]
    rank = tl.sum(before.to(tl.int32), 0)
    # In float64 nearly exact; the reference adds in another order.
    probability = tl.exp(-surprisal).to(tl.float64)
    mass = tl.sum(tl.where(before, probability[:, None], 0.0), 0).to(tl.float32)
    noisy = gumbel(seed, stream, counter + keys.to(tl.int32)) - surprisal
    noisy = tl.where((rank < top_k) & (mass < top_p), noisy, float("-inf"))
    return tl.min(tl.where(noisy == tl.max(noisy, 0), keys, _NONE), 0).to(tl.int32)


@triton.jit
def _draw_other(
    logits_ptr,
    vocabulary,
    speech_tokens,
    bans_ptr,
    early,
    inverse_temperature,
    drawn,
    seed,
    stream,
    counter,
    SPECIAL_IDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return an id other than `drawn`, from the full distribution. Rarely called, so it is a loop: slow, but
    with little code and few registers."""
    column = tl.arange(0, COLUMNS)
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    best_ids = column
    for start in range(0, vocabulary, COLUMNS):
        ids = start + column
        scores = _scores(
            logits_ptr, ids, vocabulary, speech_tokens, bans_ptr, early, inverse_temperature, SPECIAL_IDS
        )
        noisy = tl.where(ids == drawn, float("-inf"), scores + gumbel(seed, stream, counter + ids))
        best_ids = tl.where(noisy > best, ids, best_ids)
        best = tl.maximum(best, noisy)
    return tl.min(tl.where(best == tl.max(best, 0), best_ids, vocabulary), 0)
