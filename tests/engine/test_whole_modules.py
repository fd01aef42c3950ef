"""Embedding and head that each trial has a trained copy of, against plain PEFT's `modules_to_save`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lora_search.engine.build import Room, require_exact
from lora_search.engine.effect_checks import check_outline
from lora_search.engine.generation import generate
from lora_search.errors import ConfigError, ModelError
from lora_search.files.peft import Tuned, merge_adapter
from lora_search.model.embedding import check_modules
from lora_search.ops.nll import CPU_ROWS, Head
from lora_search.ops.tokens import Whole
from lora_search.service.plain_peft import plain_perplexity
from lora_search.settings.schema import EngineConfig, SweepConfig
from tests.conftest import make_run
from tests.engine.test_architectures import make_model
from tests.engine.test_checkpoint import as_known, finish, train_until
from tests.engine.test_options import SPLITS, exported_perplexity, losses, plain_base, plain_losses
from tests.engine.test_tokens import plain_answer
from tests.harness import build_engine, starting_adapter, train_all

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`:UserWarning"
)  # PEFT unties
BOTH = ("embed_tokens", "lm_head")
CASES: dict[str, tuple[str, bool, dict[str, object]]] = {  # architecture, is tied, settings
    "head": ("qwen2", False, {"modules_to_save": ("lm_head",)}),
    "head of a tied base": ("qwen2", True, {"modules_to_save": ("lm_head",)}),
    "embedding": ("qwen2", False, {"modules_to_save": ("embed_tokens",), "lora_plus_ratio": 4.0}),
    "embedding of a tied base": ("granite", True, {"modules_to_save": ("embed_tokens",)}),
    "both": ("qwen2", False, {"modules_to_save": BOTH, "label_smoothing": 0.1, "weight_decay": 0.9}),
    "both of a tied base, scaled and capped": (
        "gemma2", True, {"modules_to_save": BOTH, "target_modules": ("all-linear",)},
    ),
    "embedding that scales its rows": ("gemma3_text", True, {"modules_to_save": ("embed_tokens",)}),
    "names of another kind": (
        "gpt_neox", False, {"modules_to_save": BOTH, "target_modules": ("all-linear",)},
    ),
    "with PiSSA and biases": (
        "qwen2", False, {"modules_to_save": BOTH, "init": "pissa", "bias": "lora_only"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_copies_train_as_in_peft(name: str, tmp_path: Path) -> None:
    architecture, is_tied, options = CASES[name]
    config, folder = (
        make_model(tmp_path / "model", architecture, tie_word_embeddings=is_tied),
        tmp_path / "model",
    )
    run = make_run(tmp_path, 0, alpha=6.0, **options)
    s = run.settings
    check_outline(config.path, config, [s.target_modules], saved=[s.modules_to_save])
    if s.has_start:
        theirs = PeftLoraConfig(
            r=s.r, lora_alpha=s.alpha, init_lora_weights=s.init, bias=s.bias, task_type="CAUSAL_LM",
            target_modules=list(s.target_modules), modules_to_save=list(s.modules_to_save),
        )  # fmt: skip
        model = get_peft_model(plain_base(folder), theirs)
    else:
        start = starting_adapter(build_engine(folder, SPLITS), run, tmp_path / "start")
        model = PeftModel.from_pretrained(plain_base(folder), str(start), is_trainable=True)
    expected = plain_losses(model, run, SPLITS)

    curve = train_all(build_engine(folder, SPLITS), [run])[0]

    torch.testing.assert_close(losses(curve), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert exported_perplexity(folder, tmp_path) == pytest.approx(curve[-1].best_perplexity, rel=1e-5)
    other = replace(run, settings=replace(s, modules_to_save=()), folder=str(tmp_path / "1"))
    without = train_all(build_engine(folder, SPLITS), [other])[0]
    assert not torch.allclose(losses(without), losses(curve), rtol=1e-4)


def test_packed_trials_with_and_without_copies_train_as_alone(tmp_path: Path) -> None:
    folder = Path(make_model(tmp_path / "model", "qwen2").path)
    tokens = {"trainable_token_indices": (7, 40), "trainable_token_head": True}
    chosen = [{"modules_to_save": BOTH, "lr": 0.02}, {}, {"modules_to_save": ("lm_head",)}, tokens,
              {"modules_to_save": ("embed_tokens",), "label_smoothing": 0.1}]  # fmt: skip
    runs = [make_run(tmp_path, i, **changes) for i, changes in enumerate(chosen)]
    alone = {run.number: train_all(build_engine(folder, SPLITS), [run])[run.number] for run in runs}
    again = [make_run(tmp_path / "packed", i, **changes) for i, changes in enumerate(chosen)]

    packed = train_all(build_engine(folder, SPLITS, slots=4, tokens_per_pass=300), again)

    for number, solo in alone.items():
        torch.testing.assert_close(losses(packed[number]), losses(solo), rtol=1e-5, atol=0)


def test_a_resumed_trial_with_copies_goes_on_bitwise(tmp_path: Path) -> None:
    folder = Path(make_model(tmp_path / "model", "qwen2").path)
    changes = {"modules_to_save": BOTH, "dropout": 0.1, "lr": 0.02, "schedule": "constant"}
    undisturbed = train_all(build_engine(folder, SPLITS), [make_run(tmp_path / "whole", **changes)])[0]
    run = make_run(tmp_path, **changes)
    before = train_until(build_engine(folder, SPLITS), run, 2)
    engine = build_engine(folder, SPLITS)
    engine.admit([as_known(run, before)])

    rest = finish(engine)

    assert [m.rung for m in rest] == [3, 4]
    assert losses(rest).tolist() == losses(undisturbed[2:]).tolist()
    assert [m.perplexity for m in rest] == [m.perplexity for m in undisturbed[2:]]


@pytest.mark.parametrize("is_tied", [False, True])
def test_slots_with_copies_answer_and_merge_as_in_peft(is_tied: bool, tmp_path: Path) -> None:
    folder = Path(make_model(tmp_path / "model", "qwen2", tie_word_embeddings=is_tied).path)
    options = [{"modules_to_save": BOTH}, {"modules_to_save": ("embed_tokens",)}]
    runs = [make_run(tmp_path, i, lr=0.03, **changes) for i, changes in enumerate(options)]
    engine = build_engine(folder, SPLITS, slots=2, tokens_per_pass=200)
    curves = train_all(engine, runs)
    for number, run in enumerate(runs):
        engine.place(run.settings, tmp_path / str(number) / "adapter", free=number)
    prompts = [list(row.input_ids[: row.num_prompt_tokens]) for row in SPLITS.validation]

    found = generate(engine.model, [0, None, 1], prompts, [2], 6, 10_000)

    adapters = [tmp_path / "0/adapter", None, tmp_path / "1/adapter"]
    assert found == [[plain_answer(folder, adapter, prompt) for prompt in prompts] for adapter in adapters]
    assert found[0] != found[1] != found[2] != found[0]
    merge_adapter(plain_base(folder), adapters[0], tmp_path / "merged")
    merged = plain_perplexity(plain_base(tmp_path / "merged"), SPLITS.validation)
    assert merged == pytest.approx(curves[0][-1].best_perplexity, rel=1e-5)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_with_copies_has_the_tensors_that_peft_writes(
    dtype: str, is_tied: bool, tmp_path: Path
) -> None:
    folder = Path(make_model(tmp_path / "model", "qwen2", tie_word_embeddings=is_tied).path)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        PeftLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[*BOTH], task_type="CAUSAL_LM"),
    )
    expected = {name: (t.shape, t.dtype) for name, t in get_peft_model_state_dict(theirs).items()}
    run = make_run(tmp_path, 0, target_modules=("q_proj",), modules_to_save=BOTH)

    train_all(build_engine(folder, SPLITS, dtype=dtype), [run])

    written = load_file(tmp_path / "0/adapter/adapter_model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in written.items()} == expected
    assert len(expected) == 2 * 2 + 2  # A and B of two layers, embedding and head


def test_the_bare_base_and_other_adapters_are_unchanged_in_peft(tmp_path: Path) -> None:
    folder = Path(make_model(tmp_path / "model", "qwen2").path)
    options = [{"modules_to_save": BOTH}, {}, {"modules_to_save": ("lm_head",)}]
    train_all(
        build_engine(folder, SPLITS), [make_run(tmp_path, i, lr=0.05, **o) for i, o in enumerate(options)]
    )
    ids = torch.tensor([SPLITS.validation[0].input_ids])
    adapters = {str(i): tmp_path / str(i) / "adapter" for i in range(3)}
    with torch.no_grad():
        alone = [
            PeftModel.from_pretrained(plain_base(folder), str(at))(ids).logits for at in adapters.values()
        ]
        expected = [plain_base(folder)(ids).logits, *alone]

    tuned = Tuned(plain_base(folder), adapters)

    for name, logits in zip((None, *adapters), expected, strict=True):
        with tuned.using(name) as model, torch.no_grad():
            assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_own_head_over_several_chunks_equals_plain_autograd(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_tokens, width, vocabulary = 2 * CPU_ROWS[0] + 50, 8, 30
    head = Head(torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype).requires_grad_(False))
    own = Whole(torch.randn(vocabulary, width).to(dtype), torch.zeros(vocabulary, width))
    hidden = torch.randn(num_tokens, width, dtype=dtype, requires_grad=True)
    target, weight = torch.randint(0, vocabulary, (num_tokens,)), torch.rand(num_tokens)
    smoothing = torch.full((num_tokens,), 0.1)
    leaves = [hidden.detach().float().requires_grad_(), own.e_VD.float().requires_grad_()]
    expected = F.cross_entropy(leaves[0] @ leaves[1].T, target, reduction="none", label_smoothing=0.1)
    expected_grads = torch.autograd.grad(expected @ weight, leaves)

    nll = head.nll(hidden, target, smoothing, own=own)
    (nll @ weight).backward()

    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(nll, expected, **close)
    torch.testing.assert_close((hidden.grad.float(), own.grad_VD), expected_grads, **close)


def test_the_row_of_a_padding_token_never_learns_as_in_torch() -> None:
    ids_T, grad_TD = torch.tensor([3, 0, 3, 5]), torch.randn(4, 6)
    module = torch.nn.Embedding(8, 6, padding_idx=0)
    (module(ids_T) * grad_TD).sum().backward()
    own = Whole(module.weight.detach(), torch.zeros(8, 6), module.padding_idx)

    own.collect(ids_T, grad_TD)

    torch.testing.assert_close(own.grad_VD, module.weight.grad)
    assert own.grad_VD[3].any()


@pytest.mark.wrong_input
def test_a_head_with_a_bias_is_refused_as_peft_would_train_it(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, "qwen2").path)
    check_modules(model, BOTH)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))

    check_modules(model, ("embed_tokens",))
    with pytest.raises(ModelError, match="lora.modules_to_save: the head has a bias in this qwen2 model"):
        check_modules(model, BOTH)


@pytest.mark.wrong_input
def test_copies_over_several_devices_are_refused() -> None:
    config = SweepConfig(engine=EngineConfig(devices_per_worker=2))
    room = Room(targets=(), max_rank=8, min_batch=1, num_trials=1, saved=((), BOTH))

    with pytest.raises(ConfigError, match="^lora.modules_to_save: cannot be trained with engine.devi"):
        require_exact(config, room, torch.device("cuda"))


@pytest.mark.parametrize(("dtype", "each"), [("float32", 16), ("bfloat16", 18)])
def test_copies_take_memory_in_the_slots_whose_trials_have_them(
    dtype: str, each: int, tmp_path: Path
) -> None:
    engine = build_engine(Path(make_model(tmp_path / "model", "qwen2").path), SPLITS, slots=2, dtype=dtype)
    runs = [make_run(tmp_path, 0), make_run(tmp_path, 1, modules_to_save=BOTH)]
    size = 2 * engine.model.language_model.lm_head.weight.numel()

    engine.admit(runs)

    without, with_both = (sum(part.numel() for part in engine.bank.rows[slot].theta) for slot in (0, 1))
    assert with_both - without == size
    names = engine.resolve_targets(("q_proj", "v_proj"))
    without, with_both = (engine.bank.bytes_of(run.settings, names) for run in runs)
    assert with_both - without == each * size
