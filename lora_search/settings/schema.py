"""The settings of a sweep: typed, with their defaults and rules; the larger sections have a file of their own
(*_schema). Standard library only.

`composition` fills these classes from YAML and the command line. A value that breaks a rule raises a
ConfigError that names the key as the user types it; no value is changed silently.
"""

import re
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from lora_search.settings.data_schema import ColumnsConfig as ColumnsConfig
from lora_search.settings.data_schema import DataConfig as DataConfig
from lora_search.settings.launcher_schema import LauncherConfig as LauncherConfig
from lora_search.settings.metric_schema import MetricConfig, check_choice
from lora_search.settings.rules import require as require
from lora_search.settings.rules import require_choice, require_range
from lora_search.settings.secrets import redact
from lora_search.settings.train_schema import ALL_LINEAR as ALL_LINEAR
from lora_search.settings.train_schema import LoraConfig as LoraConfig
from lora_search.settings.train_schema import OptimConfig as OptimConfig
from lora_search.settings.train_schema import TrainConfig as TrainConfig

WRITE_OUT = "Write the folder in full: neither the shell nor the database expands ~ here"
DAY, MAX_HOURS = 86_400, 10_000
MAX_DEVICES = 64  # of one machine


@dataclass(kw_only=True)
class ModelConfig:
    path: str = "smollm2-135m-instruct"  # the packaged default, a local folder, a .gguf file, or a hub id
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: str | None = None  # or nf4: 4-bit base (QLoRA); adapters stay float32

    def __post_init__(self) -> None:
        require(
            bool(self.path.strip()), "model.path", self.path, "must name a model", "Give a folder or a hub id"
        )
        revision = self.revision
        has_text = revision is None or bool(revision.strip())
        require(has_text, "model.revision", revision, "must not be empty", "null takes the newest")
        known = self.quantization in (None, "nf4")
        require(known, "model.quantization", self.quantization, "must be null or nf4")


@dataclass(kw_only=True)
class TemplateConfig:
    name: str = "chat"  # the tokenizer's own chat template; or inst: [INST] {prompt} [/INST] {completion}
    system_prompt: str | None = None  # null: the chat template's own default

    def __post_init__(self) -> None:
        require_choice("template.name", self.name, ("chat", "inst"))


@dataclass(kw_only=True)
class EngineConfig:
    slots: int | str = 4  # trials that train at once on one base; auto: chosen by a probe of memory and speed
    tokens_per_pass: int | str = 1024  # most tokens in one forward/backward pass; auto: what fits in memory
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    devices_per_worker: int = 1  # GPUs over which a base too large for one is spread, layer by layer
    gradient_checkpointing: bool | str = "auto"  # auto: only if a row would not fit without it
    dtype: str = "auto"  # of the base: auto, float32 or bfloat16; adapters are always float32

    def __post_init__(self) -> None:
        for key, least, most in (("slots", 1, 1024), ("tokens_per_pass", 8, 16_777_216)):
            value = getattr(self, key)
            if value != "auto":
                is_number = isinstance(value, int)
                require(is_number, f"engine.{key}", value, f"must be at least {least}, or auto")
                require_range(f"engine.{key}", int(value), least, most, "auto chooses what fits in memory")
        recompute = self.gradient_checkpointing
        known_choice = isinstance(recompute, bool) or recompute == "auto"
        require(known_choice, "engine.gradient_checkpointing", recompute, "must be true, false or auto")
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)
        require(bool(known), "engine.device", self.device, "must be auto, cpu, cuda or cuda:N")
        require_range("engine.devices_per_worker", self.devices_per_worker, 1, MAX_DEVICES)
        fits = self.devices_per_worker == 1 or self.device in ("auto", "cuda")
        rule = f"must be 1 with engine.device={self.device}: more are the first GPUs that a worker sees"
        remedy = "Use engine.device=cuda, and choose GPUs with CUDA_VISIBLE_DEVICES"
        require(fits, "engine.devices_per_worker", self.devices_per_worker, rule, remedy)
        require_choice("engine.dtype", self.dtype, ("auto", "float32", "bfloat16"))


