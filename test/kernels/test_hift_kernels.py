"""Every kernel of the vocoder against PyTorch: on the GPU if available, else in the interpreter.

Sizes on the CPU are those of a tiny checkpoint; allowed errors are stated.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from light_tts.kernels import configs
from light_tts.kernels.vocoder import causal_source
from light_tts.kernels.vocoder import conv as hift_conv
from light_tts.kernels.vocoder import mean as hift_mean
from light_tts.kernels.vocoder import source as hift_source
from light_tts.kernels.vocoder import spectrum as hift_spectrum
from light_tts.kernels.vocoder.conv import convolve
from light_tts.kernels.vocoder.conv_tiles import convolve_config, tile, tile_in_parts
from light_tts.kernels.vocoder.layout import (
    NO_SUMS,
    Active,
    Convolutions,
    Frames,
    Sums,
    Taps,
    repeated,
    transposed,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOICING = hift_source.Voicing(24000, 480, 0.1, 0.003, 10.0)


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def integers(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def make_conv(
    taps: list[Taps], wide: int, narrow: int, dtype: torch.dtype = torch.float32, **options: object
) -> Convolutions:
    weights = [
        numbers(tap.taps, wide, narrow, seed=seed, scale=(tap.taps * wide) ** -0.5).to(dtype)
        for seed, tap in enumerate(taps)
    ]
    return Convolutions(weights, numbers(len(taps), narrow, seed=9), taps, **options)


def compare(conv, x, level_in, level_out, out, active, sums=NO_SUMS, atol=2e-5, **options) -> None:
    """Run both from the same start; elements that neither writes are -7."""
    results = []
    for function in (convolve, hift_conv.convolve_reference):
        own_sums, plain = sums, None
        if out is not None:
            plain = torch.full_like(out, -7.0)
            if sums.residual is out:  # in place
                plain = out.clone()
                own_sums = Sums(plain, sums.addend)
        own = None
        if active is not None:
            own = Active(active.kind, torch.full_like(active.out, -7.0), active.alpha, active.slope)
        own_options = options if function is convolve else {k: v for k, v in options.items() if k != "config"}
        function(conv, x, level_in, level_out, plain, own, own_sums, **own_options)
        results.append([tensor for tensor in (plain, own and own.out) if tensor is not None])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), atol=atol, rtol=atol)


def test_parallel_blocks_with_dilation_residual_and_snakes():
    taps = [Taps(kernel, d, d * (kernel - 1) // 2) for kernel, d in ((11, 5), (7, 3), (3, 1))]
    for wide in (4, 20):
        conv = make_conv(taps, wide, wide, exact=True)
        level = Frames(integers(9, 0, 14, 1), 5, 1)
        residual = numbers(3, 4, 71, wide, seed=2)
        active = Active("snake", numbers(3, 4, 71, wide), alpha=numbers(3, wide, seed=3).abs() + 0.3)
        x, config = numbers(3, 4, 71, wide, seed=1), tile_in_parts(32, 32, 3)
        compare(conv, x, level, level, residual, active, Sums(residual), config=config)


def test_one_block_with_addend_makes_several_activations():
    conv = make_conv([Taps(7, 1, 3)], 16, 16, exact=True)
    level = Frames(integers(30, 17))
    out, x = numbers(1, 2, 40, 16), numbers(1, 2, 40, 16, seed=1)
    active = Active("snake", numbers(3, 2, 40, 16), alpha=numbers(3, 16, seed=3).abs() + 0.3)
    compare(conv, x, level, level, out, active, Sums(numbers(1, 2, 40, 16, seed=4), numbers(1, 2, 40, 16)))


@pytest.mark.parametrize("kind", ["leaky_relu", "elu", "abs"])
def test_activations(kind):
    conv = make_conv([Taps(3, 1, 1)], 20, 18, exact=True)
    level = Frames(integers(33))
    compare(conv, numbers(1, 1, 33, 20), level, level, None, Active(kind, numbers(1, 1, 33, 18), slope=0.1))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(16, 8), (11, 5), (7, 3)])
def test_transposed_convolution(kernel, stride, mirror):
    wide, narrow, lengths = 12, 8, [10, 3, 0]
    padding, extra = (kernel - stride) // 2, int(mirror)
    weight = numbers(wide, narrow, kernel, seed=1, scale=0.2)
    bias = numbers(narrow, seed=2)
    conv = transposed(weight, bias, stride, padding, shift=extra, exact=True)
    x = numbers(1, 3, 10, wide, seed=3)
    capacity = 10 * stride + extra
    out = torch.full((1, 3, capacity, narrow), -7.0, device=DEVICE)
    lengths_there = integers(*lengths)
    convolve(conv, x, Frames(lengths_there), Frames(lengths_there, stride, extra), out, mirror=mirror)
    for row, length in enumerate(lengths):
        if length:
            expected = torch.nn.functional.conv_transpose1d(
                x[0, row, :length].T[None], weight, bias, stride, padding
            )
            expected = torch.nn.functional.pad(expected, (extra, 0), mode="reflect")[0].T
            torch.testing.assert_close(out[0, row, : len(expected)], expected, atol=2e-5, rtol=1e-5)
        assert (out[0, row, length * stride + extra * bool(length) :] == -7.0).all()
    compare(conv, x, Frames(lengths_there), Frames(lengths_there, stride, extra), out, None, mirror=mirror)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("kernel", "rate"), [(16, 8), (7, 3), (3, 4), (1, 2)])
def test_causal_convolution_of_repeated_frames(kernel, rate, mirror):
    wide, narrow, lengths, extra = 12, 8, [7, 3, 0], int(mirror)
    weight, bias = numbers(narrow, wide, kernel, seed=1, scale=0.2), numbers(narrow, seed=2)
    conv = repeated(weight, bias, rate, shift=extra, exact=True)
    x = numbers(1, 3, 10, wide, seed=3)
    out = torch.full((1, 3, 10 * rate + extra, narrow), -7.0, device=DEVICE)
    levels = Frames(integers(*lengths)), Frames(integers(*lengths), rate, extra)
    convolve(conv, x, *levels, out, mirror=mirror)
    for row, length in enumerate(lengths):
        if length:
            frames = x[0, row, :length].T[None].repeat_interleave(rate, dim=2)
            padded = torch.nn.functional.pad(frames, (kernel - 1, 0))
            expected = torch.nn.functional.conv1d(padded, weight, bias)
            expected = torch.nn.functional.pad(expected, (extra, 0), mode="reflect")[0].T
            torch.testing.assert_close(out[0, row, : len(expected)], expected, atol=2e-5, rtol=1e-5)
        assert (out[0, row, length * rate + extra * bool(length) :] == -7.0).all()
    compare(conv, x, *levels, out, None, mirror=mirror)


def test_more_frames_are_read_than_written():
    conv = make_conv([Taps(5)], 20, 18, exact=True)
    x = numbers(1, 4, 12, 20)
    x[0, :, 9:] = float("nan")
    compare(conv, x, Frames(integers(9, 7, 4, 3)), Frames(integers(5, 7, 0, 3)), numbers(1, 4, 12, 18), None)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(30, 15, 7), (6, 3, 1), (1, 1, 0)])
def test_strided_convolution(kernel, stride, padding):
    conv = make_conv([Taps(kernel, 1, padding)], 32, 8, in_stride=stride, exact=True)
    lengths = integers(4, 2)
    x = numbers(1, 2, 121, 32)
    out = numbers(1, 2, 121 // stride + 1, 8)
    extra = int(stride == 1)
    compare(conv, x, Frames(lengths, 30, 1), Frames(lengths, 30 // stride, extra), out, None)


def test_float16_frames_saturate_and_are_summed_in_float32():
    taps = [Taps(11, 3, 15), Taps(3, 3, 3)]
    conv = make_conv(taps, 64, 32, dtype=torch.float16)
    level = Frames(integers(70, 20))
    x = numbers(2, 2, 70, 64, seed=1).half()
    active = Active("snake", numbers(2, 2, 70, 32).half(), alpha=numbers(2, 32, seed=3).abs() + 0.3)
    residual = numbers(1, 2, 70, 32)
    compare(conv, x, level, level, numbers(2, 2, 70, 32), active, Sums(residual), atol=1e-3)
    convolve(conv, x, level, level, None, active, Sums(residual * 1e6))
    assert active.out[:, :, :20].abs().max() == 65504.0


def test_results_do_not_depend_on_neighbours_nor_on_the_tile():
    conv = make_conv([Taps(7, 3, 9)], 64, 64, dtype=torch.float16)
    x = numbers(1, 3, 150, 64).half()
    level = Frames(integers(40, 150, 0))
    many = torch.zeros(1, 3, 150, 64, device=DEVICE)
    convolve(conv, x, level, level, many)
    one = torch.zeros(1, 1, 64, 64, device=DEVICE)
    own = Frames(integers(40))
    convolve(conv, x[:, :1, :64].contiguous(), own, own, one)
    assert torch.equal(one[0, 0, :40], many[0, 0, :40])
    other = torch.zeros_like(many)
    convolve(
        conv,
        x,
        level,
        level,
        other,
        config=tile(128, 64, 4, 3),
    )
    torch.testing.assert_close(other, many, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("wide", "narrow"), [(72, 40), (16, 1)])
def test_sums_in_parts_are_the_same_with_every_tile(wide, narrow):
    conv = make_conv([Taps(9, 2, 8), Taps(3, 1, 1)], wide, narrow, exact=True)
    assert conv.parts == 8
    level, x = Frames(integers(33, 0, 7)), numbers(2, 3, 40, wide, seed=1)
    compare(conv, x, level, level, numbers(2, 3, 40, narrow), None, config=tile_in_parts(64, 32, 4))
    found = []
    for config in (tile_in_parts(*size) for size in ((16, 16, 4), (32, 32, 3), (32, 64, 3), (64, 32, 4))):
        found.append(numbers(2, 3, 40, narrow))
        convolve(conv, x, level, level, found[-1], config=config)
    for other in found[1:]:
        if DEVICE.type == "cuda":
            assert torch.equal(other, found[0])
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-6)


def test_tiles_are_small_for_few_frames_unless_others_were_measured(monkeypatch):
    monkeypatch.setattr(configs, "load", lambda device: {})
    pitch, narrow = make_conv([Taps(3)], 512, 512, exact=True), make_conv([Taps(7)], 64, 18, exact=True)
    found = [convolve_config(pitch, rows, NO_SUMS) for rows in (48, 96, 256, 8192)]
    assert found == [tile_in_parts(*size, 4) for size in ((16, 16), (16, 32), (32, 32), (32, 64))]
    assert convolve_config(narrow, 11521, NO_SUMS) == tile_in_parts(64, 32, 4)
    blocks = make_conv([Taps(3)], 256, 256, dtype=torch.float16)
    found = [convolve_config(blocks, rows, NO_SUMS) for rows in (608, 2000, 6400, 30000)]
    assert found == [tile(64, 32, 4, 5), tile(64, 64, 4, 5), tile(64, 64, 4, 3), tile(128, 128, 8, 3)]
    entries = [{"rows": 96, **tile_in_parts(32, 32, 3)}]
    monkeypatch.setattr(configs, "load", lambda device: {"convolve_float32_512x512x1": entries})
    assert convolve_config(pitch, 48, NO_SUMS) == tile_in_parts(32, 32, 3)
    assert convolve_config(pitch, 97, NO_SUMS) == tile_in_parts(16, 32, 4)


def test_mean_leaky_relu():
    x, out = numbers(3, 2, 77, 8), torch.zeros(2, 77, 8, device=DEVICE)
    expected = torch.zeros_like(out)
    hift_mean.mean_leaky_relu(x, 0.1, out)
    hift_mean.mean_leaky_relu_reference(x, 0.1, expected)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


def test_phase():
    f0 = (numbers(3, 70).abs() * 300).round(decimals=1)
    lengths = integers(70, 33, 0)
    out = torch.full((3, 70, 9), -7.0, device=DEVICE)
    expected = torch.full((3, 70, 9), -7.0)
    hift_source.source_phase(f0, lengths, VOICING, out)
    # on the CPU: there PyTorch rounds divisions as the kernel does
    hift_source.source_phase_reference(f0.cpu(), lengths.cpu(), VOICING, expected)
    # the same roundings; that of the float64 sum may differ by one step of float32 in rare cases
    torch.testing.assert_close(out.cpu(), expected, atol=0, rtol=2e-7)


def test_samples():
    lengths = integers(5, 2, 0, 5)
    f0 = (numbers(4, 5).abs() * 300) * (numbers(4, 5, seed=1) > -0.5)
    phase = torch.zeros(4, 5, 9, device=DEVICE)
    hift_source.source_phase(f0, lengths, VOICING, phase)
    big = {"dtype": torch.int64}
    draws = hift_source.Draws(
        integers(-1, 2**63 - 1, 5, 12345678901, **big),
        integers(3 << 32, (3 << 32) + 7, 1, 3 << 32, **big),
        integers(0, 2**33 + 5, 0, 99 * 480, **big),
        integers(1, 1, 1, 0, **big),
    )
    cached = hift_source.Cached(numbers(4, 1000), integers(0, 1000, 0, 480, **big))
    mix = numbers(9, seed=4), numbers(1, seed=5)

    def error(f0: torch.Tensor) -> float:
        out = torch.full((4, 2400), -7.0, device=DEVICE)
        expected = torch.full((4, 2400), -7.0)
        hift_source.source_samples(f0, phase, lengths, *mix, VOICING, draws, cached, out)
        hift_source.source_samples_reference(
            *(tensor.cpu() for tensor in (f0, phase, lengths, *mix)),
            VOICING,
            hift_source.Draws(*(tensor.cpu() for tensor in dataclasses.astuple(draws))),
            hift_source.Cached(cached.source.cpu(), cached.count.cpu()),
            expected,
        )
        return float((out.cpu() - expected).abs().max())

    # interpolated phases of some thousands may differ in the last bit (5e-4); what is not a sine does not
    assert error(f0) < 1e-4
    assert error(torch.zeros_like(f0)) < 5e-7


def test_continued_source():
    f0 = (numbers(5, 70).abs() * 300).round(decimals=1) * (numbers(5, 70, seed=1) > -0.5)
    span = causal_source.Span(integers(0, 33, 0, 5, 40), integers(3, 70, 0, 5, 44))
    before = numbers(5, 9, seed=2).abs().double() * 40
    before[0] = 0.0
    big = {"dtype": torch.int64}
    draws = hift_source.Draws(
        integers(-1, 2**63 - 1, 5, 6, 12345678901, **big),
        integers(3 << 32, (3 << 32) + 7, 1, 2, 3 << 32, **big),
        integers(0, 2**33 + 5, 0, 0, 99 * 480, **big),
        integers(1, 1, 1, 1, 0, **big),
    )
    mix = numbers(9, seed=4), numbers(1, seed=5)

    def results(on: str | torch.device, phases: object, samples: object) -> list[torch.Tensor]:
        own_span = causal_source.Span(span.begin.to(on), span.end.to(on))
        phase, after = torch.full((5, 70, 9), -7.0, device=on), torch.full((5, 9), -7.0, device=on).double()
        phases(f0.to(on), own_span, before.to(on), VOICING, phase, after)
        own_draws = hift_source.Draws(*(tensor.to(on) for tensor in dataclasses.astuple(draws)))
        out = torch.full((5, 70 * 480), -7.0, device=on)
        samples(f0.to(on), phase, own_span, *(part.to(on) for part in mix), VOICING, own_draws, out)
        return [tensor.cpu() for tensor in (phase, after, out)]

    phase, after, out = results(DEVICE, causal_source.causal_phase, causal_source.causal_samples)
    # on the CPU: there PyTorch rounds divisions as the kernel does
    expected = results("cpu", causal_source.causal_phase_reference, causal_source.causal_samples_reference)
    torch.testing.assert_close(phase, expected[0], atol=0, rtol=2e-7)
    torch.testing.assert_close(after, expected[1], atol=0, rtol=1e-12)
    torch.testing.assert_close(out, expected[2], atol=2e-6, rtol=0)
    assert torch.equal(out == -7.0, expected[2] == -7.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stft(dtype):
    transform = hift_spectrum.Transform.of(16, 4, 120, DEVICE)
    signal, lengths = numbers(3, 3 * 480), integers(3, 1, 0)
    out = torch.full((3, 361, 18), -7.0, device=DEVICE, dtype=dtype)
    expected = out.clone()
    hift_spectrum.stft(signal, lengths, transform, out)
    hift_spectrum.stft_reference(signal, lengths, transform, expected)
    atol = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out, expected, atol=atol, rtol=0)
    window = torch.hann_window(16, device=DEVICE)
    there = torch.stft(signal[0], 16, 4, window=window, return_complex=True)
    torch.testing.assert_close(out[0].float(), torch.cat([there.real, there.imag]).T, atol=atol, rtol=0)


def test_istft():
    transform = hift_spectrum.Transform.of(16, 4, 120, DEVICE)
    x, lengths = numbers(3, 361, 18, scale=0.5), integers(3, 1, 0)
    x[0, :2] = 40.0  # beyond the largest magnitude
    out = torch.full((3, 1440), -7.0, device=DEVICE)
    expected = out.clone()
    hift_spectrum.istft(x, lengths, transform, 0.99, out)
    hift_spectrum.istft_reference(x, lengths, transform, 0.99, expected)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
    assert (out[0].abs() == 0.99).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("width", "rate"), [(256, 8), (128, 40), (64, 120)])
def test_full_size_blocks(width, rate):
    taps = [Taps(kernel, 3, 3 * (kernel - 1) // 2) for kernel in (11, 7, 3)]
    extra = int(rate == 120)
    capacity = 64 * rate + extra
    level = Frames(integers(*[64, 17, 50, 1] * 4), rate, extra)
    x = numbers(3, 16, capacity, width, seed=1)
    residual = numbers(3, 16, capacity, width, seed=2)
    alpha = numbers(3, width, seed=3).abs() + 0.3
    for dtype, atol in ((torch.float16, 4e-3), (torch.float32, 1e-2)):
        conv = make_conv(taps, width, width, dtype=dtype)
        active = Active("snake", numbers(3, 16, capacity, width).to(dtype), alpha=alpha)
        compare(conv, x.to(dtype), level, level, residual, active, Sums(residual), atol=atol)
    conv = make_conv(taps, width, width, exact=True)
    compare(conv, x, level, level, residual, None, Sums(residual), atol=2e-5)
