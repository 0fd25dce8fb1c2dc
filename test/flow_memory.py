"""Prints the MiB that the flow needs beyond its weights to speak: flow_memory.py TOKENS STREAM"""

import resource
import sys

import torch
from support.server_process import CHECKPOINT

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.flow.flow import Flow

PROMPT = 50


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def speak(flow: Flow, tokens: int, streaming: bool) -> None:
    flow.inference(
        token=torch.zeros(1, tokens, dtype=torch.long),
        token_len=torch.tensor([tokens]),
        prompt_token=torch.zeros(1, PROMPT, dtype=torch.long),
        prompt_len=torch.tensor([PROMPT]),
        prompt_feat=torch.zeros(1, 2 * PROMPT, 80),
        embedding=torch.ones(1, 192),
        streaming=streaming,
        finalize=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    flow = Flow.from_checkpoint(CHECKPOINT, load_config(CHECKPOINT), torch.device("cpu"))
    speak(flow, 10, bool(int(sys.argv[2])))
    before = peak()
    speak(flow, int(sys.argv[1]), bool(int(sys.argv[2])))
    print(peak() - before)