@dataclass(kw_only=True)
class SamplerConfig:
    name: str = "tpe"
    n_startup_trials: int = 5  # random trials before tpe, gp and cmaes use their model

    def __post_init__(self) -> None:
        require_choice("sampler.name", self.name, ("tpe", "gp", "random", "grid", "qmc", "cmaes"))
        require_range("sampler.n_startup_trials", self.n_startup_trials, 0, 100_000)


@dataclass(kw_only=True)
class PrunerConfig:
    name: str = "asha"
    first_rung: int = 1  # the first rung at which a trial may be pruned
    reduction_factor: int | None = None  # one trial in this many continues at each rung; null: 2, hyperband 3
    percentile: float = 50.0  # percentile: the share of trials to keep
    patience: int = 2  # patient: rungs without improvement
    n_startup_trials: int = 4  # median, percentile, wilcoxon: finished trials needed for a comparison
    resume_paused: bool = False  # asha: resume a stopped trial once it ranks among the top of its rung

    def __post_init__(self) -> None:
        names = ("asha", "freeze_thaw", "hyperband", "median", "percentile", "patient", "wilcoxon", "none")
        require_choice("pruner.name", self.name, names)
        require_range("pruner.first_rung", self.first_rung, 1, 100_000)
        require_range("pruner.reduction_factor", self.factor, 2, 1000, "Try 2 or 3")
        require(0 < self.percentile < 100, "pruner.percentile", self.percentile, "must be between 0 and 100")
        require_range("pruner.patience", self.patience, 1, 100_000)
        rule = "works only with the rungs of asha"
        fits = self.name == "asha" or not self.resume_paused
        require(fits, "pruner.resume_paused", self.resume_paused, rule, "Use pruner=asha")
        require_range("pruner.n_startup_trials", self.n_startup_trials, 0, 100_000)

    @property
    def chooses(self) -> bool:
        """Whether the rule also chooses the settings of new trials, in place of the sampler."""
        return self.name == "freeze_thaw"

    @property
    def factor(self) -> int:
        """The reduction factor: as set, or what docs/pruning.md found best for asha and Optuna's own."""
        default = 2 if self.name == "asha" else 3
        return default if self.reduction_factor is None else self.reduction_factor


@dataclass(kw_only=True)
class StudyConfig:
    name: str = "sweep"
    n_trials: int | None = 12  # COMPLETE + PRUNED over all starts and workers; null: a budget ends the sweep
    max_hours: float | None = None  # wall time over all starts; the first limit reached ends the sweep
    max_tokens: int | None = None  # training tokens over all trials
    max_cost: float | None = None  # in the currency of price_per_hour
    price_per_hour: float | None = None  # of one worker with its device
    storage: str = "sqlite:///runs/lora_search.db"  # any SQLAlchemy URL
    heartbeat_seconds: int = 30
    patience_seconds: int = 600  # how long to train on while the database does not answer
    max_failures_in_a_row: int = 5
    max_retries: int = 3  # worker deaths that a trial survives at the same rung
    first_trial_is_default: bool = True  # the first trial uses the settings outside `space`
    first_trials: bool = True  # the next ones use learning rates that worked well for other models
    sample_answers: int = 3  # validation questions that base and best answer in the report
    choose_by: str = "perplexity"  # or metric: the winner has the best answers; pruning goes by perplexity
    keep_gib: float | None = None  # disk space for paused trials' checkpoints; null: 1, with freeze_thaw 20

    def __post_init__(self) -> None:
        known = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name)
        rule = "must be 1 to 100 letters, digits, '.', '_' or '-' and start with a letter or digit"
        require(bool(known), "study.name", self.name, rule, "It names a folder under runs/.")
        require_choice("study.choose_by", self.choose_by, ("perplexity", "metric"))
        self._check_limits()
        has_home = self.storage.startswith("sqlite:///~")
        require(not has_home, "study.storage", self.storage, "must not begin with ~", WRITE_OUT)
        require("://" in self.storage, "study.storage", redact(self.storage), "must be a SQL URL",
                "Try sqlite:///runs/lora_search.db")  # fmt: skip
        for key, least, most in (
            ("heartbeat_seconds", 1, DAY), ("patience_seconds", 0, 365 * DAY), ("max_retries", 0, 1000),
            ("max_failures_in_a_row", 1, 100_000), ("keep_gib", 0, 1_000_000), ("sample_answers", 0, 20),
        ):  # fmt: skip
            if (value := getattr(self, key)) is not None:
                require_range(f"study.{key}", value, least, most)

    def _check_limits(self) -> None:
        for key, most in (
            ("max_hours", MAX_HOURS), ("max_tokens", 10**15), ("max_cost", 10**9), ("price_per_hour", 10**6)
        ):  # fmt: skip
            value, rule = getattr(self, key), "must be > 0, or null"
            require(value is None or value > 0, f"study.{key}", value, rule, "null sets no limit")
            require(value is None or value <= most, f"study.{key}", value, f"must be at most {most:,}",
                    "null sets no limit")  # fmt: skip
        priced = self.max_cost is None or self.price_per_hour is not None
        remedy = "Set study.price_per_hour, the hourly price of one worker with its device"
        require(priced, "study.max_cost", self.max_cost, "needs study.price_per_hour", remedy)
        if self.n_trials is not None:
            remedy = "Use null if study.max_hours or another budget ends the sweep"
            require_range("study.n_trials", self.n_trials, 1, 100_000, remedy)
        limits = (self.n_trials, self.max_hours, self.max_tokens, self.max_cost)
        rule, remedy = "must be a number if no budget is set", "Set it, study.max_hours or study.max_tokens"
        require(any(x is not None for x in limits), "study.n_trials", self.n_trials, rule, remedy)

    @property
    def most_trials(self) -> int:
        """n_trials, or sys.maxsize if only a budget ends the study."""
        return sys.maxsize if self.n_trials is None else self.n_trials


