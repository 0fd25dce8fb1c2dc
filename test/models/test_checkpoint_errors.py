"""Every problem with a checkpoint is reported as one error that names the file and the key or tensor."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from light_tts.models.checkpoint.any_config import load_any_config
from light_tts.models.checkpoint.config import ConfigError
from light_tts.models.checkpoint.cosyvoice2_config import Config, load_config
from light_tts.models.checkpoint.cosyvoice3_config import Config3
from light_tts.models.checkpoint.weights import CheckpointError, load_state_dict
from light_tts.models.flow.flow import Flow

CHECKPOINT = Path(__file__).parents[1] / "golden" / "cosyvoice2" / "checkpoint"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    for name in ("cosyvoice2.yaml", "flow.pt"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    return tmp_path


def edit_yaml(model_dir: Path, old: str, new: str) -> None:
    path = model_dir / "cosyvoice2.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def load_flow(model_dir: Path) -> Flow:
    return Flow.from_checkpoint(model_dir, load_config(model_dir), torch.device("cpu"))


def test_yaml_of_an_early_release_without_chunk_size(model_dir: Path) -> None:
    edit_yaml(model_dir, "\nchunk_size: 25\nnum_decoding_left_chunks: -1", "")
    edit_yaml(model_dir, "        static_chunk_size: !ref <chunk_size>\n", "")
    edit_yaml(model_dir, "!ref <chunk_size> * <token_mel_ratio>", "50")
    edit_yaml(model_dir, "!ref <num_decoding_left_chunks>", "-1")
    assert replace(load_config(model_dir), path=CHECKPOINT) == replace(
        load_config(CHECKPOINT), path=CHECKPOINT
    )


def test_of_two_yaml_files_that_of_cosyvoice3_counts(model_dir: Path) -> None:
    assert isinstance(load_any_config(model_dir), Config)
    shutil.copy(CHECKPOINT.parents[1] / "cosyvoice3" / "checkpoint" / "cosyvoice3.yaml", model_dir)
    assert isinstance(load_any_config(model_dir), Config3)


def test_sizes_follow_the_yaml(model_dir: Path) -> None:
    edit_yaml(model_dir, "\nchunk_size: 25", "\nchunk_size: 10")
    edit_yaml(model_dir, "tau_r: 0.1", "tau_r: 0.3")
    edit_yaml(model_dir, "solver: 'euler'", "solver: 'euler'\n                n_timesteps: 6")
    config = load_config(model_dir)
    assert config.chunk_size == config.flow.encoder.static_chunk_size == 10
    assert config.flow.estimator.static_chunk_size == 20
    assert config.llm.sampling.tau_r == 0.3
    assert config.flow.n_timesteps == 6 and load_config(CHECKPOINT).flow.n_timesteps == 10
    assert config.llm.mix_ratio == (5, 15)


def test_yaml_is_data_and_runs_nothing(model_dir: Path) -> None:
    marker = model_dir / "ran"
    edit_yaml(model_dir, "sample_rate: 24000", f"sample_rate: 24000\nx: !apply:os.mkdir ['{marker}']")
    load_config(model_dir)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    vocab_size: 729\n", "", "key 'flow.vocab_size': missing"),
        (
            "vocab_size: 729",
            "vocab_size: many",
            "key 'flow.vocab_size': expected an integer, found 'many'",
        ),
        ("solver: 'euler'", "solver: 'rk4'", "cfm_params.content.solver': only 'euler' is supported"),
        (
            "solver: 'euler'",
            "solver: 'euler'\n                n_timesteps: 0",
            "n_timesteps': expected a positive number, found 0",
        ),
        ("channels: [32]", "channels: [32, 32]", "flow.decoder.estimator.channels': only one level"),
        ("!ref <spk_embed_dim>", "!ref <speaker_size>", "refers to 'speaker_size', which is not in the file"),
        ("top_k: 25", "top_k: 0", "key 'llm.sampling.top_k': expected a positive number, found 0"),
        ("hop_size: 480", "hop_size: 240", "is not sample_rate"),
        ("sample_rate: 24000", "sample_rate: [", "not valid YAML"),
    ],
)
def test_bad_yaml_names_file_and_key(model_dir: Path, old: str, new: str, message: str) -> None:
    edit_yaml(model_dir, old, new)
    with pytest.raises(ConfigError) as error:
        load_config(model_dir)
    assert str(model_dir / "cosyvoice2.yaml") in str(error.value)
    assert message in str(error.value)


def test_missing_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cosyvoice2\.yaml: no such file"):
        load_config(tmp_path)


def test_missing_file_is_named(model_dir: Path) -> None:
    (model_dir / "flow.pt").unlink()
    with pytest.raises(CheckpointError, match=r"flow\.pt: no such file"):
        load_flow(model_dir)


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.3, 0.999])
def test_truncated_file_is_named(model_dir: Path, kept: float) -> None:
    path = model_dir / "flow.pt"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=r"flow\.pt: expected a torch\.save file"):
        load_flow(model_dir)


def test_pickled_code_is_refused(model_dir: Path) -> None:
    torch.save({"weight": torch.nn.Linear(1, 1)}, model_dir / "flow.pt")
    with pytest.raises(CheckpointError, match="file of tensors, found something else"):
        load_flow(model_dir)


def change_tensor(model_dir: Path, name: str, tensor: torch.Tensor | None) -> None:
    state = load_state_dict(model_dir / "flow.pt")
    state.pop(name, None)
    torch.save({**state, **({} if tensor is None else {name: tensor})}, model_dir / "flow.new")
    (model_dir / "flow.new").replace(model_dir / "flow.pt")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder_proj.weight", None, "expected shape (80, 64), found none (missing)"),
        ("encoder_proj.weight", torch.zeros(80, 32), "expected shape (80, 64), found (80, 32)"),
        ("encoder_proj.gain", torch.zeros(3), "expected none, found shape (3,)"),
        ("encoder.up_layer.conv.weight", None, "expected 3 dimensions, found none (missing)"),
        ("encoder.up_layer.conv.weight", torch.zeros(4), "expected 3 dimensions, found shape (4,)"),
    ],
)
def test_wrong_tensor_is_named(model_dir: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    change_tensor(model_dir, name, tensor)
    with pytest.raises(CheckpointError) as error:
        load_flow(model_dir)
    assert str(error.value).startswith(f"{model_dir / 'flow.pt'}: tensor {name}: {message}")


def test_another_size_counts_all_tensors_that_differ(model_dir: Path) -> None:
    edit_yaml(model_dir, "linear_units: 128", "linear_units: 96")
    with pytest.raises(CheckpointError, match=r"found \(128, 64\) \(and 8 more tensors differ\)"):
        load_flow(model_dir)
