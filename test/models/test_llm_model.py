import json
import shutil
from pathlib import Path

import pytest
import torch

from light_tts.models.checkpoint.any_config import load_any_config
from light_tts.models.checkpoint.weights import CheckpointError
from light_tts.models.llm.joined import JoinedLM
from light_tts.models.llm.speech_lm import SpeechLM

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "cosyvoice2" / "checkpoint"
CPU = torch.device("cpu")
families = pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])


def load(checkpoint: Path) -> SpeechLM:
    return SpeechLM.from_checkpoint(checkpoint, checkpoint / "llm.pt", load_any_config(checkpoint), CPU)


@families
def test_unused_tables_are_not_kept_in_memory(family):
    names = list(load(GOLDEN / family / "checkpoint").state_dict())
    assert [name for name in names if "embed" in name] == ["embedding.weight"]
    assert not [name for name in names if "lm_head" in name]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    return tmp_path / "model"


@families
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_joined_linears_compute_the_same_and_take_no_more_memory(family, tokens):
    plain, model = (load(GOLDEN / family / "checkpoint") for _ in "12")
    joined, ids, positions = JoinedLM(model), torch.arange(tokens), torch.arange(tokens)

    def attend(layer, q, k, v):
        return q * k.mean() + v.mean()

    expected = plain(ids, positions, attend)
    assert torch.allclose(joined(ids, positions, attend), expected, atol=1e-5)
    assert torch.allclose(model(ids, positions, attend), expected, atol=1e-5)
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(stored.values()) <= sum(p.nbytes for p in plain.parameters())


def test_a_wrong_tensor_is_named_with_its_file_and_shapes(checkpoint):
    state = torch.load(checkpoint / "llm.pt", weights_only=True)
    state["llm_decoder.weight"] = state["llm_decoder.weight"][:-1].clone()
    torch.save(state, checkpoint / "llm.pt")
    with pytest.raises(CheckpointError, match=r"llm\.pt.*llm_decoder\.weight.*732.*731"):
        load(checkpoint)


def test_weights_of_another_family_are_refused(checkpoint):
    (checkpoint / "cosyvoice2.yaml").unlink()
    shutil.copy(GOLDEN / "cosyvoice3" / "checkpoint" / "cosyvoice3.yaml", checkpoint)
    with pytest.raises(CheckpointError, match=r"llm\.pt.*llm_decoder\.weight.*929.*732.*more"):
        load(checkpoint)


def test_a_missing_tensor_is_named(checkpoint):
    state = torch.load(checkpoint / "llm.pt", weights_only=True)
    del state["llm.model.model.norm.weight"]
    torch.save(state, checkpoint / "llm.pt")
    with pytest.raises(CheckpointError, match=r"llm\.pt.*llm\.model\.model\.norm\.weight.*missing"):
        load(checkpoint)


@pytest.mark.parametrize("key", ["hidden_size", "rope_theta", "num_key_value_heads"])
def test_a_key_missing_from_the_backbone_config_is_named(checkpoint, key):
    path = checkpoint / "CosyVoice-BlankEN" / "config.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{key}"):
        load(checkpoint)


def test_a_broken_backbone_config_is_named(checkpoint):
    (checkpoint / "CosyVoice-BlankEN" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"CosyVoice-BlankEN/config\.json"):
        load(checkpoint)
