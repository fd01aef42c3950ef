"""One pass: rows of many slots laid end to end through the frozen base; only completion tokens reach the
LM head.

Legend: T tokens of the pass, N completion tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_search.adapters import Plan
from lora_search.data import Example
from lora_search.dropout import threshold, token_keys
from lora_search.fused import fuse
from lora_search.head import Head
from lora_search.lora import SlotBank


@dataclass(frozen=True)
class SlotRows:
    """What one slot puts into a pass. ``ordinals`` number the rows as its trial sees them, for dropout."""

    slot: int | None
    rows: Sequence[Example]
    seed: int = 0
    ordinals: Sequence[int] = ()
    dropout: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def num_completion_tokens(self) -> int:
        return sum(num_completion_tokens(row) for row in self.rows)


def num_completion_tokens(row: Example) -> int:
    return len(row.input_ids) - row.num_prompt_tokens


class PackedModel:
    """The frozen base as a function from packed rows to NLL per completion token."""

    def __init__(self, model: PreTrainedModel, bank: SlotBank) -> None:
        self.bank, self.device = bank, model.device
        self.decoder: nn.Module = model.base_model
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.head = Head(model.get_output_embeddings(), softcap)
        fuse(model)

    def nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        """Return NLL per completion token [N_s] per slot, in the order given; a graph if autograd is on."""
        hidden_ND, target_N = self._hidden(packs)
        nll_N = self.head.nll(hidden_ND, target_N)
        return list(nll_N.split([pack.num_completion_tokens for pack in packs]))

    def _hidden(self, packs: Sequence[SlotRows]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [row for pack in packs for row in pack.rows]
        lengths = [len(row.input_ids) for row in rows]
        ids_T = torch.tensor([token for row in rows for token in row.input_ids])
        position_T = torch.cat([torch.arange(length) for length in lengths])
        boundaries = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        target_positions = torch.tensor(_completion_positions(rows))
        self.bank.plan = self._plan(packs)  # it stays: layers may be computed again on the way back
        output = self.decoder(
            input_ids=self._upload(ids_T[None]),
            position_ids=self._upload(position_T[None]),
            use_cache=False,
            cu_seq_lens_q=self._upload(boundaries),
            max_length_q=max(lengths),
        )
        target_N = self._upload(ids_T[target_positions])
        return output.last_hidden_state[0, self._upload(target_positions - 1)], target_N

    def _plan(self, packs: Sequence[SlotRows]) -> Plan:
        """Return who owns which tokens, and what dropout hashes: one key a token, one threshold a slot."""
        slots = tuple(pack.slot for pack in packs)
        bounds = (0, *accumulate(pack.num_tokens for pack in packs))
        grouping = self._grouping(packs) if self.bank.is_grouped else ()
        if not any(pack.dropout for pack in packs):
            return Plan(slots, bounds, None, None, *grouping)
        keys = [
            token_keys(pack.seed, list(pack.ordinals), [len(row.input_ids) for row in pack.rows])
            if pack.dropout
            else torch.zeros(pack.num_tokens, dtype=torch.int32)
            for pack in packs
        ]
        thresholds = torch.tensor([threshold(pack.dropout) for pack in packs], dtype=torch.int16)
        key_T, threshold_T = self._upload(torch.cat(keys)), self._upload(_per_token(thresholds, packs))
        return Plan(slots, bounds, key_T, threshold_T, *grouping)

    def _grouping(self, packs: Sequence[SlotRows]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return where each slot's tokens end, int32 [S], what each token's adapter is scaled by, [T], and
        which slots have no token, bool [S]. Tokens of the bare base go with slot 0, scaled by 0."""
        slots = [-1 if pack.slot is None else pack.slot for pack in packs]
        assert slots == sorted(slots), "grouped matmuls take tokens in the order of the slots"
        counts_S = torch.zeros(len(self.bank.theta_SP), dtype=torch.int32)
        for slot, pack in zip(slots, packs, strict=True):
            counts_S[max(slot, 0)] += pack.num_tokens
        scaling = torch.tensor([self.bank.scaling(pack.slot) / (1.0 - pack.dropout) for pack in packs])
        ends_S = counts_S.cumsum(0, dtype=torch.int32)
        is_idle_S = counts_S == 0
        idle_S = self._upload(is_idle_S) if is_idle_S.any() else None
        return self._upload(ends_S), self._upload(_per_token(scaling, packs)), idle_S

    def _upload(self, x: torch.Tensor) -> torch.Tensor:
        """Return x on the device; to a GPU from pinned memory, so that the host does not wait."""
        if self.device.type != "cuda":
            return x
        return x.pin_memory().to(self.device, non_blocking=True)


def _per_token(values: torch.Tensor, packs: Sequence[SlotRows]) -> torch.Tensor:
    """Return each pack's value once for each of its tokens."""
    return values.repeat_interleave(torch.tensor([pack.num_tokens for pack in packs]))


def _completion_positions(rows: Sequence[Example]) -> list[int]:
    positions: list[int] = []
    start = 0
    for row in rows:
        positions.extend(range(start + row.num_prompt_tokens, start + len(row.input_ids)))
        start += len(row.input_ids)
    return positions
