"""Every array of flow.npz: encoder, estimator, ODE, and the complete flow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from light_tts.models.family import load_family
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.cfm import fixed_noise, time_steps
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.encoder import relative_positions
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.masks import EstimatorMasks
from light_tts.tools.parity import Comparison, Golden

FILE = "flow.npz"


def _flow(golden: Golden) -> BaseFlow:
    return load_family(golden.checkpoint).read_flow()


def _length(tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor([tensor.shape[1]])


def speaker_and_embedding(golden: Golden) -> Iterator[Comparison]:
    flow, arrays = _flow(golden), golden.arrays(FILE)
    token = golden.tensor(FILE, "token").long()
    yield Comparison("spk_affine", flow.speaker(golden.tensor(FILE, "embedding")), arrays["spk_affine"], 1e-5)
    yield Comparison("input_embedding", flow.input_embedding(token), arrays["input_embedding"], 1e-5)


def encoder(golden: Golden) -> Iterator[Comparison]:
    flow, token = _flow(golden), golden.tensor(FILE, "token").long()
    if isinstance(flow, Flow):
        yield from _conformer(flow, token, golden)
    elif isinstance(flow, DiTFlow):
        yield from _lookahead(flow, token, golden)


def _lookahead(flow: DiTFlow, token: torch.Tensor, golden: Golden) -> Iterator[Comparison]:
    arrays, lengths = golden.arrays(FILE), _length(token)
    embedded = flow.input_embedding(token)
    for name, finalize in (("prelook_out", True), ("prelook_out_ctx", False)):
        out, _ = flow.pre_lookahead_layer.of_batch(embedded, lengths, finalize)
        yield Comparison(name, out, arrays[name], 1e-4)
    mu, _ = flow.condition(token, lengths, streaming=False, finalize=True)
    yield Comparison("mu", mu.transpose(1, 2), arrays["mu"], 1e-4)


def _conformer(flow: Flow, token: torch.Tensor, golden: Golden) -> Iterator[Comparison]:
    arrays, lengths = golden.arrays(FILE), _length(token)
    embedded = flow.encoder.embed(flow.input_embedding(token))
    yield Comparison("enc_embed_out", embedded, arrays["enc_embed_out"], 1e-4)
    for name in (name for name in arrays if name.startswith("pos_emb_")):
        size, width = int(name.removeprefix("pos_emb_")), arrays[name].shape[2]
        positions = relative_positions(size, width, torch.device("cpu"))[None]
        yield Comparison(name, positions, arrays[name], 1e-4)
    lookahead = flow.encoder.pre_lookahead_layer(embedded)
    yield Comparison("prelook_out", lookahead, arrays["prelook_out"], 1e-4)
    for mode, streaming in (("full", False), ("stream", True)):
        out, out_len = flow.encode(token, lengths, streaming, finalize=True)
        yield Comparison(f"enc_{mode}", out, arrays[f"enc_{mode}"], 1e-4)
        context, _ = flow.encode(token, lengths, streaming, finalize=False)
        yield Comparison(f"enc_{mode}_ctx", context, arrays[f"enc_{mode}_ctx"], 1e-4)
        if mode == "full":
            mask = torch.arange(out.shape[1]) < out_len[:, None]
            yield Comparison("enc_mask", mask.flatten(), arrays["enc_mask"].flatten())
            yield Comparison("mu", flow.encoder_proj(out).transpose(1, 2), arrays["mu"], 1e-4)


def estimator(golden: Golden) -> Iterator[Comparison]:
    flow, arrays = _flow(golden), golden.arrays(FILE)
    x, t = golden.tensor(FILE, "est_x"), golden.tensor(FILE, "est_t")
    conditions = [golden.tensor(FILE, name) for name in ("mu", "spk_affine", "est_cond")]
    mu, spks, cond = (torch.cat([value, torch.zeros_like(value)]) for value in conditions)
    x, t = x.expand(2, -1, -1), t.reshape(-1).expand(2)
    frames = x.shape[2]
    for mode, chunk in (("full", None), ("stream", flow.decoder.chunk_size)):
        masks = EstimatorMasks.build(torch.tensor([frames]), frames, chunk, torch.float32, copies=2)
        out = flow.decoder.estimator(x, masks, mu, t, spks, cond)
        yield Comparison(f"est_out_{mode}", out, arrays[f"est_out_{mode}"], 1e-4)


def flow_matching(golden: Golden) -> Iterator[Comparison]:
    flow, arrays = _flow(golden), golden.arrays(FILE)
    mu, spks, cond = (golden.tensor(FILE, name) for name in ("mu", "spk_affine", "est_cond"))
    noise = fixed_noise(mu.shape[1], torch.device("cpu"))
    yield Comparison("cfm_noise", noise[:, :, : mu.shape[2]], arrays["cfm_noise"])
    yield Comparison("t_span", time_steps(10), arrays["t_span"], 1e-6)
    first = arrays["rand_noise_first"]
    yield Comparison("rand_noise_first", noise[0, :, : first.shape[1]], first)
    sha = hashlib.sha256(noise.numpy().astype("<f4").tobytes()).hexdigest()
    yield Comparison("rand_noise_sha256_f32le", sha, str(arrays["rand_noise_sha256_f32le"]))
    for mode, streaming in (("full", False), ("stream", True)):
        mel = flow.decoder(mu, torch.tensor([mu.shape[2]]), spks, cond, streaming)
        yield Comparison(f"cfm_out_{mode}", mel, arrays[f"cfm_out_{mode}"], 1e-3)


def complete(golden: Golden) -> Iterator[Comparison]:
    flow, arrays = _flow(golden), golden.arrays(FILE)
    token, prompt = (golden.tensor(FILE, name).long() for name in ("token", "prompt_token"))
    feat, embedding = (golden.tensor(FILE, name) for name in ("prompt_feat", "embedding"))

    def mel(token: torch.Tensor, streaming: bool, finalize: bool) -> torch.Tensor:
        return flow.inference(
            token, _length(token), prompt, _length(prompt), feat, embedding, streaming, finalize
        )[0]

    yield Comparison("mel_full", mel(token, False, True), arrays["mel_full"], 1e-3)
    yield Comparison("mel_stream_final", mel(token, True, True), arrays["mel_stream_final"], 1e-3)
    yield Comparison("mel_stream_partial", mel(token, True, False), arrays["mel_stream_partial"], 1e-3)
    yield Comparison("mel_partial_nostream", mel(token, False, False), arrays["mel_partial_nostream"], 1e-3)
    for name in (name for name in arrays if name.startswith("mel_stream_prefix")):
        prefix = token[:, : int(name.removeprefix("mel_stream_prefix"))]
        yield Comparison(name, mel(prefix, True, False), arrays[name], 1e-3)


CHECKS = [speaker_and_embedding, encoder, estimator, flow_matching, complete]
