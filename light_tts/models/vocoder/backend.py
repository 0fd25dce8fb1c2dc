"""Selects the implementation of a vocoder: PyTorch, or for `Hift` on a GPU kernels in CUDA graphs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.causal_stream import TorchCausalVocoder
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.interface import CausalVocoder, Vocoder
from light_tts.models.vocoder.plain import TorchVocoder


def choose_vocoder(hift: Hift, cached_samples: int, cuda_graphs: bool = True) -> Callable[[], Vocoder]:
    """Return a factory for the fastest vocoder on the device of `hift`. It creates one per CUDA stream; they
    share their weights. cached_samples: maximum length of a cached source; cuda_graphs: record the kernels of
    each size, see GraphCache."""
    device = next(hift.parameters()).device
    if device.type != "cuda" or importlib.util.find_spec("triton") is None or hift.n_fft != 4 * hift.hop:
        return lambda: TorchVocoder(hift)
    from light_tts.models.vocoder.network import HiftNetwork
    from light_tts.models.vocoder.runner import HiftRunner

    network = HiftNetwork(hift)
    return lambda: HiftRunner(network, cached_samples, cuda_graphs)


def choose_causal_vocoder(hift: CausalHift) -> Callable[[], CausalVocoder]:
    """Return a factory for the fastest vocoder on the device of `hift`. It creates one per CUDA stream; they
    share their weights."""
    batched = next(hift.parameters()).device.type == "cuda"
    return lambda: TorchCausalVocoder(hift, batched)
