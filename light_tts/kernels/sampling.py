"""The draw of light_tts/common/sampling.py for each request of a batch, and what it changes in their state,
as one kernel."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.common import sampling
from light_tts.common.random import Purpose
from light_tts.common.row_state import SPECIAL_IDS, RowState
from light_tts.kernels.random import gumbel, gumbel_estimate


def sample(
    logits: Tensor,
    state: RowState,
    rows: Tensor,
    out: Tensor,
    lines: Tensor | None,
    text_vocab: int,
    speech_tokens: int,
    top_p: float,
    top_k: int,
    win_size: int,
    tau_r: float,
    greedy: bool = False,
) -> None:
    """Draws the next speech id of the requests in `rows`, writes it to `out`, and brings next_id, step and
    history up to date. What may be drawn: see `sampling.RepetitionAwareSampler`, without the special ids that
    the state bans; with `greedy` the most probable id.

    logits: (batch, speech ids) of any float dtype; rows: (batch,) int32, all different, negative: -1 to `out`
    and nothing else; out: (any, batch) int32; lines: (batch,) int64, the line of `out` for each request,
    counted up here; None: the first; text_vocab, speech_tokens: see `SpeechIds`"""
    batch, vocabulary = logits.shape
    block = triton.next_power_of_2(vocabulary)
    _sample_kernel[(batch,)](
        logits,
        state.next_id,
        state.seed,
        state.part,
        state.step,
        state.min_outputs,
        state.banned,
        state.history,
        rows,
        out,
        lines,
        vocabulary,
        text_vocab,
        speech_tokens,
        top_p,
        min(top_k, vocabulary),
        win_size,
        math.ceil(win_size * tau_r),
        SPECIAL_IDS=SPECIAL_IDS,
        WINDOW=state.history.shape[1],
        WINDOW_BLOCK=triton.next_power_of_2(state.history.shape[1]),
        BLOCK=block,
        ID_BITS=block.bit_length() - 1,
        NUCLEUS=triton.next_power_of_2(top_k),
        NUCLEUS_STREAM=int(Purpose.NUCLEUS) << 32,
        FALLBACK_STREAM=int(Purpose.FALLBACK) << 32,
        GREEDY=greedy,
        num_warps=8,
    )


def sample_reference(
    logits: Tensor,
    state: RowState,
    rows: Tensor,
    out: Tensor,
    lines: Tensor | None,
    text_vocab: int,
    speech_tokens: int,
    top_p: float,
    top_k: int,
    win_size: int,
    tau_r: float,
    greedy: bool = False,
) -> None:
    live = rows >= 0
    index = rows[live].long()
    banned = state.banned[index].bool()
    banned[:, 0] |= state.step[index] < state.min_outputs[index]
    scores = sampling.ban(logits[live].float(), speech_tokens, banned)
    history, steps = state.history[index].long(), state.step[index].long()
    if greedy:
        drawn = sampling.greedy(scores)
    else:
        sampler = sampling.RepetitionAwareSampler(top_p, top_k, win_size, tau_r)
        drawn = sampler(scores, history[:, -win_size:], state.seed[index], state.part[index], steps)
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
    banned_ptr,
    history_ptr,
    rows_ptr,
    out_ptr,
    lines_ptr,
    vocabulary,
    text_vocab,
    speech_tokens,
    top_p,
    top_k,
    win_size,
    most_repeats,
    SPECIAL_IDS: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    ID_BITS: tl.constexpr,
    NUCLEUS: tl.constexpr,
    NUCLEUS_STREAM: tl.constexpr,
    FALLBACK_STREAM: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """One program a request. `BLOCK` = 2^ID_BITS: the vocabulary rounded up; `NUCLEUS`: top_k rounded up;
    `most_repeats`: an id seen as often is drawn again."""
    request = tl.program_id(0)
    if lines_ptr is not None:
        line = tl.load(lines_ptr + request)
        out_ptr += line * tl.num_programs(0)
        tl.debug_barrier()  # every thread has read the line
        tl.store(lines_ptr + request, line + 1)
    row = tl.load(rows_ptr + request).to(tl.int64)
    if row >= 0:
        step = tl.load(step_ptr + row)
        seed = tl.load(seed_ptr + row)
        part = tl.load(part_ptr + row)
        latest_ptr = history_ptr + row * WINDOW + tl.arange(0, WINDOW_BLOCK)
        age = WINDOW - 1 - tl.arange(0, WINDOW_BLOCK)  # 0: the newest
        latest = tl.load(latest_ptr, mask=age >= 0, other=-1)
        later = tl.load(latest_ptr + 1, mask=age >= 1, other=-1)

        ids = tl.arange(0, BLOCK)
        banned = (ids == speech_tokens) & (step < tl.load(min_outputs_ptr + row))
        for i in tl.static_range(SPECIAL_IDS):
            is_banned = tl.load(banned_ptr + row * SPECIAL_IDS + i) != 0
            banned = banned | ((ids == speech_tokens + i) & is_banned)
        scores = tl.load(
            logits_ptr + request.to(tl.int64) * vocabulary + ids, mask=ids < vocabulary, other=float("-inf")
        )
        scores = tl.where(banned, float("-inf"), scores.to(tl.float32))

        if GREEDY:
            drawn = tl.argmax(scores, 0)
        else:
            counter = step.to(tl.int64) * vocabulary
            best, log_probs = _nucleus(scores, top_p, top_k, BLOCK, ID_BITS, NUCLEUS)
            noise = gumbel(seed, part + NUCLEUS_STREAM, counter + best)
            chosen = tl.argmax(log_probs + noise, 0)
            drawn = tl.sum(tl.where(tl.arange(0, NUCLEUS) == chosen, best, 0), 0)
            seen = (latest == drawn) & (age < win_size)
            if tl.sum(seen.to(tl.int32), 0) >= most_repeats:
                others = tl.where(ids == drawn, float("-inf"), scores)
                stream = part + FALLBACK_STREAM
                estimate = others + gumbel_estimate(seed, stream, counter + ids)
                most = tl.max(estimate, 0)
                near = estimate >= most - (1e-3 + 1e-6 * tl.abs(most))
                if tl.sum(near.to(tl.int32), 0) == 1:
                    drawn = tl.sum(tl.where(near, ids, 0), 0)
                else:
                    drawn = tl.argmax(others + gumbel(seed, stream, counter + ids), 0)
        drawn = tl.minimum(drawn, vocabulary - 1)  # NaN must not lead outside the embedding

        tl.debug_barrier()  # every thread has read the state
        tl.store(out_ptr + request, drawn)
        tl.store(next_id_ptr + row, text_vocab + drawn)
        tl.store(step_ptr + row, step + 1)
        tl.store(latest_ptr, tl.where(age == 0, drawn, later), mask=age >= 0)
    else:
        tl.store(out_ptr + request, -1)


@triton.jit
def _nucleus(scores, top_p, top_k, BLOCK: tl.constexpr, ID_BITS: tl.constexpr, NUCLEUS: tl.constexpr):
    """-> ids and log-probabilities, (NUCLEUS,) each, most probable first, the lower id first where they are
    equal; the log-probability is -inf behind the nucleus."""
    ids = tl.arange(0, BLOCK)
    shifted = scores - tl.max(scores, 0)
    total = tl.sum(tl.exp(shifted), 0)
    log_probs = shifted - tl.log(total.to(tl.float64)).to(tl.float32)
    # One integer that sorts by log-probability, then by falling id: repeated maxima need no second look-up.
    keys = (_ordered(log_probs.to(tl.int32, bitcast=True)).to(tl.int64) << ID_BITS) | (BLOCK - 1 - ids)

    place = tl.arange(0, NUCLEUS)
    best = tl.zeros([NUCLEUS], tl.int32)
    best_log_probs = tl.full([NUCLEUS], float("-inf"), tl.float32)
    mass = 0.0
    found = 0
    while (found < top_k) & (mass < top_p):
        key = tl.max(keys, 0)
        keys = tl.where(keys == key, -(1 << 63), keys)
        log_prob = _ordered((key >> ID_BITS).to(tl.int32)).to(tl.float32, bitcast=True)
        best = tl.where(place == found, (BLOCK - 1 - (key & (BLOCK - 1))).to(tl.int32), best)
        best_log_probs = tl.where(place == found, log_prob, best_log_probs)
        mass += tl.exp(log_prob)
        found += 1
    return best, best_log_probs


@triton.jit
def _ordered(bits):
    """The bits of a float32 as an int32 that is ordered as the float is; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
