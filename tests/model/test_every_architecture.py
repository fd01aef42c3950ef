"""Every causal language model of transformers is packed, run row by row, or refused with one message."""

import re
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_search.errors import ModelError
from lora_search.model.adaptation import adapt
from lora_search.model.packing_check import check_packing, runs_row_by_row
from tests.engine.test_architectures import sizes_of

LARGEST = 25_000_000  # parameters: some configurations do not take the common names of sizes


def make(architecture: str) -> PreTrainedModel | None:
    """Return a tiny random model; None where the common sizes do not make one."""
    try:
        config = AutoConfig.for_model(architecture, **sizes_of(architecture))
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config)
        is_small = sum(parameter.numel() for parameter in outline.parameters()) < LARGEST
        return AutoModelForCausalLM.from_config(config).eval() if is_small else None
    except Exception:  # noqa: BLE001 (a configuration says in its own way which sizes it wants)
        return None


def outcome(architecture: str) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(architecture)
    if model is None:
        return "not made"
    adapt(model)
    try:
        check_packing(model, "base")
    except ModelError as refusal:
        is_one_message = re.fullmatch(
            r"model.path: base is a .* model \(.*\), which .* Choose .*", str(refusal)
        )
        return "refused" if is_one_message else str(refusal)
    return "row by row" if runs_row_by_row(model) else "packed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of models that nobody has used for years
def test_every_causal_language_model_has_one_of_three_outcomes() -> None:
    outcomes = {name: outcome(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}

    count = Counter(outcomes.values())
    assert count.keys() == {"packed", "row by row", "refused", "not made"}, outcomes
    assert count["packed"] >= 100, outcomes
    assert count["packed"] + count["row by row"] >= 129, outcomes
    assert count["refused"] >= 10, outcomes
    assert count["not made"] <= 36, outcomes
