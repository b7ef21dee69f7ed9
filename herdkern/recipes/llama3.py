"""The Llama 3 models as released, on records that you give with --data.inputs.

Source: Llama 3 (arXiv:2407.21783): Table 3 (shapes, peak learning rates), section 3.2 (15.6 T tokens, 128 k entries),
section 3.4.1 (8,000 steps of warm-up, cosine over 1,200,000 steps to a hundredth of the peak, 16 M tokens a batch in
the end), section 3.4.3 (annealing on the last 40 M tokens, averaged). The batch has its final size from the start here.
"""

from herdkern.model.config import ModelConfig, llama3_8b, llama3_70b, llama3_405b
from herdkern.recipes.config import DataConfig, MixConfig, Recipe, SampleConfig, TokenizerConfig
from herdkern.train.config import CheckpointConfig, ScheduleConfig, TrainConfig

TOKENS = 15_600_000_000_000
BATCH_SEQUENCES, SEQ_LEN = 2048, 8192
VOCAB_SIZE = 128_256


def recipe_8b() -> Recipe:
    """Llama 3 8B: 15.6 T tokens, peak learning rate 3e-4."""
    return _recipe("llama3-8b", llama3_8b(VOCAB_SIZE), 3e-4)


def recipe_70b() -> Recipe:
    """Llama 3 70B: 15.6 T tokens, peak learning rate 1.5e-4."""
    return _recipe("llama3-70b", llama3_70b(VOCAB_SIZE), 1.5e-4)


def recipe_405b() -> Recipe:
    """Llama 3 405B: 15.6 T tokens, peak learning rate 8e-5."""
    return _recipe("llama3-405b", llama3_405b(VOCAB_SIZE), 8e-5)


def _recipe(name: str, model: ModelConfig, peak_lr: float) -> Recipe:
    steps = TOKENS // (BATCH_SEQUENCES * SEQ_LEN)
    anneal_steps = -(-40_000_000 // (BATCH_SEQUENCES * SEQ_LEN))
    return Recipe(
        name=name,
        data=DataConfig(heldout_share=0.0001),
        tokenizer=TokenizerConfig(vocab_size=VOCAB_SIZE),
        mix=MixConfig(anneal_weights=()),
        model=model,
        train=TrainConfig(
            steps=steps,
            seq_len=SEQ_LEN,
            batch_size=BATCH_SEQUENCES,
            micro_batch_size=1,
            dtype="bf16",
            average_every_steps=1,
            eval_every_steps=1000,
            schedule=ScheduleConfig(
                peak_lr=peak_lr,
                min_lr=peak_lr / 100,
                warmup_steps=8000,
                anneal_steps=anneal_steps,
                cosine_steps=1_200_000,
            ),
            checkpoint=CheckpointConfig(every_steps=500, keep_last=3),
        ),
        samples=SampleConfig(prompts=("The", "def ", "")),
    )
