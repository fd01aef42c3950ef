"""What Hydra composes, and what a person is told whose command line is wrong."""

import shutil
from pathlib import Path

import pytest

from lora_search.errors import InputError
from lora_search.search.priors import first_points
from lora_search.settings.composition import SWEEPS, as_override, compose, compose_study, help_page
from lora_search.settings.secrets import redact
from lora_search.settings.space import corners, parse_space


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A folder of one's own with a sweep in it, under a name that breaks Hydra's grammar."""
    folder = tmp_path / "Anna's sweeps, new"
    folder.mkdir()
    shutil.copy(SWEEPS / "smoke.yaml", folder / "mine.yaml")
    return folder


@pytest.mark.parametrize("text", ["optim.lr=interval(1e-5,1e-3)", "space.optim.lr='interval(1e-5,1e-3)'"])
def test_a_sweep_is_searched_however_it_is_written(text: str) -> None:
    assert compose("smoke", [text]).space["optim"]["lr"] == "interval(1e-5,1e-3)"


def test_backslashes_of_a_searched_pattern_are_kept() -> None:
    choices = r"choice('.*\.q_proj', '.*\.it\'s', 'x\\')"

    assert compose("smoke", [f"lora.target_modules={choices}"]).space["lora"]["target_modules"] == choices


@pytest.mark.parametrize(
    "text", ["optim.lr=1e-4", "model.path=a/b", "~space/lora", "+x=1", "not an override"]
)
def test_what_is_no_sweep_is_left_to_hydra(text: str) -> None:
    assert as_override(text) == text


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("study", "storage", "postgresql+psycopg://u:it's@host/db?sslmode=require&options=-csearch_path%3Da"),
        ("study", "storage", "postgresql://u:p4ss,w0rd@h/db"),
        ("study", "storage", "postgresql://u:p4ss,w0rd@h/db?sslmode=require"),
        ("artifacts", "uri", "s3://bucket/a=b/c"),
        ("artifacts", "uri", "s3://bucket/a,b/c"),
        ("launcher", "sbatch", "--account=mine --mem=64G"),
        ("launcher", "sbatch", "--nodelist=a,b"),
    ],
)
def test_a_url_or_an_option_needs_no_quotes_of_its_own(section: str, name: str, value: str) -> None:
    for typed in (f"{name}={value}", f'{name}="{value}"'):
        for prefix in ("", "++"):
            config = compose("smoke", ["launcher=slurm", f"{prefix}{section}.{typed}"])
            assert getattr(getattr(config, section), name) == value


def test_a_comma_in_a_databases_password_is_kept_and_hidden() -> None:
    url = "postgresql://u:c0mma,p4ss@h/db"

    study, _ = compose_study("smoke", ["study.name=k2", f"study.storage={url}"])

    assert (study.name, study.storage) == ("k2", url)
    assert redact(f"cannot reach {url}, as c0mma,p4ss is wrong") == (
        "cannot reach postgresql://u:***@h/db, as *** is wrong"
    )


@pytest.mark.parametrize("paths", ["[a.jsonl,b.csv]", "['a.jsonl','b.csv']"])
def test_a_list_is_no_sweep(paths: str) -> None:
    assert compose("smoke", [f"data.path={paths}"]).data.path == ["a.jsonl", "b.csv"]
    assert compose("smoke", ["data.path='a,b.jsonl'"]).data.path == "a,b.jsonl"


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "study.name=k2,k",
            "study.name: cannot be searched, got 'k2,k'. Quote a value that contains commas: "
            "'study.name=\"k2,k\"'; a list has brackets: study.name=[a,b]",
        ),
        ("runs_dir=a,b", "runs_dir: cannot be searched, got 'a,b'. Quote a value that contains commas"),
        ("+data.path=https://h/a,b.jsonl", "data.path: cannot be searched, got 'https://h/a,b.jsonl'."),
        ("study.storage=choice(a,b)", "study.storage: cannot be searched, got 'choice(a,b)'. Give one"),
        ("engine.slots=range(1,3)", "engine.slots: cannot be searched, got 'range(1,3)'. Give one value."),
        ("train.evals_per_epoch=2,4", "train.evals_per_epoch: cannot be searched, got '2,4'."),
        ("lora.rank_pattern.q_proj=8,16", "lora.rank_pattern.q_proj: cannot be searched, got '8,16'."),
        ("study.name=when(lora.r, 8, choice(a))", "study.name: cannot be searched, got 'when("),
        ("optim.lrr=1e-4,1e-3", "optim.lrr: there is no such setting. Did you mean optim.lr"),
        ("sampler=tpe,gp", "sampler=tpe,gp: has 2 choices, and only the last would count. Give one."),
        ("space/lora=rank,rank_alpha", "a list has brackets: space/lora=[a,b]"),
    ],
)
def test_a_sweep_of_a_key_that_cannot_be_searched_is_refused_by_commands_on_a_study(
    override: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        compose_study("smoke", [override])

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    "override",
    [
        "data.path=https://u:hush4,m3rry@h/a.jsonl",
        "data.path='https://u:hush4 m3rry@h/a.jsonl','https://v:hush4 m3rry@h/b.jsonl'",
        r'''data.path='https://u:hush4\'m3rry@h/a.jsonl',"https://v:m3rry\"hush4@h/b.jsonl"''',
        "study.storage=choice(postgresql://u:hush4,m3rry@h/db,b)",
        "+study.storage=postgresql://u:hush4,m3rry@h/db",
    ],
)
def test_a_refused_value_is_shown_without_its_password(override: str) -> None:
    with pytest.raises(InputError) as caught:
        compose_study("smoke", [override])

    assert "***" in str(caught.value)
    assert "hush4" not in str(caught.value)
    assert "m3rry" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["+", "++"])
def test_a_urls_prefix_stays_before_its_quotes(prefix: str) -> None:
    assert as_override(f"{prefix}study.storage=sqlite:///x=y.db") == (
        f"{prefix}study.storage='sqlite:///x=y.db'"
    )


def test_a_group_of_the_space_can_be_left_out() -> None:
    assert "r" not in compose("smoke", ["~space/lora"]).space.get("lora", {})


def test_a_sweep_of_ones_own_is_found_beside_the_shipped_ones(own_folder: Path) -> None:
    assert compose("mine", [], own_folder).study.n_trials == 8
    assert compose("smoke", [], own_folder).study.n_trials == 8


def test_the_llama_sweep_searches_what_chat_models_are_usually_tuned_by() -> None:
    config = compose("llama31_8b_instruct", ["data.path=my.jsonl"])

    assert config.space == {
        "lora": {"r": "choice(8, 16, 32)", "target_modules": "choice([q_proj,v_proj], all-linear)"},
        "optim": {"lr": "tag(log, interval(2e-5, 5e-5))"},
        "train": {"batch_size": "choice(8, 16)", "epochs": "interval(3, 5)"},
    }
    assert (config.lora.alpha, config.lora.dropout, config.optim.schedule) == ("2r", 0.05, "cosine")
    assert config.optim.warmup_ratio > 0
    assert config.train.gradient_accumulation_steps == 4
    assert config.train.early_stopping_patience == 2
    assert (config.data.max_length, config.data.max_length_choices) == ("auto", [512, 1024])
    assert parse_space(config).default_params(config) is not None


def test_the_wide_llama_sweep_begins_in_the_middle_of_its_range_with_alpha_apart_from_the_rank() -> None:
    config = compose("llama31_8b_wide", ["data.path=my.jsonl"])

    rates = [point["optim.lr"] for point in first_points(config, parse_space(config), 4096)]
    assert rates == [3e-4, 8.6e-4, 9.5e-5]
    assert {settings.alpha for settings in corners(config, parse_space(config), ["lora.r"])} == {32}
    assert config.lora.target_modules == "all-linear"
    assert (config.pruner.name, config.pruner.factor) == ("asha", 2)


def test_a_study_is_found_without_the_data_that_it_was_made_with() -> None:
    study, runs_dir = compose_study("llama31_8b_instruct", ["study.name=mine"])

    assert (study.name, runs_dir) == ("mine", "runs")


def test_the_help_shows_sweeps_groups_and_settings(own_folder: Path) -> None:
    page = help_page("mine", ["optim.lr=3e-4"], own_folder)

    assert "llama31_8b_instruct   Which adapter makes Llama 3.1 8B" in page
    assert "mine                  Does everything work?" in page
    assert "space/lora: rank, rank_alpha, rank_targets" in page
    assert "lr: 0.0003" in page


BAD = [
    ("+x=1", "x: there is no such setting. See --help."),
    ("+foo.bar=1", "foo.bar: there is no such setting."),
    (
        "++lora.target_parameters=[experts]",
        "lora.trainable_token_indices, but no experts, and the base is sha",
    ),
    (
        "+lora.loftq_config.loftq_bits=4",
        "lora.loftq_config.loftq_bits: there is no such setting, as loftq quantizes the base anew for each",
    ),
    ("+lora.eva_config={}", "as eva takes a pass over the data with the base for each trial. Use pissa"),
    ("+lora.ensure_weight_tying=true", "lora.ensure_weight_tying: is an option of PEFT that is not offered"),
    ("+lora.lora_bias=true", "lora.lora_bias: is an option of PEFT that is not offered: a trial trains"),
    ("lora.bias=all", "lora.bias: must be none or lora_only, got 'all'. PEFT's all trains those of norms"),
    ("++optim.foo=1", "optim.foo: there is no such setting. Did you mean optim.lr"),
    (
        "+data.columns.respond=a",
        "data.columns.respond: there is no such setting. Did you mean data.columns.resp",
    ),
    ("~optim", "~optim: settings cannot be left out. Give them values"),
    ("~optim.lr", "~optim.lr: a setting cannot be left out. Give it a value"),
    ("~nothing", "nothing: there is no such setting."),
    ("space=null", "space=null: is not a choice of the group space. Leave the group out with ~space."),
    (
        "space/lora=null",
        "space/lora=null: is not a choice of the group space/lora. Leave the group out with ~",
    ),
    ("sampler=3", "sampler=3: is not a choice of the group sampler."),
    ("=3", "=3: has no key. Write key=value."),
    ("train.epochs", "train.epochs: has no value. Write key=value"),
    ("train.epochs=", "train.epochs: Value '' of type 'str' could not be converted to Integer."),
    ("train.epochs=1.5", "train.epochs: Value '1.5' of type 'float' could not be converted to Integer."),
    ("train.epochs=null", "train.epochs: must have a value, got null."),
    (
        "train.early_stopping_patience=0",
        "train.early_stopping_patience: must be at least 1, got 0. null trains to the end",
    ),
    ("optim.lr=choice()", "optim.lr=choice(): cannot be read: empty choice is not legal."),
    ("optim.lr=when()", "optim.lr: is not in the sweep grammar (missing a required argument: 'key'), got 'w"),
    ("optim.lr=when(foo=1)", "Write when(lora.target_modules, all-linear, interval(1e-5, 1e-3)): a key"),
    ("optim.lr=choice(when(lora.r, 8, choice(0.1)))", "(no function may contain when(...); its sweeps"),
    ("optim.lr=choice(0.1, when(lora.r, 8, choice(0.1)))", "optim.lr: is not in the sweep grammar (no f"),
    ("optim.lr=tag(log, when(lora.r, 8, interval(1, 2)))", "optim.lr: is not in the sweep grammar (no f"),
    ("train.batch_size=choice(null,2)", "null cannot be a choice in Hydra's grammar. Leave it out."),
    ("model.path=my model!", """Quote the value for Hydra and for the shell: 'model.path="my model!"'"""),
    ("study.name=é", """'study.name="é"'"""),
    ("lora.r=1e9", "lora.r: Value '1000000000.0' of type 'float' could not be converted to Integer."),
    ("lora.r=100000000", "lora.r: must be in [1, 4096], got 100000000. Try 8, 16 or 32"),
    ("lora.alpha=0r", "lora.alpha: must be a number > 0 or a multiple of r, got '0r'."),
    ("lora.alpha=1e300", "lora.alpha: must be at most 1,000,000, got 1e+300."),
    ("optim.max_grad_norm=inf", "optim.max_grad_norm: must be above 0 and at most 1,000,000, got inf"),
    ("model.revision=''", "model.revision: must not be empty, got ''. null takes the newest"),
    ("sampler=[tpe,gp]", "sampler=[tpe,gp]: has 2 choices, and only the last would count. Give one."),
    ("train.epochs=many", "could not be converted to Integer. Its default is 3."),
    ("lora.alpha=inf", "lora.alpha: must be a number > 0 or a multiple of r, got inf."),
    (
        "lora.target_modules=[]",
        "lora.target_modules: must be a list of layer names, all-linear or a regular expression, got []",
    ),
    (
        "lora.target_modules=null",
        "lora.target_modules: must be a list of layer names, all-linear or a regular expression, got None",
    ),
    (
        "lora.target_modules=[q_proj,null]",
        "must be a list of layer names, all-linear or a regular expression, got ['q_proj', None]",
    ),
    ("lora.target_modules=[q_proj,q_proj]", "lora.target_modules: must name each layer once"),
    ("lora.use_rslora=maybe", "lora.use_rslora: Value 'maybe' is not a valid bool"),
    (
        "tracker.project='a/b'",
        "tracker.project: must be 1 to 128 characters, none of / \\ # ? % :, got 'a/b'",
    ),
    ("tracker.entity=''", "tracker.entity: must be 1 to 128 characters"),
    ("runs_dir=''", "runs_dir: must name a folder, got ''"),
    ("runs_dir='~/runs'", "runs_dir: must not begin with ~, got '~/runs'. Write the folder in full"),
    (
        "study.storage='sqlite:///~/x.db'",
        "study.storage: must not begin with ~, got 'sqlite:///~/x.db'",
    ),
    ("seed=-1", "seed: must be in [0, 2**31), got -1"),
    ("data.columns={instruction: q, response: q}", "data.columns.instruction: must differ from the columns"),
    ("data.columns={messages: m, response: q}", "data.columns.messages: excludes data.columns.instruction"),
    ("data.format=csv", "data.format: must be one of auto, messages, sharegpt"),
    ("data.encoding=utf-9", "data.encoding: must be a text encoding, got 'utf-9'. Try utf-8"),
    ("data.weights=[1,2]", "data.weights: must be as many as the paths of data.path, 1, got"),
    ("data.path=[]", "data.path: must name a file or folder, or a list of them, got []"),
    ("data.group_by=''", "data.group_by: must not be empty"),
    ("data.on_leakage=keep", "data.on_leakage: must be one of refuse, remove"),
    ("data.columns.instruction=''", "data.columns.instruction: must name a column of the file, got ''"),
    ("data.max_length=auto1", "data.max_length: must be a number of tokens >= 8, or auto, got 'auto1'"),
    ("data.max_length_percentile=0", "data.max_length_percentile: must be in (0, 100], got 0.0"),
    (
        "data.max_length_choices=[512,4]",
        "data.max_length_choices: must be numbers of tokens >= 8, got [512, 4]",
    ),
    (
        "data.max_length_choices=[512]",
        "data.max_length_choices: are for data.max_length=auto only, got [512]",
    ),
    ("data.test_fraction=0.95", "data.validation_fraction + data.test_fraction: must be below 1, got 1.05"),
    ("engine.slots=1.5", "engine.slots: Value '1.5' of type 'float' is incompatible with type hint"),
    ("engine.dtype=float16", "engine.dtype: must be one of auto, float32, bfloat16, got 'float16'"),
    ("model.quantization=nf8", "model.quantization: must be null or nf4, got 'nf8'"),
    ("study.heartbeat_seconds=0", "study.heartbeat_seconds: must be at least 1, got 0"),
    ("study.name=.hidden", "study.name: must be 1 to 100 letters"),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("override", "message"), BAD, ids=[override for override, _ in BAD])
def test_a_wrong_override_is_one_message(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        compose("smoke", [override])

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_of_sweeps_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="-cd .*nothing: no such folder, or no permission to read it"):
        compose("smoke", [], tmp_path / "nothing")


def test_a_missing_sweep_is_answered_with_those_that_there_are(own_folder: Path) -> None:
    with pytest.raises(InputError, match="-cn theirs: no such sweep. There are: construction_faq, .*, mine;"):
        compose("theirs", [], own_folder)


def test_the_demos_caps_do_not_hold_for_rows_of_ones_own() -> None:
    demo = compose("construction_faq", []).data
    own = compose("construction_faq", ["data.path=mine.jsonl"]).data

    assert (demo.cap("train"), demo.cap("validation")) == (64, 20)
    assert (own.cap("train"), own.cap("validation")) == (None, 1000)
    assert compose("construction_faq", ["data.max_train_examples=402"]).data.cap("train") == 402
    assert compose("construction_faq", ["data.max_validation_examples=null"]).data.cap("validation") is None
