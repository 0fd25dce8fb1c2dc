"""The state of its requests that an engine keeps on the device."""

from __future__ import annotations

from dataclasses import dataclass

from light_tts.common.kv_pool import KVPool, SlotTable
from light_tts.common.row_state import RowState
from light_tts.engine.llm.options import EngineOptions
from light_tts.models.llm.speech_lm import SpeechLM


@dataclass(frozen=True)
class EngineMemory:
    """`pool`: keys and values; `table`: their slots for each request; `states`: the state that a step needs
    for each row of the table."""

    pool: KVPool
    table: SlotTable
    states: RowState

    @classmethod
    def empty(cls, model: SpeechLM, options: EngineOptions) -> EngineMemory:
        """Allocate an empty memory on the model's device."""
        weight, backbone = model.embedding.weight, model.backbone
        pool = KVPool(
            backbone.num_hidden_layers,
            options.slots,
            backbone.num_key_value_heads,
            backbone.head_dim,
            weight.dtype,
            weight.device,
            options.int8,
        )
        table = SlotTable(options.slots, options.rows, options.max_len, weight.device)
        states = RowState.empty(options.rows, options.window, model.ids.special.count, weight.device)
        return cls(pool, table, states)