@dataclass(kw_only=True)
class TrackerConfig:
    name: str = "wandb_offline"  # or wandb (online), or none
    project: str = "lora_search"
    entity: str | None = None
    log_adapter: bool = False  # the best adapter as an artifact of the study's run

    def __post_init__(self) -> None:
        require_choice("tracker.name", self.name, ("wandb_offline", "wandb", "none"))
        for key in ("project", "entity"):
            name = getattr(self, key)
            is_usable = name is None or re.fullmatch(r"[^/\\#?%:]{1,128}", name) is not None
            require(is_usable, f"tracker.{key}", name, r"must be 1 to 128 characters, none of / \ # ? % :")


@dataclass(kw_only=True)
class ArtifactsConfig:
    """Where copies of checkpoints and adapters go. Free to differ between two starts of one study."""

    uri: str | None = None  # any that fsspec opens: s3://bucket/folder, gs://..., a folder that nodes share

    def __post_init__(self) -> None:
        if self.uri is not None:
            remedy = "Try s3://bucket/folder; null keeps files in runs_dir only"
            require(bool(self.uri.strip()), "artifacts.uri", self.uri, "must name a place", remedy)
            has_home = self.uri.startswith(("~", "file://~"))
            require(not has_home, "artifacts.uri", self.uri, "must not begin with ~", WRITE_OUT)


@dataclass(kw_only=True)
class SweepConfig:
    """All settings of one sweep. `space` mirrors the keys that it searches, in Hydra's sweep grammar."""

    seed: int = 0
    runs_dir: str = "runs"
    study: StudyConfig = field(default_factory=StudyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    artifacts: ArtifactsConfig = field(default_factory=ArtifactsConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    space: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")
        require(bool(self.runs_dir.strip()), "runs_dir", self.runs_dir, "must name a folder", "Try runs")
        check_choice(self.study.choose_by, self.metric)
        devices, gpus = self.engine.devices_per_worker, self.launcher.gpus_per_worker
        rule, remedy = f"must be engine.devices_per_worker={devices}", "Leave it out"
        require(devices == 1 or gpus in (None, devices), "launcher.gpus_per_worker", gpus, rule, remedy)
        require(
            not self.runs_dir.startswith("~"), "runs_dir", self.runs_dir, "must not begin with ~", WRITE_OUT
        )


def as_dict(config: Any) -> Any:
    """Return the settings as plain dicts, without passwords and keys."""
    if not is_dataclass(config):
        return redact(config) if isinstance(config, str) else config
    return {f.name: as_dict(getattr(config, f.name)) for f in fields(config)}
