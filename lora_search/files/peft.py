"""Adapters in PEFT's format: written atomically with a checksum, and read back."""

import copy
import json
import math
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from lora_search.files.atomic import TEMPORARY, explained_writing, write_file
from lora_search.files.tensors import read_sealed, write_sealed
from lora_search.trial import Pattern, TrialSettings

BIAS = "base_layer.bias"
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"  # what the name of trained rows ends in
PEFT_PREFIX, WEIGHTS_NAME = "base_model.model.", "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """An adapter's record of its base. ``digest``: of everything that its numbers depend on, except its
    settings and seed; ``data_hash``: of the rows."""

    path: str  # a folder, or a hub id
    revision: str | None = None  # the commit of a hub id
    module_names: tuple[str, ...] = ()
    digest: str = ""
    data_hash: str = ""


def pattern_key(keys: Collection[str], name: str) -> str:
    """Return the first key of a pattern that ends the layer's name, by PEFT's rule; else the name."""
    found: str = get_pattern_key(keys, name)
    return found


def lora_rank(settings: TrialSettings, layer: str) -> int:
    """Return the rank of the adapter on that layer."""
    ranks = dict(settings.rank_pattern)
    return int(ranks.get(pattern_key(ranks, layer), settings.r)) if ranks else settings.r


def lora_scaling(settings: TrialSettings, layer: str = "") -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732), as PEFT does."""
    r, alphas = lora_rank(settings, layer), dict(settings.alpha_pattern)
    alpha = alphas.get(pattern_key(alphas, layer), settings.alpha) if alphas else settings.alpha
    return alpha / (math.sqrt(r) if settings.use_rslora else r)


def as_plain(settings: TrialSettings) -> TrialSettings:
    """Return the settings of the adapter that is exported: with PiSSA and OLoRA twice the ranks at the same
    scaling, as in PEFT's conversion to an ordinary adapter."""
    if not settings.has_start:
        return settings
    more = math.sqrt(2.0) if settings.use_rslora else 2.0
    return replace(
        settings,
        init="kaiming",
        r=2 * settings.r,
        alpha=more * settings.alpha,
        rank_pattern=tuple((name, 2 * r) for name, r in settings.rank_pattern),
        alpha_pattern=tuple((name, more * alpha) for name, alpha in settings.alpha_pattern),
    )


def plain_weight(layer: torch.nn.Module) -> torch.Tensor:
    """Return a linear layer's weight [O, D], unpacked if it is kept in 4 bits."""
    weight: torch.Tensor = dequantize_module_weight(layer)
    return weight


def export_peft(
    state: Mapping[str, torch.Tensor],
    settings: TrialSettings,
    targets: Sequence[str] | str,
    base: BaseRecord,
    folder: Path,
    note: Mapping[str, object] | None = None,
) -> None:
    """Write a folder that plain ``PeftModel.from_pretrained`` loads. The weights are replaced atomically and
    sealed with the note. ``targets``: PEFT's target_modules, a list of names or one regular expression."""
    layers = sorted({name.partition(".lora_")[0] for name in state if ".lora_" in name})
    settings = as_plain(settings)
    config = PeftLoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # PEFT divides it, so a fraction is fine
        rank_pattern=_in_any_order(settings.rank_pattern, layers),
        alpha_pattern=_in_any_order(settings.alpha_pattern, layers),
        init_lora_weights=True if settings.init == "kaiming" else settings.init,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias=settings.bias,
        trainable_token_indices=_token_indices(settings, state),
        modules_to_save=[n.removesuffix(".weight") for n in state if is_of_base(n) and not n.endswith(BIAS)]
        or None,
        base_model_name_or_path=base.path,
        revision=base.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    _write_config(config, folder)
    weights = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.items()}
    write_sealed(folder / WEIGHTS_NAME, weights, note or {})


def is_of_base(name: str) -> bool:
    """Return whether PEFT keeps that tensor of an adapter in the base's dtype: a bias, a whole module."""
    return ".lora_" not in name and not name.endswith(TOKEN_ROWS)


