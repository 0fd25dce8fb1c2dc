"""Selects the implementation of a vocoder: PyTorch, or on a GPU kernels in CUDA graphs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.causal_stream import TorchCausalVocoder
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.interface import CausalVocoder, Vocoder
from light_tts.models.vocoder.plain import TorchVocoder
from light_tts.models.vocoder.spectrum import Transform


def choose_vocoder(hift: Hift, cached_samples: int, cuda_graphs: bool = True) -> Callable[[], Vocoder]:
    """Return a factory for the fastest vocoder on the device of `hift`. It creates one per CUDA stream; they
    share their weights. cached_samples: maximum length of a cached source; cuda_graphs: record the kernels of
    each size, see GraphCache."""
    if not _has_kernels(next(hift.parameters()).device, hift.transform):
        return lambda: TorchVocoder(hift)
    from light_tts.models.vocoder.network import HiftNetwork
    from light_tts.models.vocoder.runner import HiftRunner

    network = HiftNetwork(hift)
    return lambda: HiftRunner(network, cached_samples, cuda_graphs)


def choose_causal_vocoder(hift: CausalHift, cuda_graphs: bool = True) -> Callable[[], CausalVocoder]:
    """Return a factory for the fastest vocoder on the device of `hift`. It creates one per CUDA stream; they
    share their weights. cuda_graphs: see `choose_vocoder`."""
    device = next(hift.parameters()).device
    if not _has_kernels(device, hift.transform):
        return lambda: TorchCausalVocoder(hift, batched=device.type == "cuda")
    from light_tts.models.vocoder.causal_network import CausalNetwork
    from light_tts.models.vocoder.causal_runner import CausalRunner

    network = CausalNetwork(hift)
    return lambda: CausalRunner(network, cuda_graphs)


def _has_kernels(device: torch.device, transform: Transform) -> bool:
    windows_fit = transform.n_fft == 4 * transform.hop
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and windows_fit
