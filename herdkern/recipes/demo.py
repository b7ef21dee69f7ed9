"""The main job: this Python's documentation, crawled, cleaned and learned by a Llama 3 of 5 M parameters in minutes."""

from herdkern.data.corpus import CorpusConfig
from herdkern.data.language import LanguageConfig
from herdkern.model.config import micro
from herdkern.recipes.config import DataConfig, Recipe, SampleConfig, TokenizerConfig
from herdkern.train.config import CheckpointConfig, ScheduleConfig, TrainConfig


def demo() -> Recipe:
    """Crawl the documentation of this Python and train about 5 M parameters on it, in minutes on two cores."""
    return Recipe(
        name="demo",
        data=DataConfig(
            heldout_share=0.08,
            corpus=CorpusConfig(max_code_bytes=3 << 20),  # about as much program text as there is prose
            language=LanguageConfig(languages=("en",)),
        ),
        tokenizer=TokenizerConfig(vocab_size=8192),
        model=micro(8192),
        train=TrainConfig(
            steps=600,
            seq_len=512,
            batch_size=4,
            average_every_steps=4,
            average_last_steps=40,
            eval_every_steps=60,
            schedule=ScheduleConfig(peak_lr=2e-3, min_lr=2e-4, warmup_steps=30, anneal_steps=120),
            checkpoint=CheckpointConfig(every_steps=60, keep_last=2),
        ),
        samples=SampleConfig(
            prompts=(
                "Return a new list",
                "Help on module",
                "def main(",
                "The file object",
                "Permission is hereby granted",
                "",
            )
        ),
    )
