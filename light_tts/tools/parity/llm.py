"""The speech language model: a prefill, teacher forcing, greedy decoding in both modes, and the sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from light_tts.common.instructions import END_OF_PROMPT
from light_tts.common.sampling import NO_TOKEN, SamplingRules, greedy, nucleus, others, repeated
from light_tts.engine.llm.bistream import Bistream
from light_tts.engine.llm.engine import LLMEngine
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.options import EngineOptions
from light_tts.engine.llm.runner import Draw, Runner, TorchRunner
from light_tts.engine.llm.sequence import PartRequest, Sequence
from light_tts.models.llm.speech_lm import SpeechLM

from . import Comparison, Golden

FILE = "llm.npz"
RAS_ARRAYS = ("logp", "history", "nucleus_ids", "nucleus_probs", "resample", "resample_probs_if_top1")
SLOTS = 4096


def load_model(golden: Golden, device: str = "cpu") -> SpeechLM:
    # positional arguments, so that the cache key does not depend on how it was called
    return _load_model(golden, device)


@cache
def _load_model(golden: Golden, device: str) -> SpeechLM:
    path = golden.checkpoint / "llm.pt"
    return SpeechLM.from_checkpoint(golden.checkpoint, path, golden.config, torch.device(device))


def load_engine(
    golden: Golden,
    draw: Draw | None = None,
    device: str = "cpu",
    runner: Callable[..., Runner] | None = None,
    **options: Any,
) -> LLMEngine:
    """`draw`: replaces the sampler; by default each sequence's rule applies (greedy if it has none)."""
    options = {"slots": SLOTS, "rows": 8, **options}
    runner = runner if draw is None else partial(TorchRunner, draw=draw)
    sizes = EngineOptions(**{"max_len": options["slots"], **options})
    return LLMEngine(load_model(golden, device), sizes, runner)


def one_shot(golden: Golden, text_ids: list[int], **options: Any) -> OneShot:
    return OneShot(PartRequest("j/0", 0, 0, load_model(golden).ids, SLOTS, **options), text_ids)


def run(engine: LLMEngine, sequence: Sequence) -> None:
    """Run one step of a single sequence."""
    engine.launch([(sequence, sequence.pending)])
    engine.collect()


def finish(engine: LLMEngine, sequence: Sequence) -> list[int]:
    """Return all outputs of a single sequence."""
    while sequence.ready:
        run(engine, sequence)
    engine.release(sequence)
    return sequence.outputs


def golden_ids(arrays: dict[str, np.ndarray], name: str) -> list[int]:
    return arrays[name].ravel().tolist()


def prefill(golden: Golden) -> Iterator[Comparison]:
    arrays, model = golden.arrays(FILE), load_model(golden)
    sequence = one_shot(
        golden,
        golden_ids(arrays, "text_ids"),
        prompt_text=golden_ids(arrays, "prompt_text_ids"),
        prompt_speech=golden_ids(arrays, "prompt_speech_token"),
    )
    inputs, rows = list(sequence.inputs), []
    hook = model.llm.model.model.norm.register_forward_hook(
        lambda module, inputs, output: rows.append(output)
    )
    run(load_engine(golden), sequence)
    hook.remove()
    hidden, logits = rows[0], model.logits(rows[0])
    yield Comparison("lm_input", model.embed(torch.tensor(inputs))[None], arrays["lm_input"])
    yield Comparison("prefill_hidden_last", hidden[-1:], arrays["prefill_hidden_last"], 1e-4)
    yield Comparison("prefill_logits_last", logits[-1], arrays["prefill_logits_last"], 1e-4)
    yield Comparison("prefill_logits_argmax_all", greedy(logits), arrays["prefill_logits_argmax_all"])


def teacher_forcing(golden: Golden) -> Iterator[Comparison]:
    arrays = golden.arrays(FILE)
    tokens = golden_ids(arrays, "tf_tokens")
    rows = []
    sequence = one_shot(
        golden,
        golden_ids(arrays, "text_ids"),
        prompt_text=golden_ids(arrays, "prompt_text_ids"),
        prompt_speech=golden_ids(arrays, "prompt_speech_token"),
        min_outputs=0,
        max_outputs=len(tokens),
    )

    def forced(scores: Tensor, *_: object) -> Tensor:
        rows.append(scores[0].log_softmax(-1))
        return torch.tensor([tokens[len(rows) - 1]])

    finish(load_engine(golden, forced), sequence)
    log_probs = torch.stack(rows)
    top, ids = log_probs.topk(arrays["tf_top5_ids"].shape[1])
    of_token = log_probs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    first = arrays["tf_logprob_full_first8"]
    yield Comparison("tf_logprob_of_token", of_token, arrays["tf_logprob_of_token"], 1e-4)
    yield Comparison("tf_logprob_full_first8", log_probs[: len(first)], first, 1e-4)
    yield Comparison("tf_top5_ids", ids, arrays["tf_top5_ids"])
    yield Comparison("tf_top5_logprob", top, arrays["tf_top5_logprob"], 1e-4)


def greedy_decoding(golden: Golden) -> Iterator[Comparison]:
    arrays, engine = golden.arrays(FILE), load_engine(golden)
    for name in ("zs", "noprompt"):
        sequence = greedy_sequence(golden, name)
        limits = [sequence.min_outputs, sequence.max_outputs]
        yield Comparison(f"greedy_{name}_minmax_len", limits, arrays[f"greedy_{name}_minmax_len"])
        yield Comparison(f"greedy_{name}", finish(engine, sequence), arrays[f"greedy_{name}"])


