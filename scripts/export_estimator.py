"""Exports the flow estimator of a checkpoint as ONNX, the graph from which --load_trt builds an engine, for
inspection or to try it with trtexec.

python scripts/export_estimator.py --model_dir DIRECTORY --out estimator.onnx --data_type float16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.trt import onnx_graph as estimator_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_dir", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--data_type", choices=["float16", "bfloat16", "float32"], default="float16")
    args = parser.parse_args()
    dtype = getattr(torch, args.data_type)
    flow = Flow.from_checkpoint(args.model_dir, load_config(args.model_dir), torch.device("cpu"), dtype)
    args.out.write_bytes(estimator_onnx.export(flow.decoder.estimator))
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
