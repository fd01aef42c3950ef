"""One pass: the concatenated rows of many slots through the frozen base; only completion tokens reach the LM
head. In an evaluation, the prefix that all rows of a slot share is computed once. A base that cannot keep
packed rows apart (`packing_check`) gets them one by one.

Legend: T tokens of the pass, N completion tokens, D width.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_search.data.rows import Example
from lora_search.engine.bank import SlotBank
from lora_search.model.packing_check import bend_of, decoder_of, runs_row_by_row
from lora_search.ops.device import devices_of
from lora_search.ops.dropout import threshold, token_keys, uniform
from lora_search.ops.fused import fuse
from lora_search.ops.lora import Plan
from lora_search.ops.nll import Head


@dataclass(frozen=True)
class SlotRows:
    """One slot's rows in a pass. ``ordinals`` number the rows as the trial sees them, for dropout; the first
    ``num_shared`` tokens, the same in all rows, are in the pass once (not together with dropout)."""

    slot: int | None
    rows: Sequence[Example]
    seed: int = 0
    ordinals: Sequence[int] = ()
    dropout: float = 0.0
    num_shared: int = 0
    noise: float = 0.0  # NEFTune's alpha
    label_smoothing: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.num_shared + sum(len(row.input_ids) - self.num_shared for row in self.rows)

    @property
    def num_completion_tokens(self) -> int:
        return sum(num_completion_tokens(row) for row in self.rows)


@dataclass(frozen=True)
class SlotTokens:
    """So many tokens of one slot, without dropout: as in `generation`."""

    slot: int | None
    num_tokens: int
    dropout: float = 0.0


@dataclass(frozen=True)
class Segment:
    """Contiguous tokens from ``start`` on; those before them in their row are at ``prefix``."""

    token_ids: Sequence[int]
    start: int
    targets: tuple[range, ...] = ()  # the positions of completion tokens
    num_before: int = 0
    prefix: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def num_keys(self) -> int:
        return self.num_before + len(self.token_ids)


def num_completion_tokens(row: Example) -> int:
    return len(row.input_ids) - row.num_prompt_tokens - sum(stop - start for start, stop in row.masked)


class PackedModel:
    """The frozen base as a function from packed rows to NLL per completion token."""

    def __init__(self, model: PreTrainedModel, bank: SlotBank) -> None:
        self.bank, self.device, self.dtype = bank, model.device, model.dtype
        self.devices = devices_of(model)  # ``device`` is the one where a pass begins and ends
        self.language_model = model
        self.decoder = decoder_of(model)
        self.is_row_by_row = runs_row_by_row(model)
        bend = bend_of(model)
        self.head = Head(model.get_output_embeddings(), bend.softcap, bend.scale)
        fuse(model)

    def nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        """Return NLL per completion token [N_s] per slot, in the order given; a graph if autograd is on."""
        passes = [[alone] for alone in _one_by_one(packs)] if self.is_row_by_row else [packs]
        hidden_ND, target_N = map(torch.cat, zip(*map(self._hidden, passes), strict=True))
        counts, tokens = [pack.num_completion_tokens for pack in packs], self.bank.tokens_of_head
        smoothing_N = None
        if any(pack.label_smoothing for pack in packs):
            smoothing = torch.tensor([pack.label_smoothing for pack in packs])
            smoothing_N = self._upload(smoothing.repeat_interleave(torch.tensor(counts)))
        ends = (0, *accumulate(counts))
        parts = [(pack.slot, slice(*bounds)) for pack, bounds in zip(packs, pairwise(ends), strict=True)]
        if not self.bank.heads.keys().isdisjoint(slot for slot, _ in parts):
            smoothings = [None] * len(packs) if smoothing_N is None else smoothing_N.split(counts)
            pieces = zip(packs, hidden_ND.split(counts), target_N.split(counts), smoothings, strict=True)
            return [self._alone(pack.slot, *piece) for pack, *piece in pieces]
        trained = [(tokens[slot], rows) for slot, rows in parts if slot in tokens]
        return list(self.head.nll(hidden_ND, target_N, smoothing_N, trained).split(counts))

    def _alone(
        self,
        slot: int | None,
        hidden_ND: torch.Tensor,
        target_N: torch.Tensor,
        smoothing_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return one slot's NLL, by its own head if it has one."""
        tokens = self.bank.tokens_of_head
        trained = [(tokens[slot], slice(0, len(hidden_ND)))] if slot in tokens else []
        return self.head.nll(hidden_ND, target_N, smoothing_N, trained, self.bank.heads.get(slot))

    def weighted_sum(self, nll_N: torch.Tensor, pack: SlotRows) -> torch.Tensor:
        """Return the sum over a slot's tokens, each times its row's weight."""
        if all(row.weight == 1.0 for row in pack.rows):
            return nll_N.sum()
        counts = torch.tensor([num_completion_tokens(row) for row in pack.rows])
        weights_R = torch.tensor([row.weight for row in pack.rows], dtype=nll_N.dtype)
        return nll_N @ self._upload(weights_R.repeat_interleave(counts))

    def _hidden(self, packs: Sequence[SlotRows]) -> tuple[torch.Tensor, torch.Tensor]:
        segments = lay_end_to_end(packs)
        ids_T = torch.tensor([token for segment in segments for token in segment.token_ids])
        position_T = torch.cat([torch.arange(s.num_before, s.num_keys) for s in segments])
        target_positions = torch.tensor([place for s in segments for places in s.targets for place in places])
        self.bank.set_plan(self._plan(packs), self._upload)
        plans = self.bank.plans  # kept: layers may be recomputed in the backward pass
        arguments: dict[str, torch.Tensor | int] = {}
        if not self.is_row_by_row:
            arguments = {"position_ids": position_T[None], **attention_arguments(segments)}
        uploaded = {
            name: self._upload(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        with self._noisy(packs):
            output = self.decoder(input_ids=self._upload(ids_T[None]), use_cache=False, **uploaded)
        target_N = self._upload(ids_T[target_positions])
        hidden_TD = output.last_hidden_state.squeeze(0)  # index_select: its backward needs no sort
        if self.is_row_by_row and hidden_TD.requires_grad:  # autograd goes back row by row
            hidden_TD.register_hook(lambda _: setattr(self.bank, "plans", plans))
        return hidden_TD.index_select(0, self._upload(target_positions - 1)), target_N

    @contextmanager
    def _noisy(self, packs: Sequence[SlotRows]) -> Iterator[None]:
        """Inside, the embeddings have NEFTune's noise. By a hook, as in transformers: some models compute
        more from the token ids than embeddings."""
        if not any(pack.noise for pack in packs):
            yield
            return

        def add(_module: nn.Module, _inputs: object, embedded: torch.Tensor) -> torch.Tensor:
            return embedded + self._noise(packs, embedded.shape[-1]).to(embedded.dtype)

        handle = self.language_model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _noise(self, packs: Sequence[SlotRows], width: int) -> torch.Tensor:
        """Return the noise [T, width], which depends on the trial, the row as the trial sees it, and the
        token; as in transformers, it is at most alpha / sqrt(tokens x width)."""
        keys, sizes = [], []
        for pack in packs:
            lengths = [len(row.input_ids) for row in pack.rows]
            keys.append(token_keys(pack.seed, list(pack.ordinals), lengths))
            sizes += [torch.full((n,), pack.noise / math.sqrt(n * width)) for n in lengths]
        size_T = self._upload(torch.cat(sizes))
        return uniform(self._upload(torch.cat(keys)), width) * size_T[:, None]

    def set_plan(self, parts: Sequence[SlotTokens]) -> None:
        """Assign the tokens of the next pass to slots, for passes that `nll` does not run."""
        bounds = (0, *accumulate(part.num_tokens for part in parts))
        self.bank.set_plan(Plan(tuple(part.slot for part in parts), bounds, None, None), self._upload)

    def _plan(self, packs: Sequence[SlotRows]) -> Plan:
        """Return each slot's tokens and what dropout hashes: one key per token, one threshold per slot."""
        slots = tuple(pack.slot for pack in packs)
        bounds = (0, *accumulate(pack.num_tokens for pack in packs))
        if not any(pack.dropout for pack in packs):
            return Plan(slots, bounds, None, None)
        keys = [
            token_keys(pack.seed, list(pack.ordinals), [len(row.input_ids) for row in pack.rows])
            if pack.dropout
            else torch.zeros(pack.num_tokens, dtype=torch.int32)
            for pack in packs
        ]
        thresholds = torch.tensor([threshold(pack.dropout) for pack in packs], dtype=torch.int16)
        key_T, threshold_T = self._upload(torch.cat(keys)), self._upload(_per_token(thresholds, packs))
        return Plan(slots, bounds, key_T, threshold_T)

    def _upload(self, x: torch.Tensor) -> torch.Tensor:
        """Return x on the device; to a GPU from pinned memory, so that the host does not wait."""
        if self.device.type != "cuda":
            return x.to(self.device)
        return x.pin_memory().to(self.device, non_blocking=True)


def _per_token(values: torch.Tensor, packs: Sequence[SlotRows | SlotTokens]) -> torch.Tensor:
    """Return each pack's value once for each of its tokens."""
    return values.repeat_interleave(torch.tensor([pack.num_tokens for pack in packs]))


def _one_by_one(packs: Sequence[SlotRows]) -> Iterator[SlotRows]:
    """Yield each row of each pack as a pack of its own, with the same dropout and noise."""
    for pack in packs:
        for place, row in enumerate(pack.rows):
            yield replace(pack, rows=[row], ordinals=pack.ordinals[place : place + 1], num_shared=0)


def lay_end_to_end(packs: Sequence[SlotRows]) -> list[Segment]:
    """Return the layout of the pass: each pack's shared prefix, then the rest of each of its rows."""
    segments: list[Segment] = []
    start = 0
    for pack in packs:
        shared, prefix = pack.num_shared, start
        parts = [Segment(pack.rows[0].input_ids[:shared], start)] if shared else []
        start += shared
        for row in pack.rows:
            rest = row.input_ids[shared:]
            targets = tuple(
                range(start - shared + first, start - shared + last) for first, last in row.learnt
            )
            parts.append(Segment(rest, start, targets, shared, prefix))
            start += len(rest)
        segments += parts
    return segments


def attention_arguments(segments: Sequence[Segment]) -> dict[str, torch.Tensor | int]:
    """Return the boundaries for `rows_attention`; those of the keys and each key's source too if
    some are shared."""
    arguments: dict[str, torch.Tensor | int] = {
        "cu_seq_lens_q": _boundaries([len(s.token_ids) for s in segments]),
        "max_length_q": max(len(s.token_ids) for s in segments),
    }
    if any(s.num_before for s in segments):
        pieces = [(s.prefix, s.prefix + s.num_before, s.start, s.end) for s in segments]
        sources = [torch.arange(*ends) for a, b, c, d in pieces for ends in ((a, b), (c, d))]
        arguments["cu_seq_lens_k"] = _boundaries([s.num_keys for s in segments])
        arguments["max_length_k"] = max(s.num_keys for s in segments)
        arguments["key_source"] = torch.cat(sources)
    return arguments


def _boundaries(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
