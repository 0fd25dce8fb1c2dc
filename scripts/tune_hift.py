#!/usr/bin/env python3
"""Measures tiles of the vocoder's convolutions on this machine's GPU, for one item of few frames, and writes
the fastest to light_tts/kernels/configs/, where the kernels find them. Takes about a minute:

    python scripts/tune_hift.py [--frames 76 160] [--output FILE]

A convolution's time is that of all launches of its shape in one run of the vocoder (CosyVoice2-0.5B with
random weights), back to back in a CUDA graph. A tile that changes a single bit of the result is refused,
because the samples of an item must not depend on the size of its batch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_hift import CACHED, batch_of, full_size
from torch import Tensor
from tune_flow import microseconds

from light_tts.kernels import configs
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.launch import Config
from light_tts.kernels.vocoder import conv as kernel
from light_tts.kernels.vocoder.conv_tiles import convolve_config, tile, tile_in_parts, usual_config
from light_tts.kernels.vocoder.layout import NO_SUMS, Convolutions, Sums
from light_tts.models.vocoder import decoder, network, parts
from light_tts.models.vocoder.network import HiftNetwork
from light_tts.models.vocoder.runner import HiftRunner

FRAMES = (76, 160)  # a first chunk, and a longer one: computed in the graphs of 96 and 160 frames
PROGRAMS = range(60, 1000)  # with fewer or more a tile is not tried
IN_PARTS = [
    tile_in_parts(frames, outputs, stages)
    for frames, outputs, stages in (
        (16, 16, 4),
        (16, 32, 4),
        (32, 32, 3),
        (32, 32, 4),
        (32, 64, 3),
        (32, 64, 4),
        (64, 32, 3),
    )
]
WHOLE = {
    torch.float16: [
        tile(64, 32, 4, 5),
        tile(64, 64, 4, 3),
        tile(64, 64, 4, 5),
        tile(64, 128, 4, 4),
        tile(128, 64, 8, 3),
        tile(128, 128, 8, 3),
    ],
    torch.float32: [tile(64, 32, 4, 3), tile(64, 64, 4, 3), tile(128, 64, 8, 3)],
}


@dataclass(frozen=True)
class Shape:
    """The launches of convolutions of one shape in a run of the vocoder, each without its tile."""

    conv: Convolutions  # of the first
    rows: int
    launches: list[partial[None]]

    def tiles(self) -> list[Config]:
        """Return the usual tile and other ones that might be faster."""
        tiles = [usual_config(self.conv, self.rows, NO_SUMS)]
        for config in IN_PARTS if self.conv.parts > 1 else WHOLE[self.conv.weight.dtype]:
            columns = -(-self.conv.channels_out // config["BLOCK_OUT"])
            programs = -(-self.rows // config["BLOCK_FRAMES"]) * columns * self.conv.branches
            fits = config["BLOCK_OUT"] <= max(16, 2 * self.conv.channels_out)
            if config not in tiles and fits and programs in PROGRAMS:
                tiles.append(config)
        return tiles

    def launch(self, config: Config) -> None:
        for launch in self.launches:
            launch(config=config)

    def bits(self, config: Config) -> list[Tensor]:
        """Return what the first launch writes; none of it is what that reads."""
        self.launches[0](config=config)
        out, active = (*self.launches[0].args, None)[4:6]
        results = [result for result in (out, active and active.out) if result is not None]
        return [result.view(torch.int16).clone() for result in results]


def shapes_of(model: HiftNetwork, frames: int) -> list[Shape]:
    """Run the vocoder for one item and return the shapes of its convolutions."""
    shapes: dict[str, Shape] = {}
    rows = 0

    def choosing(conv: Convolutions, count: int, sums: Sums) -> Config:
        nonlocal rows
        rows = count
        return convolve_config(conv, count, sums)

    def recording(conv: Convolutions, *arguments: Any, **named: Any) -> None:
        kernel.convolve(conv, *arguments, **named)
        shape = shapes.setdefault(conv.name, Shape(conv, rows, []))
        shape.launches.append(partial(kernel.convolve, conv, *arguments, **named))

    with (
        mock.patch.object(kernel, "convolve_config", choosing),
        mock.patch.object(network, "convolve", recording),
        mock.patch.object(decoder, "convolve", recording),
        mock.patch.object(parts, "convolve", recording),
    ):
        HiftRunner(model, CACHED, cuda_graphs=False).speak(batch_of(model.mels, 1, frames, model.device))
    return list(shapes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES, help="of an item")
    parser.add_argument("--output", type=Path, help="instead of the file of this GPU")
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    found: dict[str, list[Config]] = {}
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        model = HiftNetwork(full_size(device))
        shapes = [shape for frames in sorted(args.frames) for shape in shapes_of(model, frames)]

        def rehearse() -> None:
            for shape in shapes:
                for config in shape.tiles():
                    shape.launch(config)

        compile_ahead(device, rehearse)
        for shape in shapes:
            usual, *others = shape.tiles()
            expected, times = shape.bits(usual), [(microseconds(partial(shape.launch, usual)), usual)]
            for config in others:
                if all(map(torch.equal, shape.bits(config), expected)):
                    times.append((microseconds(partial(shape.launch, config)), config))
                else:
                    print(f"{shape.conv.name}: refused, other bits: {config}", flush=True)
            count = len(shape.launches)
            name = f"{shape.conv.name} {shape.rows} rows"
            for time, config in times:
                print(f"    {name}: {time / count:6.1f} us  {list(config.values())}", flush=True)
            time, best = min(times, key=lambda pair: pair[0])
            print(f"{name}: {times[0][0] / count:6.1f} to {time / count:6.1f} us, {count} times  {best}")
            found.setdefault(shape.conv.name, []).append({"rows": shape.rows, **best})
    configs.save(device, found, args.output)


if __name__ == "__main__":
    main()