def greedy_sequence(golden: Golden, name: str, **options: Any) -> OneShot:
    arrays = golden.arrays(FILE)
    prompt_speech = golden_ids(arrays, "prompt_speech_token") if name == "zs" else []
    prompt_text = golden_ids(arrays, f"greedy_{name}_prompt_text_ids")
    text = golden_ids(arrays, "text_ids")
    return one_shot(golden, text, prompt_text=prompt_text, prompt_speech=prompt_speech, **options)


def bistream_decoding(golden: Golden) -> Iterator[Comparison]:
    arrays = golden.arrays(FILE)
    for name in ("zs", "noprompt"):
        if f"bi_{name}_tokens" not in arrays:
            continue
        sequence, engine = (
            bistream_sequence(golden, name),
            load_engine(golden, bistream_sampler(golden, name)),
        )
        for text_id in golden_ids(arrays, "bi_text_ids"):
            sequence.append_text([text_id])
        sequence.finish_text()
        lengths = []
        while sequence.ready:
            lengths.append(sequence.pending)
            run(engine, sequence)
        spoken = [token for token in sequence.outputs if token < golden.config.llm.speech_token_size]
        yield Comparison(f"bi_{name}_lm_inputs_len", lengths, arrays[f"bi_{name}_lm_inputs_len"])
        yield Comparison(f"bi_{name}_tokens", spoken, arrays[f"bi_{name}_tokens"])


def bistream_sequence(golden: Golden, name: str) -> Bistream:
    arrays, config = golden.arrays(FILE), golden.config.llm
    prompt_text = golden_ids(arrays, f"bi_{name}_prompt_text_ids")
    part = PartRequest(
        job="j/0",
        part=0,
        seed=0,
        ids=load_model(golden).ids,
        limit=SLOTS,
        prompt_text=prompt_text,
        prompt_speech=golden_ids(arrays, f"bi_{name}_prompt_speech_token"),
        leading=leading_ids(golden, prompt_text),
    )
    return Bistream(part, config.mix_ratio)


def leading_ids(golden: Golden, prompt_text: list[int]) -> int:
    """Return the number of ids up to the end of the instruction in a prompt's text; 0 if it has none."""
    arrays = golden.arrays("tokenizer.npz")
    end = arrays["special_ids"][arrays["special_tokens"] == END_OF_PROMPT].item()
    return prompt_text.index(end) + 1 if end in prompt_text else 0


def bistream_sampler(golden: Golden, name: str) -> Draw:
    """Greedy over speech ids alone; ends once there are `limit` outputs and the text has ended."""
    limit = int(golden.arrays(FILE)[f"bi_{name}_limit"])
    size, eos = golden.config.llm.speech_token_size, load_model(golden).ids.eos

    def sample(
        scores: Tensor, rules: SamplingRules, history: Tensor, seeds: Tensor, parts: Tensor, steps: Tensor
    ) -> Tensor:
        may_end = (scores[:, eos] > -torch.inf) & (steps >= limit)
        return torch.where(may_end, eos, greedy(scores[:, :size]))

    return sample


def special_ids(golden: Golden) -> Iterator[Comparison]:
    arrays, ids = golden.arrays(FILE), load_model(golden).ids
    # sos and task: as rows of the table they are in
    table = ids.sos if ids.table_of_marks else ids.text_vocab
    marks = [ids.sos - table, ids.eos, ids.task - table, ids.fill]
    yield Comparison("ids_sos_eos_task_fill", marks, arrays["ids_sos_eos_task_fill"])
    yield Comparison("stop_token_ids", list(ids.stop), arrays["stop_token_ids"])


def official_sampling(golden: Golden) -> Iterator[Comparison]:
    arrays, config = golden.arrays("ras.npz"), golden.config.llm.sampling
    rules = SamplingRules.of([config])
    for i in range(int(arrays["n_cases"])):
        case = {
            name.removeprefix(f"c{i}_"): value for name, value in arrays.items() if name.startswith(f"c{i}_")
        }
        scores = torch.from_numpy(case["logp"])[None]
        ids, log_probs = nucleus(scores, rules.top_p, rules.top_k)
        ids = ids[log_probs > -torch.inf]
        probs = log_probs.softmax(-1)[log_probs > -torch.inf]
        latest = case["history"][-config.win_size :].tolist()
        history = torch.tensor([[NO_TOKEN] * (config.win_size - len(latest)) + latest]).expand(len(ids), -1)
        other = others(scores, ids[None, :1]).softmax(-1)[0]
        yield Comparison(f"ras_c{i}_nucleus_ids", ids, case["nucleus_ids"])
        yield Comparison(f"ras_c{i}_nucleus_probs", probs, case["nucleus_probs"], 1e-6)
        again = repeated(ids[:, None], history, rules)
        yield Comparison(f"ras_c{i}_resample", again, case["resample"])
        yield Comparison(f"ras_c{i}_resample_probs_if_top1", other, case["resample_probs_if_top1"], 1e-6)


CHECKS = [prefill, teacher_forcing, greedy_decoding, bistream_decoding, special_ids, official_sampling]