def with_start(
    state: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return an adapter of twice the rank that takes a start away: A and A0, B and -B0."""
    halves = {name: (dim, sign * start[name]) for name, dim, sign in _second_halves(state)}
    return {
        name: torch.cat((t, halves[name][1]), halves[name][0]) if name in halves else t
        for name, t in state.items()
    }


def without_start(
    state: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return adapter and start of what `with_start` joined."""
    own, start = dict(state), dict(state)
    for name, dim, sign in _second_halves(state):
        own[name], second = state[name].chunk(2, dim)
        start[name] = sign * second
    return own, start


def _second_halves(state: Collection[str]) -> list[tuple[str, int, float]]:
    """Return name, dimension and sign of what an adapter with a start has twice."""
    kinds = {"A.weight": (0, 1.0), "B.weight": (1, -1.0)}
    found = [(name, kinds.get(name.rpartition(".lora_")[2])) for name in state]
    return [(name, *kind) for name, kind in found if kind is not None]


def _token_indices(
    settings: TrialSettings, state: Collection[str]
) -> list[int] | dict[str, list[int]] | None:
    """Return PEFT's setting: the ids, or where the head has rows of its own, the ids by module."""
    ids = list(settings.trainable_token_indices)
    if not settings.trainable_token_head:
        return ids or None
    return {name.removesuffix(f".{TOKEN_ROWS}"): ids for name in state if name.endswith(TOKEN_ROWS)}


def _in_any_order(pattern: Pattern, layers: Sequence[str]) -> dict[str, int | float]:
    """Return the pattern; by the layers' full names where its order counts, as files keep it sorted."""
    given, ordered = dict(pattern), dict(sorted(pattern))
    found = {name: pattern_key(given, name) for name in layers}
    if all(pattern_key(ordered, name) == key for name, key in found.items()):
        return given
    return {name: given[key] for name, key in found.items() if key in given}


def read_peft(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return weights and note as `export_peft` wrote them. Raises DamagedFileError."""
    weights, note = read_sealed(folder / WEIGHTS_NAME)
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in weights.items()}, note


def taken_by_experts(model: Any, names: Collection[str]) -> set[str]:
    """Return the last names of layers that PEFT takes for the experts of a mixture-of-experts model. It means
    the names that their projections had in transformers 4; a dense layer of that name, or a shared expert,
    then gets no adapter."""
    taken = set()
    for name in names:
        config = PeftLoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it wants the other half of a fused pair too
            taken.add(name)
        if config.target_modules != {name}:
            taken.add(name)
    return taken


def refused_by_peft(model: Any, names: Collection[str]) -> set[str]:
    """Return the last names of layers that PEFT gives no adapter in this model: some of Mamba's, whose
    weights its kernels read themselves."""
    refused = set()
    for name in names:
        try:
            _check_lora_target_modules_mamba(PeftLoraConfig(target_modules=[name]), model, name)
        except ValueError:
            refused.add(name)
    return refused


def fault_in_peft(outline: Any, layers: Mapping[str, Any], targets: Sequence[str] | str) -> str:
    """Return what goes wrong where plain PEFT loads an adapter on these layers, "" where nothing does.
    ``outline``: the model on the meta device."""
    settings = PeftLoraConfig(r=1, target_modules=targets if isinstance(targets, str) else list(targets))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, for what peft calls
            model = get_peft_model(copy.deepcopy(outline), settings, low_cpu_mem_usage=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return str(error).strip().partition("\n")[0]
    named = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    carriers = {name.removeprefix(PEFT_PREFIX) for name in named}
    strange = sorted(carriers ^ layers.keys())
    return f"{strange[0]} has an adapter in one of the two only" if strange else ""


def merge_adapter(base: Any, adapter: Path, to: Path) -> None:
    """Write the base with the adapter merged into its weights, in the base's dtype, as safetensors."""
    tuned = _put_on(base, adapter, "default")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Input and output embeddings are no longer tied"
        )  # it says so in config
        merged = tuned.merge_and_unload()
    with explained_writing(to):
        merged.save_pretrained(to)
        for path in to.glob("*.safetensors"):
            path.chmod(to.stat().st_mode & 0o666)  # safetensors makes its files private to the user


class Tuned:
    """A base with adapters, by name. PEFT loads their biases into the base itself, each over the last ones:
    here the base keeps its own but for `using`. ``model`` is the base itself if there are no adapters."""

    def __init__(self, base: Any, adapters: Mapping[str, Path]) -> None:
        self.model = base
        parameters = [p for name, p in base.named_parameters() if name.rpartition(".")[2] == "bias"]
        self._own = [(p, p.detach().clone()) for p in parameters]
        self._biases: dict[str | None, list[tuple[torch.Tensor, torch.Tensor]]] = {None: []}
        for name, folder in adapters.items():
            if self.model is base:
                self.model = _put_on(base, folder, name)
            else:
                self.model.load_adapter(str(folder), adapter_name=name)
            self.model.peft_config[name].bias = "none"  # PEFT allows one that is not
            self._biases[name] = [(p, p.detach().clone()) for p, own in self._own if not torch.equal(p, own)]
            _set(self._own)

    @contextmanager
    def using(self, name: str | None) -> Iterator[Any]:
        """Give the model with one adapter, or as the bare base (None)."""
        if name is not None:
            self.model.set_adapter(name)
        is_bare = name is None and isinstance(self.model, PeftModel)
        _set(self._biases[name])
        with self.model.disable_adapter() if is_bare else nullcontext():
            yield self.model
        _set(self._own)


@torch.no_grad()
def _set(values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for parameter, value in values:
        parameter.copy_(value)


def _put_on(base: Any, adapter: Path, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft's calls
        for said in ("fan_in_fan_out is set to False", "Model has `tie_word_embeddings=True` and a tied"):
            warnings.filterwarnings("ignore", said)  # of PEFT: it sets the one itself, and unties the other
        return PeftModel.from_pretrained(base, str(adapter), adapter_name=name)


def _write_config(config: PeftLoraConfig, folder: Path) -> None:
    """Write PEFT's config to a temporary folder first, so that a full disk leaves the old file unchanged.
    PEFT lists layers in the order of a set, which differs between processes: here they are sorted."""
    fresh = folder.with_name(f"{folder.name}{TEMPORARY}")
    with explained_writing(folder):
        config.save_pretrained(str(fresh))
        for path in fresh.iterdir():
            values = json.loads(path.read_bytes())
            if isinstance(values["target_modules"], list):
                values["target_modules"].sort()
            old, content = folder / path.name, json.dumps(values, indent=2, sort_keys=True).encode()
            if not old.exists() or old.read_bytes() != content:  # it differs only at a trial's first rung
                write_file(old, content)
        shutil.rmtree(fresh)
