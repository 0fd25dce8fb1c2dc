"""`light-tts check --measure`: compares a checkpoint's flow with the graph exported beside it, and scores a
few spoken sentences."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from light_tts.cli.findings import Findings
from light_tts.server.core.default_checkpoint import default_checkpoint

if TYPE_CHECKING:
    from light_tts.tools.evaluation.takes import Take

GRAPH = "flow.decoder.estimator.fp32.onnx"
FRAMES = 200  # 4 s of speech
TOLERANCE = 1e-3  # largest difference, of velocities of about 1, that float32 sums in another order explain
VOICES = ("anna", "henry")  # of the bundled checkpoint


def measure(findings: Findings, directory: Path, sentences: int) -> None:
    """Report both as findings. `sentences`: how many of the everyday sentences are spoken, on the CPU."""
    _compare_estimator(findings, directory)
    _score(findings, directory, sentences)


def _compare_estimator(findings: Findings, directory: Path) -> None:
    """Compare the flow's estimator with the checkpoint's own export of it on random input."""
    if not (directory / GRAPH).exists():
        findings.note("flow, reference", f"no {GRAPH} to compare with")
        return
    difference = estimator_difference(directory)
    text = f"largest difference from {GRAPH}: {difference:.1e} (at most {TOLERANCE:g})"
    (findings.ok if difference <= TOLERANCE else findings.fail)("flow, reference", text)


def estimator_difference(directory: Path) -> float:
    """Return the largest difference between the velocities of the estimator, in float32 with full attention,
    and those of the exported graph."""
    import onnxruntime
    import torch

    from light_tts.models.family import load_family
    from light_tts.models.flow.masks import EstimatorMasks

    flow = load_family(directory).read_flow()
    channels = flow.spk_embed_affine_layer.out_features
    generator = torch.Generator().manual_seed(0)
    x, mu, cond = torch.randn(3, 2, channels, FRAMES, generator=generator)  # the graph's batch is fixed at 2
    spks, t = torch.randn(2, channels, generator=generator), torch.tensor([0.3, 0.3])
    masks = EstimatorMasks.build(torch.tensor([FRAMES, FRAMES]), FRAMES, None, torch.float32)
    with torch.inference_mode():
        ours = flow.decoder.estimator(x, masks, mu, t, spks, cond)
    graph = onnxruntime.InferenceSession(directory / GRAPH, providers=["CPUExecutionProvider"])
    inputs = zip(graph.get_inputs(), (x, masks.frames, mu, t, spks, cond), strict=True)
    (theirs,) = graph.run(None, {spec.name: value.numpy() for spec, value in inputs})
    return float((ours - torch.from_numpy(theirs)).abs().max())


def _score(findings: Findings, directory: Path, sentences: int) -> None:
    """Let the checkpoint speak everyday sentences in the bundled voices, and score what the installed
    packages can measure."""
    from light_tts.tools.evaluation.report import summarize
    from light_tts.tools.evaluation.scores import Scorer
    from light_tts.tools.evaluation.tools import missing

    lacking = missing(("wer", "similarity"))
    for name, command in lacking.items():
        findings.note(f"speech, {name}", f"not measured; {command}")
    measures = [name for name in ("wer", "similarity") if name not in lacking]
    if not measures:
        return
    begun = time.monotonic()
    summary = summarize(Scorer(measures).score_all(list(_takes(directory, sentences)), lambda score: None))
    seconds = f"{sentences} sentences, {time.monotonic() - begun:.0f} s"
    if summary["wer"] is not None:
        findings.ok("speech, wer", f"{100 * summary['wer']:.1f} % wrong words ({seconds})")
    if summary["similarity"] is not None:
        findings.ok("speech, similarity", f"{summary['similarity']:.2f} to the prompt ({seconds})")


def _takes(directory: Path, sentences: int) -> Iterator[Take]:
    """Yield the spoken sentences, drawn by the checkpoint's own sampling rule."""
    import torch

    from light_tts.tools import evaluation
    from light_tts.tools.evaluation.lines import Line
    from light_tts.tools.evaluation.local import LocalSpeaker
    from light_tts.tools.evaluation.takes import Take

    texts = (Path(evaluation.__file__).parent / "everyday.txt").read_text("utf-8").splitlines()
    folder = default_checkpoint() / "voices"
    lines = []
    for number, text in enumerate(texts[:sentences]):
        name = VOICES[number % len(VOICES)]
        said = (folder / f"{name}.txt").read_text("utf-8").strip()
        lines.append(Line(text, name, folder / f"{name}.wav", said))
    speaker = LocalSpeaker(directory, torch.device("cpu"))
    rule = speaker.numbers.sampling
    drawn = speaker.tokens([(line, rule, seed) for seed, line in enumerate(lines)])
    for seed, (line, parts) in enumerate(zip(lines, drawn, strict=True)):
        yield Take(line, speaker.sound(line, parts, seed))
