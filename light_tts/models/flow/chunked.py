"""The flow on a CPU, one item at a time; each chunk of a stream continues the previous one.

With the chunk mask, earlier frames do not depend on later ones. So the state that later chunks need is
cached, a chunk costs only its own frames, and requests with the same voice share the cost of its recording.
The sequence is always computed in units of one attention chunk, so the samples are bit-identical whether
state was cached or had to be recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from light_tts.common.cuda_graphs import GraphCache
from light_tts.models.checkpoint.config import MAX_FRAMES
from light_tts.models.flow.base import BaseFlow, TokenMemory
from light_tts.models.flow.cfm import fixed_noise
from light_tts.models.flow.chunk_estimator import ChunkEstimator, EstimatorMemory
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.memos import Memo, MemoLimit
from light_tts.models.flow.padded import PaddedFlow

SHORTEST_STREAM = 500  # frames: 10 s of prompt and speech


@dataclass
class ChunkMemory:
    """State after a number of full chunks. mel: their frames, (frames, mels)."""

    encoder: TokenMemory
    estimator: EstimatorMemory
    mel: Tensor

    @property
    def bytes(self) -> int:
        return self.estimator.bytes  # the rest is about one percent of it

    @property
    def tokens(self) -> int:
        return self.encoder.tokens

    def copy(self) -> ChunkMemory:
        """Return an independent copy to continue from."""
        return ChunkMemory(self.encoder, self.estimator.copy(), self.mel)


class SpokenItem:
    """Prompt and speech of one item as one sequence: `ids`, of which `tokens` are spoken. Raises ValueError
    if there is nothing to speak or too much."""

    def __init__(self, flow: BaseFlow, item: FlowItem) -> None:
        self.ids = torch.cat([torch.from_numpy(item.prompt).long(), torch.tensor(item.tokens).long()])
        self.ids = self.ids.clamp(min=0)
        self.tokens = len(self.ids) - (0 if item.finalize else flow.lookahead)
        self.frames = flow.ratio * self.tokens
        self.prompt_frames = flow.ratio * len(item.prompt)
        if self.frames <= self.prompt_frames:
            raise ValueError(
                f"flow: {len(item.tokens)} tokens leave nothing to speak (finalize: {item.finalize})"
            )
        if self.frames > MAX_FRAMES:
            raise ValueError(f"{self.frames} mel frames of prompt and speech exceed {MAX_FRAMES}")
        self._speaker = flow.speaker(item.embedding[None])
        self._prompt_mel = item.prompt_mel[: self.prompt_frames]

    def given(self, mu: Tensor, start: int) -> Tensor:
        """Return the estimator's input besides noise, (frames, 3 mels), for the encoder output of the frames
        from `start` on, (frames, mels)."""
        known = torch.zeros_like(mu)
        prompt = self._prompt_mel[start : start + len(mu)]
        known[: len(prompt)] = prompt
        return torch.cat([mu, self._speaker.expand(len(mu), -1), known], dim=1)


class ChunkFlow:
    """Backend for a CPU. `limit`: memory limit of the cached state; it and the models are shared by all
    instances. If a stream of SHORTEST_STREAM would exceed the limit, streams are computed from the beginning
    each time."""

    packed = False
    graphs: GraphCache | None = None

    def __init__(self, flow: BaseFlow, estimator: ChunkEstimator, limit: MemoLimit) -> None:
        self._flow = flow
        self._estimator = estimator
        self._limit = limit
        self._chunk = flow.chunk_size
        mels = flow.spk_embed_affine_layer.out_features
        self._noise = fixed_noise(mels, torch.device("cpu"))[0].T.contiguous()  # (MAX_FRAMES, mels)
        chunks_agree = flow.decoder.chunk_size == flow.ratio * self._chunk
        remembers = chunks_agree and SHORTEST_STREAM * estimator.frame_bytes <= limit.limit
        self._from_the_beginning = None if remembers else PaddedFlow(flow)

    def cached_frames(self, voice: Memo, stream: Memo) -> int:
        return 0

    def warm_up(self, items: int, first: bool = True) -> None:
        """Nothing to prepare."""

    @torch.inference_mode()
    def __call__(self, items: Sequence[FlowItem]) -> list[Tensor]:
        return [self._mel(item) for item in items]

    def _mel(self, item: FlowItem) -> Tensor:
        speech = SpokenItem(self._flow, item)
        if item.streaming and self._from_the_beginning is not None:
            return self._from_the_beginning([item])[0]
        mel = self._stream(speech, item) if item.streaming else self._whole(speech, item)
        if item.finalize:
            self._limit.put(item.stream_memo, None)
        return mel[speech.prompt_frames :]

    def _whole(self, speech: SpokenItem, item: FlowItem) -> Tensor:
        """Return the mel frames with full attention."""
        length = torch.tensor([len(speech.ids)])
        mu, _ = self._flow.condition(speech.ids[None], length, streaming=False, finalize=item.finalize)
        return self._estimator(self._noise[: speech.frames], speech.given(mu[0], 0))

    def _stream(self, speech: SpokenItem, item: FlowItem) -> Tensor:
        memory = item.stream_memo.content or self._voice(speech, item)
        self._go_on(speech, memory, speech.tokens)
        mel = memory.mel
        if memory.tokens < speech.tokens:  # the remainder is not a full chunk and may be extended
            mel = torch.cat([mel, self._advance(speech, memory, speech.tokens, commit=False)])
        self._limit.put(item.stream_memo, memory)
        return mel

    def _voice(self, speech: SpokenItem, item: FlowItem) -> ChunkMemory:
        """Return the state after the prompt's chunks, except those that see part of the speech."""
        memory = item.voice_memo.content
        if memory is None:
            mel = self._noise[:0]
            memory = ChunkMemory(self._flow.memory(), self._estimator.memory(), mel)
            self._go_on(speech, memory, len(item.prompt) - self._flow.lookahead)
        self._limit.put(item.voice_memo, memory)
        return memory.copy()

    def _go_on(self, speech: SpokenItem, memory: ChunkMemory, end: int) -> None:
        """Advance through all full chunks up to token `end`."""
        while memory.tokens + self._chunk <= end:
            mel = self._advance(speech, memory, memory.tokens + self._chunk, commit=True)
            memory.mel = torch.cat([memory.mel, mel])

    def _advance(self, speech: SpokenItem, memory: ChunkMemory, end: int, commit: bool) -> Tensor:
        """Return the mel frames of the next chunk, which ends with token `end`. `commit`: update the
        memory.
        """
        start = memory.tokens
        ids = speech.ids[start : end + self._flow.lookahead]
        mu, encoder = self._flow.extend(ids, end - start, memory.encoder)
        first, last = self._flow.ratio * start, self._flow.ratio * end
        given = speech.given(mu, first)
        mel = self._estimator(self._noise[first:last], given, memory.estimator, commit)
        if commit:
            memory.encoder = encoder
        return mel


def chunk_flow(flow: BaseFlow, limit: MemoLimit) -> ChunkFlow:
    """Return a ChunkFlow for a flow on the CPU in float32."""
    return ChunkFlow(flow, flow.chunk_estimator(), limit)
