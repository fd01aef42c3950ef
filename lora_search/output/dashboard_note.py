"""The note that optuna-dashboard shows with a study: what the figures mean and how to go on."""

import optuna
from optuna_dashboard import save_note

from lora_search.results.formatting import show_perplexity
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import Space

NOTE = """\
# {name}

Lower is better: validation perplexity of **{base}** without an adapter is **{perplexity}**.

- A step is a *rung*: step k is k/{evals_per_epoch} epochs of training examples seen, at every batch size.
- A trial's value is its lowest validation perplexity. `reason` says why one was pruned, stopped or failed.
- Stopping the sweep loses nothing: the same command goes on. A higher `study.n_trials` adds trials.

Searched:

{searched}

```sh
{command}
```
"""


def write_note(
    study: optuna.Study, config: SweepConfig, space: Space, command: str, base_perplexity: float
) -> None:
    """Write the study's note. It takes the place of what people wrote there: write it to a new study only."""
    searched = "\n".join(f"- `{key}`: {text}" for key, text in space.expressions.items())
    save_note(
        study,
        NOTE.format(
            name=config.study.name,
            base=config.model.path,
            perplexity=show_perplexity(base_perplexity),
            evals_per_epoch=config.train.evals_per_epoch,
            searched=searched or "- nothing",
            command=command,
        ),
    )
